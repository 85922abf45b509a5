"""Operations and bytes of the dual ops and of whole-model products on paper, and the time that they
mean on one large GPU: what `bench_dual_*` and `bench_second_order` are to be compared with there.

`needed`: operations that the formulas need; `run`: those that our kernels run, which rebuild P in
every sweep instead of adding with atomics. Bytes: every input read once, every output written once.
`python benchmarks/paper_dual.py [TB/s copy] [TFLOP/s of GEMM, flash forward, flash backward and
dual]`; defaults: an H200. In the last table times of parts are added; the unit is a gradient with
flash attention, the loss head in chunks and LoRA adapters on every linear layer.
"""

import sys
from dataclasses import dataclass

from u2a_kernels._logits import SCRATCH_ELEMENTS

HALF, WORD = 2, 4
TARGETS = dict(forward=400.0, backward=300.0)  # TFLOP/s that dual_attention is to reach
HEAD_SHARE, COPY_SHARE = 0.65, 0.85  # of GEMM's and of copy's rate

ATTENTION = [
    (4, 32, 8, 2048, 128),
    (1, 32, 8, 8192, 128),
    (8, 16, 16, 2048, 64),
    (2, 8, 4, 4096, 256),
]
HEADS = [(8192, 4096, 128256), (8192, 2048, 32000)]
ROWWISE = {  # numbers per row in the forward and in the backward, rows of both halves, columns
    "RMSNorm, LayerNorm, softmax": (2, 3, 16384, 4096),
    "softmax, router": (2, 3, 262144, 128),
    "softmax, vocabulary": (2, 3, 512, 128256),
    "SwiGLU, GeGLU": (3, 5, 8192, 14336),
    "GELU, ReLU": (2, 3, 8192, 14336),
}


@dataclass(frozen=True)
class Rates:
    """bytes/s, operations/s."""

    copy: float
    gemm: float
    flash: float
    flash_back: float

    @classmethod
    def of(cls, numbers):
        return cls(*(n * 1e12 for n in numbers))


@dataclass(frozen=True)
class Model:
    d: int
    layers: int
    heads: int
    kv: int
    head_dim: int
    d_mlp: int
    vocab: int

    @property
    def weights(self):
        """Of all linear layers but the head."""
        attention = self.d * self.head_dim * 2 * (self.heads + self.kv)
        return self.layers * (attention + 3 * self.d * self.d_mlp)


MODELS = {
    "1B (Llama 3.2)": Model(2048, 16, 32, 8, 64, 8192, 128256),
    "8B (Llama 3)": Model(4096, 32, 32, 8, 128, 14336, 128256),
}


def products(mode, d):
    """Products of blocks, 2 T S D operations each: (forward, backward needed, backward run)."""
    if mode == "gradient":
        return 2, 5, 7
    if mode == "jvp":
        return 6, 0, 0
    if mode == "ggn":
        return 6, 5, 7
    return 6, 15, 21 if d <= 64 else 28 if d <= 128 else 29


def attention(shape, mode):
    """(operations forward, needed and run backward, bytes forward, backward), causal."""
    b, h, kv, t, d = shape
    each = b * h * t * t * d  # half of the scores are masked
    forward, needed, run = (n * each for n in products(mode, d))
    half, stats = b * t * d * HALF, 3 * b * h * t * WORD
    both = 1 if mode == "gradient" else 2
    met = both if mode == "hvp" else 1  # halves that the backward reads
    there = both * half * (2 * h + 2 * kv) + stats  # q, k, v to o
    back = met * half * (3 * h + 2 * kv) + both * half * (h + 2 * kv) + stats
    return forward, needed, run, there, back


def attention_table(r):
    print("dual_attention, causal, bf16: us of what runs at GEMM's rate, of what")
    print("is needed at the targets; `over`: the latter over SDPA at flash rates")
    print(f"  {'B, H, Hkv, T, D':26s}{'':5s}{'GFLOP fwd':>10s}{'bwd':>8s}{'run':>8s}"
          f"{'MB':>7s}{'GEMM':>8s}{'target':>8s}{'over':>6s}")  # fmt: skip
    for shape in ATTENTION:
        base = attention(shape, "gradient")
        for mode in ("jvp", "ggn", "hvp"):
            forward, needed, run, *moved = attention(shape, mode)
            best = max((forward + run) / r.gemm, sum(moved[: 1 if mode == "jvp" else 2]) / r.copy)
            aim = forward / TARGETS["forward"] + needed / TARGETS["backward"]
            sdpa = base[0] / r.flash + (0 if mode == "jvp" else base[1] / r.flash_back)
            print(
                f"  {str(shape):26s}{mode:5s}{forward / 1e9:10.0f}{needed / 1e9:8.0f}"
                f"{run / 1e9:8.0f}{sum(moved) / 1e6:7.0f}{best * 1e6:8.0f}{aim / 1e6:8.0f}"
                f"{aim / 1e12 / sdpa:6.2f}"
            )


HEAD_PRODUCTS = {  # of h W^T, 2 N d V operations each
    "gradient, frozen": 2, "jvp": 2, "ggn, frozen": 3, "hvp, frozen": 4, "hvp, trained": 8,
}  # fmt: skip


def head_table(r):
    print(
        "\nloss head: products of h W^T, TFLOP, ms at 65 % of GEMM; GB held in fp32 logits by plain"
    )
    print("torch (2 arrays for a gradient, 6 for double backward) and in all by the op's forward")
    for n, d, v in HEADS:
        for name, count in HEAD_PRODUCTS.items():
            flops = count * 2 * n * d * v
            theirs = (2 if name == "gradient, frozen" else 6) * n * v * WORD / 1e9
            ours = (2 * n * d * HALF + SCRATCH_ELEMENTS * WORD) / 1e9
            print(
                f"  {f'{n} x {d} x {v}':22s}{name:18s}{count:3d}{flops / 1e12:8.1f}"
                f"{flops / (HEAD_SHARE * r.gemm) * 1e3:8.1f}{theirs:8.1f}{ours:8.2f}"
            )


def rowwise_table(r):
    print("\nnorms, softmax and GLU, bf16: MB and us at 85 % of copy, forward, backward")
    for name, (forward, backward, rows, columns) in ROWWISE.items():
        cells = ""
        for count in (forward, backward):
            moved = count * rows * columns * HALF
            cells += f"{moved / 1e6:8.0f}{moved / (COPY_SHARE * r.copy) * 1e6:8.0f}"
        print(f"  {name:30s}{cells}")


PASSES = {  # mode of attention, units of a linear layer, of the head, halves of row-wise ops (f, b)
    "gradient": ("gradient", 2, 2, 1, 1),
    "hvp": ("hvp", 4, 4, 2, 2),
    "ggn": ("ggn", 3, 3, 2, 1),
    "scores": ("jvp", 2, 2, 2, 0),
}


def seconds_per_token(m, t, name, r):
    mode, units, head_units, forward_halves, backward_halves = PASSES[name]
    linear = 2 * units * m.weights / r.gemm
    head = 2 * head_units * m.d * m.vocab / r.gemm
    each = t * m.head_dim * m.heads * m.layers
    forward, _, run = (n * each for n in products(mode, m.head_dim))
    scores = forward / (r.flash if mode == "gradient" else r.flash_back) + run / r.flash_back
    if mode == "gradient":  # flash attention's own backward: one sweep
        scores = forward / r.flash + 5 * each / r.flash_back
    # Two norms, two sums, rotary; a GLU: numbers per token and layer, forward and backward.
    wide, inner = 10 * m.d + 2 * m.head_dim * (m.heads + m.kv), m.d_mlp
    numbers = forward_halves * (wide + 3 * inner) + backward_halves * (wide + 5 * inner)
    return linear + head + scores + m.layers * numbers * HALF / r.copy


def model_table(r):
    print("\nwhole model, LoRA, bf16: time over one gradient (central differences: 2.0)")
    print(f"  {'':18s}{'T':>7s}" + "".join(f"{n:>9s}" for n in PASSES if n != "gradient"))
    for name, m in MODELS.items():
        for t in (512, 1024, 2048, 4096, 8192, 16384, 32768):
            unit = seconds_per_token(m, t, "gradient", r)
            ratios = (seconds_per_token(m, t, n, r) / unit for n in PASSES if n != "gradient")
            print(f"  {name:18s}{t:7d}" + "".join(f"{x:9.2f}" for x in ratios))


def main():
    numbers = [float(a) for a in sys.argv[1:5]]
    r = Rates.of(numbers or [4.3, 700.0, 450.0, 320.0])
    attention_table(r)
    head_table(r)
    rowwise_table(r)
    model_table(r)


if __name__ == "__main__":
    main()
