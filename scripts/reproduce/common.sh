# shellcheck shell=bash disable=SC2034,SC2153 # the drivers read what is set here, and set TASKS
# Shared by the drivers in this folder (sourced, not run): train, score, prune, evaluate and report, each step once.
#
# A step whose output exists is not run again. An interrupted step continues where it was. The drivers share runs and
# evaluations, so Table 2 trains only what Table 1 did not train. Settings, from the environment, in addition to those of
# ../train/common.sh:
#   RESULTS=results/reproduce   everything is written here: runs/ scores/ pruned/ eval/ and one folder per table or figure
#   EVAL_DATA=data/eval         the benchmarks' official files; `llava-region eval --list` says which
#   FLICKR_IMAGES               folder of Flickr30k's images; 1,000 of them are drawn at random, for block influence and angular distance
#   ATTENTION_TASKS             benchmarks that image attention is scored on, 50 questions of each, separated by spaces
#   BUNNY_LLAMA3_8B_MODEL, LLAVA_7B_MODEL, LLAVA_13B_MODEL   the backbones' folders; likewise ..._VISION_TOWER,
#                               ..._PROJECTOR, ..._DATA and ..._IMAGES; each takes precedence over the setting without the model's name
#   TASKS                       benchmarks, separated by commas; default: those of the table or figure
#   TRAIN_FLAGS EVAL_FLAGS SCORE_FLAGS PRUNE_FLAGS   more flags for these commands
#   TRAIN_WITH                  put before every launcher, such as "sbatch --wait --nodes 2 scripts/slurm/train.sbatch"
#   EVAL_WITH SCORE_WITH        put before every evaluation and scoring, such as "srun --nodes 1 --gpus-per-node 8". GPUs are counted where a step
#                               runs; NUM_GPUS, if it is set, is for all steps
#   PAPER=1                     train at the paper's cost: every layer recomputed, logits at every position. Same model, another folder
#   DRY_RUN=1                   print every command, finished or not, one per line, and run none
# All regions, models, tasks and numbers are checked before the first step. TUNE_LAYERS and OUT are refused: a driver sets them for each
# run itself.

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$SCRIPTS/launching.sh"
help_if_asked "$0" "${BASH_SOURCE[0]}" "$@"
source "$SCRIPTS/reproduce/checks.sh"

RESULTS=${RESULTS:-results/reproduce}
EVAL_DATA=${EVAL_DATA:-data/eval}
FLICKR_IMAGES=${FLICKR_IMAGES:-data/flickr30k/images}
ATTENTION_TASKS=${ATTENTION_TASKS:-docvqa ocrvqa tdiuc refcocog}
ATTENTION_TASKS=${ATTENTION_TASKS//,/ }
MODE=${MODE:-lora}
PYTHON=${PYTHON:-python}
switch DRY_RUN
switch PAPER
VISUAL_TASKS=ocrvqa,docvqa,refcocog,tdiuc,mmbench,gqa,scienceqa,textvqa
export MODE PYTHON DRY_RUN
# A number of GPUs that the user gave is for every step. Else each step counts those of the machine on which it runs.
if [[ -n ${NUM_GPUS:-} ]]; then
    whole_number NUM_GPUS 1
    export NUM_GPUS
else
    unset NUM_GPUS
fi

reported=()  # folders for the report
baselines=() # its --baseline flags, one per model

REGION=("$PYTHON" -m llava_region)
if [[ -n ${BUNNY_ROOT:-} ]]; then
    on_path=(env "PYTHONPATH=$BUNNY_ROOT${PYTHONPATH:+:$PYTHONPATH}")
    REGION=("${on_path[@]}" "${REGION[@]}")
fi

# SUBMIT: set `words` to what stands before a subcommand of llava-region on all GPUs of the machine where SUBMIT, if anything, takes it.
on_all_gpus() {
    local count=${NUM_GPUS:-}
    if [[ -z $count && -n $1 ]]; then
        count=gpu # torchrun's word for those that it finds
    elif [[ -z $count ]]; then
        count=$(visible_gpus)
    fi
    words_of "$1"
    [[ -z ${BUNNY_ROOT:-} ]] || words+=("${on_path[@]}")
    words+=("$PYTHON")
    [[ $count == 1 ]] || words+=(-m torch.distributed.run --standalone --nproc_per_node "$count")
    words+=(-m llava_region)
}

# The words of a setting that holds several flags or files.
words_of() {
    read -ra words <<<"${1:-}"
}

declare -A listed # outputs whose command the dry run has printed

# OUTPUT COMMAND...: run a command unless its output exists.
once() {
    local output=$1
    shift
    if [[ $DRY_RUN == 1 ]]; then
        [[ -v listed[$output] ]] || print_command "$@"
        listed[$output]=1
    elif [[ -e $output ]]; then
        echo "already done: $output" >&2
    else
        run_step "$output" "$@"
    fi
}

run_step() {
    local output=$1
    shift
    echo "step: $(print_command "$@")" >&2
    "$@"
    [[ -e $output ]] || die "the step ended without $output; see what it printed above"
}

# llava_7b, llava_13b or bunny_llama3_8b: the model of the following steps, and its settings for the launcher.
use_model() {
    model=$1
    case $model in
        llava_7b)
            name=llava-v1.5-7b template=vicuna_v1 papers_layers=32
            papers_backbone=lmsys/vicuna-7b-v1.5 data=playground/data/llava_v1_5_mix665k.json
            ;;
        llava_13b)
            name=llava-v1.5-13b template=vicuna_v1 papers_layers=40
            papers_backbone=lmsys/vicuna-13b-v1.5 data=playground/data/llava_v1_5_mix665k.json
            ;;
        bunny_llama3_8b)
            name=bunny-llama3-8b template=llama papers_layers=32
            papers_backbone=meta-llama/Meta-Llama-3-8B-Instruct data=data/finetune/bunny_695k.json
            ;;
        *) die "unknown model '$model'; allowed: llava_7b, llava_13b, bunny_llama3_8b" ;;
    esac
    local own=${model^^}
    local own_model=${own}_MODEL own_data=${own}_DATA setting
    backbone=${!own_model:-${MODEL:-$papers_backbone}}
    data=${!own_data:-${DATA:-$data}}
    settings=("MODEL=$backbone" "DATA=$data")
    for setting in VISION_TOWER PROJECTOR IMAGES; do
        own=${model^^}_$setting
        [[ ! -v $own ]] || settings+=("$setting=${!own}")
    done
    base_flags=(--base "$backbone")
    [[ $MODE != full ]] || base_flags=() # a fully tuned model needs no base
}

# Check before the first training that what later steps read exists: a wrong EVAL_DATA should not be found after a night.
check_inputs() {
    local inputs=(--data-root "$EVAL_DATA") words
    [[ ! -v inputs_checked ]] || return 0
    inputs_checked=1
    [[ ! -v NEEDS_FLICKR ]] || inputs+=(--images "$FLICKR_IMAGES")
    words_of "${TEXT_FILES:-}"
    ((${#words[@]} == 0)) || inputs+=(--texts "${words[@]}")
    check_tasks "${inputs[@]}"
}

# [FLAG...]: check the names of the benchmarks that models are asked (TASKS) or that data are made of (NEEDED_TASKS), and what the flags name.
check_tasks() {
    local made=()
    [[ -n ${TASKS:-}${NEEDED_TASKS:-} ]] || return 0
    [[ -z ${NEEDED_TASKS:-} ]] || made=(--made-of "$NEEDED_TASKS")
    "$PYTHON" "$SCRIPTS/reproduce/score_data.py" check "${TASKS:-$NEEDED_TASKS}" "${made[@]}" "$@"
}

# SPEC [SUFFIX]: set `run` to the folder of the current model's run.
run_of() {
    run=$RESULTS/runs/$name-$MODE-$(region_name "$1")${2:-}
    [[ $PAPER != 1 ]] || run+=-paper
}

# SPEC [SUFFIX [SETTING=VALUE...]]: train that region; sets `run` to the run's folder.
train() {
    local spec=$1 paper=()
    [[ $PAPER != 1 ]] || paper=(--region_checkpointing all --supervised_logits False)
    run_of "$spec" "${2:-}"
    local launcher=(env "${settings[@]}" "${@:3}" "OUT=$run" "TUNE_LAYERS=$spec")
    words_of "${TRAIN_FLAGS:-}"
    words=("${paper[@]}" "${words[@]}")
    if [[ $DRY_RUN == 1 ]]; then
        "${launcher[@]}" "$SCRIPTS/train/$model.sh" "${words[@]}"
        return
    fi
    local flags=("${words[@]}")
    words_of "${TRAIN_WITH:-}"
    [[ -e $run/cost.json ]] || check_inputs
    # cost.json is the last file of a run; without it, the launcher resumes from the last checkpoint
    once "$run/cost.json" "${launcher[@]}" "${words[@]}" "$SCRIPTS/train/$model.sh" "${flags[@]}"
}

# KIND [FLAG...]: score the layers of the current run; sets `scores` to the file.
score() {
    scores=$RESULTS/scores/$(basename "$run")-$1.json
    on_all_gpus "${SCORE_WITH:-}"
    local command=("${words[@]}")
    words_of "${SCORE_FLAGS:-}"
    once "$scores" "${command[@]}" score "$run" "${@:2}" --base "$backbone" --out "$scores" --resume "${words[@]}"
}

# KIND METRICS: on 1,000 images of Flickr30k, as the paper scores block influence.
score_on_flickr() {
    local list=$RESULTS/data/flickr30k.json
    once "$list" "$PYTHON" "$SCRIPTS/reproduce/score_data.py" images "$FLICKR_IMAGES" --out "$list"
    score "$1" --metrics "$2" --data "$list" --image-folder "$FLICKR_IMAGES" --limit 1000 \
        --prompt "Please describe this image in detail."
}

# On 50 questions of each of the paper's four benchmarks.
score_attention() {
    local task file files=()
    for task in $ATTENTION_TASKS; do
        file=$RESULTS/data/attention-$task.json
        once "$file" "$PYTHON" "$SCRIPTS/reproduce/score_data.py" task "$task" --data-root "$EVAL_DATA" --out "$file"
        files+=(--data "$file")
    done
    score attention --metrics image_attention "${files[@]}" --image-folder "$EVAL_DATA" --limit 50
}

# TASK LIMIT: a benchmark's questions with their answers; sets `file`.
answers() {
    file=$RESULTS/data/answers/$1.json
    once "$file" "$PYTHON" "$SCRIPTS/reproduce/score_data.py" answers "$1" --data-root "$EVAL_DATA" --limit "$2" --out "$file"
}

# K [FLAG...]: drop K layers by the angular distance in `scores`; sets `run` to the pruned model, which needs no base.
prune() {
    local drop=$1 from=$run
    run=$RESULTS/pruned/$(basename "$from")-minus-$drop
    words_of "${PRUNE_FLAGS:-}"
    once "$run/config.json" "${REGION[@]}" prune "$from" --drop "$drop" --scores "$scores" "${@:2}" "${base_flags[@]}" --out "$run" "${words[@]}"
}

# Like train, then evaluate the run on the driver's benchmarks. Percentages refer to the run that tunes all layers on all the data.
train_and_evaluate() {
    train "$@"
    evaluate "$TASKS" "$run" "${base_flags[@]}"
    [[ $1 != all || -n ${2:-} ]] || baselines+=(--baseline "$(basename "$run")")
}

# TASKS FOLDER [FLAG...]: evaluate a model on benchmarks; adds its folder under eval/ to `reported`.
evaluate() {
    local tasks=$1 folder=$2 out
    out=$RESULTS/eval/$(basename "$folder")
    reported+=("$out")
    on_all_gpus "${EVAL_WITH:-}"
    local command=("${words[@]}")
    words_of "${EVAL_FLAGS:-}"
    command+=(eval "$folder" --task "$tasks" --data-root "$EVAL_DATA" --out "$out" "${@:3}" "${words[@]}")
    if [[ $DRY_RUN == 1 ]]; then
        print_command "${command[@]}"
    elif has_tasks "$out/results.json" "$tasks"; then
        echo "already done: $tasks in $out" >&2
    else
        run_step "$out/results.json" "${command[@]}"
    fi
}

has_tasks() { # FILE TASKS
    local task
    [[ -f $1 ]] || return 1
    for task in ${2//,/ }; do
        grep -q "^ *\"$task\": {" "$1" || return 1
    done
}

# NAME FLAG...: report on the folders in `reported` under RESULTS/NAME; make it again if one of them, or a file named by a flag, is newer
# than the report.
report() {
    local out=$RESULTS/$1 made source
    made=$out/$1.md
    [[ $1 != figure* ]] || made=$out/$1.png
    local command=("${REGION[@]}" report "${reported[@]}" "${@:2}" "${baselines[@]}" --out "$out")
    for source in "${reported[@]}" "${@:2}"; do
        if [[ $DRY_RUN != 1 && ($source/results.json -nt $made || $source/cost.json -nt $made || (-f $source && $source -nt $made)) ]]; then
            run_step "$made" "${command[@]}"
            return
        fi
    done
    once "$made" "${command[@]}"
}
