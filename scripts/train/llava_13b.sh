#!/usr/bin/env bash
# LLaVA-1.5-13B (Vicuna-1.5-13B, CLIP ViT-L/14-336) on the 665k mixture, 16 x 1 x 8 GPUs. Settings: see common.sh.
set -euo pipefail
FAMILY=llava
NAME=llava-v1.5-13b
MODEL=${MODEL:-lmsys/vicuna-13b-v1.5}
VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
PROJECTOR=${PROJECTOR-checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin}
DATA=${DATA:-playground/data/llava_v1_5_mix665k.json}
IMAGES=${IMAGES:-playground/data}
TEMPLATE=v1
RECIPE_BATCH=16
MAX_LENGTH=2048
GROUPED=True
MODEL_FLAGS=(--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch "$@"
