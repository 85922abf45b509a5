"""dual_linear_cross_entropy with a trainable and with a frozen head, some targets ignored.

Oracle: jvp of cross-entropy on explicit logits; curvature from the jvp of its gradient there.
"""

import torch
import torch.nn.functional as F

import u2a_kernels
from cases import Case
from u2a_kernels.ops.dual_linear_cross_entropy import reference as plain
from u2a_kernels.ops.dual_linear_cross_entropy import triton as kernels
from u2a_kernels.testing import randn

SHAPES = {  # tokens, d, V, direction, bias, bias's direction, softcap
    "direction": (5, 7, 11, True, False, False, None),
    "capped": (5, 7, 37, True, True, True, 2.0),
    "bias": (4, 3, 5, False, True, False, None),
    "cap": (7, 5, 131, False, False, False, 30.0),
    "no-direction": (4, 3, 5, False, False, False, None),
    "one": (1, 1, 1, True, True, True, 30.0),
    "two": (1, 1, 2, False, False, False, None),
    "blocks": (67, 33, 1100, True, False, False, None),
    "tiles": (3, 5, 2053, True, False, False, None),
    "empty": (0, 3, 5, False, True, False, None),
    "ignored": (2, 3, 5, True, True, True, 1.0),
}


def inputs(variant, dtype):
    n, d, vocab, direct, bias, bias_direct, softcap = SHAPES[variant]
    targets = (torch.arange(n) * 7 + 3) % vocab
    if variant == "ignored":
        targets[:] = -100
    elif n > 2:
        targets[2] = -100
    return dict(
        h=randn(2 * n, d, seed=1, dtype=dtype),
        weight=randn(vocab, d, seed=2, dtype=dtype),
        targets=targets,
        weight_t=randn(vocab, d, seed=3, dtype=dtype) if direct else None,
        bias=randn(vocab, seed=4, dtype=dtype) if bias else None,
        bias_t=randn(vocab, seed=5, dtype=dtype) if bias_direct else None,
        softcap=softcap,
    )


def oracle(h, weight, targets, weight_t, bias=None, bias_t=None, softcap=None):
    primal, tangent = h.chunk(2)
    wide = torch.promote_types(h.dtype, torch.float32)

    def losses(z):
        return F.cross_entropy(z.to(wide), targets, ignore_index=-100, reduction="none")

    def head(h, weight, bias):
        z = F.linear(h, weight, bias)
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    ends = [primal, weight, bias]
    directions = [
        tangent,
        torch.zeros_like(weight) if weight_t is None else weight_t,
        bias_t if bias_t is not None or bias is None else torch.zeros_like(bias),
    ]
    if bias is None:
        ends, directions = ends[:2], directions[:2]

    def logits(*parameters):
        return head(*parameters, *([None] if bias is None else []))

    ends, directions = tuple(ends), tuple(directions)
    loss, loss_t = torch.func.jvp(lambda *a: losses(logits(*a)), ends, directions)
    z, z_t = torch.func.jvp(logits, ends, directions)
    gradient = torch.func.grad(lambda z: losses(z).sum())
    curvature = (torch.func.jvp(gradient, (z,), (z_t,))[1].to(wide) * z_t.to(wide)).sum(1)
    return loss, loss_t, curvature.detach()


class Launched(torch.autograd.Function):
    """An implementation's forward and backward in the op's place."""

    @staticmethod
    def forward(ctx, module, mode, softcap, targets, weight_t, bias_t, h, weight, bias):
        args = h, weight, targets, weight_t, bias, bias_t, softcap or 0.0, mode
        *values, stats, kept = module.forward(*args, True)
        ctx.saved, ctx.module = (*args[:6], stats, *args[6:]), module
        ctx.kept = kept
        return tuple(values)

    @staticmethod
    def backward(ctx, a, b, _):
        dw, db = ctx.module.backward(a, b, *ctx.saved)
        kept, h = ctx.kept.float(), ctx.saved[0]
        primal = b[:, None] * kept[0]
        tangent = torch.zeros_like(primal)
        if len(kept) == 2:
            primal, tangent = primal + a[:, None] * kept[1], b[:, None] * kept[1]
        dh = torch.cat([primal, tangent]).to(h.dtype)
        return (None,) * 6 + (dh, dw, db if len(db) else None)


def launched(module):
    def call(h, weight, targets, weight_t, bias=None, bias_t=None, softcap=None, mode="hvp"):
        return Launched.apply(module, mode, softcap, targets, weight_t, bias_t, h, weight, bias)

    return call


def op_args(a):
    names = ("h", "weight", "targets", "weight_t", "bias", "bias_t")
    return *(a[n] for n in names), a["softcap"] or 0.0, "hvp", a["h"].requires_grad


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
    "bias": (
        lambda a: {**a, "bias": torch.ones(3)},
        ValueError,
        r"dual_linear_cross_entropy: bias must be \[V\] = \[11\], got \[3\]",
    ),
    "bias-direction": (
        lambda a: {**a, "bias_t": torch.ones(11)},
        ValueError,
        r"dual_linear_cross_entropy: bias_t must be None without bias",
    ),
    "softcap": (
        lambda a: {**a, "softcap": -1.0},
        ValueError,
        r"dual_linear_cross_entropy: softcap must be None or a positive number, got -1.0",
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


def case(name, differentiable, errors, launchers):
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
        launchers=launchers,
        backward_launchers=launchers,
    )


LAUNCHERS = {"triton": launched(kernels), "reference": launched(plain)}
CASES = [
    case("dual_linear_cross_entropy", ("h", "weight", "bias"), ERRORS, LAUNCHERS),
    case("dual_linear_cross_entropy-frozen", ("h",), {}, {}),
]


def aot_inputs(dtype):
    """The head of an 8B Llama with a tangent; a capped head with a bias, frozen."""
    for name, n, d, v, direct, bias, softcap in (
        ("dual_linear_cross_entropy", 4096, 4096, 128256, True, False, None),
        ("dual_linear_cross_entropy-frozen", 4096, 2304, 256000, False, True, 30.0),
    ):

        def empty(*shape):
            return torch.empty(*shape, dtype=dtype, device="meta")

        yield (
            name,
            dict(
                h=empty(2 * n, d),
                weight=empty(v, d),
                targets=torch.empty(n, dtype=torch.int64, device="meta"),
                weight_t=empty(v, d) if direct else None,
                bias=empty(v) if bias else None,
                bias_t=empty(v) if bias else None,
                softcap=softcap,
            ),
        )
