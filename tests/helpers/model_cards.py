"""The code in a model card, executed as a reader would."""

import re
from pathlib import Path


def code_of(folder: Path, places: dict[str, Path]) -> list[str]:
    """The blocks of Python in a card, with their places filled in, for a machine without a GPU."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    for place, path in {"FOLDER": folder, **places}.items():
        blocks = [code.replace(place, str(path)) for code in blocks]
    return [code.replace(")\n", ", device='cpu')\n") if "load_pretrained_model(" in code else code for code in blocks]


def run_code(folder: Path, places: dict[str, Path], blocks: int | None = None) -> list[list[str]]:
    """Execute each block of a card, or the first ones: this package's, the upstream's, PEFT's.

    Returns:
        of what each has loaded, a parameter's name for each decoder layer.
    """
    loaded = []
    for code in code_of(folder, places)[:blocks]:
        found: dict = {}
        exec(code, found)
        model = found["loaded"].model if "loaded" in found else found["model"]
        loaded.append([name for name, _ in model.named_parameters() if re.search(r"layers\.\d+\.input_layernorm.weight$", name)])
        assert not any(p.is_meta for p in model.parameters())
    return loaded
