"""`llava-region score`: the file it writes, what it refuses, interrupted and resumed runs, several processes, and training by it."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_region import cli
from llava_region.errors import LlavaRegionError
from llava_region.region import Region
from llava_region.scores import pass_over_data
from llava_region.scores.metrics import METRICS
from llava_region.scores.score import Options
from tests.helpers.scores_reference import mixed_records
from tests.helpers.training_runs import LORA, environment, llava_flags

ACTIVATIONS = "block_influence,multimodal_block_influence,angular_distance,image_attention"
STORED = [*METRICS[:5], "parameter_change_norm", "parameter_change_l1", METRICS[5]]


def flags(tiny, out, *more, data=None, **changes) -> list[str]:
    """Flags of a run over 12 records, in batches of 2."""
    options = {"data": data or tiny.data, "image-folder": tiny.images, "limit": 12, "batch-size": 2, "out": out, **changes}
    return [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))] + list(more)


def run(*argv) -> int:
    return cli.main(["score", *map(str, argv)])


@pytest.fixture(scope="module")
def whole(tiny, llava_checkpoint, tmp_path_factory) -> Path:
    """All metrics of the checkpoint."""
    out = tmp_path_factory.mktemp("scores") / "scores.json"
    assert run(llava_checkpoint, *flags(tiny, out, base=tiny.backbone)) == 0
    return out


def scores(path) -> dict[str, list[float]]:
    return {name: metric["scores"] for name, metric in json.loads(Path(path).read_text())["metrics"].items()}


def same_scores(a, b, tolerance=1e-12):
    samples = [{name: metric["samples"] for name, metric in json.loads(Path(path).read_text())["metrics"].items()} for path in (a, b)]
    assert samples[0] == samples[1]
    a, b = scores(a), scores(b)
    for name in a:
        assert a[name] == pytest.approx(b[name], abs=tolerance), name


def test_the_file_says_what_was_scored_and_how(whole, tiny, llava_checkpoint):
    data = json.loads(whole.read_text())
    assert data["num_layers"] == 8 and data["samples"] == 12
    assert data["model"]["folder"] == str(llava_checkpoint) and data["base"]["folder"] == str(tiny.backbone)
    assert data["data"] == [
        {"file": str(tiny.data), "sha256": hashlib.sha256(tiny.data.read_bytes()).hexdigest(), "records": 72, "used": 12}
    ]
    assert list(data["metrics"]) == STORED
    for metric in data["metrics"].values():
        assert len(metric["scores"]) == 8 and metric["options"]
    images = data["metrics"]["image_attention"]["samples"]
    assert 0 < images < 12 and data["metrics"]["block_influence"]["samples"] == 12
    assert data["metrics"]["parameter_change"]["options"].keys() == {"form", "eps", "masked", "elements"}
    assert data["metrics"]["block_influence"]["options"]["dtype"] == "float32"
    assert [len(data["instances"][0][key]) for key in ("records", "scores")] == [images, images]
    assert all(data["correlation"][name][name] == pytest.approx(1) for name in STORED)
    a, b = (torch.tensor(data["metrics"][name]["scores"]).argsort().argsort().double() for name in STORED[:2])
    assert data["correlation"][STORED[0]][STORED[1]] == pytest.approx(torch.corrcoef(torch.stack([a, b]))[0, 1].item())
    assert not list(whole.parent.glob("*.partial*"))


def test_tune_layers_reads_it(whole):
    values = scores(whole)["image_attention"]
    region = Region.parse(f"{whole}:image_attention:3", 8)
    assert set(region.layers) == set(sorted(range(8), key=lambda layer: -values[layer])[:3])
    assert region.to_dict()["scores"]["sha256"] == hashlib.sha256(whole.read_bytes()).hexdigest()
    spread = Region.parse(f"{whole}:image_attention:4:spread", 8)
    assert spread.layers == tuple(max((i, i + 1), key=lambda layer: values[layer]) for i in (0, 2, 4, 6))


def test_a_model_trains_by_it(whole, tiny, tmp_path):
    pytest.importorskip("llava.train.train")
    from llava_region import train

    out, spec = tmp_path / "run", f"{whole}:image_attention:2"
    assert train.main(["llava", *llava_flags(tiny, out, **LORA), "--tune_layers", spec]) == 0
    region = json.loads((out / "region.json").read_text())
    assert region["layers"] == list(Region.parse(spec, 8).layers) and region["spec"] == spec
    assert region["scores"]["metric"] == "image_attention"
    assert region["scores"]["sha256"] == hashlib.sha256(whole.read_bytes()).hexdigest()


def test_tables_and_figures(whole, llava_checkpoint, tiny, tmp_path, capsys):
    """The table names the layers that --tune_layers would take; a figure for each metric and the heat map."""
    out = tmp_path / "scores.json"
    argv = flags(tiny, out, "--plot", tmp_path / "figures", "--top", "3", "--spread", metrics="image_attention,angular_distance")
    assert run(llava_checkpoint, *argv) == 0
    printed = capsys.readouterr().out
    for metric in ("angular_distance", "image_attention"):
        layers = Region.parse(f"{out}:{metric}:3:spread", 8).layers
        line = next(line for line in printed.splitlines() if line.strip().startswith(metric))
        assert f" {','.join(map(str, layers))} " in line
        ranked = " ".join(map(str, sorted(range(8), key=lambda layer: -scores(out)[metric][layer])))
        assert ranked[:5] in printed
    assert "rank correlation" in printed
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"angular_distance.png", "image_attention.png", "image_attention_instances.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "figures").iterdir())


def test_json_and_a_lora_run_scored_with_the_base_it_names(tiny, lora_run, tmp_path, capsys):
    assert run(lora_run, *flags(tiny, tmp_path / "s.json", "--json", limit=4)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["metrics"]) == STORED and "instances" not in printed
    assert printed["top"]["parameter_change"] == [1, 6]
    for name in ("parameter_change", "angular_distance_weights"):
        assert [value > 0 for value in printed["metrics"][name]["scores"]] == [layer in (1, 6) for layer in range(8)]


def test_a_lora_run_scores_as_its_merged_model(tiny, lora_run, tmp_path):
    merged = tmp_path / "merged"
    assert cli.main(["merge", str(lora_run), "--out", str(merged), "--base", str(tiny.backbone)]) == 0
    for folder, base, out in ((lora_run, tiny.backbone, "a.json"), (merged, tiny.backbone, "b.json")):
        assert run(folder, *flags(tiny, tmp_path / out, base=base, limit=6)) == 0
    same_scores(tmp_path / "a.json", tmp_path / "b.json", 1e-5)


def test_a_list_of_images_under_one_prompt(tiny, llava_checkpoint, tmp_path):
    images = tmp_path / "images.json"
    images.write_text(json.dumps(["0.png", {"image": "1.png"}, {"image": ["2.png", "3.png"]}]))
    prompt = "Please describe this image in detail."
    argv = flags(tiny, tmp_path / "s.json", data=images, prompt=prompt, metrics="block_influence,image_attention")
    assert run(llava_checkpoint, *argv) == 0
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["metrics"]["block_influence"]["samples"] == 3
    assert data["metrics"]["block_influence"]["options"]["prompt"] == prompt


def test_a_plain_language_model_without_images(tiny, tmp_path):
    data = tmp_path / "text.json"
    data.write_text(json.dumps([record for record in mixed_records(["x"] * 6) if "image" not in record]))
    assert run(tiny.backbone, *flags(tiny, tmp_path / "s.json", data=data, metrics="block_influence,angular_distance")) == 0
    assert set(scores(tmp_path / "s.json")) == {"block_influence", "angular_distance"}


def test_several_data_files(tiny, llava_checkpoint, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(mixed_records([f"{i}.png" for i in range(6)])))
    argv = flags(tiny, tmp_path / "s.json", "--data", other, "--instances", "2", metrics="image_attention")
    assert run(llava_checkpoint, *argv) == 0
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["samples"] == 12 + 7 and [d["used"] for d in data["data"]] == [12, 7]
    assert data["instances"][1]["records"] == [0, 1] and len(data["instances"][0]["records"]) <= 2


def stop_after(monkeypatch, batches: int, number=signal.SIGINT):
    """Ctrl-C while a batch runs."""
    original, seen = pass_over_data.measure, []

    def measure(*args):
        seen.append(1)
        if len(seen) == batches:
            os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(pass_over_data, "measure", measure)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed(tiny, llava_checkpoint, whole, tmp_path, monkeypatch, capsys, number):
    out = tmp_path / "scores.json"
    argv = [llava_checkpoint, *flags(tiny, out, base=tiny.backbone)]
    with monkeypatch.context() as patched:
        stop_after(patched, 2, number)
        assert run(*argv) == 128 + number
    assert "interrupted after 4 of 12 samples" in capsys.readouterr().err
    assert not out.exists() and (tmp_path / "scores.json.partial").is_file()
    assert run(*argv) == 2 and "--resume" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        stop_after(patched, 3, number)
        assert run(*argv, "--resume") == 128 + number
    assert "after 10 of 12" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        stop_after(patched, 2)  # one batch is left: a second one would stop it again
        assert run(*argv, "--resume") == 0
    same_scores(out, whole)
    instances = [sorted(json.loads(path.read_text())["instances"][0]["records"]) for path in (out, whole)]
    assert instances[0] == instances[1]
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("change", ["batch-size", "limit", "data", "metrics", "model"])
def test_a_resume_with_anything_else_is_refused(tiny, llava_checkpoint, tmp_path, monkeypatch, capsys, change):
    out, model, data = tmp_path / "scores.json", llava_checkpoint, tmp_path / "data.json"
    data.write_text(tiny.data.read_text())
    argv = {"data": data, "metrics": "block_influence", "limit": 8}
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        assert run(model, *flags(tiny, out, **argv)) == 130
    before = (tmp_path / "scores.json.partial").read_bytes()
    if change == "data":
        data.write_text(data.read_text() + " ")
    elif change == "model":
        model = Path(shutil.copytree(llava_checkpoint, tmp_path / "llava-other"))
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)  # the weights' last byte, and with the same size and times
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        times = (llava_checkpoint / "model.safetensors").stat()
        os.utime(model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        argv |= {"batch-size": 4} if change == "batch-size" else {"limit": 9} if change == "limit" else {"metrics": "angular_distance"}
    assert run(model, *flags(tiny, out, "--resume", **argv)) == 2
    named = "data" if change in ("data", "limit") else change if change == "model" else "options"
    assert f"made with another {named}" in capsys.readouterr().err
    assert (tmp_path / "scores.json.partial").read_bytes() == before
    assert run(model, *flags(tiny, out, "--force", **argv)) == 0


def test_a_copy_of_the_model_on_another_disk_goes_on(tiny, llava_checkpoint, whole, tmp_path, monkeypatch):
    """What a model is does not depend on where it lies or when its files were written."""
    out = tmp_path / "scores.json"
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert run(llava_checkpoint, *flags(tiny, out, base=tiny.backbone)) == 130
    model, base = (shutil.copytree(path, tmp_path / path.name, copy_function=shutil.copyfile) for path in (llava_checkpoint, tiny.backbone))
    assert (model / "model.safetensors").stat().st_mtime_ns != (llava_checkpoint / "model.safetensors").stat().st_mtime_ns
    assert run(model, *flags(tiny, out, "--resume", base=base)) == 0
    same_scores(out, whole)
    written, expected = (json.loads(path.read_text()) for path in (out, whole))
    for name, folder in (("model", model), ("base", base)):
        assert written[name] == {"folder": str(folder), "fingerprint": expected[name]["fingerprint"]}


def test_what_an_older_version_left_is_refused_with_the_reason(tiny, llava_checkpoint, tmp_path, monkeypatch, capsys):
    """It told models apart by the times of their files, so it is not certain that the files are the same."""
    out = tmp_path / "scores.json"
    argv = [llava_checkpoint, *flags(tiny, out, metrics="block_influence", limit=8)]
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        assert run(*argv) == 130
    partial = tmp_path / "scores.json.partial"
    data = json.loads(partial.read_text())
    data["identity"]["model"]["fingerprint"] = hashlib.sha256(b"names, sizes and times").hexdigest()
    partial.write_text(json.dumps(data))
    assert run(*argv, "--resume") == 2
    assert "or by a version that told models apart by the times of their files" in capsys.readouterr().err


def test_a_damaged_partial_file_is_refused(tiny, llava_checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "scores.json"
    argv = flags(tiny, out, metrics="block_influence", limit=8)
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        assert run(llava_checkpoint, *argv) == 130
    partial = tmp_path / "scores.json.partial"
    data = json.loads(partial.read_text())
    partial.write_text(json.dumps({**data, "table": [[1.0]]}))
    assert run(llava_checkpoint, *argv, "--resume") == 2
    assert "damaged" in capsys.readouterr().err


def torchrun(script_or_module: list, argv: list) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script_or_module, "score", *argv]
    environ = environment(CUDA_VISIBLE_DEVICES="")
    return subprocess.run([str(part) for part in command], env=environ, capture_output=True, text=True, timeout=300)


def test_two_processes_find_the_same_as_one(tiny, llava_checkpoint, whole, tmp_path):
    out = tmp_path / "scores.json"
    done = torchrun(["-m", "llava_region"], [llava_checkpoint, *flags(tiny, out, base=tiny.backbone)])
    assert done.returncode == 0, done.stderr[-3000:]
    same_scores(out, whole)
    assert json.loads(out.read_text())["instances"] == json.loads(whole.read_text())["instances"]
    assert done.stdout.count("image_attention") == 2, "only the first process prints its two tables"
    assert not list(tmp_path.glob("*.partial*"))


STOPPED = """
import os, signal, sys
from llava_region import cli
from llava_region.scores import pass_over_data

original, seen = pass_over_data.measure, []

def measure(*args):
    seen.append(1)
    if len(seen) == 2 - int(os.environ["RANK"]):
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*args)

pass_over_data.measure = measure
sys.exit(cli.main(sys.argv[1:]))
"""


def test_two_processes_interrupted_and_resumed_by_one(tiny, llava_checkpoint, whole, tmp_path, capsys):
    out, script = tmp_path / "scores.json", tmp_path / "stopped.py"
    script.write_text(STOPPED)
    argv = [llava_checkpoint, *flags(tiny, out, base=tiny.backbone)]
    done = torchrun([script], argv)
    assert done.returncode != 0 and not out.exists()
    parts = {path.name: json.loads(path.read_text())["done"] for path in tmp_path.glob("*.partial*")}
    assert parts == {"scores.json.partial": [0, 2], "scores.json.partial.1": [1]}
    assert run(*argv, "--resume") == 0
    same_scores(out, whole)
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": "nonsense"}, "unknown metric 'nonsense'"),
        ({"out": "scores.txt"}, "has to end in .json"),
        ({"limit": 0}, "--limit is '"),
        ({"batch-size": 0}, "--batch-size is '"),
        ({"instances": -1}, "--instances is '"),
        ({"top": 9}, "--top is 9; allowed: 1 to 8"),
        ({"eps": -1}, "--eps is '"),
        ({"eps": "nan"}, "--eps"),
        ({"dtype": "int3"}, "unknown dtype 'int3'"),
        ({"image-folder": None}, "--image-folder"),
        ({"image-folder": "nowhere"}, "images are missing"),
        ({"metrics": "parameter_change"}, "give it with --base"),
        ({"base": "nowhere"}, "there is no folder nowhere"),
        ({"data": None, "metrics": ACTIVATIONS}, "give --data"),
        ({"data": "nowhere.json", "metrics": ACTIVATIONS}, "cannot read nowhere.json"),
        ({"model": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tiny, llava_checkpoint, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llava_region.scores.score.load", lambda *a, **k: pytest.fail("weights were loaded"))
    options = {"metrics": "block_influence", "data": tiny.data, "image-folder": tiny.images, "out": "scores.json", **changes}
    model = options.pop("model", llava_checkpoint)
    assert run(model, *(part for name, value in options.items() if value is not None for part in (f"--{name}", value))) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"limit": 0}, "--limit is 0; allowed: 1 or more"),
        ({"batch_size": 0}, "--batch-size is 0; allowed: 1 or more"),
        ({"instances": -1}, "--instances is -1; allowed: 0 or more"),
        ({"eps": -1}, "--eps is -1; allowed: 0 or more"),
        ({"eps": math.nan}, "--eps is nan; allowed: 0 or more"),
    ],
)
def test_code_that_calls_score_is_held_to_the_same_bounds(bad, message):
    with pytest.raises(LlavaRegionError, match=message):
        Options(**bad)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "0.png"}, "has no 'conversations'; give --prompt"),
        ({"image": "0.png", "conversations": [{"from": "human", "value": "no place"}]}, "1 images and 0 times <image>"),
        (7, "is a int"),
        ({"conversations": [{"from": "human", "value": "text only"}]}, "no record has an image, which multimodal_block_influence needs"),
    ],
)
def test_bad_records_are_refused(tiny, llava_checkpoint, tmp_path, capsys, record, message):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([record]))
    assert run(llava_checkpoint, *flags(tiny, tmp_path / "s.json", data=data, metrics=ACTIVATIONS)) == 2
    assert message in capsys.readouterr().err


def test_a_broken_image_is_named_and_what_was_found_is_kept(tiny, llava_checkpoint, whole, tmp_path, capsys):
    for name in ("0.png", "1.png", "broken.png"):
        (tmp_path / name).write_bytes((tiny.images / name).read_bytes() if name != "broken.png" else b"not an image")
    data = tmp_path / "data.json"
    data.write_text(json.dumps(["0.png", "1.png", "broken.png"]))
    changes = {"prompt": "What is this?", "metrics": "block_influence", "image-folder": tmp_path, "batch-size": 1}
    argv = flags(tiny, tmp_path / "s.json", data=data, **changes)
    assert run(llava_checkpoint, *argv) == 2
    assert "broken.png" in capsys.readouterr().err and not (tmp_path / "s.json").exists()
    assert json.loads((tmp_path / "s.json.partial").read_text())["done"] == [0, 1]
    (tmp_path / "broken.png").write_bytes((tiny.images / "2.png").read_bytes())
    assert run(llava_checkpoint, *argv, "--resume") == 0
    assert json.loads((tmp_path / "s.json").read_text())["metrics"]["block_influence"]["samples"] == 3


def test_an_output_that_exists_is_kept(tiny, llava_checkpoint, whole, capsys):
    before = whole.read_bytes()
    assert run(llava_checkpoint, *flags(tiny, whole, metrics="block_influence")) == 2
    assert "exists" in capsys.readouterr().err and whole.read_bytes() == before
