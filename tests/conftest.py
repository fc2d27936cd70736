"""Fixtures shared by all tests: tiny models on disk, made once a session."""

import os
import signal
import sys

# DeepSpeed compiles an extension at its first run: one for each environment, as two versions would undo each other's
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")  # the launchers leave --report_to to the user, and wandb is installed here

import pytest

from llava_region.data.tiny import TinyFiles, write_tiny

# a shell without job control starts what it runs in the background with Ctrl-C ignored, and children would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyFiles:
    """A random backbone of 8 decoder layers, a CLIP tower, and easy-vqa data. Never write into it."""
    pytest.importorskip("easy_vqa")
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def llava_checkpoint(tiny, tmp_path_factory):
    """A full LLaVA checkpoint folder (`llava-tiny`), projector included, saved by upstream's own classes. Never write into it."""
    pytest.importorskip("llava.model")
    from tests.helpers.finished_models import write_llava_checkpoint

    return write_llava_checkpoint(tiny, tmp_path_factory.mktemp("full") / "llava-tiny")


@pytest.fixture(scope="session")
def lora_run(tiny, tmp_path_factory):
    """Output folder of a LoRA run on layers 1 and 6 (name contains `lora`), in upstream's layout. Base: `tiny.backbone`."""
    pytest.importorskip("llava.model")
    from tests.helpers.finished_models import write_lora_run

    return write_lora_run(tiny, tmp_path_factory.mktemp("run") / "llava-tiny-lora", layers=(1, 6))
