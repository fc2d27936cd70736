# shellcheck shell=bash disable=SC2153 # MODEL and MODEL_FLAGS come from the launcher
# Shared by the launchers in this folder (sourced, not run): the paper's recipe, from settings to one command line.
#
# A launcher sets FAMILY, NAME, MODEL, VISION_TOWER, PROJECTOR, DATA, IMAGES, TEMPLATE, RECIPE_BATCH, MAX_LENGTH and
# MODEL_FLAGS, sources this file and calls `launch "$@"`. Settings, from the environment:
#   MODEL VISION_TOWER DATA IMAGES     folders or hub names of the backbone and tower, the data file, the image folder
#   PROJECTOR                          pretrained mm_projector.bin; set to nothing: none (MODEL has one, or a new one is trained)
#   OUT                                output folder; the default is named after the model, MODE and TUNE_LAYERS
#   TUNE_LAYERS=sparse:25%             the visual region, as in `llava-region layers --help`
#   MODE=lora|qlora|full               LoRA, LoRA on a 4-bit backbone, or the region's own weights
#   NUM_GPUS                           GPUs on this node; default: all visible ones (CUDA_VISIBLE_DEVICES: indices, GPU-... or MIG-...)
#   BATCH                              samples per device and pass; default: the paper's, or less if there are more GPUs
#   GLOBAL_BATCH=128                   samples per optimizer step over all GPUs; the paper's for every model
#   RECIPE=upstream|authors            authors: as the paper's authors trained LLaVA, in Bunny's code: 8 samples per device and pass, and not
#                                      grouped by length. Bunny's own recipe is theirs
#   REPORT_TO                          none, wandb, tensorboard, ...; default: the upstream's, which is every one that is installed
#   SAVE_STEPS=500                     optimizer steps between checkpoints
#   ZERO=zero3|zero2|zero3_offload|auto|none|FILE.json   auto: by the GPUs' memory and network, when training starts; QLoRA: zero2, auto or none
#   LAUNCHER=deepspeed|torchrun|python   several nodes: torchrun; python: one process on one GPU
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   several nodes: the same command on each, with its own NODE_RANK. In the pods of a
#                                      Kubeflow PyTorchJob they come from the operator
#   NNODES RDZV_ENDPOINT=HOST:PORT RDZV_ID=NAME   the same without ranks: torchrun's nodes find each other at HOST
#   HOSTFILE=FILE                      several nodes from one of them, with DeepSpeed's launcher, over ssh
#   TRAIN_SCRIPT                       path of an upstream train script, to take its attention implementation; default: LLaVA's train_mem.py
#                                      (flash attention) where PYTHON has flash_attn, else train.py
#   BUNNY_ROOT                         a Bunny checkout, if Bunny is not installed
#   PYTHON=python                      the interpreter that has everything installed
#   DRY_RUN=1                          print the command, quoted for the shell, on one line, and stop
# Flags after the launcher's name go last, so they override everything here.

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$SCRIPTS/launching.sh"
help_if_asked "$0" "${BASH_SOURCE[0]}" "$@"
source "$SCRIPTS/train/supervise.sh"

MODE=${MODE:-lora}
TUNE_LAYERS=${TUNE_LAYERS:-sparse:25%}
GLOBAL_BATCH=${GLOBAL_BATCH:-128}
RECIPE=${RECIPE:-upstream}
SAVE_STEPS=${SAVE_STEPS:-500}
switch DRY_RUN
PYTHON=${PYTHON:-python}

# LLaVA's train_mem.py asks for flash attention. Where it lies is found without importing anything.
choose_script() {
    [[ -z ${TRAIN_SCRIPT:-} ]] || return 0
    TRAIN_SCRIPT=$FAMILY
    [[ $FAMILY == llava ]] || return 0
    local find='import os
from importlib.util import find_spec
package = find_spec("llava") if find_spec("flash_attn") else None
script = os.path.join(*package.submodule_search_locations[:1], "train", "train_mem.py") if package else ""
print(script if os.path.isfile(script) else "")'
    local found
    found=$("$PYTHON" -c "$find" 2>/dev/null) || return 0
    [[ -z $found ]] || { TRAIN_SCRIPT=$found && echo "flash attention is installed: $found" >&2; }
}

# Numbers that would be read only by what is started.
check_numbers() {
    # the trainer takes a part of all steps too
    [[ $SAVE_STEPS =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$ ]] || die "SAVE_STEPS is '$SAVE_STEPS'; allowed: a number of optimizer steps"
    [[ -z ${MASTER_PORT:-} ]] || whole_number MASTER_PORT 0
}

choose_recipe() {
    case $RECIPE in
        upstream) ;;
        authors) [[ $FAMILY != llava ]] || { RECIPE_BATCH=8 GROUPED=False; } ;;
        *) die "RECIPE is '$RECIPE'; allowed: upstream, authors" ;;
    esac
}

# LoRA runs need both the family's name and "lora" in the folder's name: the upstream's loader decides by it.
choose_output() {
    OUT=${OUT:-checkpoints/$NAME-$MODE-$(region_name "$TUNE_LAYERS")}
    local folder
    folder=$(basename "$OUT")
    folder=${folder,,}
    [[ $folder == *"$FAMILY"* ]] || die "OUT is '$OUT'; upstream's loader needs '$FAMILY' in the folder's name"
    case $MODE in
        lora | qlora) [[ $folder == *lora* ]] || die "OUT is '$OUT'; upstream's loader needs 'lora' in the name of a LoRA run" ;;
        full) [[ $folder != *lora* ]] || die "OUT is '$OUT'; upstream's loader takes it for a LoRA run: leave 'lora' out of the name" ;;
    esac
}

# In a pod of a Kubeflow PyTorchJob the operator says how many there are and which this is. torchrun's own variables are PET_...
read_pod() {
    [[ -n ${KUBERNETES_SERVICE_HOST:-} && ! -v LOCAL_RANK ]] || return 0
    NNODES=${NNODES:-${PET_NNODES:-${WORLD_SIZE:-1}}}
    NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-${RANK:-}}}
    [[ ${PET_NPROC_PER_NODE:-} != [0-9]* ]] || NUM_GPUS=${NUM_GPUS:-$PET_NPROC_PER_NODE}
    unset "${!PET_@}" # torchrun would read them along with the flags that it is given
}

# Set NNODES and NUM_GPUS to those of a DeepSpeed hostfile: lines of `HOST slots=N`.
read_hostfile() {
    [[ -n ${HOSTFILE:-} ]] || return 0
    [[ ${LAUNCHER:=deepspeed} == deepspeed ]] || die "HOSTFILE is for LAUNCHER=deepspeed, which is '$LAUNCHER'; leave one of them out"
    [[ -f $HOSTFILE ]] || die "HOSTFILE is '$HOSTFILE', which is not a file"
    local host slots rest hosts=0 least=
    while read -r host slots rest || [[ -n $host ]]; do
        [[ -n $host && $host != \#* ]] || continue
        [[ $slots =~ ^slots=([1-9][0-9]*)$ ]] || die "a line of $HOSTFILE is '$host $slots $rest'; allowed: HOST slots=GPUS"
        [[ ${least:-${BASH_REMATCH[1]}} == "${BASH_REMATCH[1]}" ]] ||
            die "the hosts in $HOSTFILE have different numbers of slots; give each the same, or train with torchrun on each node"
        least=${BASH_REMATCH[1]} hosts=$((hosts + 1))
    done <"$HOSTFILE"
    ((hosts)) || die "HOSTFILE is '$HOSTFILE', which names no host"
    [[ -z ${NNODES:-} || $NNODES == "$hosts" ]] || die "NNODES is $NNODES, but $HOSTFILE names $hosts hosts; leave NNODES out"
    [[ -z ${NUM_GPUS:-} || $NUM_GPUS == "$least" ]] || die "NUM_GPUS is $NUM_GPUS, but $HOSTFILE has slots=$least; leave NUM_GPUS out"
    NNODES=$hosts NUM_GPUS=$least
}

choose_gpus() {
    count_gpus
    NUM_GPUS=${NUM_GPUS:-$(visible_gpus)}
    NNODES=${NNODES:-1}
    whole_number NUM_GPUS 1
    whole_number NNODES 1
    [[ -z ${HOSTFILE:-} ]] || return 0
    # none at all: ranks on the CPU. What nvidia-smi lists here says nothing of where a printed command will run
    if [[ ${seen:-0} -gt 0 && ($DRY_RUN != 1 || -v CUDA_VISIBLE_DEVICES) ]]; then
        ((NUM_GPUS <= seen)) || die "NUM_GPUS is $NUM_GPUS, but a process here can use $seen (CUDA_VISIBLE_DEVICES is '${CUDA_VISIBLE_DEVICES-not set}'); name more GPUs there, or set NUM_GPUS=$seen"
    fi
    gpus=("${gpus[@]:0:NUM_GPUS}")
}

# Per-device batch and accumulation that make GLOBAL_BATCH on all GPUs, the batch as large as the paper's or smaller.
choose_batch() {
    whole_number GLOBAL_BATCH 1
    local devices=$((NUM_GPUS * NNODES))
    ((GLOBAL_BATCH % devices == 0)) ||
        die "a global batch of $GLOBAL_BATCH cannot be shared evenly by $devices GPUs; choose NUM_GPUS x NNODES among its divisors"
    local per_gpu=$((GLOBAL_BATCH / devices))
    if [[ -z ${BATCH:-} ]]; then
        BATCH=$((RECIPE_BATCH < per_gpu ? RECIPE_BATCH : per_gpu))
        while ((per_gpu % BATCH)); do BATCH=$((BATCH - 1)); done
    fi
    whole_number BATCH 1
    ((per_gpu % BATCH == 0)) || die "BATCH is $BATCH, but $devices GPUs take $per_gpu samples each; allowed: the divisors of $per_gpu"
    ACCUMULATION=$((per_gpu / BATCH))
}

# Say what a step sees, flags after the launcher's name included.
say_batch() { # COMMAND...
    local words=("$@") batch=0 accumulation=1 i value
    for ((i = 0; i < $#; i++)); do
        value=${words[i]#*=}
        [[ ${words[i]} == *=* ]] || value=${words[i + 1]:-}
        case ${words[i]%%=*} in
            --per_device_train_batch_size) batch=$value ;;
            --gradient_accumulation_steps) accumulation=$value ;;
        esac
    done
    [[ $batch$accumulation =~ ^[0-9]+$ ]] || return 0 # the training refuses it
    echo "global batch $((10#$batch * 10#$accumulation * NUM_GPUS * NNODES)): $batch per GPU x $accumulation accumulated x $((NUM_GPUS * NNODES)) GPUs" >&2
}

choose_zero() {
    local default=zero3
    [[ $MODE == qlora ]] && default=zero2
    ZERO=${ZERO:-$default}
    case $ZERO in
        none) ZERO_FLAGS=() ;;
        auto) ZERO_FLAGS=(--deepspeed auto) ;;
        *.json) ZERO_FLAGS=(--deepspeed "$ZERO") ;;
        *) ZERO_FLAGS=(--deepspeed "$SCRIPTS/deepspeed/$ZERO.json") ;;
    esac
    [[ $ZERO == none || $ZERO == auto || -f ${ZERO_FLAGS[1]} ]] || die "ZERO is '$ZERO'; allowed: zero2, zero3, zero3_offload, auto, none or a DeepSpeed config FILE.json"
    # bitsandbytes' packed 4-bit weights cannot be partitioned between the GPUs.
    [[ $MODE != qlora || $ZERO != *zero3* ]] || die "QLoRA does not work with ZeRO-3; allowed with MODE=qlora: ZERO=zero2, auto or none"
}

choose_mode() {
    local lora=(--lora_enable True --lora_r 128 --lora_alpha 256 --lora_dropout 0.05 --learning_rate 2e-4 --mm_projector_lr 2e-5)
    case $MODE in
        lora) MODE_FLAGS=("${lora[@]}") ;;
        qlora) MODE_FLAGS=("${lora[@]}" --bits 4) ;;
        full) MODE_FLAGS=(--learning_rate 2e-5) ;; # upstream's rate for full tuning; the projector's too
        *) die "MODE is '$MODE'; allowed: lora, qlora, full" ;;
    esac
}

# What comes before the module's own arguments. `python -m` finds the launchers of the interpreter that PYTHON names.
choose_launcher() {
    local default=deepspeed
    # DeepSpeed's launcher reads indices only
    ((NNODES == 1)) && [[ -z ${RDZV_ENDPOINT:-} && "${gpus[*]}" != *-* ]] || default=torchrun
    LAUNCHER=${LAUNCHER:-$default}
    case $LAUNCHER in
        deepspeed) choose_deepspeed ;;
        torchrun) choose_torchrun ;;
        python)
            ((NUM_GPUS * NNODES == 1)) || die "LAUNCHER=python is one process; with more GPUs use deepspeed or torchrun"
            LAUNCH=(-m)
            # one process that sees several GPUs would train on all of them, with a batch for each
            ((${seen:-1} <= 1)) || gpus=("${gpus[0]:-0}")
            ;;
        *) die "LAUNCHER is '$LAUNCHER'; allowed: deepspeed, torchrun, python" ;;
    esac
    LAUNCH=("$PYTHON" "${LAUNCH[@]}")
    local settings=()
    local names
    names=$(IFS=, && echo "${gpus[*]}")
    [[ -z $names || $LAUNCHER == deepspeed || $names == "${CUDA_VISIBLE_DEVICES:-}" ]] || settings+=("CUDA_VISIBLE_DEVICES=$names")
    [[ $FAMILY != bunny || -z ${BUNNY_ROOT:-} ]] || settings+=("PYTHONPATH=$BUNNY_ROOT${PYTHONPATH:+:$PYTHONPATH}")
    ((${#settings[@]} == 0)) || LAUNCH=(env "${settings[@]}" "${LAUNCH[@]}")
}

choose_deepspeed() {
    LAUNCH=(-m deepspeed.launcher.runner)
    if [[ -n ${HOSTFILE:-} ]]; then
        LAUNCH+=(--hostfile "$HOSTFILE")
        [[ -z ${MASTER_ADDR:-} ]] || LAUNCH+=(--master_addr "$MASTER_ADDR")
    else
        ((NNODES == 1)) || die "several nodes are started with torchrun, or with a HOSTFILE; leave LAUNCHER out or set LAUNCHER=torchrun"
        [[ "${gpus[*]}" != *-* ]] || die "LAUNCHER=deepspeed knows GPUs by index, and CUDA_VISIBLE_DEVICES is '$CUDA_VISIBLE_DEVICES'; set LAUNCHER=torchrun"
        # it would read /job/hostfile where that exists
        LAUNCH+=(--hostfile /dev/null)
        # --num_gpus would count from GPU 0, whatever CUDA_VISIBLE_DEVICES says
        if ((${#gpus[@]})); then
            LAUNCH+=(--include "localhost:$(IFS=, && echo "${gpus[*]}")")
        else
            LAUNCH+=(--num_gpus "$NUM_GPUS")
        fi
    fi
    [[ -z ${MASTER_PORT:-} ]] || LAUNCH+=(--master_port "$MASTER_PORT")
    LAUNCH+=(--module)
}

choose_torchrun() {
    LAUNCH=(-m torch.distributed.run --nproc_per_node "$NUM_GPUS")
    if [[ -n ${RDZV_ENDPOINT:-} ]]; then
        LAUNCH+=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "${RDZV_ID:-llava-region}")
    elif ((NNODES > 1)); then
        [[ -n ${MASTER_ADDR:-} ]] || die "MASTER_ADDR is not set; give every node the address of node 0"
        whole_number NODE_RANK 0
        ((NODE_RANK < NNODES)) || die "NODE_RANK is $NODE_RANK; allowed: 0 to $((NNODES - 1))"
        LAUNCH+=(--nnodes "$NNODES" --node_rank "$NODE_RANK")
        LAUNCH+=(--master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
    elif [[ -n ${MASTER_PORT:-} ]]; then
        LAUNCH+=(--master_port "$MASTER_PORT")
    else
        LAUNCH+=(--standalone) # any free port
    fi
    LAUNCH+=(-m)
}

launch() {
    check_layers "$TUNE_LAYERS" TUNE_LAYERS
    check_numbers
    choose_recipe
    choose_mode
    choose_output
    read_pod
    read_hostfile
    choose_gpus
    choose_batch
    choose_zero
    choose_launcher
    choose_script
    local command=("${LAUNCH[@]}" llava_region.train "$TRAIN_SCRIPT" --tune_layers "$TUNE_LAYERS")
    command+=("${MODE_FLAGS[@]}" "${ZERO_FLAGS[@]}" --model_name_or_path "$MODEL" --version "$TEMPLATE" "${MODEL_FLAGS[@]}")
    command+=(--group_by_modality_length "$GROUPED")
    command+=(--data_path "$DATA" --image_folder "$IMAGES" --image_aspect_ratio pad --lazy_preprocess True)
    command+=(--vision_tower "$VISION_TOWER" --mm_projector_type mlp2x_gelu)
    [[ -z $PROJECTOR ]] || command+=(--pretrain_mm_mlp_adapter "$PROJECTOR")
    command+=(--output_dir "$OUT" --num_train_epochs 1 --model_max_length "$MAX_LENGTH")
    command+=(--per_device_train_batch_size "$BATCH" --gradient_accumulation_steps "$ACCUMULATION")
    command+=(--weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine)
    command+=(--bf16 True --tf32 True --gradient_checkpointing True --dataloader_num_workers 4)
    # one checkpoint is kept, so that a lost node or a full queue costs at most SAVE_STEPS
    command+=(--evaluation_strategy no --save_strategy steps --save_steps "$SAVE_STEPS" --save_total_limit 1)
    command+=(--logging_steps 1)
    [[ -z ${REPORT_TO:-} ]] || command+=(--report_to "$REPORT_TO")
    command+=("$@")
    say_batch "${command[@]}"
    if [[ $DRY_RUN == 1 ]]; then
        print_command "${command[@]}"
        return
    fi
    [[ $LAUNCHER == python ]] && exec "${command[@]}"
    supervise "${command[@]}"
}
