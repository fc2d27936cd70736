"""The declared tensors of every projector are those of the upstream's own builder."""

from types import SimpleNamespace

import pytest

from llava_region.patches.projectors import projector_shapes
from tests.helpers import bunny_shims

LLAVA = ("linear", "identity", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu")
BUNNY = (*LLAVA, "spp_v1", "spp_v2", "spp_v3", "ldp", "vanilla", "minigpt")
WIDTHS = ((32, 64), (1152, 2560), (24, 40), (3 * 32, 136), (16, 8))


def _held(build, kind: str, features: int, width: int) -> None:
    import torch

    with torch.device("meta"):
        built = build(SimpleNamespace(mm_projector_type=kind, mm_hidden_size=features, hidden_size=width))
    assert projector_shapes(kind, features, width) == {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", LLAVA)
def test_llavas(kind, widths):
    builder = pytest.importorskip("llava.model.multimodal_projector.builder")
    _held(builder.build_vision_projector, kind, *widths)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", BUNNY)
def test_bunnys(kind, widths):
    if bunny_shims.why_not():
        pytest.skip(bunny_shims.why_not())
    bunny_shims.apply()
    from bunny.model.multimodal_projector.builder import build_vision_projector

    _held(build_vision_projector, kind, *widths)


def test_others_are_unknown():
    assert projector_shapes("qformer", 4, 4) is None and projector_shapes("mlp_gelu", 4, 4) is None
