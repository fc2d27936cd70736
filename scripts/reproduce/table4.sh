#!/usr/bin/env bash
# Table 4: text-only tasks, for all layers tuned, a region of 8 layers, and the backbone itself (section 5.3).
# Settings: see common.sh; MODELS are the launchers, SPEC the region.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TASKS=${TASKS:-mmlu,bbh}
MODELS=${MODELS:-bunny_llama3_8b llava_7b}
SPEC=${SPEC:-sparse:8}
check_settings MODELS SPEC

for model in $MODELS; do
    use_model "$model"
    check_regions SPEC all "$SPEC"
done
for model in $MODELS; do
    use_model "$model"
    train_and_evaluate all
    train_and_evaluate "$SPEC"
    evaluate "$TASKS" "$backbone" --template "$template"
done
report table4 --table 4 --paper
