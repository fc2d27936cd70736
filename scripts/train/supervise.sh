# shellcheck shell=bash
# Shared by the launchers in this folder. Sourced, not run.
#
# torchrun and deepspeed hand a signal on to the ranks of a training and kill them 30 seconds later; they know no SIGUSR1; and
# whatever the ranks' exit code is, torchrun's is 1. So `supervise` stands before them: a signal for this script goes to the
# ranks and not to their launcher, and the script ends with the code that the ranks have noted.

# Run a command line that starts ranks; ends this script with its exit code.
supervise() { # COMMAND...
    local status code=127 name
    noted=$(mktemp)
    trap 'rm -f "$noted"' EXIT
    for name in INT TERM USR1; do
        # shellcheck disable=SC2064 # the name as it is now
        trap "hand_on $name" "$name"
    done
    trap 'hand_on TERM' HUP # the terminal is gone
    set -m # a process group of its own: Ctrl-C reaches this script alone
    # Slurm may signal every process of a job; SIGUSR1 would end the launcher. The ranks set a handler of their own.
    (trap '' USR1 && LLAVA_REGION_EXIT_CODE_FILE=$noted exec "$@") &
    launcher=$!
    set +m
    while true; do # a signal ends `wait` early
        signalled=0 status=0
        wait "$launcher" || status=$?
        ((status == 127)) || code=$status
        ((signalled)) || break
    done
    # 0 is noted by every rank that is done, though another may fail yet
    [[ ! -s $noted || $(<"$noted") == 0 ]] || code=$(<"$noted")
    exit "$code"
}

hand_on() { # NAME of a signal
    signalled=1
    [[ ! -s $noted ]] || return 0 # the ranks are leaving, and it must not come in between
    local ranks=() others=()
    sort_descendants "$launcher"
    if ((${#ranks[@]})) && all_listen "${ranks[@]}"; then
        kill -s "$1" "${ranks[@]}" 2>/dev/null || true
    else
        echo "stopped by SIG$1 before training began; nothing was saved" >&2
        disown "$launcher" # or bash would say that it was killed
        kill -s KILL "$launcher" "${others[@]}" "${ranks[@]}" 2>/dev/null || true
        exit $((128 + $(kill -l "$1")))
    fi
}

# Whether all ranks have come as far as to set their handlers.
all_listen() { # PID...
    local pid caught
    for pid in "$@"; do
        caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null)
        ((16#${caught:-0} >> ($(kill -l USR1) - 1) & 1)) || return 1
    done
}

# Sort the processes below PID into `ranks`, without what they started themselves, and `others`. The launcher tells a rank its number.
sort_descendants() { # PID
    local file line fields
    for file in /proc/[0-9]*/stat; do
        { read -r line <"$file"; } 2>/dev/null || continue
        read -ra fields <<<"${line##*) }" # the name before that may contain anything: state, parent, ...
        [[ ${fields[1]} == "$1" ]] || continue
        file=${file#/proc/} file=${file%/stat}
        if grep -qsz '^LOCAL_RANK=' "/proc/$file/environ"; then
            ranks+=("$file")
        else
            others+=("$file")
            sort_descendants "$file"
        fi
    done
}
