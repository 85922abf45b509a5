"""dual_glu and dual_act: every activation, packed, strided, broadcast and empty rows.

The oracle is the jvp of the activation in plain torch, times up where there is one.
"""

import torch
import torch.nn.functional as F

import u2a_kernels
from cases import Case
from u2a_kernels.ops.dual_glu import triton as launch
from u2a_kernels.testing import randn

PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "quick_gelu": lambda a: a * torch.sigmoid(1.702 * a),
    "relu": F.relu,
    "relu2": lambda a: F.relu(a).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda a: a,
}
ODD = {  # activation, shape of y, kind of input
    "one": ("silu", (2, 1), "pair"),
    "block": ("gelu", (4, 3, 131), "pair"),
    "blocks": ("silu", (2, 1031), "pair"),
    "packed": ("gelu_tanh", (4, 3, 17), "packed"),
    "packed-blocks": ("silu", (2, 3, 1030), "packed"),
    "halves": ("silu", (4, 3, 17), "halves"),
    "column": ("sigmoid", (4, 3, 17), "column"),
    "empty": ("silu", (0, 5), "pair"),
    "no-columns": ("silu", (4, 0), "pair"),
}
GLU = {**{name: (name, (6, 2, 7), "pair") for name in PLAIN}, **ODD}
ACT = {
    **{name: (name, (6, 2, 7)) for name in PLAIN},
    "one": ("gelu", (2, 1)),
    "block-tanh": ("gelu_tanh", (4, 3, 131)),
    "empty": ("silu", (0, 5)),
}


def glu_inputs(variant, dtype):
    activation, shape, kind = GLU[variant]
    up = randn(*shape, seed=2, dtype=dtype)
    gate = 3 * randn(*shape[:-1], 1 if kind == "column" else shape[-1], seed=1, dtype=dtype)
    if kind == "packed":
        gate, up = torch.cat([gate, up], -1), None
    elif kind == "halves":
        gate, up = torch.cat([gate, up], -1).chunk(2, -1)
    return dict(gate=gate.expand_as(up) if kind == "column" else gate, up=up, activation=activation)


def act_inputs(variant, dtype):
    activation, shape = ACT[variant]
    return dict(x=3 * randn(*shape, seed=1, dtype=dtype), activation=activation)


def glu_oracle(gate, up, activation):
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    (a, a_t), (b, b_t) = gate.contiguous().chunk(2), up.chunk(2)  # jvp takes no expanded rows
    f = PLAIN[activation]
    return torch.cat(torch.func.jvp(lambda a, b: f(a) * b, (a, b), (a_t, b_t)))


def act_oracle(x, activation):
    primal, tangent = x.chunk(2)
    return torch.cat(torch.func.jvp(PLAIN[activation], (primal,), (tangent,)))


class Launched(torch.autograd.Function):
    """The Triton launchers in the op's place, forward and backward."""

    @staticmethod
    def forward(ctx, gate, up, *options):
        ctx.save_for_backward(gate, up)
        ctx.options = options
        return launch.forward(gate, up, *options)

    @staticmethod
    def backward(ctx, grad):
        d_gate, d_up = launch.backward(grad, *ctx.saved_tensors, *ctx.options)
        return d_gate, None if ctx.saved_tensors[1] is None else d_up, None, None


def glu_triton(gate, up, activation):
    return Launched.apply(gate, up, activation, True)


def act_triton(x, activation):
    return Launched.apply(x, None, activation, False)


def spoil(name):
    def put(args):
        args[name][1] = float("nan")
        return lambda out: [out[0][[0, 2, 3, 5]]]

    return put


GLU_ERRORS = {
    "odd": (
        lambda a: {**a, "gate": a["gate"][:5], "up": a["up"][:5]},
        ValueError,
        r"dual_glu: gate must be \[2B, ..., F\], primal rows then .* got \[5, 2, 7\]",
    ),
    "odd-columns": (
        lambda a: {**a, "up": None},
        ValueError,
        r"dual_glu: gate must be \[2B, ..., 2F\] without up, got \[6, 2, 7\]",
    ),
    "shape": (
        lambda a: {**a, "up": a["up"][:4]},
        ValueError,
        r"dual_glu: up must be .* = \[6, 2, 7\], got \[4, 2, 7\]",
    ),
    "dtype": (
        lambda a: {**a, "up": a["up"].double()},
        TypeError,
        r"dual_glu: up must have the dtype of gate",
    ),
    "activation": (
        lambda a: {**a, "activation": "mish"},
        ValueError,
        r"dual_glu: activation must be one of silu, gelu, .*, got 'mish'",
    ),
}
ACT_ERRORS = {
    "odd": (
        lambda a: {**a, "x": a["x"][:3]},
        ValueError,
        r"dual_act: x must be \[2B, ..., F\], .* got \[3, 2, 7\]",
    ),
    "activation": (
        lambda a: {**a, "activation": "GELU"},
        ValueError,
        r"dual_act: activation must be one of silu, .*, got 'GELU'",
    ),
}
CASES = [
    Case(
        name="dual_glu",
        public=u2a_kernels.dual_glu,
        overload=torch.ops.u2a.dual_glu.default,
        op_args=lambda a: (a["gate"], a["up"], a["activation"], True),
        inputs=glu_inputs,
        oracle=glu_oracle,
        variants=list(GLU),
        differentiable=("gate", "up"),
        spoil=spoil("gate"),
        errors=GLU_ERRORS,
        launchers={"triton": glu_triton},
        backward_launchers={"triton": glu_triton},
    ),
    Case(
        name="dual_act",
        public=u2a_kernels.dual_act,
        overload=torch.ops.u2a.dual_glu.default,
        op_args=lambda a: (a["x"], None, a["activation"], False),
        inputs=act_inputs,
        oracle=act_oracle,
        variants=list(ACT),
        differentiable=("x",),
        spoil=spoil("x"),
        errors=ACT_ERRORS,
        launchers={"triton": act_triton},
        backward_launchers={"triton": act_triton},
    ),
]


def aot_inputs(dtype):
    """Llama 8B's pair, Phi-3's one projection and every activation on its own."""
    shape = (4, 2048, 14336)
    pair = [torch.empty(shape, dtype=dtype, device="meta") for _ in range(2)]
    for activation in PLAIN:
        yield "dual_glu", dict(gate=pair[0], up=pair[1], activation=activation)
        yield "dual_act", dict(x=pair[0], activation=activation)
    packed = torch.empty(4, 2048, 16384, dtype=dtype, device="meta")
    yield "dual_glu", dict(gate=packed, up=None, activation="silu")
