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
check_settings SPEC DROPS

only_model llava_7b
run_of all
scored_first=$RESULTS/scores/$(basename "$run")-angles.json # SPEC may name it
check_regions SPEC "$SPEC" all
check_drops ${num_layers:+$((num_layers - sizes[0] < num_layers - 1 ? num_layers - sizes[0] : num_layers - 1))}
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
