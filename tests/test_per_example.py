"""v^T G_i v and v^T H_i v of each row against products of that row alone."""

import pytest
import torch
from test_products import CASES, IDS, REF, nll, npo, oracle_ggnvp, oracle_hvp
from tiny_models import direction, make, rows, two_batches

from u2a.batch import collate
from u2a.per_example import per_example_curvature
from u2a.products import hvp
from u2a.tree import dot

ORACLE = {"ggn": oracle_ggnvp, "hessian": oracle_hvp}


@pytest.mark.parametrize("family, lora", CASES, ids=IDS)
def test_against_double_backward_row_by_row(family, lora):
    model, batches = make(family, lora), two_batches()
    v, one = direction(model, 1), torch.eye(5, dtype=torch.float64)
    for kind, oracle in ORACLE.items():
        got = per_example_curvature(model, batches, npo, v, kind, ref=REF)
        each = [oracle(model, batches, npo, v, one[i]) for i in range(5)]
        want = torch.stack([dot(v, h) for h in each])
        assert (got - want).norm() / want.norm() < 1e-8
        assert not got.requires_grad and (kind != "ggn" or (got > 0).all())


def test_rows_without_answers_and_refs_per_batch():
    model = make("llama", lora=True)
    v = direction(model, 1)
    batch = collate(rows(shapes=((3, 0), (2, 2))))
    ref = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    for kind in ORACLE:
        got = per_example_curvature(model, [batch], npo, v, kind, ref=[ref])
        assert got[0] == 0 and got[1].abs() > 1e-4
    alone = collate(rows(shapes=((3, 0), (2, 2)))[1:], [1])
    want = dot(v, hvp(model, alone, npo, v, ref=[ref[1:]]))
    assert got[1].item() == pytest.approx(want.item(), rel=1e-10)


def test_wrong_kinds_and_losses():
    model, batches, v = make("llama", lora=True), two_batches(), direction(make("llama", True), 1)
    with pytest.raises(ValueError, match="kind must be 'ggn' or 'hessian', got 'fisher'"):
        per_example_curvature(model, batches, nll, v, "fisher")
    for kind in ORACLE:
        with pytest.raises(ValueError, match=r"loss must return \[B\]"):
            per_example_curvature(model, batches, lambda lp: nll(lp).mean(), v, kind)
