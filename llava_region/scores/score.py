"""Score every decoder layer of a model by several metrics and write `scores.json` (paper: section 4.1, appendix A)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_region import __version__, locks, processes
from llava_region import files as atomic
from llava_region.checkpoints.identity import read_merge_record, weights_digest
from llava_region.checkpoints.model_source import ModelLike, ModelSource
from llava_region.errors import LlavaRegionError
from llava_region.models.loading import DTYPES, check_base, load, named_base
from llava_region.scores.angular_distance_weights import angular_distance_weights
from llava_region.scores.data import Dataset, Sample, read_samples
from llava_region.scores.metrics import ACTIVATION_METRICS, MEANING, METRICS, WEIGHT_METRICS
from llava_region.scores.parameter_change import FORMS, masked, parameter_change
from llava_region.scores.partial import Progress, partial_files
from llava_region.scores.pass_over_data import Plan, run_pass
from llava_region.scores.scores_file import correlation
from llava_region.scores.weight_changes import weight_changes


@dataclass(frozen=True)
class Options:
    """How to score; see `llava-region score --help`.

    Raises:
        LlavaRegionError: a number that is out of its bounds.
    """

    metrics: tuple[str, ...] = METRICS
    image_folder: Path | None = None
    base: str | None = None
    limit: int | None = None
    seed: int = 0
    prompt: str | None = None
    batch_size: int = 4
    instances: int = 50
    eps: float = 1e-6
    device: str | None = None
    dtype: str | None = None
    template: str | None = None
    attn_implementation: str | None = None
    resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("batch_size", 1), ("instances", 0), ("eps", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:  # nor is NaN
                raise LlavaRegionError(f"--{name.replace('_', '-')} is {value}; allowed: {least} or more")


def score(model: ModelLike, data: list[Path], out: Path, options: Options) -> dict[str, Any] | None:
    """Score a model's layers and write `out`.

    Returns:
        The content of the file; None in every process but the first.

    Raises:
        LlavaRegionError: bad input; before any weights are loaded.
        Interrupted: stopped by a signal, progress saved next to `out`.
    """
    with locks.held_by_run(out, wait=locks.STALE):
        source = ModelSource.of(model)
        base = _base(source, options)
        samples, datasets = _check(source, base, data, out, options)
        wanted = tuple(name for name in ACTIVATION_METRICS if name in options.metrics)
        identity = _identity(source, base, datasets, options)
        weights = _weight_scores(source, base, options) if processes.is_first() else {}
        activations = _activation_scores(source, base, samples, wanted, out, options, identity) if wanted else None
        if not processes.is_first():
            return None
        metrics, instances = weights, []
        if activations:
            found, dtype = activations
            metrics = {**{name: _entry(name, found, dtype, options) for name in wanted}, **weights}
            instances = _instances(found, identity["data"]) if "image_attention" in wanted else []
        result = {
            "num_layers": source.num_layers,
            "model": identity["model"],
            "base": identity["base"],
            "data": identity["data"],
            "samples": len(samples),
            "metrics": metrics,
            "correlation": correlation(metrics),
            "instances": instances,
            "llava_region_version": __version__,
        }
        atomic.write_json(out, result)
        for path in partial_files(out):
            path.unlink()
        return result


def _base(model: ModelSource, options: Options) -> ModelSource | None:
    """The backbone: as given, else the one that the run names, if it is there."""
    return named_base(model) if options.base is None else ModelSource.of(options.base)


def _check(
    model: ModelSource, base: ModelSource | None, data: list[Path], out: Path, options: Options
) -> tuple[list[Sample], list[Dataset]]:
    """Everything that can be refused before weights are read; returns the samples and their data sets."""
    if out.suffix != ".json":
        raise LlavaRegionError(f"the output {out} has to end in .json, as --tune_layers knows it by that")
    atomic.refuse_existing(out, options.force)
    left = partial_files(out)
    if left and not options.resume and not options.force:
        raise LlavaRegionError(f"{left[0]} is left of an interrupted run; go on with --resume, or start again with --force")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise LlavaRegionError(f"unknown dtype '{options.dtype}'; allowed: {', '.join(DTYPES)}")
    weights = [name for name in options.metrics if name in WEIGHT_METRICS]
    if weights and base is None:
        raise LlavaRegionError(
            f"{weights[0]} compares with the backbone; give it with --base, or leave {' and '.join(weights)} out of --metrics"
        )
    if not set(options.metrics) & set(ACTIVATION_METRICS):
        return [], []
    return _check_activations(model, base, data, options)


def _check_activations(
    model: ModelSource, base: ModelSource | None, data: list[Path], options: Options
) -> tuple[list[Sample], list[Dataset]]:
    check_base(model, _load_base(model, base))
    if not data:
        raise LlavaRegionError("the activation metrics need data; give --data, or leave them out of --metrics")
    samples, datasets = read_samples(data, options.image_folder, limit=options.limit, seed=options.seed, prompt=options.prompt)
    images = [name for name in ("multimodal_block_influence", "image_attention") if name in options.metrics]
    if images and not any(sample.images for sample in samples):
        raise LlavaRegionError(
            f"no record has an image, which {images[0]} needs; leave {' and '.join(images)} out of --metrics, or give other data"
        )
    if any(sample.images for sample in samples) and model.upstream is None:
        raise LlavaRegionError(f"{model} is a language model without a vision tower, and the data has images; give data without")
    return samples, datasets


def _load_base(model: ModelSource, base: ModelSource | None) -> ModelSource | None:
    """What `models.load` needs: the base of an adapter; a whole model takes none."""
    return base if model.kind == "adapter" else None


def _identity(model: ModelSource, base: ModelSource | None, datasets: list[Dataset], options: Options) -> dict[str, Any]:
    """What a partial result belongs to, and what the scores file says of its origin."""
    kept = ("metrics", "limit", "seed", "prompt", "batch_size", "instances", "dtype", "template", "attn_implementation")
    chosen = asdict(options)
    return {
        "model": _identity_of(model),
        "base": _identity_of(base) if base else None,
        "data": [dataset.to_dict() for dataset in datasets],
        "options": {name: chosen[name] for name in kept},
    }


def _identity_of(model: ModelSource) -> dict[str, Any]:
    """Where a model lies, and which it is; of a merged model also of which run and base."""
    merged = read_merge_record(model)
    origin = {"merged_from": {key: merged[key] for key in ("fingerprint", "base_fingerprint")}} if merged else {}
    return {"folder": str(model), "fingerprint": weights_digest(model), **origin}


def _weight_scores(model: ModelSource, base: ModelSource | None, options: Options) -> dict[str, dict[str, Any]]:
    if base is None or not set(options.metrics) & set(WEIGHT_METRICS):
        return {}
    layers = weight_changes(model, base, options.eps)
    metrics = {}
    if "parameter_change" in options.metrics:
        for form in FORMS:
            scores = [parameter_change(layer, form) for layer in layers]
            given = {"form": form}
            if form == "elementwise":
                given |= {
                    "eps": options.eps,
                    "masked": [masked(layer) for layer in layers],
                    "elements": [sum(t.numel for t in layer) for layer in layers],
                }
            name = "parameter_change" if form == "elementwise" else f"parameter_change_{form}"
            metrics[name] = {"scores": scores, "options": given, "samples": None}
    if "angular_distance_weights" in options.metrics:
        given = {"mean": "over the layer's parameter tensors, each as one vector"}
        scores = [angular_distance_weights(layer) for layer in layers]
        metrics["angular_distance_weights"] = {"scores": scores, "options": given, "samples": None}
    return metrics


def _activation_scores(
    model: ModelSource, base: ModelSource | None, samples: list[Sample], metrics: Sequence[str], out: Path, options: Options,
    identity: dict[str, Any],
) -> tuple[Progress, str]:  # fmt: skip
    """What all processes found, and the dtype that the model ran in."""
    loaded = load(
        model, _load_base(model, base), device=processes.device(options.device), dtype=options.dtype, template=options.template,
        attn_implementation=options.attn_implementation,
    )  # fmt: skip
    batches = [samples[i : i + options.batch_size] for i in range(0, len(samples), options.batch_size)]
    plan = Plan(batches, tuple(metrics), options.prompt, options.instances, out, identity)
    return run_pass(loaded, plan, options.resume), str(loaded.model.dtype).removeprefix("torch.")


def _entry(metric: str, found: Progress, dtype: str, options: Options) -> dict[str, Any]:
    text = {"prompt": options.prompt} if options.prompt is not None else {"text": "the records' conversations"}
    given = {"score": MEANING[metric], **text, "limit": options.limit, "seed": options.seed, "dtype": dtype}
    return {"scores": found.sums.scores(metric), "options": given, "samples": found.sums.samples(metric)}


def _instances(found: Progress, datasets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Image attention of single records, by data file, in the file's order."""
    out = []
    for number, dataset in enumerate(datasets):
        rows = sorted((int(index), row) for index, row in found.attention.get(str(number), {}).items())
        out.append({"data": Path(dataset["file"]).stem, "records": [index for index, _ in rows], "scores": [row for _, row in rows]})
    return out
