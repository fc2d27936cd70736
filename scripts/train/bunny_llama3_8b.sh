#!/usr/bin/env bash
# Bunny-Llama-3-8B-V (Llama-3-8B-Instruct, SigLIP so400m-384) on Bunny's 695k mixture, 8 x 2 x 8 GPUs. Settings: see common.sh.
set -euo pipefail
FAMILY=bunny
NAME=bunny-llama3-8b
MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}
VISION_TOWER=${VISION_TOWER:-google/siglip-so400m-patch14-384}
PROJECTOR=${PROJECTOR-checkpoints-pretrain/bunny-llama3-8b-pretrain/mm_projector.bin}
DATA=${DATA:-data/finetune/bunny_695k.json}
IMAGES=${IMAGES:-data/finetune/images}
TEMPLATE=llama
RECIPE_BATCH=8
MAX_LENGTH=2048
GROUPED=False
MODEL_FLAGS=(--model_type llama3-8b)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch "$@"
