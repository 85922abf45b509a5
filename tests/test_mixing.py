"""A model taken back to a bound on its perplexity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from u2a.adapter import snapshot
from u2a.mixing import mix_back


class Line(nn.Module):
    """Perplexity 1 + theta^2, reached from theta = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def perplexity(self) -> float:
        return 1 + float(self.theta.detach()) ** 2


def moved(to: float) -> tuple[Line, dict[str, torch.Tensor]]:
    model = Line()
    start = snapshot(model)
    model.theta.data.fill_(to)
    return model, start


def test_the_largest_mixture_within_the_bound():
    model, start = moved(2.0)
    a = mix_back(model, start, model.perplexity, 1.25, steps=30)
    assert a == pytest.approx(0.25, abs=1e-8)
    assert float(model.theta) == pytest.approx(0.5, abs=1e-7) and model.perplexity() <= 1.25
    coarse, start = moved(2.0)
    b = mix_back(coarse, start, coarse.perplexity, 1.21, steps=3)
    assert b == 0.125 and float(coarse.theta) == 0.25


@pytest.mark.parametrize("bound", [5.0, 7.0, float("inf")])
def test_a_model_within_the_bound_is_left_as_it_is(bound):
    model, start = moved(2.0)
    assert mix_back(model, start, model.perplexity, bound) == 1.0
    assert float(model.theta) == 2.0


@pytest.mark.parametrize("bound", [0.99, float("nan")])
def test_refuses_a_bound_below_the_start(bound):
    model, start = moved(2.0)
    with pytest.raises(ValueError, match=r"mix_back: max_ratio must be >= 1, got"):
        mix_back(model, start, model.perplexity, bound)
    assert float(model.theta) == 2.0
