"""dual_softmax: sizes off the blocks, large logits, masked entries; the jvp of torch.softmax."""

import torch

import u2a_kernels
from cases import Case
from u2a_kernels.ops import dual_softmax as op
from u2a_kernels.testing import randn

SHAPES = {
    "odd": (6, 2, 7),
    "one": (2, 1),
    "masked": (4, 3, 11),
    "large": (4, 16),
    "block": (146, 67),
    "wide": (4, 9001),
    "warp": (6, 256),  # these four: a warp or a CTA to a row in CUDA, more than it holds
    "cta": (4, 4096),
    "ctas": (2, 12288),
    "tiles": (2, 40960),
    "empty": (0, 5),
    "no-columns": (4, 0),
    "dim": (4, 5, 3),
}


def inputs(variant, dtype):
    z = 2 * randn(*SHAPES[variant], seed=1, dtype=dtype)
    if variant == "masked":
        z[:2, :, 3:6] = float("-inf")
    if variant == "large":
        z[:2] *= 2e4 if dtype == torch.float16 else 1e30
    return dict(z=z, dim=1 if variant == "dim" else -1, mode="hvp")


def oracle(z, dim, mode):
    primal, tangent = z.chunk(2)
    return torch.cat(torch.func.jvp(lambda z: torch.softmax(z, dim), (primal,), (tangent,)))


class Launched(torch.autograd.Function):
    """The Triton launchers in the op's place, forward and backward."""

    @staticmethod
    def forward(ctx, z, mode):
        out = op.triton(z, mode)
        ctx.save_for_backward(out)
        ctx.mode = mode
        return out

    @staticmethod
    def backward(ctx, grad):
        return op.triton_bwd(grad, *ctx.saved_tensors, ctx.mode == "ggn"), None


def triton(z, dim, mode):
    return Launched.apply(z.movedim(dim, -1), mode).movedim(-1, dim)


def reference(z, dim, mode):
    return op.reference(z.movedim(dim, -1), mode).movedim(-1, dim)


def spoil(args):
    args["z"][1] = float("nan")
    keep = [0, 2, 3, 5]
    return lambda out: [out[0][keep]]


CASES = [
    Case(
        name="dual_softmax",
        public=u2a_kernels.dual_softmax,
        overload=torch.ops.u2a.dual_softmax.default,
        op_args=lambda a: (a["z"].movedim(a["dim"], -1), a["mode"]),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("z",),
        spoil=spoil,
        launchers={"triton": triton, "reference": reference},
        backward_launchers={"triton": triton},
        errors={
            "odd": (
                lambda a: {**a, "z": a["z"][:3]},
                ValueError,
                r"dual_softmax: z must be \[2B, ..., V\], .* got \[3, 2, 7\]",
            ),
            "dim": (
                lambda a: {**a, "dim": 0},
                ValueError,
                r"dual_softmax: dim must be in \[1, 3\) or \[-2, 0\), got 0",
            ),
            "mode": (
                lambda a: {**a, "mode": "full"},
                ValueError,
                r"dual_softmax: mode must be 'hvp', 'ggn' or 'jvp', got 'full'",
            ),
            "dtype": (
                lambda a: {**a, "z": a["z"].int()},
                TypeError,
                r"dual_softmax: z must be float32, .* got torch.int32",
            ),
        },
    )
]


def aot_inputs(dtype):
    """A router of 128 experts, attention rows, a vocabulary, each with both backwards."""
    for rows, v in ((16384, 128), (4096, 4096), (1024, 8192), (256, 128256)):
        for mode in ("hvp", "ggn"):
            z = torch.empty(2 * rows, v, dtype=dtype, device="meta")
            yield "dual_softmax", dict(z=z, dim=-1, mode=mode)
