"""Remove decoder layers outside the visual region (section 6, Figure 4).

Once the visual region is trained, layers outside it with the smallest angular distance between input and output can go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_region.checkpoints.model_source import ModelLike, ModelSource
from llava_region.checkpoints.whole_model import ModelFolder, check_output, read_model, write_model
from llava_region.decoder import layer_index, with_layer_index
from llava_region.errors import LlavaRegionError
from llava_region.files import output_folder
from llava_region.region import Region, read_scores
from llava_region.run_files import REGION_FILE
from llava_region.scores.scored_model import check_scored_model
from llava_region.surgery.merge import merged_model
from llava_region.surgery.pruned_config import pruned_config, renumbered, unknown_lists
from llava_region.surgery.self_check import self_test


def prune(
    model: ModelLike, out: str | Path, *, drop: int | None = None, scores: str | Path | None = None,
    layers: str | Iterable[int] | None = None, protect: str | Iterable[int] | None = None, base: ModelLike | None = None,
    force: bool = False, check: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Write the model without some of its decoder layers, the others renumbered.

    Give either `drop` and `scores`, or `layers`.

    Args:
        model: a full model, or a LoRA run (or a `checkpoint-N` of one), which is merged on the way.
        out: folder to write; appears only when it is whole and has passed the self test.
        drop: how many layers to drop: those outside `protect` with the lowest `angular_distance`; ties to the lower index.
        scores: file written by `llava-region score` for this model, for the LoRA run that it was merged from, or for such a merge.
        layers: exactly the layers to drop, as a spec or indices; region layers too, if named.
        protect: layers never to drop, a spec or indices; `none` protects none. Default: the region in `region.json`.
        base: for a LoRA run, what it was trained on. Default: the one that the run names.
        force: replace `out`.
        check: load the result in fp32 on the CPU and see that it generates the same tokens with and without its cache.

    Returns:
        `{"out", "model", "dropped": old numbers, "num_layers": new count, "original_num_layers", "layers": the region in new
        numbers, "new_to_old", "bytes", "remarks": [str]}`. Old numbers are `model`'s own.

    Raises:
        LlavaRegionError: not a model, a damaged one, layers that do not fit, scores of another model, or the self test failed.
    """
    source, remarks = ModelSource.of(model), []
    if source.kind == "adapter":
        whole, remarks = merged_model(source, base)
    elif base is not None:
        raise LlavaRegionError(f"{model} is not a LoRA run, so it takes no base; leave out --base")
    else:
        whole = read_model(source)
    check_output(out, (source.path, whole.path), force)
    dropped = layers_to_drop(whole, drop=drop, scores=scores, layers=layers, protect=protect)
    if scores is not None:
        remarks = [*remarks, *check_scored_model(scores, source, whole.merged_from)]
    remarks = [*remarks, *unknown_lists(whole.config, whole.num_layers)]
    pruned = without_layers(whole, dropped)
    assert pruned.region is not None
    with output_folder(out, force) as folder:
        size = write_model(pruned, folder, "pruning")
        if check:
            self_test(folder)
    return {
        "out": str(out), "model": str(model), "dropped": list(dropped), "num_layers": pruned.num_layers,
        "original_num_layers": whole.num_layers, "layers": pruned.region["layers"],
        "new_to_old": [i for i in range(whole.num_layers) if i not in dropped], "bytes": size, "remarks": remarks,
    }  # fmt: skip


def layers_to_drop(
    model: ModelFolder, *, drop: int | None = None, scores: str | Path | None = None,
    layers: str | Iterable[int] | None = None, protect: str | Iterable[int] | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """The layers that `prune` drops, ascending; arguments as there.

    Raises:
        LlavaRegionError: the arguments contradict each other or do not fit the model, or its region is of another depth.
    """
    _check_region(model)
    count = model.num_layers
    if layers is not None and drop is None:
        if scores is not None or protect is not None:
            raise LlavaRegionError("--layers drops exactly those, so it goes without --scores and --protect")
        chosen = _indices(layers, count)
        if len(chosen) == count:
            raise LlavaRegionError(f"all {count} decoder layers would be dropped; keep at least one")
        return chosen
    if drop is None or layers is not None:
        raise LlavaRegionError("say what to drop: --drop K with --scores FILE, or --layers SPEC")
    if scores is None:
        raise LlavaRegionError("--drop needs --scores FILE; write one with 'llava-region score', or name layers with --layers")
    kept = _protected(model, protect)
    outside = [i for i in range(count) if i not in kept]
    most = min(len(outside), count - 1)
    if not 1 <= drop <= most:
        allowed = f"; allowed: 1 to {most}" if most else ""
        hint = "; --protect none frees the region too" if protect is None else ""
        raise LlavaRegionError(f"cannot drop {drop} layers: {len(outside)} of {count} lie outside the protected ones{allowed}{hint}")
    values = read_scores(scores, "angular_distance", count)
    return tuple(sorted(sorted(outside, key=lambda i: (values[i], i))[:drop]))


def _indices(layers: str | Iterable[int], num_layers: int) -> tuple[int, ...]:
    return Region.parse(layers if isinstance(layers, str) else ",".join(map(str, layers)), num_layers).layers


def _protected(model: ModelFolder, protect: str | Iterable[int] | None) -> tuple[int, ...]:
    if isinstance(protect, str) and protect.strip() == "none":
        return ()
    if protect is not None:
        return _indices(protect, model.num_layers)
    if model.region is None:
        raise LlavaRegionError(
            f"{model.path} holds no {REGION_FILE}, so no region is known to protect; give --protect SPEC, or --protect none"
        )
    return tuple(model.region["layers"])


def _check_region(model: ModelFolder) -> None:
    """Refuse the record of a model of another depth: its layers are not this model's."""
    if model.region is not None and model.region["num_layers"] != model.num_layers:
        raise LlavaRegionError(
            f"{REGION_FILE} of {model.path} is for {model.region['num_layers']} layers, the model has {model.num_layers}; "
            f"copy the {REGION_FILE} that belongs to it, or remove it and give --protect"
        )


def without_layers(model: ModelFolder, dropped: Iterable[int]) -> ModelFolder:
    """The model without the dropped decoder layers: tensors renamed, config and region renumbered; nothing is loaded."""
    gone = set(dropped)
    kept = [i for i in range(model.num_layers) if i not in gone]
    new = {old: i for i, old in enumerate(kept)}
    tensors = {}
    for name, entry in model.tensors.items():
        layer = layer_index(name)
        if layer is None:
            tensors[name] = entry
        elif layer in new:
            tensors[with_layer_index(name, new[layer])] = entry
    region = _pruned_region(model, kept)
    config = pruned_config(model.config, kept, model.num_layers)
    if "visual_region" in config or model.region is not None:
        config["visual_region"] = {key: region[key] for key in ("layers", "num_layers", "spec")}
    return replace(model, tensors=tensors, config=config, region=region, merged_from=None)  # it is no longer what was merged


def _pruned_region(model: ModelFolder, kept: list[int]) -> dict:
    """`region.json` in new numbers, with the way back to those of the model as it was before any pruning."""
    count = model.num_layers
    # a model without region.json was tuned in all layers
    old = model.region or {"layers": list(range(count)), "num_layers": count, "spec": "all"}
    before = old.get("pruned") or {
        "original_num_layers": count, "new_to_old": list(range(count)),
        "original_layers": old["layers"], "original_spec": old.get("spec"),
    }  # fmt: skip
    new_to_old = [before["new_to_old"][i] for i in kept]
    layers = renumbered(old["layers"], kept)
    dropped = [i for i in range(before["original_num_layers"]) if i not in new_to_old]
    region = {**old, "layers": layers, "num_layers": len(kept), "spec": ",".join(map(str, layers))}
    if "reverted" in old:
        region["reverted"] = {**old["reverted"], "layers": renumbered(old["reverted"]["layers"], kept)}
    return {**region, "pruned": {**before, "dropped": dropped, "new_to_old": new_to_old}}
