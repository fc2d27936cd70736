# shellcheck shell=bash
# Shared by the launchers (train/) and the drivers (reproduce/). Sourced, not run.

die() {
    echo "error: $*" >&2
    exit 2
}

# Print the comments at the top of a script and of the file with its settings, and stop, if --help or -h is among the arguments.
help_if_asked() { # SCRIPT SETTINGS ARGUMENTS...
    local argument
    for argument in "${@:3}"; do
        if [[ $argument == --help || $argument == -h ]]; then
            echo "usage: SETTING=VALUE ... $1 [FLAGS]"
            echo
            sed -e '/^#!/d' -e '/^# shellcheck/d' -e '/^[^#]/,$d' -e '/^$/,$d' -e 's/^# \{0,1\}//' "$1"
            echo
            sed -e '/^# shellcheck/d' -e '/^[^#]/,$d' -e '/^$/,$d' -e 's/^# \{0,1\}//' "$2"
            exit 0
        fi
    done
}

# A misspelt name of a layer selection would be found only after the GPUs were taken. The rest is checked by the training itself.
check_layers() { # SPEC SETTING
    local spec=${1//[[:space:]]/}
    local name=${spec%%:*}
    case $spec in
        *.json* | all) return ;;
    esac
    case $name in
        sparse | lower | lower-middle | upper-middle | top | hybrid)
            [[ $spec =~ ^[a-z-]+:[0-9.]+%?$ ]] || die "$2 is '$1'; allowed: a number of layers or a percentage, such as $name:8 or $name:25%"
            ;;
        *)
            [[ $spec =~ ^[0-9,-]+$ ]] ||
                die "$2 is '$1'; allowed: all, layers such as 0,4,8-11, FILE.json:METRIC:8, or sparse, lower, lower-middle, upper-middle, top or hybrid with a number or percentage, such as sparse:25%"
            ;;
    esac
}

# Print a command as one line that can be pasted into a shell.
print_command() {
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
}

# Check a setting that is on or off; off is the default.
switch() { # NAME
    [[ ${!1:-0} == [01] ]] || die "$1 is '${!1}'; allowed: 1, or 0 or nothing"
    printf -v "$1" %s "${!1:-0}"
}

# Check a setting, and write it without zeros before it, which bash would read as octal.
whole_number() { # NAME LEAST
    if ! [[ ${!1:-} =~ ^[0-9]{1,9}$ ]] || ((10#${!1} < $2)); then
        die "$1 is '${!1:-}'; allowed: a whole number, at least $2"
    fi
    printf -v "$1" %d "$((10#${!1}))"
}

# Set `gpus` to the names in CUDA_VISIBLE_DEVICES, which are indices or begin with GPU- or MIG-. As for CUDA, a negative one ends the list.
read_gpu_names() {
    local name names
    gpus=()
    IFS=, read -ra names <<<"${CUDA_VISIBLE_DEVICES//[[:space:]]/}"
    for name in "${names[@]}"; do
        [[ $name != -* && $name != NoDevFiles ]] || break
        [[ -n $name ]] || continue
        [[ $name =~ ^([0-9]+|GPU-[0-9A-Fa-f-]+|MIG-[0-9A-Za-z/-]+)$ ]] ||
            die "CUDA_VISIBLE_DEVICES is '$CUDA_VISIBLE_DEVICES'; allowed: indices, or names as 'nvidia-smi -L' prints them (GPU-..., MIG-...), separated by commas"
        [[ " ${gpus[*]} " != *" $name "* ]] || die "CUDA_VISIBLE_DEVICES is '$CUDA_VISIBLE_DEVICES', which names $name twice; CUDA would see no GPU"
        gpus+=("$name")
    done
}

# Set `seen` to the number of GPUs that a process here can use, or to nothing where that cannot be known.
count_gpus() {
    local listed
    gpus=() seen=
    if [[ -v CUDA_VISIBLE_DEVICES ]]; then
        read_gpu_names
        seen=${#gpus[@]}
        [[ ${gpus[0]:-} != MIG-* ]] || seen=1 # CUDA shows a process one MIG instance only
    elif command -v nvidia-smi >/dev/null && listed=$(nvidia-smi --list-gpus 2>/dev/null); then
        seen=$(grep -c '^GPU ' <<<"$listed") || true
        ! grep -q '^ *MIG ' <<<"$listed" || seen=1
    fi
}

# GPUs of this machine, at least 1.
visible_gpus() {
    count_gpus
    echo $((${seen:-1} > 0 ? ${seen:-1} : 1))
}

# A layer spec, changed so that it can be part of a folder's name: sparse:25% -> sparse-25pct, scores.json:block_influence:8 -> block_influence-8.
region_name() {
    local name=${1##*.json:}
    name=${name//%/pct}
    echo "${name//[^A-Za-z0-9._]/-}"
}
