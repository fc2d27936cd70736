#!/usr/bin/env bash
# Figure 2: numbers of layers on all, 25 % and 10 % of Bunny's data (section 4.3). The parts are random and nested.
# Settings: see common.sh; SPECS are the regions, PERCENTS the parts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TASKS=${TASKS:-ocrvqa,textvqa,tdiuc,gqa}
SPECS=${SPECS:-all sparse:16 sparse:8 sparse:6 sparse:4 sparse:2 sparse:1}
PERCENTS=${PERCENTS:-100 25 10}
words_of "$PERCENTS"
check_numbers PERCENTS 1 "${words[@]}"

use_model bunny_llama3_8b
words_of "$SPECS"
check_regions SPECS "${words[@]}"
scales=()
for percent in $PERCENTS; do
    suffix=
    part=$data
    if ((percent < 100)); then
        suffix=-data-${percent}pct
        part=$RESULTS/data/$(basename "$data" .json)$suffix.json
        once "$part" "${REGION[@]}" subset "$data" --fraction "$percent%" --seed 0 --out "$part"
    fi
    for spec in $SPECS; do
        train_and_evaluate "$spec" "$suffix" "DATA=$part"
        scales+=(--data-scale "$(basename "$run")=$percent")
    done
done
report figure2 --figure 2 "${scales[@]}" --paper
