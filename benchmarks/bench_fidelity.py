"""How well sketches of per-example gradients keep inner products, on a trained language model.

GPT-2 of 4 layers, d = 256, trained on the demo's sentences. For all pairs of examples, the exact
gradients of the 16 linear weights inside the layers give cos = <a, b> / |a||b|; a sketch's error
is <s(a), s(b)> / |a||b| - cos, its variance (1 + cos^2) / k for an ideal dense projection to k
numbers. Effective dimension: mean(1 + cos^2) / mean(error^2), over pairs and seeds; "plain" is
1 / mean(error^2). The ideal rows are that projection itself, on the same pairs: a Gaussian one
needs the Gram matrix of the gradients only. Ranks: Spearman correlation of the candidates' scores
along one query gradient with the exact ones of the forward-mode scan.

`python benchmarks/bench_fidelity.py [seeds]` prints the table.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from _trained import CANDIDATES, Taps, capture, exact_scores, make_rows, nll, train_model
from torch import Tensor

from u2a.index import Kronecker, Sketch, features
from u2a_kernels import grad_project, grad_sketch

SIDE, TOTAL = 16, 4096
SEEDS, INDEX_SEEDS, FORMED_SEEDS = 32, 8, 3


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).float()


def count_sketch(columns: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """[n, k] of `[d, n]`: buckets k and above take the entries of negative sign."""
    bucket = torch.randint(2 * k, columns.shape[:1], generator=generator)
    found = columns.new_zeros(2 * k, columns.shape[1]).index_add_(0, bucket, columns)
    return (found[:k] - found[k:]).T


def kronecker(taps: Taps, side: int, generator: torch.Generator) -> list[Tensor]:
    found = []
    for x, g in zip(taps.x, taps.g, strict=True):
        p_in, p_out = (signs((side, t.shape[1]), generator) / side**0.5 for t in (x, g))
        found.append(grad_project(x, g, taps.offsets, p_in, p_out).flatten(1))
    return found


def tensor_sketch(taps: Taps, k: int, seed: int) -> list[Tensor]:
    """A seed a module."""
    return [
        grad_sketch(x, g, taps.offsets, k, seed * 1000 + i)
        for i, (x, g) in enumerate(zip(taps.x, taps.g, strict=True))
    ]


def factored(taps: Taps, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Sketches that need inputs and output gradients only."""
    generator = torch.Generator().manual_seed(seed)
    yield "Kronecker 16x16 a module", torch.cat(kronecker(taps, SIDE, generator), 1)
    wide = kronecker(taps, 64, generator)
    each = TOTAL // len(wide)
    parts = [count_sketch(w.T, each, generator) for w in wide]
    yield "Kronecker 64x64, count-sketch 256 a module", torch.cat(parts, 1)
    yield (
        "Kronecker 64x64, count-sketch global",
        count_sketch(torch.cat(wide, 1).T, TOTAL, generator),
    )
    yield "grad_sketch 256 a module", torch.cat(tensor_sketch(taps, each, seed), 1)
    for k in (1024, 4096):
        yield f"grad_sketch {k} global", torch.stack(tensor_sketch(taps, k, seed)).sum(0)


def formed(taps: Taps, seeds: int) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The Gram matrix of each module, `[modules, n, n]`; sketches of the formed gradients."""
    whole, parts, grams = [0.0] * seeds, [[] for _ in range(seeds)], []
    for i, rows in enumerate(taps.formed()):
        grams.append((rows @ rows.T).double())
        columns = rows.T.contiguous()
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed * 1000 + i)
            whole[seed] = whole[seed] + count_sketch(columns, TOTAL, generator)
            parts[seed].append(count_sketch(columns, TOTAL // len(taps.x), generator))
    return torch.stack(grams), {
        "count-sketch 256 a module (formed)": [torch.cat(p, 1) for p in parts],
        "count-sketch 4096 global (formed)": whole,
    }


def root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt()


def ideal(grams: Tensor, k: int, seed: int) -> Tensor:
    """What dense Gaussian matrices make of gradients with these Gram matrices, a matrix each."""
    generator = torch.Generator().manual_seed(seed)
    draws = [
        root(gram) @ torch.randn(len(gram), k, dtype=torch.float64, generator=generator) / k**0.5
        for gram in grams
    ]
    return torch.cat(draws, 1).float()


@dataclass
class Yardstick:
    """Exact cosines and query scores; candidates come first, queries last."""

    gram: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        size = self.gram.diagonal().sqrt()
        self.scale = size[:, None] * size
        n = len(self.gram)
        self.pairs = torch.triu_indices(n, n, 1).unbind()
        self.cos = (self.gram / self.scale)[self.pairs]

    def row(self, sketches: list[Tensor]) -> dict[str, float]:
        spread = (1 + self.cos.square()).mean()
        squares, correlations, ranks = [], [], []
        for s in sketches:
            s = s.double()
            found = ((s @ s.T) / self.scale)[self.pairs]
            squares.append((found - self.cos).square().mean().item())
            correlations.append(torch.corrcoef(torch.stack([found, self.cos]))[0, 1].item())
            scores = s[:CANDIDATES] @ s[CANDIDATES:].sum(0)
            ranks.append(spearman(scores, self.scores))
        mse = statistics.fmean(squares)
        error = statistics.stdev(squares) / len(squares) ** 0.5 / mse if len(squares) > 1 else 0.0
        return {
            "floats": sketches[0].shape[1], "effective": spread.item() / mse, "error": error,
            "plain": 1 / mse, "corr": statistics.fmean(correlations),
            "rank": statistics.fmean(ranks),
        }  # fmt: skip


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def facts_of(grams: Tensor, yardstick: Yardstick) -> dict[str, float]:
    """How concentrated the gradients are, and how well the captured ones match the scan."""
    energy = grams.diagonal(dim1=1, dim2=2).sum(1) / yardstick.gram.trace()
    values = torch.linalg.eigvalsh(yardstick.gram / yardstick.scale)
    scores = yardstick.gram[:CANDIDATES, CANDIDATES:].sum(1)
    return {
        "pairs": len(yardstick.cos),
        "cos_mean": yardstick.cos.mean().item(),
        "cos_sd": yardstick.cos.std().item(),
        "top_module": energy.max().item(),
        "top_four": energy.topk(4).values.sum().item(),
        "stable_rank": (values.sum().square() / values.square().sum()).item(),
        "scan_error": ((scores - yardstick.scores).norm() / yardstick.scores.norm()).item(),
    }


def measure(seeds: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Facts about the model and the pairs; a row for each sketch."""
    tokenizer, train, candidates, queries = make_rows()
    model, loss = train_model(len(tokenizer), train)
    rows = candidates + queries
    scores = exact_scores(model, candidates, queries)
    taps = capture(model, rows)
    grams, found = formed(taps, min(seeds, FORMED_SEEDS))
    gram = grams.sum(0)
    yardstick = Yardstick(gram, scores)
    draws: dict[str, tuple[int, Callable[[int], Tensor]]] = {
        "ideal 256 a module": (seeds, lambda seed: ideal(grams, TOTAL // len(grams), seed)),
        "ideal 1024 global": (seeds, lambda seed: ideal(gram[None], 1024, seed)),
        "ideal 4096 global": (seeds, lambda seed: ideal(gram[None], 4096, seed)),
    }
    for name, spec in {
        "u2a.index Kronecker(16, 16)": partial(Kronecker, SIDE, SIDE),
        "u2a.index Sketch(1024)": partial(Sketch, 1024),
        "u2a.index Sketch(4096)": partial(Sketch, 4096),
        "u2a.index Sketch(4096, sjlt)": partial(Sketch, 4096, kind="sjlt"),
    }.items():
        draw = partial(lambda spec, seed: features(model, rows, nll, spec(seed=seed)), spec)
        draws[name] = min(seeds, INDEX_SEEDS), draw
    for name, (count, draw) in draws.items():
        found[name] = [draw(seed) for seed in range(count)]
    for seed in range(seeds):
        for name, sketch in factored(taps, seed):
            found.setdefault(name, []).append(sketch)
    facts = {"loss": loss} | facts_of(grams, yardstick)
    return facts, {name: yardstick.row(sketches) for name, sketches in found.items()}


def test_fidelity(benchmark):
    facts, rows = benchmark.pedantic(measure, args=(SEEDS,), rounds=1)
    benchmark.extra_info |= {"facts": facts, "rows": rows}
    assert facts["scan_error"] < 1e-4
    for k in (1024, 4096):
        assert rows[f"grad_sketch {k} global"]["effective"] > 0.9 * k


def table(seeds: int) -> None:
    facts, rows = measure(seeds)
    print(", ".join(f"{name} {value:.4g}" for name, value in facts.items()))
    print(
        f"{'sketch':44}{'floats':>7}{'effective':>11}{'':8}{'a float':>8}"
        f"{'plain':>7}{'corr':>6}{'rank':>7}"
    )
    for name, r in sorted(rows.items(), key=lambda item: item[1]["effective"]):
        print(
            f"{name:44}{r['floats']:7}{r['effective']:11.0f} ±{r['error'] * 100:4.1f} %"
            f"{r['effective'] / r['floats']:9.2f}{r['plain']:7.0f}{r['corr']:6.2f}{r['rank']:7.3f}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    table(int(sys.argv[1]) if len(sys.argv) > 1 else SEEDS)
