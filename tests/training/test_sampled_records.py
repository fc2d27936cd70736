"""A sample of records is tokenised before weights load: what trains nothing is said, and refused where too much of it does."""

import json
import shutil

import pytest

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from llava_region import train as region_train
from llava_region.training.sampled_records import MOST_MASKED, choose
from tests.helpers.command_line import run
from tests.helpers.training_runs import LORA, llava_flags


@pytest.fixture
def checked(tiny, tmp_path, capsys, monkeypatch):
    """Train on records with changed flags up to where weights would load; returns (exit code, what was printed, error)."""
    import llava.train.train as upstream

    monkeypatch.setattr(upstream, "train", lambda attn_implementation=None: print("went on to train"))
    monkeypatch.setattr("llava_region.training.finish.finish", lambda run: None)

    def check(records, **changes):
        path = tmp_path / "data.json"
        path.write_text(json.dumps(records))
        flags = llava_flags(tiny, tmp_path / "out", **{**LORA, "data_path": path, **changes})
        return run(capsys, "llava", *flags, "--tune_layers", "1,6", main=region_train.main)

    return check


def sampled(ran) -> str:
    """The line about the sample of a run that went on to train."""
    assert ran.code == 0 and "went on to train" in ran.out, ran
    return next(line for line in ran.out.splitlines() if line.startswith("sample: "))


def refused(ran) -> str:
    assert ran.code == 2 and "went on to train" not in ran.out and ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran
    return ran.err


def record(question="<image>\nWhat is it?", answer="A circle", image="1.png", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**({"image": image} if image else {}), "conversations": turns, **more}


EMPTY, MARKED = record(answer=""), record(answer="It says ASSISTANT: me")
UNASKED = {"image": "1.png", "conversations": [{"from": "gpt", "value": "<image>\nA circle"}]}
UNANSWERED = {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}


@pytest.mark.parametrize(
    ("bad", "changes", "reason"),
    [
        (EMPTY, {}, "4 as an answer is empty or missing (record 0 (id 0), record 1 (id 1), record 2 (id 2), ...)"),
        (UNANSWERED, {}, "as an answer is empty or missing"),
        (UNASKED, {}, "as an answer is empty or missing"),
        (MARKED, {}, "as the text holds the template's own marks"),
        (record(answer="It ends with </s> here"), {}, "as the text holds the template's own marks"),
        (record(question="long " * 400, image=None), {}, "as the answers lie past --model_max_length 512"),
        (record(question="<image> " + "long " * 120), {"model_max_length": 128}, "as the answers lie past --model_max_length 128"),
        # fits without the image, whose 16 features take the answer's place: with CLIP's 576, LLaVA's own default of 512
        (record(), {"model_max_length": 110}, "as the answers lie past --model_max_length 110"),
        (record(), {"version": "mpt"}, "as --version does not fit the tokenizer"),
    ],
    ids=["empty", "unanswered", "unasked", "role", "end", "long text", "long image", "features", "template"],
)
def test_all_masked_is_refused_with_the_reason(checked, bad, changes, reason):
    line = refused(checked([{**bad, "id": i} for i in range(4)], **changes))
    assert "all 4 sampled records of" in line and reason in line
    assert "--check_records 0" not in line


def test_without_the_image_it_fits(checked):
    """The counterpart of `features` above."""
    assert "all have a label to train" in sampled(checked([record(question="What is it?", image=None)] * 4, model_max_length=110))


def test_some_masked_are_said_with_share_and_ids(checked):
    records = [record(id=f"r{i}") for i in range(20)]
    records[3], records[7], records[11] = {**EMPTY, "id": "e"}, {**MARKED, "id": "m"}, {**EMPTY, "id": 11}
    line = sampled(checked(records))
    assert "20 of 20 records: 3 (15.0%) have no label to train: " in line
    assert "2 as an answer is empty or missing (record 3 (id e), record 11 (id 11))" in line
    assert "1 as the text holds the template's own marks (record 7 (id m))" in line and "(3 reported by upstream)" in line


def test_half_may_be_masked_and_more_may_not(checked):
    good, half = record(), round(10 * MOST_MASKED)
    assert f"{half} (50.0%) have no label" in sampled(checked([EMPTY] * half + [good] * half))
    line = refused(checked([EMPTY] * (half + 1) + [good] * (half - 1)))
    assert "6 of 10 sampled records" in line and "allowed: 50%, or 10% where the template does not fit" in line
    ran = checked([EMPTY] * 10, check_records=0)
    assert ran.code == 0 and "went on to train" in ran.out and "sample" not in ran.out


def test_a_template_that_fits_only_one_kind_of_record(checked, monkeypatch):
    """With tokenizers older than 0.14, LLaVA counts one token too few in every round but the first: it masks all records of several."""
    import llava.train.train as upstream

    rounds = record()
    rounds["conversations"] = [*rounds["conversations"], *record(question="And its colour?", answer="Blue")["conversations"]]
    few, many = [record()] * 19 + [rounds], [record()] * 17 + [rounds] * 3
    assert "all have a label" in sampled(checked(many))
    monkeypatch.setattr(upstream, "IS_TOKENIZER_GREATER_THAN_0_14", False)
    assert "1 (5.0%) have no label to train: 1 as --version does not fit the tokenizer (record 19)" in sampled(checked(few))
    line = refused(checked(many))
    assert "3 of 20 sampled records" in line and "3 as --version does not fit the tokenizer (record 17, record 18, record 19)" in line


def test_lengths_and_images(checked):
    records = [record()] * 10 + [record(question="What is it?", image=None)] * 9 + [record(answer="long " * 500)]
    line = sampled(checked(records))
    assert "1 cut to 512; images per record: 0 in 9, 1 in 11" in line
    median, tail = (int(line.partition(name)[2].split(",")[0].replace(",", "")) for name in ("median ", "95% "))
    longest = int(line.partition("longest ")[2].split(", ")[0].replace(",", ""))
    assert median == tail < 512 < longest


def test_dry_run_shows_the_same_line_and_trains_nothing(checked):
    records = [record(), EMPTY]
    said = sampled(checked(records)).removeprefix("sample: ")
    ran = checked(records, dry_run=True)
    assert ran.code == 0 and "went on to train" not in ran.out
    assert next(line for line in ran.out.splitlines() if line.startswith("sample ")).split(maxsplit=1)[1] == said
    assert "all 2 sampled records" in refused(checked([EMPTY] * 2, dry_run=True))


def test_other_ranks_leave_it_to_the_first(checked, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    ran = checked([EMPTY] * 4)
    assert ran.code == 0 and "sample" not in ran.out


def test_what_upstream_cannot_tokenise_is_named(checked, tiny, tmp_path):
    """Its slow tokenizers but Llama's have no `legacy`, which training looks up at the second round, hours in."""
    from transformers import GPT2Tokenizer

    backbone = tmp_path / "gpt2"
    shutil.copytree(tiny.backbone, backbone, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *map(chr, range(33, 127)), *map(chr, range(161, 323))])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(backbone)
    rounds = record(id="two")
    rounds["conversations"] = rounds["conversations"] * 2
    rounds["conversations"][2] = {"from": "human", "value": "And?"}
    line = refused(checked([rounds], model_name_or_path=backbone))
    assert "record 0 (id two) of" in line and "cannot be tokenised as LLaVA does (" in line and "'legacy'" in line


def test_a_tokenizer_that_is_not_there(checked, tiny, tmp_path):
    """A run would end after it has loaded the weights."""
    backbone = tmp_path / "bare"
    shutil.copytree(tiny.backbone, backbone, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    line = refused(checked([record()], model_name_or_path=backbone))
    assert f"--model_name_or_path {backbone} holds no tokenizer" in line
    assert f"--model_name_or_path {backbone} holds no tokenizer" in refused(checked([record()], model_name_or_path=backbone, dry_run=True))


def test_numbers_that_are_none(checked):
    assert "--check_records -1 is negative; allowed: 0 (none) or more" in refused(checked([record()], check_records=-1))


def test_ids_that_no_stream_writes(checked):
    """A lone half of a character in an id is nothing to the training."""
    line = sampled(checked([record(), {**EMPTY, "id": "a\ud800b" + "x" * 100}]))
    assert "record 1 (id a\\ud800b" in line and "..." in line


@pytest.mark.parametrize(("total", "count"), [(1, 256), (5, 256), (1000, 10), (1003, 256), (256, 256)])
def test_the_choice_is_spread_seeded_and_has_the_longest(total, count):
    lengths = [10] * total
    longest = total * 2 // 3
    lengths[longest] = 500
    chosen = choose(lengths, count)
    assert chosen == choose(lengths, count) == sorted(set(chosen)) and longest in chosen
    parts = min(count, total)
    for part in range(parts):
        assert any(total * part // parts <= number < total * (part + 1) // parts for number in chosen)
    assert len(chosen) in (parts, parts + 1)
    assert total < 1000 or chosen != choose(lengths, count, seed=1)


def test_texts_that_would_take_minutes_are_left_out(monkeypatch):
    monkeypatch.setattr("llava_region.training.sampled_records.LONGEST_TEXT", 100)
    assert choose([101, 10, 500, 100], 256) == [1, 3]
    assert choose([101, 500], 256) == [0, 1]  # where there are no others
