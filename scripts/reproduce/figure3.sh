#!/usr/bin/env bash
# Figure 3: GPU hours over the number of layers tuned, from the cost.json of the runs of Tables 2 and 3 (section 5.2).
# PAPER=1 trains at the paper's cost. Without it, this package's own savings are in the figure too (benchmarks/README.md).
# Settings: see common.sh; MODELS are the launchers, LLAVA_7B_SPECS etc. the regions.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
BUNNY_LLAMA3_8B_SPECS=${BUNNY_LLAMA3_8B_SPECS:-all sparse:16 sparse:8 sparse:6 sparse:4 sparse:2 sparse:1}
LLAVA_7B_SPECS=${LLAVA_7B_SPECS:-all sparse:16 sparse:8 sparse:6 sparse:4 sparse:2 sparse:1}
LLAVA_13B_SPECS=${LLAVA_13B_SPECS:-all sparse:10 sparse:9}
MODELS=${MODELS:-llava_7b bunny_llama3_8b llava_13b}
check_settings MODELS BUNNY_LLAMA3_8B_SPECS LLAVA_7B_SPECS LLAVA_13B_SPECS

check_models "$MODELS"
for model in $MODELS; do
    use_model "$model"
    specs=${model^^}_SPECS
    for spec in ${!specs}; do
        train "$spec"
        reported+=("$run")
    done
done
report figure3 --figure 3
