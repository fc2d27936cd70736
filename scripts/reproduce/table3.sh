#!/usr/bin/env bash
# Table 3: numbers of layers on LLaVA-1.5-7B (32 layers) and 13B (40), section 5.1.
# Settings: see common.sh; MODELS are the launchers, LLAVA_7B_SPECS and LLAVA_13B_SPECS the regions.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TASKS=${TASKS:-$VISUAL_TASKS}
LLAVA_7B_SPECS=${LLAVA_7B_SPECS:-all sparse:16 sparse:8 sparse:6 sparse:4 sparse:2 sparse:1}
LLAVA_13B_SPECS=${LLAVA_13B_SPECS:-all sparse:10 sparse:9}
MODELS=${MODELS:-llava_7b llava_13b}
check_settings MODELS LLAVA_7B_SPECS LLAVA_13B_SPECS

check_models "$MODELS"
for model in $MODELS; do
    use_model "$model"
    specs=${model^^}_SPECS
    for spec in ${!specs}; do
        train_and_evaluate "$spec"
    done
done
report table3 --table 3 --paper
