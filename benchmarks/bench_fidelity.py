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

import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from u2a.batch import Row, collate, row_batches
from u2a.demo.base_model import make_tokenizer
from u2a.demo.corpus import make_corpus
from u2a.products import answer_logps, gradient, jvp_scores
from u2a_kernels import grad_project, grad_sketch

STEPS, BATCH, RATE = 200, 32, 2e-3
CANDIDATES, QUERIES = 192, 16
SIDE, TOTAL = 16, 4096
SEEDS, FORMED_SEEDS = 32, 3


def nll(lp):
    return -lp.sequence()


def make_rows() -> tuple[object, list[Row], list[Row], list[Row]]:
    """Tokenizer, rows to train on, candidates, queries."""
    corpus = make_corpus(0)
    base = corpus["base"]
    tokenizer = make_tokenizer([r["prompt"] + r["completion"] for r in base])

    def encode(i: int, prompt: str, answer: str) -> Row:
        ids = tokenizer([prompt, answer])["input_ids"]
        return Row(str(i), tuple(ids[0]), (*ids[1], tokenizer.eos_token_id))

    train = [encode(i, r["prompt"], r["completion"]) for i, r in enumerate(base)]
    chosen = corpus["forget"][:CANDIDATES]
    candidates = [encode(i, r["prompt"], r["completion"]) for i, r in enumerate(chosen)]
    queries = [encode(i, r["prompt"], r["rejected"]) for i, r in enumerate(corpus["pa"][:QUERIES])]
    return tokenizer, train, candidates, queries


def train_model(vocab: int, rows: list[Row]) -> tuple[GPT2LMHeadModel, float]:
    """The model and the mean loss per answer token of its last 20 steps."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab, n_positions=64, n_embd=256, n_layer=4, n_head=4, use_cache=False,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    losses = []
    for _ in range(STEPS):
        batch = collate([rows[i] for i in torch.randint(len(rows), (BATCH,)).tolist()])
        loss = -answer_logps(model, batch).logp.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), statistics.fmean(losses[-20:])


@dataclass
class Taps:
    """Inputs and output gradients of the linears on all rows' tokens, packed."""

    offsets: Tensor
    x: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)

    def formed(self) -> Iterator[Tensor]:
        """Module by module, the gradients `[rows, d_out * d_in]`."""
        bounds = self.offsets.tolist()
        for x, g in zip(self.x, self.g, strict=True):
            parts = [g[s:e].T @ x[s:e] for s, e in pairwise(bounds)]
            yield torch.stack(parts).flatten(1)


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, Conv1D) and re.search(r"\bh\.\d", n)}


def capture(model: GPT2LMHeadModel, rows: list[Row]) -> Taps:
    """One padded batch by plain hooks; the padding is dropped."""
    batch = collate(rows)
    real = torch.arange(batch.ids.shape[1]) < batch.length[:, None]
    taps = Taps(F.pad(batch.length.cumsum(0), (1, 0)))
    outputs = []

    def hook(module, inputs, output):
        taps.x.append(inputs[0].detach()[real])
        outputs.append(output)

    hooks = [m.register_forward_hook(hook) for m in linears(model).values()]
    logits = model(input_ids=batch.ids).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
    grads = torch.autograd.grad(-(logp * batch.answer[:, 1:]).sum(), outputs)
    taps.g += [g[real] for g in grads]
    for h in hooks:
        h.remove()
    return taps


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
    for k in (TOTAL // 4, TOTAL):
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


def exact_scores(
    model: GPT2LMHeadModel, candidates: list[Row], queries: list[Row]
) -> tuple[Tensor, Tensor]:
    """<grad of a candidate, summed gradient of the queries> by the forward-mode scan, `[n]`; the
    gradient's squared norm."""
    model.requires_grad_(False)
    for linear in linears(model).values():
        linear.weight.requires_grad_()
    v = gradient(model, row_batches(queries, 8192), nll)
    v = {name: t * len(queries) for name, t in v.items()}
    scores = jvp_scores(model, row_batches(candidates, 8192), nll, v).double()
    return scores, sum(t.double().square().sum() for t in v.values())


def measure(seeds: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Facts about the model and the pairs; a row for each sketch."""
    tokenizer, train, candidates, queries = make_rows()
    model, loss = train_model(len(tokenizer), train)
    scores, size = exact_scores(model, candidates, queries)
    taps = capture(model, candidates + queries)
    grams, found = formed(taps, min(seeds, FORMED_SEEDS))
    gram = grams.sum(0)
    yardstick = Yardstick(gram, scores)
    energy = grams.diagonal(dim1=1, dim2=2).sum(1) / gram.trace()
    values = torch.linalg.eigvalsh(gram / yardstick.scale)
    facts = {
        "loss": loss, "pairs": len(yardstick.cos), "cos_mean": yardstick.cos.mean().item(),
        "cos_sd": yardstick.cos.std().item(), "top_module": energy.max().item(),
        "top_four": energy.topk(4).values.sum().item(),
        "stable_rank": (values.sum().square() / values.square().sum()).item(),
        "scan": (relative(gram[:CANDIDATES, CANDIDATES:].sum(1), scores)),
        "query": abs(gram[CANDIDATES:, CANDIDATES:].sum().item() / size.item() - 1),
    }  # fmt: skip
    for seed in range(seeds):
        for name, sketch in factored(taps, seed):
            found.setdefault(name, []).append(sketch)
    each = TOTAL // len(grams)
    draws: dict[str, Callable[[int], Tensor]] = {
        "ideal 256 a module": lambda seed: ideal(grams, each, seed),
        f"ideal {TOTAL // 4} global": lambda seed: ideal(gram[None], TOTAL // 4, seed),
        f"ideal {TOTAL} global": lambda seed: ideal(gram[None], TOTAL, seed),
    }
    for name, draw in draws.items():
        found[name] = [draw(seed) for seed in range(seeds)]
    return facts, {name: yardstick.row(sketches) for name, sketches in found.items()}


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_fidelity(benchmark):
    facts, rows = benchmark.pedantic(measure, args=(SEEDS,), rounds=1)
    benchmark.extra_info |= {"facts": facts, "rows": rows}
    assert facts["scan"] < 1e-4
    for k in (TOTAL // 4, TOTAL):
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
