"""linear_logp: V and N off the tiles, ignored targets, bias, softcap, temperature; full logits."""

import torch
import torch.nn.functional as F

import u2a_kernels
from cases import Case
from u2a_kernels.ops import linear_logp as op
from u2a_kernels.ops.linear_logp import triton as kernels
from u2a_kernels.testing import randn

# N, d, V, ignored rows, bias, softcap, temperature
SHAPES = {
    "ragged": (13, 7, 37, [0, 4, 12], True, 2.0, 0.7),
    "prime": (11, 5, 131, [], False, None, 1.0),
    "blocks": (67, 33, 1100, [3], False, None, 1.5),
    "one": (1, 1, 1, [], True, 30.0, 1.0),
    "all-ignored": (3, 4, 5, [0, 1, 2], True, None, 1.0),
    "empty": (0, 4, 5, [], True, 1.0, 1.0),
}


def targets(n, v, ignored):
    t = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(4))
    t[ignored] = -100
    return t


def inputs(variant, dtype):
    n, d, v, ignored, bias, softcap, temperature = SHAPES[variant]
    return dict(
        h=randn(n, d, seed=1, dtype=dtype),
        weight=randn(v, d, seed=2, dtype=dtype),
        targets=targets(n, v, ignored),
        bias=randn(v, seed=3, dtype=dtype) if bias else None,
        softcap=softcap,
        temperature=temperature,
    )


def oracle(h, weight, targets, bias=None, softcap=None, temperature=1.0):
    z = F.linear(h, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = F.nll_loss(F.log_softmax(z / temperature, -1), targets, reduction="none")
    return -loss  # nll_loss gives 0 for -100


class Launched(torch.autograd.Function):
    """The Triton launchers in the op's place, forward and backward."""

    @staticmethod
    def forward(ctx, h, weight, targets, bias, softcap, temperature):
        logp, lse, unit = kernels.forward(h, weight, targets, bias, softcap, temperature, True)
        ctx.save_for_backward(unit, h, weight, targets, lse, *(() if bias is None else (bias,)))
        ctx.map = softcap, temperature
        return logp

    @staticmethod
    def backward(ctx, grad):
        unit, h, weight, targets, lse, *bias = ctx.saved_tensors
        bias = bias[0] if bias else None
        dw, db = kernels.backward(grad, h, weight, targets, bias, lse, *ctx.map)
        dh = (grad[:, None] * unit).to(h.dtype)
        return dh, dw, None, None if bias is None else db, None, None


def triton(h, weight, targets, bias=None, softcap=None, temperature=1.0):
    """With a gradient in sight the two GEMMs and the row kernel, else the fused tile kernel."""
    if h.requires_grad or weight.requires_grad:
        return Launched.apply(h, weight, targets, bias, softcap or 0.0, temperature)
    return kernels.forward(h, weight, targets, bias, softcap or 0.0, temperature, False)[0]


def triton_rows(h, weight, targets, bias=None, softcap=None, temperature=1.0):
    return kernels.forward(h, weight, targets, bias, softcap or 0.0, temperature, True)[0]


def reference(h, weight, targets, bias=None, softcap=None, temperature=1.0):
    return op.reference(h, weight, targets, bias, softcap or 0.0, temperature, False)[0]


def spoil(args):
    """NaN in one hidden state that has a target, and in one that has none."""
    used = (args["targets"] != -100).nonzero()[:, 0]
    args["h"][used[1]] = float("nan")
    args["h"][args["targets"] == -100] = float("nan")
    keep = [i for i in range(len(args["h"])) if i != used[1]]
    return lambda out: [out[0][keep]]


def changed(**new):
    return lambda args: {**args, **{k: f(args) for k, f in new.items()}}


HEAD_ERRORS = {
    "width": (
        changed(weight=lambda a: a["weight"][:, :-1]),
        ValueError,
        r"weight must be \[V, d\]",
    ),
    "rank": (changed(h=lambda a: a["h"][None]), ValueError, r"h must be \[N, d\], got"),
    "vocabulary": (
        changed(weight=lambda a: a["weight"][:0]),
        ValueError,
        r"weight must be \[V, d\]",
    ),
    "dtype": (
        changed(weight=lambda a: a["weight"].double()),
        TypeError,
        r"weight must have the dtype of h",
    ),
    "targets-rows": (
        changed(targets=lambda a: a["targets"][1:]),
        ValueError,
        r"targets must be \[N\]",
    ),
    "targets-type": (
        changed(targets=lambda a: a["targets"].int()),
        TypeError,
        r"targets must be int64",
    ),
    "targets-range": (
        changed(targets=lambda a: torch.full_like(a["targets"], len(a["weight"]))),
        ValueError,
        r"targets must be .*37.* got 37 at",
    ),
}


def named(op_name, errors):
    return {k: (f, e, f"{op_name}: {pattern}") for k, (f, e, pattern) in errors.items()}


def op_args(a):
    return (
        a["h"], a["weight"], a["targets"], a["bias"], a["softcap"] or 0.0, a["temperature"],
        a["h"].requires_grad,
    )  # fmt: skip


CASES = [
    Case(
        name="linear_logp",
        public=u2a_kernels.linear_logp,
        overload=torch.ops.u2a.linear_logp_fwd.default,
        op_args=op_args,
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("h", "weight", "bias"),
        spoil=spoil,
        launchers={"triton": triton, "triton rows": triton_rows, "reference": reference},
        backward_launchers={"triton": triton},
        errors=named(
            "linear_logp",
            {
                **HEAD_ERRORS,
                "bias": (changed(bias=lambda a: a["bias"][1:]), ValueError, r"bias must be \[V\]"),
                "softcap": (changed(softcap=lambda a: 0.0), ValueError, r"softcap must be None or"),
                "temperature": (
                    changed(temperature=lambda a: -1.0),
                    ValueError,
                    r"temperature must be a positive",
                ),
            },
        ),
    )
]


def aot_inputs(dtype):
    """The head of an 8B Llama; a capped, tempered head with a bias."""
    for n, d, v, bias, softcap, temperature in (
        (8192, 4096, 128256, False, None, 1.0),
        (4096, 2304, 256000, True, 30.0, 0.7),
    ):
        yield (
            "linear_logp",
            dict(
                h=torch.empty(n, d, dtype=dtype, device="meta"),
                weight=torch.empty(v, d, dtype=dtype, device="meta"),
                targets=torch.empty(n, dtype=torch.int64, device="meta"),
                bias=torch.empty(v, dtype=dtype, device="meta") if bias else None,
                softcap=softcap,
                temperature=temperature,
            ),
        )
