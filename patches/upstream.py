"""What a training codebase has to provide (`Upstream`), and the half that all of them share: the hooks themselves.

Importing this module imports neither torch nor an upstream: `llava-region doctor` asks it when both may be broken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from llava_region.data.records import speakers_problem
from llava_region.decoder import Parts
from llava_region.errors import LlavaRegionError, UnsupportedUpstream
from llava_region.patches.seams import hooked
from llava_region.run_files import CONFIG_FILE

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llava_region.patches.model_side import ModelSide
    from llava_region.patches.tokenisation import Tokenisation
    from llava_region.region import Region
    from llava_region.training.run import RegionRun


@dataclass(frozen=True)
class Lora:
    """The LoRA settings of a run, as PEFT's `LoraConfig` takes them."""

    rank: int
    alpha: int
    dropout: float
    bias: str


@dataclass(frozen=True)
class Recipe:
    """What a command line asks for, in this package's own words: nothing outside `patches` reads a flag of an upstream.

    Attributes:
        model: folder or hub name of the model that training starts from.
        cache_dir: where hub downloads are kept; None: the default.
        data: JSON file with the records; images: the folder that their images are relative to.
        tower: the vision tower, folder or hub name.
        projector: file of a pretrained projector.
        lora: None: the region's own weights are tuned.
        bits: of the backbone's weights: 4 or 8 (quantised) or 16; double_quantised: whether their scales are quantised too.
        trains_projector: whether the projector trains; projector_rate: its learning rate, None: that of all else.
        trains_tower: whether the vision tower trains.
        max_length: tokens to which a sample is cut.
        flags: the command line's flag for each of these, for messages: `{"model": "--model_name_or_path"}`.
    """

    model: str | None = None
    cache_dir: str | None = None
    data: str | None = None
    images: str | None = None
    tower: str | None = None
    projector: str | None = None
    lora: Lora | None = None
    bits: int = 16
    double_quantised: bool = True
    trains_projector: bool = True
    projector_rate: float | None = None
    trains_tower: bool = False
    max_length: int = 2048
    flags: Mapping[str, str] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        """`lora`, `qlora` or `full`, as `region.json` says it."""
        return "full" if self.lora is None else "lora" if self.bits == 16 else "qlora"


class Upstream(ABC):
    """A training codebase: its facts, its train side, and a way to its model side.

    Facts (class attributes):
        name: on the command line, in `region.json` and `results.json`.
        title: for people.
        commit: the commit that the hooks were tested with; tested: the same with the version, for messages.
        how_to_get: how a user installs it; variables: names of the environment variables that `get_command` reads.
        distributions: what it is called in a package index; the first that is installed tells the version.
        parts: how it names the parts of its models.
        architectures: model type in `config.json` -> class that its `save_pretrained` names there.
        supported: component -> version range in which it is expected to work (`python` and `transformers` have to have one, with
            both bounds); pinned: -> version it was tested with.
        also_tested: further sets that it was tested with, each by what `make test-...` calls it.
        without: component that it can do without -> what to do where that is not installed, for `llava-region doctor`.
        probe: code that imports what training and loading need, for `llava-region doctor`.
        train_module_name: the module with its `train()`, which looks up in its own globals, and so can be given others:
            trainer: its trainer class, over transformers' Trainer;
            linear_names: its function `(model) -> names of the modules that LoRA goes on`;
            save: its function `(trainer, output_dir)` that saves at the end, if it calls CUDA where there is none; else None.
        scripts: its train scripts, by file name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    commit: ClassVar[str]
    tested: ClassVar[str]
    how_to_get: ClassVar[str]
    variables: ClassVar[tuple[str, ...]] = ()
    distributions: ClassVar[tuple[str, ...]]
    parts: ClassVar[Parts]
    architectures: ClassVar[Mapping[str, str]]
    supported: ClassVar[Mapping[str, str]]
    pinned: ClassVar[Mapping[str, str]]
    also_tested: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    without: ClassVar[Mapping[str, str]] = {}
    probe: ClassVar[str]
    train_module_name: ClassVar[str]
    trainer: ClassVar[str]
    linear_names: ClassVar[str] = "find_all_linear_names"
    save: ClassVar[str | None] = None
    scripts: ClassVar[tuple[str, ...]] = ("train.py",)

    # -- facts that depend on something

    def owns(self, config: Mapping[str, Any]) -> bool:
        """Whether a model with this `config.json` is one of this upstream's, runnable or not."""
        return config.get("model_type") in self.architectures

    def installed(self) -> bool:
        """Whether it can be found, without importing it."""
        return find_spec(self.train_module_name.partition(".")[0]) is not None

    def version(self) -> str:
        """The installed version, as `region.json` records it; `checkout` where it is used from its folder."""
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        for distribution in self.distributions:
            try:
                return f"{distribution} {installed(distribution)}"
            except PackageNotFoundError:
                continue
        return "checkout"

    def get_command(self, environment: Mapping[str, str]) -> str:
        """The command that makes it importable, or what to do, as `llava-region doctor` prints it.

        Args:
            environment: of `variables`, those that are set.
        """
        return self.how_to_get

    def transformers_finding(self, version: str) -> str | None:
        """What is known to be wrong with this version of transformers, for `llava-region doctor`; None: nothing."""
        from packaging.specifiers import SpecifierSet

        if SpecifierSet(self.supported["transformers"]).contains(version, prereleases=True):
            return None
        return f"{self.title} was tested with transformers {self.supported['transformers']}, not with {version}"

    # -- train side

    @abstractmethod
    def train_module(self) -> ModuleType:
        """The module with `train()`, checked for every symbol that the hooks and the preflight use.

        Raises:
            UnsupportedUpstream: not installed, or a symbol is missing or changed.
        """

    @abstractmethod
    def recipe(self, args: Any) -> Recipe:
        """What the flags ask for.

        Args:
            args: all flags parsed, or the TrainingArguments alone: what is not there has the recipe's default.
        """

    @abstractmethod
    def check(self, args: Namespace, config: Mapping[str, Any]) -> None:
        """Refuse what this upstream alone would find out after loading weights, or never.

        Args:
            args: all flags, parsed.
            config: the `config.json` of the model to tune.

        Raises:
            LlavaRegionError: names the flag and how to fix it.
        """

    def check_files(self, args: Namespace, config: Mapping[str, Any]) -> None:
        """Refuse files that this upstream alone would find missing, damaged or of another model after loading weights, or never.

        To be extended where there are more files than the weights of the model to tune. Arguments as for `check`, which was before.

        Raises:
            LlavaRegionError: names the flag and how to fix it.
        """
        from llava_region.training.model_files import check_backbone

        check_backbone(self, self.recipe(args), self.meta_model(args, config))

    def write_miniature(self, args: Namespace, config: Mapping[str, Any], layers: int, folder: Path) -> dict[str, Any] | None:
        """Write a miniature of the model for a rehearsal on the CPU: as small as can be, with random weights and the real tokenizer.

        Args:
            args, config: as for `check`, which was before.
            layers: decoder layers to leave.
            folder: an empty folder, from which train() will be started. The records will be in its `data.json`.

        Returns:
            the flags that differ from `args`, with paths relative to the folder; None: no rehearsal.
        """
        return None

    def meta_model(self, args: Namespace, config: Mapping[str, Any]) -> nn.Module:
        """`empty_model` on the meta device. What it raises is about a value in the config.

        Raises:
            LlavaRegionError: the config makes no model.
        """
        import torch

        try:
            with torch.device("meta"):
                return self.empty_model(args, config)
        except LlavaRegionError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            text = " ".join(str(e).split())[:200]
            raise LlavaRegionError(
                f"{self.title} cannot build a model from the {CONFIG_FILE} of {self.recipe(args).model} ({type(e).__name__}: {text}); "
                "copy that file again from where the model comes"
            ) from e

    @abstractmethod
    def empty_model(self, args: Namespace, config: Mapping[str, Any]) -> nn.Module:
        """The model that training would build, on the default device (meta, in a dry run) from configs alone, with projector
        and vision tower. Arguments as for `check`."""

    @abstractmethod
    def tokenisation(self, args: Namespace, config: Mapping[str, Any]) -> AbstractContextManager[Tokenisation]:
        """The codebase's own tokenisation of records, set up as train() sets it up, for the length of a block; loads no weights.

        Arguments as for `check`, which was before, as was `check_files`.
        """

    def record_check(self, args: Namespace) -> Callable[[Mapping[str, Any]], str | None]:
        """What tells why a record of the form `TURNS` would end training with these flags, as the end of a sentence that begins with
        the record; None: it would not. It is asked of every record."""
        return lambda record: speakers_problem(record["conversations"])

    def vision_tower(self, config: Mapping[str, Any]) -> str | None:
        """The vision tower that a model with this `config.json` sees through, a folder or hub name; None: it is not named there."""
        return None

    def picture_problem(self, args: Namespace, width: int, height: int) -> str | None:
        """Why an image of this size, in pixels, could not be trained on with these flags, in a few words; None: it could."""
        return None

    @abstractmethod
    def trained_besides_lora(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
        """The trained weights that are not LoRA's, by name, gathered from all ranks. Collective under ZeRO-3."""

    def projector_tensors(self, config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]] | None:
        """The tensors that a model with this `config.json` has between vision tower and decoder layers: name in the bare model ->
        shape. None: not known, and nothing is expected.

        Raises:
            LlavaRegionError: the config lacks a width that they go by.
        """
        return None

    @abstractmethod
    def image_tokens(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Where a batch has a token that an image's features replace: (B, T) bool; None for a batch without token ids.

        Args:
            inputs: what the trainer hands to the model.
        """

    @abstractmethod
    def features_per_image(self, model: nn.Module) -> int:
        """Tokens that one image becomes in the language model."""

    def intercept_labels(
        self, model: nn.Module, receive: Callable[[torch.Tensor | None], torch.Tensor | None]
    ) -> Callable[[], None] | None:
        """Have a model hand over its labels once image features are in place, and go on with the answer instead.

        For logits at supervised positions only. To be overridden where the model's own forward puts image features in, which
        moves the labels: there those of the batch do not fit the hidden states, and training with them stops.

        Args:
            model: with the language model's head, out of all wrappers.
            receive: takes labels (B, L), or None; returns those that the model goes on with.

        Returns:
            A function that undoes it; None where nothing was done, as the labels of a batch fit the hidden states as they are.
        """
        return None

    @abstractmethod
    def checkout_of(self, script: Path) -> Path | None:
        """Root of the checkout that a train script lies in, or None if it is not this upstream's."""

    def argument_classes(self) -> tuple[Any, Any, Any]:
        """The three dataclasses that `train()` parses its command line into, ours in place of TrainingArguments."""
        from llava_region.training.arguments import extend_arguments

        module = self.train_module()
        return module.ModelArguments, module.DataArguments, extend_arguments(module.TrainingArguments)

    def entry(self, script: str) -> Callable[[], None]:
        """What one of `scripts` does when it is run, as a function without arguments.

        Raises:
            LlavaRegionError: another script.
        """
        if script not in self.scripts:
            raise LlavaRegionError(f"'{script}' is not a known train script of {self.title}; allowed: {', '.join(self.scripts)}")
        return lambda: self.train_module().train()

    def check_script(self, script: str) -> None:  # noqa: B027 - most scripts need nothing
        """Refuse a train script that needs what is not installed.

        Raises:
            LlavaRegionError: says what.
        """

    @contextmanager
    def applied(self, tune_layers: str | Region, **options: Any) -> Iterator[RegionRun]:
        """Hook the module with `train()`, so that it tunes a region; everything is put back on leaving.

        What is rebound is in `seams.hooked`.

        Args:
            tune_layers: a layer spec, or a `Region`.
            options: further fields of `RegionRun`, such as `base_model`.

        Yields:
            the `RegionRun`, which knows the region once the model is there.

        Raises:
            UnsupportedUpstream: the installed upstream lacks a symbol.
            LlavaRegionError: on leaving, if what was saved is not the region's.
        """
        from llava_region.training.run import RegionRun

        run = RegionRun(tune_layers, upstream=self, **options)
        with hooked(self, run):
            yield run

    # -- model side

    def loading_code(self, model: str, base: str | None, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Lines of Python that load a finished model with the upstream alone, for its model card; none: it has no such function.

        Args:
            model: folder of a whole model, or of a LoRA run; base: for a LoRA run, what it was trained on.
            config: its `config.json`.
        """
        return ()

    def model_side(self) -> ModelSide:
        """How its finished models are loaded and talked to. Imports the upstream.

        Raises:
            UnsupportedUpstream: it is not installed, fails to import, or can only be trained here.
        """
        raise UnsupportedUpstream(f"models of {self.title} can be trained here, but the tools for finished models cannot load them")
