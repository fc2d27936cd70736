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
check_layers() {
    local spec=${1//[[:space:]]/}
    local name=${spec%%:*}
    case $spec in
        *.json* | all) return ;;
    esac
    case $name in
        sparse | lower | lower-middle | upper-middle | top | hybrid)
            [[ $spec =~ ^[a-z-]+:[0-9.]+%?$ ]] || die "TUNE_LAYERS is '$1'; allowed: a number of layers or a percentage, such as $name:8 or $name:25%"
            ;;
        *)
            [[ $spec =~ ^[0-9,-]+$ ]] ||
                die "TUNE_LAYERS is '$1'; allowed: all, layers such as 0,4,8-11, FILE.json:METRIC:8, or sparse, lower, lower-middle, upper-middle, top or hybrid with a number or percentage, such as sparse:25%"
            ;;
    esac
}

# Print a command as one line that can be pasted into a shell.
print_command() {
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
}

visible_gpus() {
    local found=1
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        found=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
    elif command -v nvidia-smi >/dev/null; then
        found=$(nvidia-smi --list-gpus | wc -l)
    fi
    echo $((found > 0 ? found : 1))
}

# A layer spec, changed so that it can be part of a folder's name: sparse:25% -> sparse-25pct, scores.json:block_influence:8 -> block_influence-8.
region_name() {
    local name=${1##*.json:}
    name=${name//%/pct}
    echo "${name//[^A-Za-z0-9._]/-}"
}
