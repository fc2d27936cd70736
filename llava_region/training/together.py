"""The start of a run, on which all its ranks agree before weights load: the same flags and data, one output folder, one checkpoint."""

from __future__ import annotations

import functools
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava_region import locks, processes
from llava_region.errors import LlavaRegionError
from llava_region.run_files import REGION_FILE
from llava_region.training.checkpoint_to_resume import check_asked, check_resumable
from llava_region.training.fingerprint import FREE, Fingerprint, check_same_run, path_flags, shortened

if TYPE_CHECKING:
    from llava_region.training.preflight import Preflight
    from llava_region.upstreams import Upstream

VISIBLE = 60.0  # seconds in which a network file system shows a file to every node
# Flags of `Preflight.args` that may differ between ranks; all others decide what is trained, or when the ranks wait for each other.
OWN = FREE - {"overwrite_output_dir", "resume_from_checkpoint", "tune_layers", "gradient_checkpointing", "load_best_model_at_end"}
OWN_BEGINNINGS = ("_", "hub_", "dry_run", "logging_dir")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Start:
    """How a run starts.

    Attributes:
        fingerprint: written into its checkpoints; checkpoint: it resumes from; None: it starts afresh.
    """

    fingerprint: Fingerprint
    checkpoint: Path | None


def on_all(work: Callable[[], Value]) -> Value:
    """Do something on every rank; if it fails on one, all of them raise. The processes have to be joined.

    Raises:
        LlavaRegionError: its own of each rank where it has one, else the first one's.
    """
    own: Exception | None = None
    value: Any = None
    try:
        value = work()
    except Exception as e:
        own = e
    problems = processes.gather(None if own is None else str(own) or type(own).__name__)
    if own is not None:
        raise own
    rank, problem = next(((rank, text) for rank, text in enumerate(problems) if text is not None), (0, None))
    if problem is not None:
        raise LlavaRegionError(problem if rank == 0 else f"rank {rank}: {problem}")
    return value


def on_first(work: Callable[[], Value]) -> Value:
    """Do something on the first rank; all get its value, or raise what it raised. The processes have to be joined.

    Raises:
        LlavaRegionError: of the first rank.
    """
    return processes.broadcast(on_all(lambda: work() if processes.is_first() else None))  # type: ignore[return-value]


@contextmanager
def started(upstream: Upstream, checked: Preflight) -> Iterator[Start]:
    """Agree on a run, and hold its output folder while it goes on. The processes may not be joined when the block begins.

    Raises:
        LlavaRegionError: on every rank: the ranks were given different flags or data, or see different output folders; another run
            writes there; or its last checkpoint is of another run.
    """
    args = checked.args
    with ExitStack() as held:
        with processes.joined():
            fingerprint = on_all(functools.partial(Fingerprint.of, upstream, checked))
            check_same_everywhere(checked, fingerprint)
            if not getattr(args, "save_on_each_node", False):
                check_shared(args.output_dir)
            # a job that was moved to another node may start before the one that it replaces has ended
            on_first(lambda: held.enter_context(locks.held(args.output_dir, wait=locks.STALE)))
            checkpoint = on_first(lambda: choose_checkpoint(checked, fingerprint))
            on_all(lambda: wait_until_seen(checkpoint / REGION_FILE) if checkpoint else None)
        yield Start(fingerprint, checkpoint)


def choose_checkpoint(checked: Preflight, fingerprint: Fingerprint) -> Path | None:
    """The checkpoint that a run resumes from, after a look at whether it is this run's.

    Raises:
        LlavaRegionError: it is of another run, or not whole.
    """
    args = checked.args
    checkpoint = check_resumable(args.output_dir, checked.region, checked.recipe.lora is not None, bool(args.deepspeed))
    check_asked(args.resume_from_checkpoint, checkpoint, args.output_dir)
    if checkpoint is not None:
        for line in check_same_run(checkpoint, fingerprint):
            print(f"note: {line}", flush=True)
    return checkpoint


def check_same_everywhere(checked: Preflight, fingerprint: Fingerprint) -> None:
    """Refuse ranks that were started with different flags, data or versions: they would train, each by its own. Collective.

    Raises:
        LlavaRegionError: names what differs, the rank, and both values.
    """
    paths = path_flags(checked.recipe)
    own = {
        **{f"--{name}": str(value) for name, value in vars(checked.args).items() if not _may_differ(name, paths)},
        **{f"the content of {name}": digest for name, digest in fingerprint.contents.items()},
        **{f"the version of {name}": number for name, number in fingerprint.versions.items()},
    }
    everyone = processes.gather((socket.gethostname(), own))
    first_host, first = everyone[0]
    for rank, (host, given) in enumerate(everyone):
        # the data is read by the first process of each node, the images' list by the first of all
        for name in sorted(first.keys() & given.keys()):
            if first[name] != given[name]:
                raise LlavaRegionError(
                    f"{name} is not the same on every rank: {shortened(first[name])} on rank 0 ({first_host}), "
                    f"{shortened(given[name])} on rank {rank} ({host}); start all nodes with the same"
                )


def _may_differ(name: str, paths: set[str]) -> bool:
    return name in OWN or name in paths or name.startswith(OWN_BEGINNINGS)


def check_shared(output_dir: str | Path) -> None:
    """Refuse an output folder that is not the same one on every node: only the first rank writes there, and all resume from it. Collective.

    Raises:
        LlavaRegionError: names the nodes that do not see what the first rank writes.
    """
    if processes.world_size() == processes.local_world_size():
        return
    token = on_first(lambda: _write_token(Path(output_dir).absolute()))
    seen = not processes.is_first_on_node() or _appears(Path(token))
    nodes = processes.gather((socket.gethostname(), seen))
    if processes.is_first():
        with suppress(FileNotFoundError):
            os.unlink(token)
    blind = sorted({host for host, sees in nodes if not sees})
    if blind:
        raise LlavaRegionError(
            f"--output_dir {output_dir} is not the same folder on every node: what rank 0 writes on {nodes[0][0]} is not seen on "
            f"{', '.join(blind)}; give a folder on a shared file system, or --save_on_each_node True"
        )


def _write_token(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    handle, token = tempfile.mkstemp(dir=existing, prefix=".llava_region-", suffix=".token")
    os.close(handle)
    return token


def wait_until_seen(path: Path) -> None:
    """Wait for a file that the first rank sees.

    Raises:
        LlavaRegionError: it does not appear.
    """
    if processes.is_first_on_node() and not _appears(path):
        raise LlavaRegionError(f"{path}, from which rank 0 resumes, is not seen on {socket.gethostname()}; copy it there, or remove it")


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + VISIBLE
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        with suppress(OSError):
            os.listdir(path.parent)  # makes a network file system look again
        time.sleep(0.2)
    return True
