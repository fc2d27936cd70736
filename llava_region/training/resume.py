"""Going on from a checkpoint as if the run had never stopped: what transformers and the upstreams leave out of that.

Which checkpoint may be resumed is decided in `checkpoint_to_resume`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_region.errors import LlavaRegionError
from llava_region.run_files import EPOCH_RNG_FILE, NON_LORA_FILE, TRAINER_STATE_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


class AllStepsDone(Exception):
    """The checkpoint that a run resumes from is that of its last step."""


class NoStepTooMany(TrainerCallback):
    """Ends a run that resumes from the checkpoint of its last step; transformers would train one more."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if 0 < state.max_steps <= state.global_step:
            raise AllStepsDone


class BeginsAt(TrainerCallback):
    """Sees that a run which resumes from `checkpoint-N` has done N steps then, and not none: it would train on at the first rate."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if f"checkpoint-{state.global_step}" != self.folder.name:
            raise LlavaRegionError(
                f"the run resumes from {self.folder}, but would go on after step {state.global_step}; its {TRAINER_STATE_FILE} is of "
                "another checkpoint, or something else replaced the folder meanwhile: give another --output_dir"
            )


class EpochOrder(TrainerCallback):
    """Makes a run that resumes within an epoch see the same order of samples as one never stopped.

    Upstream's sampler draws an epoch's order from torch's global random state as it is when the epoch begins, which a
    resumed process does not have: it is kept in the checkpoint.
    """

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None
        self.restored: torch.Tensor | None = None

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.restored is not None:
            torch.random.set_rng_state(self.restored)
            self.restored = None
        self.state = torch.random.get_rng_state()

    def save(self, folder: Path) -> None:
        """Write the state that the current epoch began with into a checkpoint folder."""
        torch.save(self.state, folder / EPOCH_RNG_FILE)

    def resume(self, folder: str | Path) -> None:
        """Read the state from a checkpoint folder, to be set when the interrupted epoch begins again."""
        path = Path(folder) / EPOCH_RNG_FILE
        self.restored = torch.load(path, weights_only=True) if path.is_file() else None

    def random_state_loaded(self, step: int, steps_per_epoch: int) -> None:
        """After transformers has set the random state of a checkpoint of this step.

        Between two epochs the order is drawn after that, not before.
        """
        if step % max(steps_per_epoch, 1) == 0:
            self.state = torch.random.get_rng_state()


def missing_random_states(checkpoint: str | Path, rank: int, ranks: int) -> list[str]:
    """Files with random states that a checkpoint lacks for a rank: transformers goes on without them, and says nothing.

    Nothing that was trained is lost with them, so a run may go on.
    """
    names = (EPOCH_RNG_FILE, "rng_state.pth" if ranks <= 1 else f"rng_state_{rank}.pth")
    return [name for name in names if not (Path(checkpoint) / name).is_file()]


def load_trained_parameters_only(accelerator: Accelerator) -> None:
    """Let DeepSpeed load a LoRA checkpoint, which holds only what trained.

    transformers saves it so, but up to 4.37 loads it strictly, and fails over every frozen parameter.
    """
    prepare = accelerator.prepare

    def prepare_lenient(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        for part in prepared if isinstance(prepared, tuple) else (prepared,):
            if hasattr(part, "load_checkpoint"):
                part.load_checkpoint = functools.partial(part.load_checkpoint, load_module_strict=False)
        return prepared

    accelerator.prepare = prepare_lenient  # type: ignore[method-assign]


def load_non_lora(model: nn.Module, checkpoint: str | Path) -> None:
    """Load the projector and whatever else trained next to LoRA from a checkpoint into a PEFT model, in place.

    Raises:
        LlavaRegionError: the file is missing, or does not fit the model.
    """
    path = Path(checkpoint) / NON_LORA_FILE
    if not path.is_file():
        raise LlavaRegionError(f"{checkpoint} holds no {NON_LORA_FILE}, so the projector cannot be restored; remove it and start again")
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = dict(model.named_parameters())
    wrong = [name for name, tensor in state.items() if name not in own or own[name].shape != tensor.shape]
    if wrong:
        raise LlavaRegionError(f"{path} does not fit the model: {wrong[0]} is unknown or of another shape; give another --output_dir")
    lacking = [name for name, parameter in own.items() if parameter.requires_grad and "lora_" not in name and name not in state]
    if lacking:
        raise LlavaRegionError(f"{path} lacks {lacking[0]}, which the run trains; remove {checkpoint} to resume from the one before")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


@functools.cache  # registered once
def load_to_numbered_cpus() -> None:
    """Let torch.load put tensors on `cpu:0`, as transformers asks for where several processes train on CPUs; torch knows `cpu` alone."""
    torch.serialization.register_package(5, lambda storage: None, _on_numbered_cpu)


def _on_numbered_cpu(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


@contextmanager
def numpy_state_loadable() -> Iterator[None]:
    """Let torch.load read transformers' saved random states, which hold a NumPy array, under torch >= 2.6's `weights_only`."""
    import numpy

    safe_globals = getattr(torch.serialization, "safe_globals", None)
    reconstruct: Any = numpy.zeros(1).__reduce__()[0]  # where it lives differs between NumPy 1 and 2
    allowed = [reconstruct, numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32))]
    with safe_globals(allowed) if safe_globals else nullcontext():
        yield
