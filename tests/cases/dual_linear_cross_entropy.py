"""dual_linear_cross_entropy with a trainable and with a frozen head, some targets ignored.

Oracle: jvp of cross-entropy on explicit logits; curvature from the jvp of its gradient there.
"""

import torch
import torch.nn.functional as F

import u2a_kernels
from cases import Case
from u2a_kernels.testing import randn

SHAPES = {  # tokens, d, V
    "direction": (5, 7, 11),
    "no-direction": (4, 3, 5),
    "one": (1, 1, 2),
    "tiles": (3, 5, 8195),
    "empty": (0, 3, 5),
    "ignored": (2, 3, 5),
}


def inputs(variant, dtype):
    n, d, vocab = SHAPES[variant]
    targets = (torch.arange(n) * 7 + 3) % vocab
    if variant == "ignored":
        targets[:] = -100
    elif n > 2:
        targets[2] = -100
    direct = variant in ("direction", "tiles")
    return dict(
        h=randn(2 * n, d, seed=1, dtype=dtype),
        weight=randn(vocab, d, seed=2, dtype=dtype),
        targets=targets,
        weight_t=randn(vocab, d, seed=3, dtype=dtype) if direct else None,
    )


def oracle(h, weight, targets, weight_t):
    primal, tangent = h.chunk(2)
    weight_t = torch.zeros_like(weight) if weight_t is None else weight_t
    wide = torch.promote_types(h.dtype, torch.float32)

    def losses(z):
        return F.cross_entropy(z.to(wide), targets, ignore_index=-100, reduction="none")

    def head(h, weight):
        return F.linear(h, weight)

    ends, directions = (primal, weight), (tangent, weight_t)
    loss, loss_t = torch.func.jvp(lambda *a: losses(head(*a)), ends, directions)
    z, z_t = torch.func.jvp(head, ends, directions)
    gradient = torch.func.grad(lambda z: losses(z).sum())
    curvature = (torch.func.jvp(gradient, (z,), (z_t,))[1].to(wide) * z_t.to(wide)).sum(1)
    return loss, loss_t, curvature.detach()


def op_args(a):
    rows = a["h"].requires_grad and not a["weight"].requires_grad
    return a["h"], a["weight"], a["targets"], a["weight_t"], "hvp", rows


def spoil(args):
    args["h"][1] = float("nan")
    keep = [0, 2, 3, 4]
    return lambda out: [o[keep] for o in out]


ERRORS = {
    "odd": (
        lambda a: {**a, "h": a["h"][:3]},
        ValueError,
        r"dual_linear_cross_entropy: h must be \[2N, d\], .* got \[3, 7\]",
    ),
    "weight": (
        lambda a: {**a, "weight": a["weight"][:, :-1]},
        ValueError,
        r"dual_linear_cross_entropy: weight must be \[V, d\] = \[11, 7\], got \[11, 6\]",
    ),
    "direction": (
        lambda a: {**a, "weight_t": a["weight_t"].requires_grad_()},
        ValueError,
        r"dual_linear_cross_entropy: weight_t must not require grad",
    ),
    "targets-count": (
        lambda a: {**a, "targets": a["targets"][:-1]},
        ValueError,
        r"dual_linear_cross_entropy: targets must be \[N\] = \[5\], got \[4\]",
    ),
    "targets-high": (
        lambda a: {**a, "targets": a["targets"] + 200},
        ValueError,
        r"dual_linear_cross_entropy: targets must be in \[0, V = 11\) or -100, got 203 at 0",
    ),
    "targets-negative": (
        lambda a: {**a, "targets": torch.full_like(a["targets"], -1)},
        ValueError,
        r"dual_linear_cross_entropy: targets must be in \[0, V = 11\) or -100, got -1 at 0",
    ),
    "targets-type": (
        lambda a: {**a, "targets": a["targets"].int()},
        TypeError,
        r"dual_linear_cross_entropy: targets must be int64, got torch.int32",
    ),
    "mode": (
        lambda a: {**a, "mode": "fisher"},
        ValueError,
        r"dual_linear_cross_entropy: mode must be 'hvp', 'ggn' or 'jvp', got 'fisher'",
    ),
}


def case(name, differentiable, errors):
    return Case(
        name=name,
        public=u2a_kernels.dual_linear_cross_entropy,
        overload=torch.ops.u2a.dual_linear_cross_entropy.default,
        op_args=op_args,
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=differentiable,
        spoil=spoil,
        errors=errors,
        grad_outputs=(0, 1),
    )


CASES = [
    case("dual_linear_cross_entropy", ("h", "weight"), ERRORS),
    case("dual_linear_cross_entropy-frozen", ("h",), {}),
]
