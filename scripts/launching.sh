# shellcheck shell=bash
# Shared by the launchers (train/) and the drivers (reproduce/). Sourced, not run.

die() {
    echo "error: $*" >&2
    exit 2
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
