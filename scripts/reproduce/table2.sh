#!/usr/bin/env bash
# Table 2: how many of Bunny-Llama-3-8B-V's layers to tune (section 4.2). Settings: see common.sh; SPECS are the regions.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TASKS=${TASKS:-$VISUAL_TASKS}
words_of "${SPECS:-all sparse:16 sparse:8 sparse:6 sparse:4 sparse:2 sparse:1}"
specs=("${words[@]}")
check_settings SPECS

only_model bunny_llama3_8b
check_regions SPECS "${specs[@]}"
for spec in "${specs[@]}"; do
    train_and_evaluate "$spec"
done
report table2 --table 2 --paper
