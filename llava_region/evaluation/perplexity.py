"""Teacher-forced perplexity on answer tokens, with sets of decoder layers reverted to the backbone (paper, Figure 1, left).

The training template and the upstream's own labels are used, so perplexity is what the training loss sees: exp of the
summed negative log-likelihood over the answers' tokens and EOS, divided by their number, for each data file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from llava_region.checkpoints.model_source import ModelLike, ModelSource
from llava_region.checkpoints.whole_model import check_same_shape
from llava_region.data.images import prefetch, read_pixels
from llava_region.data.labels import IGNORE_INDEX
from llava_region.data.records import read_records, require_images, training_images
from llava_region.decoder import layer_index
from llava_region.errors import LlavaRegionError
from llava_region.models import Embedded, LoadedModel, load
from llava_region.models.loading import base_to_load
from llava_region.progress import progress_bar
from llava_region.region import Region
from llava_region.run_files import ADAPTER_CONFIG_FILE
from llava_region.surgery.revert import backbone_tensors


@dataclass
class Likelihood:
    """What a data file's answers cost the model.

    Attributes:
        nll: summed negative log-likelihood, in nats.
        tokens: answer tokens and EOS that it is over.
        unlabelled: records without a token to score: cut away by the model's maximum length, or given up by the
            upstream's preprocessing (a tokenisation mismatch, for which it prints a warning).
    """

    nll: float = 0.0
    tokens: int = 0
    unlabelled: int = 0

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens); infinite where that is beyond a float."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


class Sample(NamedTuple):
    """A record ready for the model: ids and labels (T,), and its picture's file or None."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    image: Path | None


def perplexity(model: LoadedModel, data: Path, image_folder: Path | None, **options: Any) -> Likelihood:
    """Score one LLaVA-format file; options as for `likelihood`. See `read_data` for what is raised."""
    return likelihood(model, samples(model, read_data(data, image_folder), image_folder), **options)


def read_data(data: Path, image_folder: Path | None, text_only: bool = False) -> list[dict]:
    """The records of a LLaVA-format JSON file, their form checked and their images found.

    Raises:
        LlavaRegionError: names the first record that is not in LLaVA's form, or has an image that is not there or not wanted.
    """
    records = read_records(data)
    pictures = training_images(records)
    if pictures and text_only:
        raise LlavaRegionError(
            f"{len(pictures)} records of {data} have an image, which a plain language model does not see; give text only"
        )
    require_images(pictures, image_folder, data)
    return records


def samples(model: LoadedModel, records: Sequence[dict], image_folder: Path | None) -> list[Sample]:
    """The records, as `read_data` returns them, through the model's training template."""
    folder = image_folder or Path()  # `read_data` refuses images without a folder
    return [Sample(*model.example(record), folder / record["image"] if "image" in record else None) for record in records]


@torch.inference_mode()
def likelihood(
    model: LoadedModel, samples: Sequence[Sample], *, batch_size: int = 8, workers: int = 4, description: str = "perplexity"
) -> Likelihood:
    """Score the answers of `samples`, in batches of similar length, pictures read by `workers` threads.

    Raises:
        LlavaRegionError: a picture cannot be decoded, or no sample has a token to score.
    """
    total = Likelihood()
    with progress_bar(description, len(samples)) as advance:
        for batch, pictures in prefetch(lambda batch: _pixels(model, batch), _batches(samples, batch_size), workers):
            embedded = model.embed([s.input_ids for s in batch], pictures, [s.labels for s in batch])
            nll, tokens = _score(model, embedded)
            total.nll += nll.sum().item()
            total.tokens += int(tokens.sum())
            total.unlabelled += int((tokens == 0).sum())
            advance(len(batch))
    if not total.tokens:
        raise LlavaRegionError(
            f"none of the {len(samples)} records has an answer token to score; see --template, and the upstream's warnings"
        )
    return total


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    ordered = sorted(samples, key=lambda s: (s.image is None, len(s.input_ids)))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def _pixels(model: LoadedModel, batch: Sequence[Sample]) -> list[list[torch.Tensor]]:
    """The pictures of a batch; a record with a picture that no turn places is text to the upstreams, too."""
    return [[read_pixels(s.image, model.pixel_values)] if s.image and (s.input_ids < 0).any() else [] for s in batch]


def _score(model: LoadedModel, batch: Embedded) -> tuple[torch.Tensor, torch.Tensor]:
    """Per sample, summed negative log-likelihood (B,) in float64, and number of tokens (B,); each token is predicted by the one before."""
    logits = model.model(
        inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    assert batch.labels is not None
    labels = batch.labels[:, 1:]
    wanted = labels != IGNORE_INDEX
    losses = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    losses[wanted] = F.cross_entropy(logits[:, :-1][wanted].float(), labels[wanted], reduction="none").double()
    return losses.sum(dim=1), wanted.sum(dim=1)


class Reverter:
    """Swaps decoder layers of a model in memory between its own weights and the backbone's, read from its shards.

    The model's own weights of reverted layers are kept on the CPU meanwhile.

    Raises:
        LlavaRegionError: the backbone does not hold the same tensors in these layers.
    """

    def __init__(self, model: nn.Module, backbone: ModelSource) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if layer_index(n) is not None}
        every = {layer for name in self.parameters if (layer := layer_index(name)) is not None}
        self.backbone = backbone_tensors(self.parameters, backbone.checkpoint, every, backbone)
        self.own: dict[str, torch.Tensor] = {}

    def revert(self, layers: Iterable[int]) -> None:
        """Make exactly these layers the backbone's, and all others the model's own."""
        chosen = set(layers)
        wanted = {name for name in self.parameters if layer_index(name) in chosen}
        for name in set(self.own) - wanted:
            self.parameters[name].data.copy_(self.own.pop(name))
        for name in wanted - set(self.own):
            self.own[name] = self.parameters[name].detach().cpu().clone()
            self.parameters[name].data.copy_(self.backbone[name].load())


def parse_sweep(text: str, num_layers: int) -> list[Region]:
    """`SPEC;SPEC;...` as regions, each set of layers once; any spec that `--tune_layers` takes.

    Raises:
        LlavaRegionError: a spec does not fit the model, or there is none.
    """
    regions = {region.layers: region for part in text.split(";") if part.strip() for region in [Region.parse(part, num_layers)]}
    if not regions:
        raise LlavaRegionError(
            f"--revert-sweep '{text}' names no set of layers; allowed: layer specs with ; between, such as '0-3;sparse:25%'"
        )
    return list(regions.values())


def sweep(
    model_folder: ModelLike, data: Sequence[Path], *, image_folder: Path | None = None, base: ModelLike | None = None,
    lora_base: ModelLike | None = None, revert: str | None = None, batch_size: int = 8, workers: int = 4, **loading: Any,
) -> dict[str, Any]:  # fmt: skip
    """Perplexity of a model on each data file, as it is and with each set of layers of `revert` taken from the backbone.

    Args:
        base: the backbone, to revert to; for a LoRA run also what it was trained on, unless `lora_base` says otherwise. None: for
            a LoRA run the model that it names.
        revert: `SPEC;SPEC;...`; None: the model as it is, only.
        loading: device, dtype, template and so on, as for `models.load`.

    Returns:
        `{"model", "upstream", "base", "template", "rows": [{"data", "visual", "reverted": [layers], "perplexity", "tokens",
        "unlabelled"}]}`, the unreverted rows first, in the order of `revert` and `data`. perplexity is None where it is beyond a
        float; visual says whether a record of the file has an image; upstream is None for a plain language model.

    Raises:
        LlavaRegionError: bad input, before weights load.
    """
    source = ModelSource.of(model_folder)
    own_base, backbone = check_bases(source, base, lora_base, revert)
    regions = parse_sweep(revert, source.num_layers) if revert else []
    text_only = source.upstream is None
    records = {path: read_data(path, image_folder, text_only) for path in dict.fromkeys(map(Path, data))}
    model = load(source, own_base, **loading)
    sets = {path: samples(model, found, image_folder) for path, found in records.items()}
    reverter = Reverter(model.model, backbone) if backbone else None
    rows = []
    for layers in ((), *(region.layers for region in regions)):
        if reverter:
            reverter.revert(layers)
        for path, found in sets.items():
            description = f"{path.name}, {len(layers)} layers reverted" if layers else path.name
            result = likelihood(model, found, batch_size=batch_size, workers=workers, description=description)
            finite = result.perplexity if math.isfinite(result.perplexity) else None
            counts = {"tokens": result.tokens, "unlabelled": result.unlabelled}
            visual = any("image" in record for record in records[path])
            rows.append({"data": str(path), "visual": visual, "reverted": list(layers), "perplexity": finite, **counts})
    upstream, origin = source.upstream.name if source.upstream else None, backbone or own_base
    return {
        "model": str(source), "upstream": upstream, "base": str(origin) if origin else None, "template": model.template, "rows": rows,
    }  # fmt: skip


def check_bases(
    model: ModelSource, base: ModelLike | None, lora_base: ModelLike | None, revert: str | None
) -> tuple[ModelSource | None, ModelSource | None]:
    """The model that the adapter goes on, and the one that layers are reverted to; None where there is no need of one.

    Raises:
        LlavaRegionError: one is missing or superfluous, or the backbone is of another shape.
    """
    is_run = model.kind == "adapter"
    if lora_base and not is_run:
        raise LlavaRegionError(f"{model} is not a LoRA run (it has no {ADAPTER_CONFIG_FILE}); leave out --lora-base")
    if base and not is_run and not revert:
        raise LlavaRegionError("--base is the backbone for --revert-sweep, or what a LoRA run was trained on; leave it out here")
    if lora_base and base and not revert:
        raise LlavaRegionError("without --revert-sweep a LoRA run takes one base; leave out --base or --lora-base")
    given = ModelSource.of(base) if base else None
    own = base_to_load(model, lora_base or given) if is_run else None
    if not revert:
        return own, None
    # what a run was trained on is its backbone, unless that was a visual model already
    backbone = given or (own if own and not own.upstream else None)
    if backbone is None:
        raise LlavaRegionError("--revert-sweep needs the backbone that layers are reverted to; give it with --base")
    check_same_shape(model.config, backbone.config, (f"the model {model}", f"the backbone {backbone}"))
    return own, backbone
