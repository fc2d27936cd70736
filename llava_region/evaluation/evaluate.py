"""Put benchmarks to a model and score the answers (paper, section 3.2): greedy, batched, sharded over processes, resumable.

`evaluate` writes the answers (see `answers_folder`) and `OUT/results.json`, which `llava-region report` reads:

    {"model": the model's folder, "base": a LoRA run's base or null, "upstream": "llava" | "bunny" | null, "template", "dtype",
     "num_layers": decoder layers it has now, "region": its region.json or null, "llava_region_version",
     "tasks": {"gqa": {"score": percent, "n": questions, "missing": 0, "unreadable_images": 0, "cut_prompts": 0,
                       ...every other metric of the task..., "limit": only where fewer questions were asked than there are}}}

A later run on further tasks adds to it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region import __version__, locks, processes, tasks
from llava_region.checkpoints.identity import weights_digest
from llava_region.checkpoints.model_source import ModelLike, ModelSource
from llava_region.data.images import UnreadableImage, prefetch, read_pixels
from llava_region.errors import LlavaRegionError
from llava_region.evaluation.answers_folder import (
    UNREADABLE,
    Answers,
    check_settings,
    questions_digest,
    unreadable,
    write_settings,
)
from llava_region.files import read_json, write_json
from llava_region.progress import progress_bar
from llava_region.run_files import RESULTS_FILE
from llava_region.tasks import Example, Task
from llava_region.tasks import answers as answers_file

if TYPE_CHECKING:
    import torch

    from llava_region.models.loaded import LoadedModel

CUT = "cut_prompt"  # key of a row's metadata: tokens that did not fit the model's maximum length


def score_predictions(name: str, predictions: Path, data_root: Path) -> dict[str, Any]:
    """Score an answers file in LLaVA's form, whoever wrote it; no model, no torch, no images.

    Raises:
        LlavaRegionError: unknown task, missing or malformed files, or answers to none of its questions.
    """
    task = tasks.load(name)
    tasks.check([name], data_root, images=False)
    rows = answers_file.read(predictions)
    examples = task.examples(data_root)
    return task.score(examples, answers_file.pair(task, examples, rows))


def evaluate(
    model: ModelLike, names: Sequence[str], data_root: str | Path, out: str | Path, *, base: ModelLike | None = None, batch_size: int = 16,
    limit: int | None = None, workers: int = 4, device: str | None = None, dtype: str | None = None, template: str | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Put the tasks to a model and score its answers. Under `torchrun` each process answers a part; the first one scores.

    Answers already in `out` are kept: a killed run goes on where it was. Each question is in the same batch whatever was
    answered before and however many processes there are, so the answers are the same, too.

    Args:
        model: LLaVA or Bunny model, LoRA run, or plain language model (text tasks only).
        base: what a LoRA run was trained on; None: the model that the run names.
        limit: ask only the first questions of each task.
        batch_size: questions per batch; halved while one does not fit the GPU's memory.
        workers: threads that read images.

    Returns:
        {task: its result}, as in `results.json`; in processes other than the first {}.

    Raises:
        LlavaRegionError: bad input, before weights load; or `out` holds answers of another model or to other questions.
    """
    from llava_region.models.loading import base_to_load, check_base, load

    with locks.held_by_run(out, wait=locks.STALE):
        data_root, out = Path(data_root), Path(out)
        found = {name: tasks.load(name) for name in names}
        tasks.check(list(names), data_root)
        source = ModelSource.of(model)
        on = base_to_load(source, base)
        check_base(source, on)
        seeing = [name for name, task in found.items() if task.visual]
        if seeing and source.upstream is None:
            raise LlavaRegionError(
                f"{source} is a language model without a vision tower, so it cannot do {', '.join(seeing)}; allowed: mmlu, bbh"
            )
        examples = {name: task.examples(data_root) for name, task in found.items()}
        digests = {name: questions_digest(task, examples[name]) for name, task in found.items()}
        settings: dict[str, Any] = {"weights": weights_digest(source, *([on] if on else [])), "tasks": digests}
        loaded = load(source, on, device=processes.device(device), dtype=dtype, template=template)
        settings.update(template=loaded.template, dtype=str(loaded.model.dtype).removeprefix("torch."))
        _agree(out, settings)
        record = _record(loaded, source, on, settings["dtype"])
        results = {}
        for name, task in found.items():
            rows = _answer_task(loaded, task, examples[name], out, batch_size, limit, workers)
            if processes.is_first():
                results[name] = _score(task, examples[name], rows, limit)
                _write_results(out, record, results)
    return results


def _agree(out: Path, settings: Mapping[str, Any]) -> None:
    """All processes check the settings in `out` before the first one writes them."""
    check_settings(out, settings)
    processes.barrier()
    if processes.is_first():
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise LlavaRegionError(f"cannot write {out}: {e.strerror}") from e
        write_settings(out, settings)
    processes.barrier()


def _record(loaded: LoadedModel, source: ModelSource, base: ModelSource | None, dtype: str) -> dict[str, Any]:
    """What `results.json` says about the model."""
    return {
        "model": str(source.path.resolve()), "base": str(base.path.resolve()) if base else None, "upstream": loaded.upstream,
        "template": loaded.template, "dtype": dtype, "num_layers": loaded.num_layers, "region": source.region,
        "llava_region_version": __version__,
    }  # fmt: skip


def _answer_task(
    loaded: LoadedModel, task: Task, examples: list[Example], out: Path, batch_size: int, limit: int | None, workers: int
) -> dict[Hashable, dict]:
    """Answer what is not answered yet; returns all rows by key, in the first process."""
    answers = Answers(out, task, processes.rank())
    if processes.is_first():
        answers.drop_cut_lines()
    processes.barrier()
    done = {key for key, row in answers.rows().items() if not unreadable(row)}
    processes.barrier()  # no process appends while another still reads
    own = processes.share(batches(examples[:limit], batch_size))
    todo = [batch for batch in own if any(task.key_of(example) not in done for example in batch)]
    with progress_bar(task.title, sum(map(len, own)), enabled=processes.is_first()) as advance:
        advance(sum(map(len, own)) - sum(map(len, todo)))
        for batch, rows in _answer_batches(loaded, task, todo, workers):
            answers.append([row for row in rows if task.key(row) not in done])
            advance(len(batch))
    processes.barrier()
    return answers.merge(examples) if processes.is_first() else {}


def batches(examples: list[Example], batch_size: int) -> list[list[Example]]:
    """Questions with an image first, long prompts first: what fits at the start fits to the end, and padding is short."""
    ordered = sorted(examples, key=lambda example: (example.image is None, -len(example.prompt)))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _answer_batches(
    loaded: LoadedModel, task: Task, todo: list[list[Example]], workers: int
) -> Iterator[tuple[list[Example], list[dict[str, Any]]]]:
    """Each batch with its rows: an empty answer where the image could not be read."""
    name = loaded.folder.name
    model_id = f"{loaded.folder.resolve().parent.name}_{name}" if name.startswith("checkpoint-") else name  # as upstream names it
    for batch, pictures in prefetch(lambda batch: [_picture(loaded, task, example) for example in batch], todo, workers):
        shown = [(example, picture) for example, picture in zip(batch, pictures, strict=True) if not isinstance(picture, str)]
        prompts = [_fit(loaded, task, example) for example, _ in shown]
        texts = _generate(loaded, [ids for ids, _ in prompts], [picture for _, picture in shown], task.max_new_tokens) if shown else []
        answered = {id(example): (text, cut) for (example, _), text, (_, cut) in zip(shown, texts, prompts, strict=True)}
        rows = []
        for example, picture in zip(batch, pictures, strict=True):
            text, cut = answered.get(id(example), ("", 0))
            metadata = {UNREADABLE: picture} if isinstance(picture, str) else {CUT: cut} if cut else {}
            rows.append({**example.row(text), "model_id": model_id, "metadata": metadata})
        yield batch, rows


def _picture(loaded: LoadedModel, task: Task, example: Example) -> list[torch.Tensor] | str:
    """The example's images, [] or [(3, H, W)], or why there is none to show."""
    if example.image is None:
        return []
    try:
        return [read_pixels(example.image, partial(loaded.pixel_values, task=task.name))]
    except UnreadableImage as e:
        return " ".join(str(e).split())


def _fit(loaded: LoadedModel, task: Task, example: Example) -> tuple[torch.Tensor, int]:
    """Ids (T,) of the example's prompt, with fewer shots where it is too long, and how many tokens still do not fit."""
    images = int(example.image is not None)
    text: str | None = example.prompt
    while True:
        ids = loaded.input_ids(loaded.prompt(text, images))
        excess = max(0, len(ids) + images * (loaded.image_tokens - 1) - (loaded.max_length or len(ids) + images * loaded.image_tokens))
        shorter = task.shorten(text) if excess and task.shorten else None
        if shorter is None:
            return ids, excess
        text = shorter


def _generate(loaded: LoadedModel, ids: list[torch.Tensor], pictures: list[list[torch.Tensor]], max_new_tokens: int) -> list[str]:
    """Answers to a batch; in halves where it does not fit the GPU's memory."""
    import torch

    try:
        return loaded.generate(ids, pictures, max_new_tokens)
    except torch.cuda.OutOfMemoryError as e:
        if len(ids) == 1:
            raise LlavaRegionError(
                "the GPU's memory does not hold the model and a single question; give --dtype bfloat16 or a larger GPU"
            ) from e
    torch.cuda.empty_cache()
    half = len(ids) // 2
    return [
        text
        for part in (slice(0, half), slice(half, None))
        for text in _generate(loaded, ids[part], pictures[part], max_new_tokens)
    ]  # fmt: skip


def _score(task: Task, examples: list[Example], rows: Mapping[Hashable, dict], limit: int | None) -> dict[str, Any]:
    asked = examples[:limit]
    of_asked = [rows[key] for key in map(task.key_of, asked) if key in rows]
    result = task.score(asked, answers_file.pair(task, asked, of_asked))
    result["unreadable_images"] = sum(map(unreadable, of_asked))
    result["cut_prompts"] = sum(CUT in row["metadata"] for row in of_asked)
    return {**result, "limit": limit} if len(asked) < len(examples) else result


def _write_results(out: Path, record: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    path = out / RESULTS_FILE
    before = read_json(path).get("tasks", {}) if path.is_file() else {}
    write_json(path, {**record, "tasks": {**before, **results}})
