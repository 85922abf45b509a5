"""Cross-entropy of a linear head without logits: a weighted sum of linear_logp, nothing of its own.

The op underneath already takes one cotangent per row, so per-token weights, their gradient and any
reduction are plain torch on [N] vectors.
"""

from __future__ import annotations

from torch import Tensor

from u2a_kernels._checks import check_size, check_softcap
from u2a_kernels.ops.linear_logp import IGNORE, check_head, linear_logp


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of softmax(c tanh((h W^T + bias) / c)) against targets, reduced to a scalar.

    c is the soft cap; without one the logits are h W^T + bias. loss_t is -linear_logp of the same
    arguments, 0 where the target is -100. The result is mean_t loss_t over the tokens that are not
    ignored (0 when there are none, where ``F.cross_entropy`` gives NaN); with token_weights it is
    sum_t token_weights_t loss_t, with no normalisation: put 1 / (number of tokens), per example or
    per batch, into the weights.

    Args:
        h: [N, d] hidden states; float32, bfloat16, float16 (float64 on CPU).
        weight: [V, d] head, dtype of h.
        targets: [N] int64 in [0, V) or -100.
        token_weights: [N], any sign, any floating dtype, on the device of h.
        bias: [V], dtype of h, or None.
        softcap: positive, or None.

    Returns:
        Scalar, float32 (float64 for float64), in nats. Differentiable once in h, weight, bias
        and token_weights. No [N, V] tensor is held.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value that does not fit, by name.

    Equivalent torch: with z the logits: ``F.cross_entropy(z, targets)``, or
    ``(token_weights * F.cross_entropy(z, targets, reduction="none")).sum()``.

    Source: as linear_logp.
    """
    op = "linear_cross_entropy"
    check_head(op, h, weight, targets, bias)
    check_softcap(op, softcap)
    if token_weights is not None:
        if not isinstance(token_weights, Tensor):
            got = type(token_weights).__name__
            raise TypeError(f"{op}: token_weights must be a torch.Tensor, got {got}")
        if not token_weights.is_floating_point():
            raise TypeError(
                f"{op}: token_weights must be floating point, got {token_weights.dtype}"
            )
        check_size(op, "token_weights", token_weights, "[N]", (h.shape[0],))
    logp = linear_logp(h, weight, targets, bias=bias, softcap=softcap)
    if token_weights is None:
        return -logp.sum() / (targets != IGNORE).sum().clamp_min(1)
    return -(token_weights.to(logp.dtype) * logp).sum()
