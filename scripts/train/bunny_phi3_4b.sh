#!/usr/bin/env bash
# Bunny-Phi3-mini-4B-V (Phi-3-mini-4k, SigLIP so400m-384) on Bunny's 695k mixture, 4 x 4 x 8 GPUs. Settings: see common.sh.
set -euo pipefail
FAMILY=bunny
NAME=bunny-phi3-4b
MODEL=${MODEL:-microsoft/Phi-3-mini-4k-instruct}
VISION_TOWER=${VISION_TOWER:-google/siglip-so400m-patch14-384}
PROJECTOR=${PROJECTOR-checkpoints-pretrain/bunny-phi-3-pretrain/mm_projector.bin}
DATA=${DATA:-data/finetune/bunny_695k.json}
IMAGES=${IMAGES:-data/finetune/images}
TEMPLATE=phi3
RECIPE_BATCH=4
MAX_LENGTH=4096
GROUPED=False
MODEL_FLAGS=(--model_type phi-3)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch "$@"
