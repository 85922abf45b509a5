"""linear_cross_entropy: mean, and per-token weights with their gradient; torch's own as oracle."""

import torch
import torch.nn.functional as F

import u2a_kernels
from cases import Case, linear_logp
from u2a_kernels.testing import randn

# N, d, V, ignored rows, weighted, bias, softcap
SHAPES = {
    "weighted": (13, 7, 37, [0, 4, 12], True, False, None),
    "capped": (11, 5, 131, [2], True, True, 2.0),
    "mean": (13, 7, 37, [0, 4, 12], False, False, None),
    "all-ignored": (3, 4, 5, [0, 1, 2], False, False, None),
    "empty": (0, 4, 5, [], True, False, None),
}


def inputs(variant, dtype):
    n, d, v, ignored, weighted, bias, softcap = SHAPES[variant]
    return dict(
        h=randn(n, d, seed=1, dtype=dtype),
        weight=randn(v, d, seed=2, dtype=dtype),
        targets=linear_logp.targets(n, v, ignored),
        token_weights=randn(n, seed=3, dtype=dtype) if weighted else None,
        bias=randn(v, seed=4, dtype=dtype) if bias else None,
        softcap=softcap,
    )


def oracle(h, weight, targets, token_weights=None, bias=None, softcap=None):
    z = F.linear(h, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, targets, reduction="none")
    if token_weights is None:
        return loss.sum() / max(1, int((targets != -100).sum()))
    return (token_weights * loss).sum()


def spoil(args):
    """The sum takes every row, so nothing but the NaN itself can be asked of it."""
    args["h"][1] = float("nan")
    return lambda out: []


changed = linear_logp.changed
CASES = [
    Case(
        name="linear_cross_entropy",
        public=u2a_kernels.linear_cross_entropy,
        overload=torch.ops.u2a.linear_logp_fwd.default,  # a composition: its only op
        op_args=lambda a: (
            a["h"],
            a["weight"],
            a["targets"],
            None,
            0.0,
            1.0,
            a["h"].requires_grad,
        ),  # fmt: skip
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("h", "weight", "token_weights", "bias"),
        spoil=spoil,
        errors=linear_logp.named(
            "linear_cross_entropy",
            {
                **linear_logp.HEAD_ERRORS,
                "bias": (
                    changed(bias=lambda a: torch.ones(3)),
                    ValueError,
                    r"bias must be \[V\] = \[37\], got \[3\]",
                ),
                "softcap": (changed(softcap=lambda a: 0.0), ValueError, r"softcap must be None or"),
                "weights-rows": (
                    changed(token_weights=lambda a: a["token_weights"][1:]),
                    ValueError,
                    r"token_weights must be \[N\]",
                ),
                "weights-type": (
                    changed(token_weights=lambda a: a["token_weights"].int()),
                    TypeError,
                    r"token_weights must be floating",
                ),
            },
        ),
    )
]
