#!/usr/bin/env bash
# Figure 5: image attention of Bunny-Llama-3-8B-V tuned in all layers, by instance and layer (appendix A): 50 questions of each of
# four benchmarks.
# Settings: see common.sh; MODELS=bunny_llama3_8b are the models, ATTENTION_TASKS the benchmarks, both separated by spaces.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
NEEDED_TASKS=${ATTENTION_TASKS// /,}
MODELS=${MODELS:-bunny_llama3_8b}
check_settings MODELS

for each in $MODELS; do
    use_model "$each"
    check_regions MODELS all
done
found=()
for each in $MODELS; do
    use_model "$each"
    train all
    score_attention
    found+=(--scores "$scores")
done
report figure5 --figure 5 "${found[@]}"
