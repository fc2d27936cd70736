#!/usr/bin/env bash
# Figure 4: LLaVA-1.5-7B with 0 to 4 layers pruned, all layers tuned against a region of 8 (section 6): the layers of lowest
# angular distance, scored once on the unpruned model; those of the region stay.
# Settings: see common.sh; DROPS are the numbers of layers pruned, SPEC the region.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TASKS=${TASKS:-ocrvqa,textvqa,docvqa,scienceqa}
NEEDS_FLICKR=1
SPEC=${SPEC:-sparse:8}
DROPS=${DROPS:-1 2 3 4}
words_of "$DROPS"
check_numbers DROPS 1 "${words[@]}"

use_model llava_7b
check_regions SPEC "$SPEC"
for spec in all "$SPEC"; do
    train_and_evaluate "$spec"
    trained=$run
    score_on_flickr angles angular_distance
    protect=()
    [[ $spec != all ]] || protect=(--protect none) # its region is every layer
    for drop in $DROPS; do
        run=$trained
        prune "$drop" "${protect[@]}"
        evaluate "$TASKS" "$run"
    done
done
report figure4 --figure 4
