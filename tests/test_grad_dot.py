"""Special about grad_dot: offsets that are a strided view."""

import pytest
import torch

from u2a_kernels.ops import grad_dot as op
from u2a_kernels.testing import offsets_of, randn


@pytest.mark.parametrize("function", [torch.ops.u2a.grad_dot.default, op.forward_triton])
def test_strided_offsets(function):
    x, g, v = randn(6, 8, seed=1), randn(6, 5, seed=2), randn(1, 5, 8, seed=3)
    offsets = offsets_of([4, 2])
    strided = torch.stack([offsets, offsets + 100], 1)[:, 0]
    for by_tokens in (True, False):
        want = function(x, g, offsets, v, by_tokens)
        assert torch.equal(function(x, g, strided, v, by_tokens), want)
