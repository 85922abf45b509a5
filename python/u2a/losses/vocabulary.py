"""Losses over the whole vocabulary, at most `chunk` tokens' logits at a time.

A token function takes logits z `[c, V]`, targets `[c]`, reference logits `[c, V]` or None, and
returns `[c]`. `head_loss` applies one to all answer tokens: each chunk's logits are made, used and
dropped, and made again in the backward pass. Twice differentiable through autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from u2a.batch import AnswerLogps, Batch
from u2a.dual import final_softcap, parts
from u2a.logps import _moved
from u2a.losses.base import REFERENCE, VOCABULARY, Loss, Vector

TokenLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _wanted(ref: Tensor | None, name: str) -> Tensor:
    if ref is None:
        raise ValueError(f"{name}: wants the reference model's logits [c, V], got None")
    return ref.detach()


def _soft_ce(q: Tensor, z: Tensor) -> Tensor:
    return -(q * z.log_softmax(-1)).sum(-1)


def undial(z: Tensor, target: Tensor, ref: Tensor | None, beta: float = 10.0) -> Tensor:
    """Self-distillation: cross-entropy to the reference logits with beta off the true token."""
    teacher = _wanted(ref, "undial").scatter_add(
        -1, target[:, None], torch.full_like(z.detach()[:, :1], -beta)
    )
    return _soft_ce(teacher.softmax(-1), z)


def ceu(z: Tensor, target: Tensor, ref: Tensor | None, beta: float = 0.0) -> Tensor:
    """Cross-entropy to the own distribution without the true token, detached."""
    if z.shape[-1] < 2:
        raise ValueError(f"ceu: wanted a vocabulary of 2 or more, got {z.shape[-1]}")
    q = z.detach().scatter(-1, target[:, None], -torch.inf).softmax(-1)
    return _soft_ce(q, z)


def pdu(z: Tensor, target: Tensor, ref: Tensor | None, beta: float = 0.0) -> Tensor:
    """(max logit - mean logit)^2: 0 only for a uniform prediction."""
    return (z.amax(-1) - z.mean(-1)).square()


def kl(z: Tensor, target: Tensor, ref: Tensor | None, beta: float = 1.0) -> Tensor:
    """beta^2 KL(softmax(ref/beta) || softmax(z/beta)); beta is the temperature, 1 the plain KL."""
    q = (_wanted(ref, "kl") / beta).log_softmax(-1)
    return beta * beta * (q.exp() * (q - (z / beta).log_softmax(-1))).sum(-1)


def _logits(h: Tensor, head: nn.Linear, softcap: float | None) -> Tensor:
    z = F.linear(h, head.weight, head.bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def head_loss(
    h: Tensor,
    head: nn.Linear,
    target: Tensor,
    fn: TokenLoss,
    *,
    ref: Tensor | None = None,
    ref_head: nn.Linear | None = None,
    softcap: float | None = None,
    chunk: int = 256,
) -> Tensor:
    """`fn` of every token's logits, `[n]`.

    Args:
        h: `[n, d]` hidden states; `target [n]` int64.
        head: the LM head, `[V, d]` and bias or None; `softcap` as the model's.
        ref: `[n, d]` hidden states of the reference, through `ref_head` (default: `head`).
        chunk: tokens whose logits are held at once, in the forward and in the backward pass.

    Raises ValueError for chunk < 1 and for shapes that do not fit.
    """
    if chunk < 1:
        raise ValueError(f"head_loss: chunk must be >= 1, got {chunk}")
    if h.ndim != 2 or target.shape != h.shape[:1] or (ref is not None and len(ref) != len(h)):
        given = None if ref is None else list(ref.shape)
        raise ValueError(
            "head_loss: wanted h [n, d], target [n], ref [n, d]; "
            f"got {list(h.shape)}, {list(target.shape)}, {given}"
        )

    def part(h: Tensor, target: Tensor, ref: Tensor | None) -> Tensor:
        with torch.no_grad():
            zr = None if ref is None else _logits(ref, ref_head or head, softcap)
        return fn(_logits(h, head, softcap), target, zr)

    out = []
    for i in range(0, len(h), chunk):
        s = slice(i, i + chunk)
        zr = None if ref is None else ref[s]
        out.append(
            checkpoint(part, h[s], target[s], zr, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(out) if out else h.new_zeros(0)


def vocabulary_loss(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    *,
    reference: nn.Module | None = None,
    skip: int | None = None,
    chunk: int = 256,
) -> Tensor:
    """A whole-vocabulary loss of the table on a batch, mean over each answer's tokens, `[B]`.

    Args:
        model, batch: as for `u2a.answer_logps`; gradients flow.
        reference: the frozen reference model where the loss needs one (a peft model with its
            adapter disabled: compute inside `u2a.adapter.adapter_disabled` on a copy).
        skip: leading answer tokens left out of the mean; None: 1 for "ceu", else 0. An answer
            with no token left counts 0.
        chunk: see `head_loss`.
    """
    if REFERENCE in loss.needs and reference is None:
        raise ValueError(f"{loss.name}: wants a reference model, got None")
    backbone, head = parts(model)
    ids, at, target, row, count = _moved(batch, head.weight.device)
    lp = AnswerLogps(target, row, count)
    keep = lp.position() >= ((loss.name == "ceu") if skip is None else skip)
    at, target, row = at[keep], target[keep], row[keep]
    h = _hidden(backbone, ids, at)
    ref, ref_head = None, None
    if REFERENCE in loss.needs and reference is not None:
        with torch.no_grad():
            ref_backbone, ref_head = parts(reference)
            ref = _hidden(ref_backbone, ids, at)
    fn = partial(loss.fn, beta=loss.beta or 0.0, **loss.options)
    each = head_loss(
        h, head, target, fn, ref=ref, ref_head=ref_head, softcap=final_softcap(model), chunk=chunk
    )
    left = count.new_zeros(len(batch)).index_add(0, row, torch.ones_like(row))
    return AnswerLogps(each, row, left).mean()


def _hidden(backbone: nn.Module, ids: Tensor, at: Tensor) -> Tensor:
    h: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
    return h.flatten(0, 1).index_select(0, at)


_Z, _R = (1.0, 0.0, -1.0, 2.0), (0.5, 1.5, -0.5, 0.0)
_BOTH = frozenset({VOCABULARY, REFERENCE})
LOSSES = (
    Loss(
        "undial", "mean_t CE(softmax(z_ref - beta onehot(y)), softmax(z))",
        "UNDIAL, arXiv 2402.10052", undial,
        Vector(1.5056996693, logits=_Z, target=1, ref_logits=_R),
        beta=10.0, needs=_BOTH,
    ),
    Loss(
        "ceu", "mean_t CE(softmax(sg(z) with z_y = -inf), softmax(z)), first answer token left out",
        "CEU, arXiv 2503.01224", ceu, Vector(0.8050432398, logits=_Z, target=1),
        needs=frozenset({VOCABULARY}),
    ),
    Loss(
        "pdu", "mean_t (max z - mean z)^2, plus lam (L_r - eps), see steps.Dual",
        "PDU, arXiv 2506.05314", pdu, Vector(2.25, logits=_Z, target=1),
        needs=frozenset({VOCABULARY}), retain_weight=1.0,
    ),
    Loss(
        "kl_retain", "mean_t beta^2 KL(softmax(z_ref/beta) || softmax(z/beta)), on retain rows",
        "KL, TOFU, arXiv 2401.06121; C3PO's distillation, arXiv 2402.10893", kl,
        Vector(0.9372194129, logits=_Z, target=1, ref_logits=_R), beta=1.0, needs=_BOTH,
    ),
)  # fmt: skip
