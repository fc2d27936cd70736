# shellcheck shell=bash disable=SC2034,SC2154 # use_model sets what is read here, and the drivers read what is set here
# Shared by the drivers in this folder (sourced, not run): what is refused before the first step, in a dry run too. A mistyped fifth
# region should not be found after four trainings.

driver=$(basename "$0")

# SETTING...: those that this driver reads, of the settings that are easily mistaken for one another: the others would change nothing,
# silently. The rest may be set for other drivers.
check_settings() {
    local reads=${*:-no setting for that} setting
    [[ -z ${TUNE_LAYERS:-} ]] ||
        die "TUNE_LAYERS is '$TUNE_LAYERS', but a driver chooses the layers of each run; unset it, or train one run with a launcher of $SCRIPTS/train ($driver reads $reads)"
    [[ -z ${OUT:-} ]] || die "OUT is '$OUT', but a driver names the folder of each run; unset it, and set RESULTS to write elsewhere"
    [[ ! " ${TRAIN_FLAGS:-}" =~ [[:space:]]--(tune[_-]layers|output[_-]dir)([=[:space:]]|$) ]] ||
        die "TRAIN_FLAGS has --${BASH_REMATCH[1]}, which a driver sets for each run; leave it out"
    for setting in SPECS SPEC LAYERS; do
        [[ -z ${!setting:-} || " $* " == *" $setting "* ]] ||
            die "$setting is '${!setting}', and $driver has no such setting; unset it ($driver reads $reads)"
    done
    find_package
    [[ -z $package ]] || check_tasks
}

# Set `package` where PYTHON has this package. A dry run does without: it may be made on another machine.
find_package() {
    local problem
    package=1
    # not the one in the current folder, which `-c` would see
    problem=$("$PYTHON" -c "import sys; sys.path = [*filter(None, sys.path)]; import llava_region" 2>&1) && return
    package=
    [[ $DRY_RUN == 1 ]] || die "PYTHON is '$PYTHON', which cannot import llava_region (${problem##*$'\n'}); set PYTHON to an interpreter that has it"
    echo "PYTHON is '$PYTHON', which has no llava_region: of layers only the form is checked, and tasks are not" >&2
}

# The only model of a driver that does not read MODELS.
only_model() {
    [[ " ${MODELS:-$1} " == *" $1 "* ]] || die "MODELS is '$MODELS', but $driver is about $1 alone; unset MODELS"
    use_model "$1"
}

# MODELS: check the regions in each model's own setting.
check_models() {
    local each setting
    for each in $1; do
        use_model "$each"
        setting=${each^^}_SPECS
        [[ -n ${!setting:-} ]] || die "MODELS names $each, for which $driver has no regions; set $setting"
        words_of "${!setting}"
        check_regions "$setting" "${words[@]}"
    done
}

# SETTING SPEC...: all regions that the current model will be trained with, from that setting.
check_regions() {
    local setting=$1 spec folder suffix
    local -A of=()
    for spec in "${@:2}"; do
        folder=$(region_name "$spec")
        [[ ${of[$folder]:-$spec} == "$spec" ]] ||
            die "$setting has '${of[$folder]}' and '$spec', whose runs would have one folder (...-$folder); train the second with another RESULTS"
        of[$folder]=$spec
    done
    check_layer_sets "$@"
    [[ $DRY_RUN != 1 ]] || return 0 # it prints every launcher's command
    for spec in "${@:2}"; do
        for suffix in "${suffixes[@]-}"; do
            run_of "$spec" "$suffix"
            [[ -e $run/cost.json ]] || { check_launcher && return; }
        done
    done
}

# SETTING SPEC...: sets of the current model's layers. Sets `num_layers` and, of each set, `sizes` where they can be known.
check_layer_sets() {
    local setting=$1 spec asked=() config found line
    num_layers='' sizes=()
    find_config
    for spec in "${@:2}"; do
        [[ -n ${spec//[[:space:]]/} ]] || continue
        [[ -n $config ]] || check_layers "$spec" "$setting"
        asked+=("$(instead_of_scores "$spec")")
    done
    ((${#asked[@]})) || die "$setting names no layers; allowed: layer specs, such as sparse:25% or 0,4,8-11"
    [[ -n $config ]] || return 0
    found=$("${REGION[@]}" layers "$config" --json -- "${asked[@]}" 2>&1) || die "$setting for $model: ${found#error: }"
    while read -r line; do
        [[ $line =~ \"layers\":\ \[([0-9, ]*)\],\ \"num_layers\":\ ([0-9]+) ]] || continue
        num_layers=${BASH_REMATCH[2]}
        words_of "${BASH_REMATCH[1]}"
        sizes+=("${#words[@]}")
    done <<<"$found"
}

# A spec by the scores that this driver will write first, as one with the same number of layers.
instead_of_scores() { # SPEC
    local spec=$1
    if [[ -n ${scored_first:-} && $spec == "$scored_first":* && ! -e $scored_first ]]; then
        spec=${spec%:spread}
        spec=sparse:${spec##*:}
    fi
    echo "$spec"
}

# Set `config` to what names the current model's number of layers: its folder or hub name, for the paper's backbone also without a
# download a file with the number itself; to nothing where it is not known.
find_config() {
    config=
    [[ -n $package ]] || return 0
    if [[ -d $backbone ]] || "${REGION[@]}" layers "$backbone" all >/dev/null 2>&1; then
        config=$backbone
    elif [[ $backbone == "$papers_backbone" ]]; then
        [[ -v count_file ]] || { count_file=$(mktemp) && trap 'rm -f "$count_file"' EXIT; }
        echo "{\"num_hidden_layers\": $papers_layers}" >"$count_file"
        config=$count_file
    fi
}

# Whether the current model's launcher takes the settings, and what it names is there. Of a training that is submitted elsewhere neither
# can be said here.
check_launcher() {
    local said i value need
    local -A given=()
    [[ -z ${TRAIN_WITH:-} ]] || return 0
    words_of "${TRAIN_FLAGS:-}"
    said=$(env "${settings[@]}" DRY_RUN=1 "OUT=$run" TUNE_LAYERS=all "$SCRIPTS/train/$model.sh" "${words[@]}" 2>&1) || die "${said#error: }"
    eval "words=(${said##*$'\n'})" # printed to be read by a shell
    for ((i = 0; i < ${#words[@]}; i++)); do
        value=${words[i]#*=}
        [[ ${words[i]} == --*=* ]] || value=${words[i + 1]:-}
        given[${words[i]%%=*}]=$value # the last one counts
    done
    for need in MODEL=--model_name_or_path VISION_TOWER=--vision_tower DATA=--data_path PROJECTOR=--pretrain_mm_mlp_adapter IMAGES=--image_folder; do
        value=${given[${need#*=}]:-}
        case ${need%%=*} in
            # not a hub name either
            MODEL | VISION_TOWER) [[ -z $value || -d $value || $value =~ ^[A-Za-z0-9_-][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$ ]] ;;
            IMAGES) [[ -z $value || -d $value ]] ;;
            *) [[ -z $value || -f $value ]] ;;
        esac || die "$model would be trained with ${need#*=} $value, which is not there; set ${model^^}_${need%%=*} or ${need%%=*}"
    done
}

# [MOST]: each of DROPS, so many layers at most.
check_drops() {
    local drop
    for drop in $DROPS; do
        if ! [[ $drop =~ ^[0-9]{1,9}$ ]] || ((10#$drop < 1 || 10#$drop > ${1:-10#$drop})); then
            die "DROPS has '$drop'; allowed: whole numbers of layers from 1 on${1:+, here at most $1}"
        fi
    done
}
