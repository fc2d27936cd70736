"""The model card of a run or a model, `README.md`: what its folder says about it, fit to be uploaded to the Hugging Face hub."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region import upstreams
from llava_region.checkpoints.model_source import ModelSource, locate
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json, write_text
from llava_region.region import Region, layer_ranges, region_record
from llava_region.run_files import ADAPTER_CONFIG_FILE, CARD_FILE, CONFIG_FILE, COST_FILE, NON_LORA_FILE, RUN_FILE

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

MARK = "<!-- written by llava_region: remove this line to keep what you change -->"
PEFTS = "[More Information Needed]"  # in every card that PEFT writes
PAPER = (
    "Wang et al., [Activating Distributed Visual Region within LLMs for Efficient and Effective Vision-Language Training and Inference]"
    "(https://aclanthology.org/2025.acl-long.1484/), ACL 2025"
)
MODES = {"lora": "LoRA", "qlora": "QLoRA", "full": "full tuning"}


def write_card(
    folder: str | Path, *, base: str | Path | None = None, config: dict[str, Any] | None = None, region: dict[str, Any] | None = None,
    cost: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the card of the model or run in a folder. PEFT's card there is replaced; one that somebody else wrote is left alone.

    No path of this machine gets into it.

    Args:
        base: what it was trained on, a folder or a hub name; None: what `region.json` names.
        config, region, cost: the content of `config.json`, `region.json` and `cost.json`, where it is known or not there yet.

    Raises:
        LlavaRegionError: one of the folder's files is damaged, or it is not writable.
    """
    folder = Path(folder)
    path = folder / CARD_FILE
    if path.is_file() and not any(mark in path.read_text(errors="replace") for mark in (MARK, PEFTS)):
        return
    write_text(path, _Card(folder, base, config, region, cost).text())


def hub_name(model: str | Path) -> str | None:
    """The hub name of a model, from itself or from where the hub's cache keeps it; None for a folder of another kind."""
    path = Path(model)
    cached = next((part for part in path.absolute().parts if part.startswith("models--")), None)  # the folder may be on another machine
    if cached or path.is_dir():
        return cached.removeprefix("models--").replace("--", "/") if cached else None
    return str(model) if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(model)) else None


class _Card:
    """What a card says.

    Attributes:
        base: as it was given; called: as readers know it; base_name: its hub name, if there is one.
    """

    def __init__(
        self, folder: Path, base: str | Path | None, config: dict[str, Any] | None, region: dict[str, Any] | None,
        cost: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.config = config or self._file(CONFIG_FILE) or {}
        self.upstream = upstreams.of_config(self.config)
        self.adapter = (folder / ADAPTER_CONFIG_FILE).is_file()
        self.region: dict[str, Any] = region or region_record(folder, self.config) or {}
        self.base = base or self.region.get("base_model") or None
        self.base_name = hub_name(self.base) if self.base else None
        self.run = self._file(RUN_FILE) or {}
        self.cost = cost or self._file(COST_FILE) or {}
        self.licence = _licence(self.base, self.base_name)
        self.called = self.base_name or (Path(self.base).name if self.base else "the base model")

    def _file(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    def data(self) -> ModelCardData:
        from huggingface_hub import ModelCardData

        upstream = self.upstream
        relation = ("adapter" if self.adapter else "finetune") if self.base_name else None
        return ModelCardData(
            # the hub takes a model for one of transformers' own where no library is named
            base_model=self.base_name, base_model_relation=relation, library_name="peft" if self.adapter else "llava_region",
            pipeline_tag="image-text-to-text" if upstream else "text-generation",
            tags=["llava_region", "visual-region", *([upstream.name] if upstream else []), *(["lora"] if self.adapter else [])],
            **self.licence,
        )  # fmt: skip

    def text(self) -> str:
        sections = (self._opening(), self._layers(), self._training(), self._flags(), self._use(), self._licence())
        body = "\n\n".join("\n".join(lines) for section in sections if (lines := list(section)))
        return f"---\n{self.data().to_yaml()}\n---\n{MARK}\n\n{body}\n"

    def _opening(self) -> Iterator[str]:
        upstream = self.upstream
        kind = f"{upstream.title} " if upstream else ""
        what = f"A LoRA adapter, and what was trained next to it, for a {kind}model" if self.adapter else f"A {kind}model"
        yield f"# {self._title()}"
        yield ""
        yield f"{what} on {_plain(self.called)}." if self.base else f"{what}."
        if self.region:
            yield "Of the language model's decoder layers, those of its *visual region* were tuned, and no others."
            yield f"The method is that of {PAPER}."

    def _title(self) -> str:
        name = _plain(Path(self.called).name)
        return f"{name}, visual region of {len(self.region['layers'])} layers" if self.region else name

    def _layers(self) -> Iterator[str]:
        if not self.region:
            return
        layers, count, spec = self.region["layers"], self.region["num_layers"], self._spec()
        yield "## Visual region"
        yield ""
        if layers:  # pruning may have taken all of them
            yield f"{len(layers)} of {count} decoder layers, `{layer_ranges(layers)}`{f' ({_inline(spec)})' if spec else ''}; `#` is tuned:"
            yield ""
            yield f"    {Region(tuple(layers), count, spec).map_line()}"
        else:
            yield f"None of the {count} decoder layers that are left was tuned."
        if pruned := self.region.get("pruned"):
            yield ""
            gone = layer_ranges(pruned["dropped"])
            yield f"Of what were {pruned['original_num_layers']} decoder layers, {gone} have been removed, and the others renumbered."
        if reverted := self.region.get("reverted"):
            yield ""
            yield f"Decoder layers {layer_ranges(reverted['layers'])} have been put back to the weights before visual tuning."

    def _spec(self) -> str:
        """The layer spec as it was given, without the folder of a scores file."""
        file, ending, rest = str(self.region.get("spec") or "").rpartition(".json:")
        return f"{Path(file).name}{ending}{rest}"

    def _training(self) -> Iterator[str]:
        rows = dict(self._facts())
        if rows:
            yield "## Training"
            yield ""
            yield "| | |"
            yield "|---|---|"
            yield from (f"| {name} | {value} |" for name, value in rows.items())

    def _facts(self) -> Iterator[tuple[str, str]]:
        if mode := MODES.get(str(self.region.get("mode"))):
            yield "tuned by", mode
        if tower := self.upstream.vision_tower(self.config) if self.upstream else None:
            yield "vision tower", _plain(hub_name(tower) or Path(tower).name)
        batch, cost = self.run.get("batch", {}), self.cost
        if batch:
            each, times, devices = (batch[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "devices"))
            yield "samples per step", f"{each * times * devices} ({each} x {times} accumulated x {devices} devices)"
        if cost.keys() >= {"steps", "gpu_hours", "gpus", "device", "samples"}:
            yield "steps", f"{cost['steps']:,}"
            yield "cost", f"{cost['gpu_hours']:.2f} GPU hours on {cost['gpus']} x {cost['device']}, {cost['samples']:,.0f} samples"
        versions = {"llava_region": self.region.get("llava_region_version"), **self.run.get("versions", {})}
        if shown := ", ".join(f"{name} {number}" for name, number in versions.items() if number):
            yield "versions", shown

    def _flags(self) -> Iterator[str]:
        flags = {**self.run.get("flags", {}), **self.run.get("steps", {}), "tune_layers": self._spec() or None}
        if self.run:
            yield "<details><summary>Flags that decided the training</summary>"
            yield ""
            lines = [f"--{name} {_shown(value)}" for name, value in sorted(flags.items()) if value is not None and not _secret(name, value)]
            fence = _fence("\n".join(lines), 3)
            yield from (fence, *lines, fence)
            yield "</details>"

    def _use(self) -> Iterator[str]:
        upstream, base = self.upstream, self.base_name or f"PATH/TO/{self.called}"
        yield "## How to load it"
        yield ""
        yield "With llava_region, where `FOLDER` is where these files are:"
        arguments = f"'FOLDER', {base!r}" if self.adapter else "'FOLDER'"
        yield from _code("from llava_region import load", "", f"loaded = load({arguments})")
        if upstream and (lines := upstream.loading_code("FOLDER", base if self.adapter else None, self.config)):
            yield ""
            yield f"With {upstream.title} itself:"
            yield from _code(*lines)
        if self.adapter:
            yield ""
            yield f"With PEFT, without what was trained next to the adapter (the projector, in `{NON_LORA_FILE}`):"
            known, read = self._code_for_base(base)
            yield from _code(*sorted(("from peft import PeftModel", known)), "", f"model = PeftModel.from_pretrained({read}, 'FOLDER')")

    def _code_for_base(self, base: str) -> tuple[str, str]:
        """The import and the expression that load the base without its adapter, by what the base's config says if it is on this machine."""
        try:
            source = ModelSource.of(self.base) if self.base else None
            upstreams_own, own_code = source and source.upstream, source and "auto_map" in source.config
        except LlavaRegionError:  # it is not here
            upstreams_own = own_code = None
        if upstreams_own:  # which transformers alone does not know
            return "from llava_region import load", f"load({base!r}).model"
        more = ", trust_remote_code=True" if own_code else ""
        return "from transformers import AutoModelForCausalLM", f"AutoModelForCausalLM.from_pretrained({base!r}{more})"

    def _licence(self) -> Iterator[str]:
        yield "## Licence"
        yield ""
        if name := self.licence.get("license_name") or self.licence.get("license"):
            yield f"That of {_plain(self.called)} ({name}), and those of the vision tower and of the training data."
        else:
            yield f"Those of {_plain(self.called)}, of the vision tower and of the training data. State them before you publish this."


def _shown(value: Any) -> str:
    """A flag's value; of a path of this machine, also within a longer text, the last part."""
    text = value if isinstance(value, str) else json.dumps(value)
    whole = re.match(r"(/|~|\.{1,2}/)", text)
    return shlex.quote(Path(text).name if whole else _PATH.sub(lambda found: Path(found[0]).name, text))


_PATH = re.compile(r"(?<![\w./:~-])(?:~|\.{1,2})?/[^\s'\",:;=\[\]{}()]+")


def _secret(name: str, value: Any) -> bool:
    """Whether a flag's value is none to publish, by the flag's name or its own form."""
    named = re.search(r"(^|_)(token|secret|password|api_?key|credentials?)$", name)
    formed = re.search(r"\bhf_\w{10}|\bsk-[\w-]{16}|://[^/\s@]+@", json.dumps(value))
    return (isinstance(value, str) and bool(named)) or bool(formed)


def _plain(text: str) -> str:
    """A name in prose, a heading or a table: what Markdown or HTML would read as a sign is escaped."""
    return re.sub(r"([\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _inline(text: str) -> str:
    """A text as inline code."""
    fence = _fence(text, 1)
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _fence(text: str, least: int) -> str:
    """Backticks that a code of this text can stand between."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def _code(*lines: str) -> Iterator[str]:
    yield from ("", "```python", *lines, "```")


def _licence(base: str | Path | None, base_name: str | None) -> dict[str, Any]:
    """What the base's own card says of its licence, as far as the card is on this machine; else, of a base on the hub, where it says so."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    page = f"https://huggingface.co/{base_name}" if base_name else None
    try:
        card = locate(base) / CARD_FILE if base else None
        data = ModelCard.load(card).data if card and card.is_file() else None
    except (LlavaRegionError, ValueError, YAMLError):  # it is not here, or its card holds no metadata
        data = None
    names = ("license", "license_name", "license_link")
    found = {name: value for name in names if (value := getattr(data, name, None))}
    if not found and page:
        return {"license": "other", "license_name": "that-of-the-base-model", "license_link": page}
    link = found.get("license_link", "")
    if link and "://" not in link:  # a file next to the base's card
        del found["license_link"]
        if page:
            found["license_link"] = f"{page}/blob/main/{link.removeprefix('./')}"
    return found
