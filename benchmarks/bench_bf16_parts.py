"""Where the error of a bf16 product comes from: the rounding of the model's activations, which any
product of the bf16 model has, or the product's own arithmetic.

    python benchmarks/bench_bf16_parts.py [steps [seeds]]

All errors are ||a - b|| / ||c|| over the trainable parameters, c in float64 at the bf16 weights.
- error: of the bf16 result, against c.
- activations: of a float64 product whose activations, tangents not, are those of the bf16 run: what
  exact arithmetic in all the rest would leave.
- own: of the bf16 result against that product.
- ratio: error over the gradient's own: that of torch's bf16 gradient (SDPA) on the same rows.
Each seed has its initial weights, order of training rows and held-out rows; medians (ranges).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from statistics import median

import torch
from _second_order import Problem, inner, nll, references
from bench_bf16 import ROWS, STEPS, central, problems, trained

from u2a.dual import dual
from u2a.logps import dual_logps
from u2a.products import ggnvp, hvp
from u2a.tree import Tree, norm
from u2a_kernels.testing import PrimalTape

SEEDS = 5
Found = dict[str, list[float]]
OWN = "gradient, torch SDPA"


def dual_gradient(p: Problem) -> Tree:
    """By the ops of the products: the primal half of the loss."""
    with dual(p.model, p.v, "hvp") as run:
        loss = nll(dual_logps(run, p.batch)[0]).mean()
        return p.named(torch.autograd.grad(loss, list(p.params.values())))


PRODUCTS: dict[str, Callable[[Problem], Tree]] = {
    "gradient": dual_gradient,
    "hvp": lambda p: hvp(p.model, p.batch, nll, p.v),
    "ggn": lambda p: ggnvp(p.model, p.batch, nll, p.v),
}


def widened(p: Problem, dtype: torch.dtype) -> Problem:
    model = copy.deepcopy(p.model).to(dtype)
    return Problem(model, p.ids, {n: t.to(dtype) for n, t in p.v.items()})


def distance(a: Tree, b: Tree, unit: Tree) -> float:
    """In per cent of the norm of `unit`."""
    wide = {n: t.double() for n, t in a.items()}
    return 100 * float(norm({n: t - b[n].double() for n, t in wide.items()}) / norm(unit))


def parts(p: Problem, exact: Problem, what: str, want: Tree) -> list[float]:
    """[error, activations, own]."""
    call = PRODUCTS[what]
    got, held = PrimalTape.both(*p.ids.shape, lambda: call(p), lambda: call(exact))
    return [distance(got, want, want), distance(held, want, want), distance(got, held, want)]


def measure(p: Problem, kind: str) -> Found:
    """Per row of the table: error, activations, own (as far as they exist), ratio."""
    exact, single = widened(p, torch.float64), widened(p, torch.float32)
    want = references(exact)
    inner(exact.model).set_attn_implementation("sdpa")
    found: Found = {OWN: [distance(p.gradient(), want["gradient"], want["gradient"])]}
    found["gradient, dual ops"] = parts(p, exact, "gradient", want["gradient"])
    for what in ("hvp", "ggn"):
        found[f"{what}, v {kind}"] = parts(p, exact, what, want[what])
        alone = PRODUCTS[what](single)
        found[f"{what}, model.float()"] = [distance(alone, want[what], want[what])]
    best = min(e for e, _ in central(p, want["hvp"]))
    found[f"central differences at their best, v {kind}"] = [100 * best]
    own = found[OWN][0]
    return {row: [e[0] / own, *e] for row, e in found.items()}


def spread(values: list[float], unit: str) -> str:
    def show(x: float) -> str:
        return f"{x:.0e}" if x < 0.005 else f"{x:.2f}"

    return f"{show(median(values))}{unit} ({show(min(values))}-{show(max(values))})"


def table(name: str, steps: int, seeds: int) -> None:
    rows: dict[str, list[list[float]]] = {}
    reached = []
    for seed in range(seeds):
        reached.append(trained(name, steps, seed)[2])
        for kind, p in problems(name, steps, seed):
            for row, found in measure(p, kind).items():
                rows.setdefault(row, []).append(found)
    what = "GPT-2, full parameters" if name == "gpt2" else "Llama, LoRA r=8"
    print(f"\n{what}, d=256, L=4, {ROWS} rows of 64 tokens, {steps} steps of training to a loss of "
          f"{spread(reached, '')}, {seeds} seeds\n")  # fmt: skip
    print("| product | error | activations | own | ratio |\n| --- | --- | --- | --- | --- |")
    for row, found in rows.items():
        ratio, *columns = (list(c) for c in zip(*found, strict=True))
        cells = [spread(c, " %") for c in columns] + [""] * (3 - len(columns))
        print(f"| {row} | {' | '.join(cells)} | {spread(ratio, '')} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = [int(a) for a in sys.argv[1:]]
    for model_name in ("gpt2", "llama"):
        table(model_name, *(given + [STEPS, SEEDS][len(given) :]))
