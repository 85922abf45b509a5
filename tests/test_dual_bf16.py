"""Products of bfloat16 models against float64 at the same weights: their relative error is at most
twice that of torch's own bfloat16 double backward; of scores, twice that of its gradients.

Most of that error is the rounding of the model's activations, which no product can undo. Against
float64 at those very activations the rest is a few roundings of bfloat16, as a gradient's is.
"""

import pytest
import torch
from test_products import nll, oracle_ggnvp, oracle_gradient, oracle_hvp
from tiny_models import FAMILIES, direction, make, rows

from u2a.batch import collate
from u2a.dual import dual
from u2a.linearize import linearize
from u2a.logps import dual_logps
from u2a.lookup import lookup
from u2a.products import ggnvp, gradient, hvp, jvp_scores
from u2a.tree import trainable
from u2a_kernels.testing import PrimalTape

ROWS, DRAWS, DIRECTIONS = 5, (1, 2), (1, 2, 3, 4)
CASES = [(f, False) for f in FAMILIES] + [("llama", True), ("gpt2", True)]


def flat(found):
    parts = found.values() if isinstance(found, dict) else [found]
    return torch.cat([t.double().reshape(-1) for t in parts])


def pair(family, lora):
    model = make(family, lora).bfloat16()
    return model, make(family, lora).bfloat16().double()


def widened(v):
    return {n: t.double() for n, t in v.items()}


def relative(found):
    """||got - want|| / ||want|| over all pairs."""
    got, want = (torch.cat(list(x)) for x in zip(*found, strict=True))
    return ((got - want).norm() / want.norm()).item()


def within(name, ours, torchs):
    ours, torchs = relative(ours), relative(torchs)
    assert ours <= 2 * torchs, f"{name}: relative error {ours:.4f}, torch's {torchs:.4f}"


@pytest.mark.parametrize("family, lora", CASES)
@pytest.mark.parametrize("product, oracle", [(hvp, oracle_hvp), (ggnvp, oracle_ggnvp)])
def test_products_in_bfloat16(product, oracle, family, lora):
    model, exact = pair(family, lora)
    each = torch.full((ROWS,), 1 / ROWS, dtype=torch.bfloat16)
    ours, torchs = [], []
    for seed in DRAWS:
        batch, v = collate(rows(seed)), direction(model, seed)
        want = flat(product(exact, batch, nll, widened(v)))
        ours.append((flat(product(model, batch, nll, v)), want))
        torchs.append((flat(oracle(model, [batch], nll, v, each)), want))
    within(product.__name__, ours, torchs)


@pytest.mark.parametrize("family, lora", CASES)
def test_scores_in_bfloat16(family, lora):
    model, exact = pair(family, lora)
    ours, torchs = [], []
    for seed in DRAWS:
        batch = collate(rows(seed))
        for v in (direction(model, seed) for seed in DIRECTIONS):
            want = jvp_scores(exact, batch, nll, widened(v))
            ours.append((flat(jvp_scores(model, batch, nll, v)), want))
        for w in torch.eye(ROWS, dtype=torch.bfloat16):
            g, want = (flat(oracle_gradient(m, [batch], nll, w)) for m in (model, exact))
            torchs.append((g, want))
    within("jvp_scores", ours, torchs)


# Their bfloat16 run casts where the float64 one does not (norms in float32), or sorts tokens by
# expert.
UNTAPED = ("gemma", "gemma2", "gemma3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def dual_gradient(model, batch, loss, v):
    """By the same ops as the products, from the primal half of the loss."""
    params = trainable(model)
    with dual(model, v, "hvp") as run:
        total = loss(dual_logps(run, batch)[0]).mean()
        return dict(zip(params, torch.autograd.grad(total, [*params.values()]), strict=True))


@pytest.mark.parametrize("family, lora", [c for c in CASES if c[0] not in UNTAPED])
def test_own_rounding_is_that_of_a_gradient(family, lora):
    """Against float64 at the bfloat16 run's activations: at most 3 times the gradient's error."""
    model, exact = pair(family, lora)
    off = {}
    for product in (dual_gradient, hvp, ggnvp):
        found = []
        for seed in DRAWS:
            batch, v = collate(rows(seed)), direction(model, seed)
            both = PrimalTape.both(
                *batch.ids.shape,
                lambda p=product, b=batch, v=v: p(model, b, nll, v),
                lambda p=product, b=batch, v=v: p(exact, b, nll, widened(v)),
            )
            found.append([flat(x) for x in both])
        off[product.__name__] = relative(found)
    assert 0 < off["dual_gradient"] < 0.01, off
    assert max(off.values()) <= 3 * off["dual_gradient"], off


def test_lookup_sums_the_gradient_of_a_frequent_row_in_float32():
    """Summed in bfloat16, as torch does on a CPU, 4096 ones make 256."""
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.tensor([1] * 4096 + [0, 2]).view(2, -1)
    (found,) = torch.autograd.grad(lookup(ids, weight, 2).sum(), weight)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[1.0, 1.0], [4096.0, 4096.0], [0.0, 0.0]]


PRODUCTS = {
    "gradient": lambda m, b, v: gradient(m, b, nll),
    "hvp": lambda m, b, v: hvp(m, b, nll, v),
    "ggnvp": lambda m, b, v: ggnvp(m, b, nll, v),
    "linearize hvp": lambda m, b, v: linearize(m, b, nll, mode="hvp").matvec(v),
    "linearize ggn": lambda m, b, v: linearize(m, b, nll, mode="ggn").matvec(v),
}


@pytest.mark.parametrize("product", ["hvp", "linearize hvp"])
def test_tables_of_a_large_batch(product):
    """200 rows: the own rounding of embedding and positions; 2 and 4 % if bfloat16 adds up."""
    model, exact = pair("gpt2", False)
    batch, v = collate(rows(1) * 40), direction(model, 1)
    got, want = PrimalTape.both(
        *batch.ids.shape,
        lambda: hvp(model, batch, nll, v),
        lambda: hvp(exact, batch, nll, widened(v)),
    )
    if product != "hvp":
        got = PRODUCTS[product](model, [batch], v)
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        assert relative([(flat(got[name]), flat(want[name]))]) < 0.01, name


@pytest.mark.parametrize("product", PRODUCTS)
def test_batches_are_summed_in_float32(product):
    """The mean over 128 equal batches is that over one: all that differs is a power of two."""
    model, call = make("llama", True).bfloat16(), PRODUCTS[product]
    batch, v = collate(rows(1)), direction(model, 1)
    one, many = (flat(call(model, [batch] * n, v)) for n in (1, 128))
    assert one.any() and torch.equal(one, many)
