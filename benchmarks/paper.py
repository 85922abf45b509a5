"""Bytes and operations of every grad_* op on paper, and the time they bound on one large GPU.

Counted are compulsory bytes (every input read once, every output written once, 16-bit inputs, fp32
results) and the operations of the algorithm our kernels run, tensor-core products apart from what
runs on ordinary cores. The bound is the larger of the three times; `of a layer` sets it beside
forward and backward of activations of that linear layer (4 operations a token and weight).
`python benchmarks/paper.py [TB/s copy] [TFLOP/s 16-bit] [T additions/s]`; defaults: an H200.
"""

import math
import sys
from dataclasses import dataclass

LAYERS = {
    "GPT-2 768x3072": (768, 3072),
    "1B 2048x5632": (2048, 5632),
    "8B 4096x14336": (4096, 14336),
}
EXAMPLES, TOKENS = 32, 512
HALF, WORD = 2, 4


@dataclass
class Cost:
    """Bytes, tensor-core operations, and operations on ordinary cores."""

    bytes: float
    dot: float
    plain: float = 0.0


def factors(n, d_in, d_out):
    return n * (d_in + d_out) * HALF


def project(n, b, d_in, d_out, k):
    dot = 2 * n * k * (d_in + d_out) + 2 * n * k * k
    return Cost(factors(n, d_in, d_out) + k * (d_in + d_out) * HALF + b * k * k * WORD, dot)


def sketch(n, b, d_in, d_out, k):
    adds = n * (2 * k * math.log2(k) + 2 * k + d_in + d_out)
    return Cost(factors(n, d_in, d_out) + b * k * WORD, 0, adds)


def dot_ghost(n, b, d_in, d_out, q):
    return Cost(factors(n, d_in, d_out) + q * d_in * d_out * HALF, 2 * q * n * d_in * d_out)


def dot_tiles(n, b, d_in, d_out, q):
    whole = d_in * d_out
    return Cost(factors(n, d_in, d_out) + q * whole * HALF, 2 * n * whole, 2 * q * b * whole)


def norm_ghost(n, b, d_in, d_out, _):
    pairs = b * (n // b) * (n // b + 1) / 2
    return Cost(factors(n, d_in, d_out) + b * WORD, 2 * pairs * (d_in + d_out), 3 * pairs)


def norm_formed(n, b, d_in, d_out, _):
    return Cost(factors(n, d_in, d_out) + b * WORD, 2 * n * d_in * d_out, 2 * b * d_in * d_out)


def gram(n, b, d_in, d_out, _):
    """Formed in strips of bounded scratch, written and read once: those bytes count."""
    whole = d_in * d_out
    scratch = 2 * b * whole * WORD
    return Cost(factors(n, d_in, d_out) + scratch + b * b * WORD, 2 * (n + b * b) * whole)


OPS = {
    "grad_project k=16": (project, 16),
    "grad_project k=64": (project, 64),
    "grad_project k=256": (project, 256),
    "grad_sketch k=1024": (sketch, 1024),
    "grad_sketch k=4096": (sketch, 4096),
    "grad_sketch k=65536": (sketch, 65536),
    "grad_dot Q=1, ghost": (dot_ghost, 1),
    "grad_dot Q=8, tiles": (dot_tiles, 8),
    "grad_sq_norm, ghost": (norm_ghost, 0),
    "grad_sq_norm, formed": (norm_formed, 0),
    "grad_gram": (gram, 0),
}


def main():
    rates = [float(a) for a in sys.argv[1:4]] or [4.3, 790.0, 33.0]
    copy, tensor, plain = (r * 1e12 for r in rates)
    n = EXAMPLES * TOKENS
    print(f"{EXAMPLES} examples x {TOKENS} tokens; copy {rates[0]} TB/s, {rates[1:]} TFLOP/s")
    print(f"{'':24s}{'MB':>8s}{'GFLOP dot':>11s}{'plain':>8s}{'us':>8s}  bound by   of a layer")
    for layer, (d_in, d_out) in LAYERS.items():
        print(layer)
        step = 4 * n * d_in * d_out / tensor
        for name, (count, size) in OPS.items():
            c = count(n, EXAMPLES, d_in, d_out, size)
            times = {"bytes": c.bytes / copy, "dot": c.dot / tensor, "plain": c.plain / plain}
            bound = max(times, key=lambda k: times[k])
            print(
                f"  {name:22s}{c.bytes / 1e6:8.0f}{c.dot / 1e9:11.1f}{c.plain / 1e9:8.1f}"
                f"{times[bound] * 1e6:8.0f}  {bound:9s}{times[bound] / step:11.3f}"
            )


if __name__ == "__main__":
    main()
