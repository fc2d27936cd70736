"""The flags of transformers' own trainer: what it refuses only when weights are loaded or a step is due, or never."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llava_region.errors import LlavaRegionError
from llava_region.training.flag_values import AT_LEAST_ONE, BELOW_ONE, FINITE, NOT_NEGATIVE, POSITIVE, SEED, SHARE, check_values, words
from llava_region.training.report_flags import check_reporters

if TYPE_CHECKING:
    from transformers import TrainingArguments

NUMBERS = {
    "per_device_train_batch_size": AT_LEAST_ONE, "gradient_accumulation_steps": AT_LEAST_ONE, "learning_rate": POSITIVE,
    "weight_decay": NOT_NEGATIVE, "adam_beta1": BELOW_ONE, "adam_beta2": BELOW_ONE, "adam_epsilon": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE, "warmup_ratio": SHARE, "dataloader_num_workers": NOT_NEGATIVE, "seed": SEED, "max_steps": FINITE,
    "save_steps": FINITE, "logging_steps": FINITE,
}  # fmt: skip


def check_trainer_flags(args: Namespace, own_optimizer: bool = False) -> None:
    """Check the flags that the upstream hands on to transformers' trainer.

    Args:
        args: all flags, parsed.
        own_optimizer: whether the DeepSpeed config brings its own optimizer.

    Raises:
        LlavaRegionError: names the flag and what is allowed.
    """
    check_values(args, NUMBERS)
    if args.max_steps <= 0:  # else the epochs are not looked at
        check_values(args, {"num_train_epochs": POSITIVE})
    _check_words(args)
    check_reporters(args)
    _check_hub(args)
    with _nothing_left_behind():
        arguments = _arguments(args)
        _check_schedule(arguments)
        if not own_optimizer:
            _check_optimizer(arguments)


def _check_words(args: Namespace) -> None:
    """What argparse leaves to the trainer: the upstreams take any word for the optimizer."""
    from transformers.training_args import OptimizerNames

    check_values(args, {"optim": words(name.value for name in OptimizerNames)})
    if args.fp16 and args.bf16:
        raise LlavaRegionError("--fp16 True and --bf16 True exclude each other; give one of them")


def _check_hub(args: Namespace) -> None:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if args.push_to_hub and HF_HUB_OFFLINE:
        raise LlavaRegionError("--push_to_hub True needs the hub, but HF_HUB_OFFLINE is set; leave one of them out")


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Put the environment back, in which TrainingArguments leaves settings for accelerate, and keep its warnings for the real ones."""
    before = dict(os.environ)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # with it, DeepSpeed's settings would be read and kept
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _arguments(args: Namespace) -> TrainingArguments:
    """transformers' TrainingArguments, which check themselves. No device and no DeepSpeed is started, the hub is not asked.

    Raises:
        LlavaRegionError: transformers refuses them.
    """
    import torch
    import transformers

    class Arguments(transformers.TrainingArguments):
        @property
        def device(self) -> torch.device:  # transformers' own starts the process group
            return torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")

    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(transformers.TrainingArguments) if f.init and hasattr(args, f.name)}
    values.update(deepspeed=None, push_to_hub_model_id=None)
    if args.dry_run and not torch.cuda.is_available() and not args.use_cpu:  # the GPUs are elsewhere
        values.update(fp16=False, fp16_full_eval=False, bf16=False, bf16_full_eval=False, tf32=None)
    try:
        return Arguments(**values)
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as e:
        raise LlavaRegionError(f"transformers' trainer refuses these flags: {e}; change them") from e


def trains_on_cpu(args: Namespace) -> bool:
    """Whether this run trains on the CPU. A dry run that is not told to use it is for GPUs, which may be elsewhere."""
    import torch

    return bool(args.use_cpu or args.no_cuda or not (args.dry_run or torch.cuda.is_available()))


@functools.cache
def computes_fp16_on_cpu() -> bool:
    """Whether torch can run a vision tower in fp16 on a CPU: 2.1 cannot."""
    import torch

    one = torch.zeros(1, 1, 1, 1, dtype=torch.float16)
    try:
        torch.nn.functional.conv2d(one, one)
    except RuntimeError:
        return False
    return True


def _check_optimizer(arguments: TrainingArguments) -> None:
    """Look up the optimizer's class, as the trainer does before its first step."""
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    optim = OptimizerNames(arguments.optim).value
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, TypeError, ImportError, RuntimeError) as e:
        raise LlavaRegionError(f"--optim {optim} cannot be used here: {e}; the default is adamw_torch") from e


def _check_schedule(arguments: TrainingArguments) -> None:
    """Build the learning rate's schedule, as the trainer does before its first step, for a parameter that stands for all."""
    import torch
    from transformers import SchedulerType, get_scheduler

    name, total = SchedulerType(arguments.lr_scheduler_type), max(arguments.max_steps, 0)
    settings = getattr(arguments, "lr_scheduler_kwargs", None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    try:
        schedule = get_scheduler(
            name, optimizer, arguments.get_warmup_steps(total or 100), total or 100,
            **({"scheduler_specific_kwargs": settings} if settings else {}),
        )  # fmt: skip
    except (ValueError, TypeError, ArithmeticError) as e:  # inverse_sqrt without a warm-up divides by zero
        raise LlavaRegionError(f"--lr_scheduler_type {name.value} does not go with the other flags: {e}; change one of them") from e
    if total == 1 and schedule.get_last_lr() == [0.0]:
        raise LlavaRegionError("--max_steps 1 is its whole warm-up, at a learning rate of 0; leave --warmup_ratio and --warmup_steps out")
