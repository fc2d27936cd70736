"""What a forward pass keeps for its backward pass, whoever holds it."""

import pytest
import torch
from torch import nn

from llava_region.training.kept_tensors import kept_by

X = torch.randn(4, 8, requires_grad=True)


class Hidden(torch.autograd.Function):
    """Keeps its input where autograd's hooks for saved tensors do not see it, as some kernels do."""

    @staticmethod
    def forward(ctx, x):
        ctx.mine = x
        return x.exp()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.mine.exp()


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (lambda x: x * 2, 0),  # the output is not counted
        (lambda x: (x + 1).sin(), 1),
        (lambda x: (x + 1).exp(), 1),  # exp keeps its output
        (lambda x: (x.detach() + 1).sin() + x, 0),  # nothing differentiates it
        (lambda x: x @ torch.ones(8, 8, requires_grad=True).t() + x, 2),  # a matrix is twice a tensor of 4 x 8
        (lambda x: Hidden.apply(x + 1), 1),
        (lambda x: (x + 1)[:2].sin(), 1),  # a part keeps the whole
    ],
)
def test_what_lives_on_is_counted(function, tensors):
    output, kept = kept_by(function, X)
    assert kept == tensors * X.untyped_storage().nbytes()
    assert torch.equal(output, function(X)) and output.grad_fn is None


def test_several_outputs_and_none():
    (first, nothing), kept = kept_by(lambda x: ((x + 1).sin(), None), X)
    assert nothing is None and first.shape == X.shape and kept == 128


def test_a_product_in_8_bits_keeps_its_input():
    """bitsandbytes keeps it in a field of its own: 3 layers of 7B would be planned for 2."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(64, 64), has_fp16_weights=False, requires_grad=False)
    layer = layer.to("cpu")
    layer(torch.ones(2, 64))  # it quantises its weight at first use
    hidden, norm = torch.randn(16, 64, requires_grad=True), nn.LayerNorm(64, elementwise_affine=False)
    _, alone = kept_by(norm, hidden)
    _, kept = kept_by(lambda x: layer(norm(x)), hidden)
    assert kept - alone >= 16 * 64 * 4
