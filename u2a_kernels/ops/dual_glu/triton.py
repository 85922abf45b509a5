"""dual_glu on a GPU: every tensor read once and written once, 1024 columns a program.

Rows keep their strides, so the halves of one projection are read in place and their gradients are
written side by side; where all rows are dense they become one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from u2a_kernels._triton import cast_to, tanh, tl, triton

BLOCK, WARPS = 1024, 4


@triton.jit
def _sigmoids(x):
    """The sigmoids of x and -x, each with its own tail."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def _clamp(x, bound: tl.constexpr):
    """NaN stays."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _normal(x):
    """Phi and phi. Phi(-z) exp(z^2 / 2) is t times a polynomial in t = 1 / (1 + 0.3 z), fitted for
    0 <= z <= 13.4 to 4e-9."""
    z = tl.abs(x)
    t = 1.0 / (1.0 + 0.3 * z)
    u = t - 0.5
    p = -2.05898586e-2 * u + 1.95920827e-2
    p = ((p * u + 3.59257299e-2) * u - 3.64560475e-2) * u - 7.75533114e-2
    p = ((p * u + 2.90564135e-2) * u + 2.22082753e-1) * u + 3.46198840e-1
    p = (p * u + 3.29158970e-1) * u + 2.21970613e-1
    e = tl.exp(-0.5 * z * z)
    tail = e * (t * p)
    return tl.where(x < 0, tail, 1.0 - tail), e * 0.3989422804014327


@triton.jit
def _curve(a, ACT: tl.constexpr):
    """f, f' and f'' at a."""
    if ACT == "silu":
        s, rest = _sigmoids(a)
        slope = s * rest
        return a * s, s + a * slope, slope * (2.0 + a * (rest - s))
    elif ACT == "quick_gelu":
        k = 1.702 * a
        s, rest = _sigmoids(k)
        slope = 1.702 * s * rest
        return a * s, s + a * slope, slope * (2.0 + k * (rest - s))
    elif ACT == "gelu":
        c = _clamp(a, 16.0)
        big, small = _normal(c)
        return a * big, big + c * small, small * (2.0 - c * c)
    elif ACT == "gelu_tanh":
        c = _clamp(a, 16.0)
        u = 1.5957691216057308 * c
        u1 = 1.5957691216057308 + 0.21406444881780076 * c * c
        u2 = 0.4281288976356015 * c
        s, rest = _sigmoids(u + 0.044715 * u * c * c)
        slope = s * rest
        return a * s, s + c * slope * u1, slope * (2.0 * u1 + c * (u2 + (rest - s) * u1 * u1))
    elif ACT == "relu":
        f1 = tl.where(a <= 0, 0.0, 1.0)
        return tl.where(a <= 0, 0.0, a), f1, 0.0 * f1
    elif ACT == "relu2":
        f = tl.where(a <= 0, 0.0, a)
        return f * f, 2.0 * f, tl.where(a <= 0, 0.0, 2.0)
    elif ACT == "sigmoid":
        s, rest = _sigmoids(a)
        slope = s * rest
        return s, slope, slope * (rest - s)
    elif ACT == "tanh":
        s, rest = _sigmoids(2.0 * a)
        f = tanh(a)
        slope = 4.0 * s * rest
        return f, slope, -2.0 * f * slope
    else:
        one = tl.full(a.shape, 1.0, tl.float32)
        return a, one, 0.0 * one


@triton.jit
def _halves(x, at, far, mask):
    """Primal block and its tangent, fp32."""
    primal = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    return primal, tl.load(x + at + far, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(x, at, far, mask, primal, tangent):
    tl.store(x + at, cast_to(primal, x.dtype.element_ty), mask=mask)
    tl.store(x + at + far, cast_to(tangent, x.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    a, b, y, F, BLOCKS, sa, sb, far_a, far_b, far_y, b0,
    A_STEP: tl.constexpr, B_STEP: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [2M, F] dense; far: from a primal row to its tangent; b0: where b starts in its rows."""
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    j = (program % BLOCKS).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < F
    va, va_t = _halves(a, row * sa + j * A_STEP, far_a, mask)
    f, f1, _ = _curve(va, ACT)
    if GATED:
        vb, vb_t = _halves(b, b0 + row * sb + j * B_STEP, far_b, mask)
        _put(y, row * F + j, far_y, mask, f * vb, f1 * va_t * vb + f * vb_t)
    else:
        _put(y, row * F + j, far_y, mask, f, f1 * va_t)


@triton.jit
def _backward_kernel(
    grad, a, b, da, db, F, BLOCKS, sg, sa, sb, sda, sdb,
    far_g, far_a, far_b, far_da, far_db, b0, db0,
    G_STEP: tl.constexpr, A_STEP: tl.constexpr, B_STEP: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    j = (program % BLOCKS).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < F
    g_t, g = _halves(grad, row * sg + j * G_STEP, far_g, mask)
    va, va_t = _halves(a, row * sa + j * A_STEP, far_a, mask)
    f, f1, f2 = _curve(va, ACT)
    if GATED:
        vb, vb_t = _halves(b, b0 + row * sb + j * B_STEP, far_b, mask)
        pa = (g_t * vb + g * vb_t) * f1 + g * vb * va_t * f2
        _put(da, row * sda + j, far_da, mask, pa, g * vb * f1)
        _put(db, db0 + row * sdb + j, far_db, mask, g_t * f + g * va_t * f1, g * f)
    else:
        _put(da, row * sda + j, far_da, mask, g_t * f1 + g * va_t * f2, g * f1)


@dataclass
class Rows:
    """Where rows [2M, F] lie: element j of row i is at start + i stride + j step."""

    data: Tensor
    stride: int
    step: int
    start: int = 0

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """In place where a row stride describes it, else of a copy."""
        width = x.shape[-1]
        if width > 1 and x.stride(-1) not in (0, 1):
            x = x.contiguous()
        flat = x.flatten(0, -2)
        return cls(flat, flat.stride(0), 1 if width == 1 else flat.stride(-1))

    def part(self, start: int) -> Rows:
        return Rows(self.data, self.stride, self.step, start)

    def dense(self, width: int) -> bool:
        return self.stride == width and self.step == 1


def _joined(parts: list[Rows], m: int, width: int) -> tuple[int, int]:
    """Rows and columns; dense rows are one long row (changes their strides)."""
    if m == 0 or not all(r.dense(width) for r in parts):
        return m, width
    for r in parts:
        r.stride = m * width
    return 1, m * width


def forward(gate: Tensor, up: Tensor | None, activation: str, gated: bool) -> Tensor:
    packed = gated and up is None
    width = gate.shape[-1] // 2 if packed else gate.shape[-1]
    y = gate.new_empty(*gate.shape[:-1], width)
    if y.numel() == 0:
        return y
    a = Rows.of(gate)
    b = Rows.of(up) if up is not None else a.part(width if packed else 0)
    m, f = _joined([a, b], y.numel() // width // 2, width)
    blocks = triton.cdiv(f, BLOCK)
    _forward_kernel[(m * blocks,)](
        a.data, b.data, y, f, blocks,
        a.stride, b.stride, m * a.stride, m * b.stride, m * f, b.start,
        A_STEP=a.step, B_STEP=b.step,
        ACT=activation, GATED=gated, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return y


def backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    packed = gated and up is None
    width = grad.shape[-1]
    d_gate = gate.new_empty(gate.shape)
    d_up = gate.new_empty(0 if up is None else up.shape)
    if grad.numel() == 0:
        return d_gate, d_up
    g, a, da = Rows.of(grad), Rows.of(gate), Rows.of(d_gate)
    b = Rows.of(up) if up is not None else a.part(width if packed else 0)
    db = Rows.of(d_up) if up is not None else da.part(width if packed else 0)
    every = [g, a, b, da, db]
    m, f = _joined(every, grad.numel() // width // 2, width)
    blocks = triton.cdiv(f, BLOCK)
    _backward_kernel[(m * blocks,)](
        *(r.data for r in every), f, blocks,
        *(r.stride for r in every), *(m * r.stride for r in every), b.start, db.start,
        G_STEP=g.step, A_STEP=a.step, B_STEP=b.step,
        ACT=activation, GATED=gated, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return d_gate, d_up
