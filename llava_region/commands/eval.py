"""`llava-region eval`: the paper's benchmarks, put to a model or scored from its answers."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import typer


def command(
    model: str = typer.Argument(None, help="A LLaVA or Bunny model, merged or pruned; a LoRA run; a plain LLM for mmlu and bbh."),
    task: str = typer.Option(None, "--task", help="Names with commas between, or all. See --list."),
    data_root: Path = typer.Option(None, "--data-root", help="Folder with the official files, one folder per task. See --list."),
    out: Path = typer.Option(None, "--out", help="Folder for the answers and results.json. What it already holds is not asked again."),
    base: str = typer.Option(None, "--base", help="For a LoRA run: the model it was trained on. Default: the one the run names."),
    predictions: Path = typer.Option(None, "--predictions", help="Score this answers file (LLaVA's jsonl) without a model."),
    batch_size: int = typer.Option(16, "--batch-size", min=1, help="Questions per batch; halved while a batch does not fit."),
    limit: int = typer.Option(None, "--limit", min=1, help="Ask only the first questions of each task; the report calls that incomplete."),
    template: str = typer.Option(None, "--template", help="Conversation template. Default: the model's own."),
    device: str = typer.Option(None, "--device", help="cuda, cuda:1, cpu. Default: cuda if there is any."),
    dtype: str = typer.Option(None, "--dtype", help="float32, bfloat16 or float16. Default: float32 on CPU, else the model's own."),
    workers: int = typer.Option(4, "--workers", min=1, help="Threads that read images."),
    list_tasks: bool = typer.Option(False, "--list", help="List the tasks, the files each needs, and where to get them."),
    as_json: bool = typer.Option(False, "--json", help='Print {"gqa": {"score", "n", ...}}, the score in percent.'),
) -> None:
    """Run benchmarks with greedy decoding and score them, or score an answers file.

    Several GPUs: torchrun --nproc_per_node 8 -m llava_region eval ... A killed run goes on where it was when started again.
    """
    from llava_region import processes, tasks
    from llava_region.errors import LlavaRegionError
    from llava_region.evaluation.evaluate import evaluate, score_predictions

    if list_tasks:
        _list(tasks, as_json)
        return
    for value, option in ((task, "--task"), (data_root, "--data-root")):
        if value is None:
            raise LlavaRegionError(f"{option} is missing; 'llava-region eval --list' shows the tasks and their files")
    names = tasks.parse_names(task)
    if predictions:
        if model or out or len(names) != 1:
            raise LlavaRegionError(
                "--predictions scores one answers file: it takes one --task and --data-root, and neither MODEL nor --out"
            )
        results = {names[0]: score_predictions(names[0], predictions, data_root)}
    else:
        if not model or not out:
            raise LlavaRegionError("give a MODEL and --out, or --predictions with an answers file to score")
        results = evaluate(
            model, names, data_root, out, base=base, batch_size=batch_size, limit=limit, workers=workers, device=device, dtype=dtype,
            template=template,
        )  # fmt: skip
    if processes.is_first():
        print(json.dumps(results)) if as_json else _show(results)


def _list(tasks: ModuleType, as_json: bool) -> None:
    found = [tasks.load(name) for name in tasks.NAMES]
    if as_json:
        files = {task.name: [{"path": file.path, "source": file.source} for file in task.files] for task in found}
        print(json.dumps({task.name: {"title": task.title, "split": task.split, "files": files[task.name]} for task in found}))
        return
    for task in found:
        print(f"{task.name}: {task.title}, {task.split}")
        for file in task.files:
            print(f"    {file.path}\n        {file.source}")


def _show(results: dict[str, dict[str, Any]]) -> None:
    print(f"{'task':<12}{'score':>8}{'n':>9}  metric")
    for name, result in results.items():
        print(f"{name:<12}{result['score']:>8.2f}{result['n']:>9,}  {result['metric']}")
        notes = {
            "missing": "questions without an answer, counted wrong",
            "unreadable_images": "images missing or corrupt, counted wrong (see 'metadata' in the answers)",
            "cut_prompts": "prompts longer than the model takes, cut at the end",
            "limit": "questions asked at most: no result to compare",
        }
        for key, text in notes.items():
            if result.get(key):
                print(f"{'':<12}{result[key]:>8,} {text}")
