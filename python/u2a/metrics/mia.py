"""Membership inference: can forget rows be told from rows never trained on?

Every score is high for a row that looks never seen, so an AUC of 1 says that the forget rows still
look memorised, 0.5 that they look like the held-out ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from u2a.adapter import evaluating
from u2a.batch import Batch, Row, row_batches
from u2a.dual_modules import path
from u2a.metrics.tokens import by_row, check_count
from u2a.products import answer_logps
from u2a_kernels import grad_sq_norm

LINEAR = "transformers.pytorch_utils.Conv1D"


def loss_score(nll: Tensor, count: Tensor) -> Tensor:
    """NLL/|y| `[R]` float64. `nll [R]` summed, `count [R]`. Source: Yeom et al., arXiv 1709.01604.

    Raises ValueError for a row without answer token.
    """
    check_count("loss_score", count)
    return nll.double() / count


def zlib_score(loss: Tensor, texts: Sequence[str]) -> Tensor:
    """(NLL/|y|) / bytes of the zlib-compressed answer text, `[R]`.

    Source: Carlini et al., arXiv 2012.07805.
    """
    if loss.shape != (len(texts),):
        raise ValueError(f"zlib_score: wanted [{len(texts)}] losses, got {list(loss.shape)}")
    size = [len(zlib.compress(t.encode())) for t in texts]
    return loss.double() / torch.tensor(size, dtype=torch.float64)


def reference_score(loss: Tensor, reference: Tensor) -> Tensor:
    """NLL/|y| minus that of a reference model `[R]`; source as `zlib_score`."""
    if loss.shape != reference.shape:
        raise ValueError(
            f"reference_score: wanted {list(loss.shape)} reference losses, got "
            f"{list(reference.shape)}"
        )
    return loss.double() - reference.double()


def min_k(values: Tensor, count: Tensor, k: float = 0.4) -> Tensor:
    """Minus the mean of the lowest max(1, floor(k |y|)) `values` of every row, `[R]` float64.

    `values [n]` token log-probabilities, `count [R]`. Raises ValueError for k outside (0, 1] or a
    row without token. Source: Min-K% Prob, arXiv 2310.16789.
    """
    if not 0 < k <= 1:
        raise ValueError(f"min_k: k must be in (0, 1], got {k}")
    rows = [v.double().sort().values for v in by_row("min_k", values, count)]
    # 0.29 * 100 is 28.999999999999996
    return torch.stack([-v[: max(1, int(k * len(v) + 1e-9))].mean() for v in rows])


def min_k_plus_plus(
    logp: Tensor, mean: Tensor, std: Tensor, count: Tensor, k: float = 0.4
) -> Tensor:
    """`min_k` of (log p_t - mean) / std, the moments over the vocabulary of log p under p.

    `logp`, `mean`, `std` `[n]` of `AnswerTokens`. std is at least 1e-3, as in the public code (a
    distribution on one token has 0). Source: Min-K%++, arXiv 2404.02936.
    """
    return min_k((logp.double() - mean.double()) / std.double().clamp_min(1e-3), count, k)


def auc(members: Tensor, others: Tensor) -> float:
    """Probability that a held-out row scores above a forget row, ties counted half.

    `members [F]`: scores of the forget rows, `others [H]`: of rows never trained on. Raises
    ValueError for an empty side or a non-finite score.
    """
    from sklearn.metrics import roc_auc_score

    for name, x in (("members", members), ("others", others)):
        if x.ndim != 1 or not len(x):
            raise ValueError(f"auc: {name} must be [n >= 1] scores, got {list(x.shape)}")
        if not bool(x.isfinite().all()):
            raise ValueError(f"auc: {name} must be finite, row {int((~x.isfinite()).nonzero()[0])}")
    label = torch.cat([torch.zeros(len(members)), torch.ones(len(others))])
    return float(roc_auc_score(label.numpy(), torch.cat([members, others]).double().numpy()))


def privleak(unlearned: float, retrained: float = 0.5) -> float:
    """100 ((1 - AUC_u) - (1 - AUC_r)) / (1 - AUC_r), AUCs as `auc` gives them (Min-40%).

    0 is best, below: forget rows still look trained on, above: unlearnt so far that it shows. 0.5
    stands for a model trained without them where none is at hand. Raises ValueError for an AUC
    outside [0, 1], or a retrained one of 1. Source: MUSE, arXiv 2407.06460.
    """
    if not (0 <= unlearned <= 1 and 0 <= retrained < 1):
        raise ValueError(
            f"privleak: wanted AUCs in [0, 1], the retrained below 1; got {unlearned}, {retrained}"
        )
    return 100 * (retrained - unlearned) / (1 - retrained)


def gradient_norms(model: nn.Module, rows: Sequence[Row], batch_tokens: int = 8192) -> Tensor:
    """||grad of NLL/|y||| `[R]` float64 over the weights of all linear layers below the head.

    Frozen weights and those of an adapter's base layers count, the adapter's own factors do not, so
    that models with and without adapter compare. No weight gradient is formed: one forward and one
    backward of activations per batch, then `u2a_kernels.grad_sq_norm`. Fused experts, embeddings,
    norms and biases are left out. The public code averages the norms of single tensors instead.
    Source: GradNorm attack, arXiv 2402.17012.
    """
    out = torch.zeros(len(rows), dtype=torch.float64)
    for batch in row_batches(rows, batch_tokens):
        out[batch.index] = _batch_norms(model, batch).double().cpu()
    return out


def _linear(name: str, module: nn.Module) -> bool:
    kind = isinstance(module, nn.Linear) or path(type(module)) == LINEAR
    return kind and "lora_" not in name and not name.endswith("lm_head")


def _batch_norms(model: nn.Module, batch: Batch) -> Tensor:
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0].detach(), output))

    def start(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.requires_grad_()

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    hooks = [embedding.register_forward_hook(start)]
    hooks += [m.register_forward_hook(keep) for n, m in model.named_modules() if _linear(n, m)]
    try:
        with evaluating(model), torch.enable_grad():
            loss = -answer_logps(model, batch).mean().sum()
            grads = torch.autograd.grad(loss, [y for _, y in seen])
    finally:
        for hook in hooks:
            hook.remove()
    rows, width = batch.ids.shape
    ends = torch.arange(0, (rows + 1) * width, width, device=loss.device)
    total = torch.zeros(rows, dtype=torch.float64, device=loss.device)
    for (x, _), g in zip(seen, grads, strict=True):
        total += grad_sq_norm(x.flatten(0, 1).to(g.dtype), g.flatten(0, 1), ends).double()
    return total.clamp_min(0).sqrt()
