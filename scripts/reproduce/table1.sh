#!/usr/bin/env bash
# Table 1: which 8 of Bunny-Llama-3-8B-V's layers to tune: all of them, six heuristic selections, five by importance
# (section 4.1; the scores are those of the model that tunes all layers). Settings: see common.sh; LAYERS=8 is the count.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TASKS=${TASKS:-$VISUAL_TASKS}
NEEDED_TASKS=${ATTENTION_TASKS// /,}
NEEDS_FLICKR=1
LAYERS=${LAYERS:-8}
check_settings LAYERS

only_model bunny_llama3_8b
selections=(sparse lower lower-middle upper-middle top hybrid)
check_regions LAYERS all "${selections[@]/%/:$LAYERS}"
train_and_evaluate all
score_attention
attention=$scores
score_on_flickr influence block_influence,multimodal_block_influence
influence=$scores
score weights --metrics parameter_change,angular_distance_weights # both against the backbone's weights (appendix A)
weights=$scores

for selection in "${selections[@]}"; do
    train_and_evaluate "$selection:$LAYERS"
done
for metric in "$attention:image_attention" "$weights:parameter_change" "$influence:block_influence" \
    "$influence:multimodal_block_influence" "$weights:angular_distance_weights"; do
    train_and_evaluate "$metric:$LAYERS"
done
report table1 --table 1 --paper
