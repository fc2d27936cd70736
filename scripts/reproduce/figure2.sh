#!/usr/bin/env bash
# Figure 2: numbers of layers on all, 25 % and 10 % of Bunny's data (section 4.3). The parts are random and nested.
# Settings: see common.sh; SPECS are the regions, PERCENTS the parts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TASKS=${TASKS:-ocrvqa,textvqa,tdiuc,gqa}
words_of "${SPECS:-all sparse:16 sparse:8 sparse:6 sparse:4 sparse:2 sparse:1}"
specs=("${words[@]}")
PERCENTS=${PERCENTS:-100 25 10}
check_settings SPECS PERCENTS

suffix_of() { # PERCENT: of the names of a part and of its runs
    [[ $1 == 100 ]] || echo "-data-${1}pct"
}

suffixes=()
for percent in $PERCENTS; do
    [[ $percent =~ ^(100|[1-9][0-9]?(\.[0-9]+)?|0?\.[0-9]*[1-9][0-9]*)$ ]] ||
        die "PERCENTS has '$percent'; allowed: 100, and numbers above 0 and below 100, such as 25 or 12.5"
    suffixes+=("$(suffix_of "$percent")")
done
only_model bunny_llama3_8b
check_regions SPECS "${specs[@]}"
scales=()
for percent in $PERCENTS; do
    suffix=$(suffix_of "$percent")
    part=$data
    if [[ -n $suffix ]]; then
        part=$RESULTS/data/$(basename "$data" .json)$suffix.json
        once "$part" "${REGION[@]}" subset "$data" --fraction "$percent%" --seed 0 --out "$part"
    fi
    for spec in "${specs[@]}"; do
        train_and_evaluate "$spec" "$suffix" "DATA=$part"
        scales+=(--data-scale "$(basename "$run")=$percent")
    done
done
report figure2 --figure 2 "${scales[@]}" --paper
