"""The flags that are added to the upstream TrainingArguments.

Annotations here are types, not strings as elsewhere: `extend_arguments` puts them into a class of another module.
"""

# ruff: noqa: UP045 - HfArgumentParser of transformers 4.36 to 4.41 does not read `str | None`

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Optional

from llava_region.training.deepspeed_config import corrected


@dataclass
class RegionArguments:
    """Flags of `python -m llava_region.train`, in addition to the upstream's own."""

    tune_layers: Optional[str] = field(
        default=None,
        metadata={
            "help": "Decoder layers to tune: sparse:25%%, sparse:8, 0,4,8-11, lower:8, lower-middle:8, upper-middle:8, top:8, hybrid:8, "
            "all, or scores.json:METRIC:8[:spread]. Without it, training is upstream's own, untouched."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check everything, print the layer map, trainable parameters and memory, and exit without loading weights."},
    )
    dry_run_gpus: Optional[int] = field(
        default=None, metadata={"help": "GPUs to assume in the dry run's memory estimate. Default: the ranks it was launched with."}
    )
    dry_run_step: bool = field(
        default=True,
        metadata={"help": "In a dry run, also train 4 records on a miniature of the model (2 decoder layers, random weights), on the CPU."},
    )
    check_images: str = field(
        default="sample",
        metadata={
            "help": "Open the images of the data before training: 1,000 of them (sample), all, or none.",
            "choices": ["sample", "all", "none"],
        },
    )
    check_records: int = field(
        default=256,
        metadata={
            "help": "Tokenise so many records before training as the upstream does, spread over the data, and the longest one, to see that "
            "they have labels to train. 0: none."
        },
    )
    fix_generation_config: bool = field(
        default=False,
        metadata={"help": "Where the base model's generation config can't be saved (sampling options without do_sample), set do_sample."},
    )
    region_checkpointing: str = field(
        default="auto",
        metadata={
            "help": "With --gradient_checkpointing True, the decoder layers that recompute their activations in the backward pass: all "
            "(as upstream), region, none, or auto: as few as the memory asks for. Gradients are the same.",
        },
    )
    region_memory: Optional[str] = field(
        default=None,
        metadata={"help": "Most memory that activations may take under auto, such as 20GB. Default: what is free, less a margin."},
    )
    supervised_logits: bool = field(
        default=True,
        metadata={"help": "Compute the head's logits only at positions that have a label. The loss is the same within rounding."},
    )


def did_you_mean(unknown: Iterable[str], known: Iterable[str]) -> str:
    """The known flags that unknown ones resemble, as the end of a message: `; did you mean --x?`, or nothing."""
    flags = {flag.replace("-", "_"): flag for flag in known}
    found = [close[0] for flag in unknown if (close := difflib.get_close_matches(flag.replace("-", "_"), flags, n=1, cutoff=0.75))]
    return f"; did you mean {' and '.join(flags[flag] for flag in dict.fromkeys(found))}?" if found else ""


OWN_FLAGS = tuple(f"--{f.name}" for f in dataclasses.fields(RegionArguments))


def extend_arguments(upstream_class: type, recipe_of: Optional[Callable[[Any], Any]] = None) -> type:
    """A subclass of the upstream's TrainingArguments with our flags, which hands DeepSpeed a corrected config.

    Args:
        recipe_of: what the flags ask for, from the arguments (`Upstream.recipe`); None: the arguments are not going to be made.

    It bears the upstream class's name and module, and is bound there while the hooks are applied, so that
    `training_args.bin`, a pickle, can later be read where llava_region is not installed.
    """

    def post_init(self: Any) -> None:
        path = self.deepspeed
        if isinstance(path, str) and recipe_of is not None and os.path.isfile(path):
            self.deepspeed, _ = corrected(path, recipe_of(self))
        upstream_class.__post_init__(self)
        self.deepspeed = path  # as it was given

    fields = [(f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in dataclasses.fields(RegionArguments)]
    extended = dataclasses.make_dataclass(upstream_class.__name__, fields, bases=(upstream_class,), namespace={"__post_init__": post_init})
    extended.__module__ = upstream_class.__module__
    extended.__qualname__ = upstream_class.__qualname__
    return extended
