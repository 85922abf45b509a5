"""What a model says of every answer token: log-probability, whether it would have said it itself,
and the mean and spread of log-probabilities over the vocabulary there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from u2a.adapter import evaluating
from u2a.batch import Row, row_batches
from u2a.dual import final_softcap, parts
from u2a.logps import _moved
from u2a_kernels import linear_logp

LOGITS = 1 << 22


@dataclass(frozen=True)
class AnswerTokens:
    """Flat over the answer tokens of R rows, in their order, on the CPU.

    `logp [n]` float64; `hit [n]` bool, the token is the model's most likely one; `mean [n]`,
    `std [n]` float64 of log p(v) for v drawn from p; `count [R]` int64 tokens per row.
    """

    logp: Tensor
    hit: Tensor
    mean: Tensor
    std: Tensor
    count: Tensor


def moments(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(argmax = t, sum_v p_v log p_v, its spread) `[n]` of `logits [n, V]`, `target [n]`.

    Ties for the most likely token go to the lowest id, as in greedy decoding.
    """
    logp = torch.log_softmax(logits, -1)
    p = logp.exp()
    # 0 log 0 = 0
    mean = torch.where(p > 0, p * logp, 0.0).sum(-1)
    spread = torch.where(p > 0, p * (logp - mean[:, None]).square(), 0.0).sum(-1)
    return logits.argmax(-1) == target, mean, spread.sqrt()


def answer_tokens(
    model: nn.Module, rows: Sequence[Row], batch_tokens: int = 8192, *, logits: int = LOGITS
) -> AnswerTokens:
    """`AnswerTokens` of rows, without gradient.

    Args:
        logits: how many logits are held at once (at least one token's): the answer tokens of a
            batch meet the vocabulary in blocks of logits // V. Six float32 arrays of that many
            numbers are the peak, 96 MiB with the default.

    `logp` is `u2a_kernels.linear_logp`'s. The logits for the rest are in the model's dtype, as
    transformers computes them; statistics of them in float32, float64 for a float64 model.
    """
    if not rows:
        raise ValueError("answer_tokens: rows must hold at least one Row, got none")
    backbone, head = parts(model)
    block = max(logits // head.weight.shape[0], 1)
    found: dict[int, list[Tensor]] = {}
    with evaluating(model):
        for batch in row_batches(rows, batch_tokens):
            ids, at, target, _, count = _moved(batch, head.weight.device)
            h = backbone(input_ids=ids, use_cache=False).last_hidden_state
            h = h.flatten(0, 1).index_select(0, at)
            steps = zip(h.split(block), target.split(block), strict=True)
            blocks = [_facts(model, x, t) for x, t in steps]
            facts = [torch.cat(f).cpu() for f in zip(*blocks, strict=True)]
            cut = zip(*(f.split(count.tolist()) for f in facts), strict=True)
            found |= dict(zip(batch.index.tolist(), map(list, cut), strict=True))
    return _joined([found[i] for i in range(len(rows))])


def _facts(model: nn.Module, h: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    _, head = parts(model)
    cap = final_softcap(model)
    logp = linear_logp(h, head.weight, target, bias=head.bias, softcap=cap)
    z = nn.functional.linear(h, head.weight, head.bias)
    z = z if z.dtype == torch.float64 else z.float()
    return logp, *moments(z if cap is None else cap * torch.tanh(z / cap), target)


def _joined(rows: Sequence[Sequence[Tensor]]) -> AnswerTokens:
    count = torch.tensor([len(r[0]) for r in rows], dtype=torch.int64)
    logp, hit, mean, std = (torch.cat(f) for f in zip(*rows, strict=True))
    return AnswerTokens(logp.double(), hit, mean.double(), std.double(), count)


def without_end(tokens: AnswerTokens, rows: Sequence[Row], eos: int) -> AnswerTokens:
    """Without the end-of-sequence token that closes an answer, where the answer has others: it
    follows from the answer's end alone and says nothing of what is known."""
    ends = torch.tensor([len(r.answer_ids) > 1 and r.answer_ids[-1] == eos for r in rows])
    keep = torch.ones(len(tokens.logp), dtype=torch.bool)
    keep[tokens.count.cumsum(0)[ends] - 1] = False
    return AnswerTokens(
        tokens.logp[keep],
        tokens.hit[keep],
        tokens.mean[keep],
        tokens.std[keep],
        tokens.count - ends.long(),
    )


def by_row(name: str, values: Tensor, count: Tensor) -> list[Tensor]:
    """`values [n]` cut into rows. Raises ValueError for a row without token, or another n."""
    if values.shape != (int(count.sum()),):
        n = int(count.sum())
        raise ValueError(f"{name}: wanted [{n}] values, one a token; got {list(values.shape)}")
    check_count(name, count)
    return list(values.split(count.tolist()))


def check_count(name: str, count: Tensor) -> None:
    """Raises ValueError for no row, or one without answer token."""
    if not len(count) or int(count.min()) < 1:
        at = int(count.argmin()) if len(count) else 0
        raise ValueError(f"{name}: row {at} holds no answer token, wanted at least one")
