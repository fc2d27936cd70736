#!/usr/bin/env bash
# Figure 1 of LLaVA-1.5-7B tuned in all layers. Left: perplexity with sets of layers put back to the backbone's weights, on
# questions and answers with images and on text; the rise is over the model as trained with images, over the backbone on text.
# Right: accuracy without the layers of lowest angular distance.
# Settings: see common.sh, and
#   MODELS=llava_7b             models, separated by spaces
#   SETS                        sets of layers, with ; between; the paper's text does not name its own
#   VISUAL_DATA TEXT_DATA       benchmarks whose questions and answers perplexity is measured on, separated by spaces
#   TEXT_FILES                  text files, measured too
#   RECORDS=1000                of each, drawn at random
#   DROPS                       numbers of layers pruned
#   PERPLEXITY_FLAGS            more flags for `llava-region perplexity`
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TASKS=${TASKS:-ocrvqa,textvqa,docvqa,scienceqa}
VISUAL_DATA=${VISUAL_DATA-ocrvqa docvqa} TEXT_DATA=${TEXT_DATA-mmlu bbh}
VISUAL_DATA=${VISUAL_DATA//,/ } TEXT_DATA=${TEXT_DATA//,/ }
SETS=${SETS:-0-3;4-7;12-15;20-23;28-31}
RECORDS=${RECORDS:-1000}
NEEDS_FLICKR=1
words_of "$VISUAL_DATA $TEXT_DATA"
NEEDED_TASKS=$(IFS=,; echo "${words[*]}")
MODELS=${MODELS:-llava_7b}
DROPS=${DROPS:-1 2 3 4}
whole_number RECORDS 1
check_settings MODELS SETS DROPS

# Set `visual` and `text` to --data flags, after making the files.
make_data() {
    local task
    visual=()
    text=()
    for task in $VISUAL_DATA; do
        answers "$task" "$RECORDS"
        visual+=(--data "$file")
    done
    for task in $TEXT_DATA; do
        answers "$task" "$RECORDS"
        text+=(--data "$file")
    done
    if [[ -n ${TEXT_FILES:-} ]]; then
        words_of "$TEXT_FILES"
        file=$RESULTS/data/answers/texts.json
        once "$file" "$PYTHON" "$SCRIPTS/reproduce/score_data.py" text "${words[@]}" --limit "$RECORDS" --out "$file"
        text+=(--data "$file")
    fi
}

# NAME FLAG...: measure a perplexity once; adds its file to the report.
measure() {
    local out=$RESULTS/perplexity/$1.json
    words_of "${PERPLEXITY_FLAGS:-}"
    once "$out" "${REGION[@]}" perplexity "${@:2}" --out "$out" "${words[@]}"
    measured+=(--perplexity "$out")
}

IFS=';' read -ra sets <<<"$SETS"
for each in $MODELS; do
    use_model "$each"
    check_layer_sets SETS "${sets[@]}"
    check_drops ${num_layers:+$((num_layers - 1))}
    check_regions MODELS all
done
measured=()
for each in $MODELS; do
    use_model "$each"
    train_and_evaluate all
    make_data
    trained=$run
    measure "$(basename "$run")" "$run" "${visual[@]}" "${text[@]}" --image-folder "$EVAL_DATA" --base "$backbone" --revert-sweep "$SETS"
    ((${#text[@]} == 0)) || measure "$(basename "$run")-backbone" "$backbone" "${text[@]}" --template "$template"
    score_on_flickr angles angular_distance
    for drop in $DROPS; do
        run=$trained
        prune "$drop" --protect none # its region is every layer
        evaluate "$TASKS" "$run"
    done
done
report figure1 --figure 1 "${measured[@]}"
