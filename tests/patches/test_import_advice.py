"""What an upstream's failed import advises."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_region.errors import UnsupportedUpstream
from llava_region.patches import seams


def refusal(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(UnsupportedUpstream) as error:
        seams.import_upstream(name, "Bunny", "give the path")
    return str(error.value)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("raise ModuleNotFoundError('no', name='torchvision.ops')", "'torchvision' is missing: pip install torchvision torch=="),
        ("import no_such_package.inner", "'no_such_package' is missing: pip install no_such_package"),
        (
            "try:\n    import no_such_package\nexcept ImportError as e:\n    raise RuntimeError('Failed to import') from e",
            "'no_such_package' is missing: pip install no_such_package",
        ),
    ],
)
def test_a_missing_package_is_named(code: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(tmp_path, code, monkeypatch, "half_an_upstream")
    assert advice in line and "give the path" not in line and "\n" not in line


def test_a_version_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = seams.version
    monkeypatch.setattr(seams, "version", lambda name: "0.21.2" if name == "peft" else real(name))
    line = refusal(tmp_path, "from transformers import EncoderDecoderCacheOfTomorrow", monkeypatch, "upstream_with_peft")
    assert "EncoderDecoderCacheOfTomorrow" in line and "pip install 'peft" in line and "<0.14" in line


def test_an_absent_upstream_keeps_its_own_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also next to a version that does not fit: what is missing comes first."""
    real = seams.version
    monkeypatch.setattr(seams, "version", lambda name: "0.21.2" if name == "peft" else real(name))
    with pytest.raises(UnsupportedUpstream, match="give the path"):
        seams.import_upstream("absent_upstream.train", "Bunny", "give the path")
