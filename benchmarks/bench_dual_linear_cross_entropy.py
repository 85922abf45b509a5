"""The dual loss head against plain torch: scores, Hessian and Gauss-Newton products.

`grads` is time over that of one gradient of F.cross_entropy(h W^T), itself 3 products h W^T (2 when
W is frozen). Products of the dual head: jvp 2; frozen hvp 4, ggn 4 (3 on a GPU); trainable 8, where
double backward takes 9 and holds all logits. Plain: torch's jvp, double backward, and the
Gauss-Newton cotangent by hand. Reference: this package's own plain torch, in row chunks.
`python benchmarks/bench_dual_linear_cross_entropy.py [threads]` prints interleaved medians, then
the peak memory at growing vocabularies.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from _measure import interleaved, peak_mb

import u2a_kernels
from u2a_kernels.ops import dual_linear_cross_entropy as op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = (
    [(8192, 4096, 128256), (8192, 2048, 32000)]
    if DEVICE == "cuda"
    else [(512, 256, 8192), (1024, 512, 32000)]
)
MODES = {  # mode of the op, is the head trainable
    "jvp": ("jvp", False),
    "hvp-frozen": ("hvp", False),
    "ggn-frozen": ("ggn", False),
    "hvp-trainable": ("hvp", True),
}


def make(n, d, v):
    h, h_t = (torch.randn(n, d, device=DEVICE, dtype=DTYPE) for _ in range(2))
    weight = torch.randn(v, d, device=DEVICE, dtype=DTYPE) / d**0.5
    weight_t = torch.randn(v, d, device=DEVICE, dtype=DTYPE) / d**0.5
    return h, h_t, weight, weight_t, torch.randint(0, v, (n,), device=DEVICE)


def u2a(args, mode):
    h, h_t, weight, weight_t, targets = args
    kind, trainable = MODES[mode]
    both = torch.cat([h, h_t]).requires_grad_(kind != "jvp")
    w = weight.detach().requires_grad_(trainable)
    leaves = [both, w] if trainable else [both]
    tangent = weight_t if trainable else None

    def call():
        out = u2a_kernels.dual_linear_cross_entropy(both, w, targets, tangent, mode=kind)
        return out if kind == "jvp" else torch.autograd.grad(out[1].sum(), leaves)

    return call


def cross_entropy(h, w, targets):
    return F.cross_entropy((h @ w.T).float(), targets, reduction="none")


def plain(args, mode):
    h, h_t, weight, weight_t, targets = args
    kind, trainable = MODES[mode]
    x, w = h.detach().requires_grad_(), weight.detach().requires_grad_(trainable)
    leaves = [x, w] if trainable else [x]
    directions = [h_t, weight_t] if trainable else [h_t]

    def jvp():
        return torch.func.jvp(lambda x: cross_entropy(x, weight, targets), (h,), (h_t,))

    def hvp():
        loss = cross_entropy(x, w, targets).sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        total = sum((g * t).sum() for g, t in zip(grads, directions, strict=True))
        return torch.autograd.grad(total, leaves)

    def ggn():
        z, z_t = (x @ w.T).float(), (h_t @ w.detach().T).float()
        p = torch.softmax(z, 1)
        u = p * (z_t - (p * z_t).sum(1, keepdim=True))
        return u.to(h.dtype) @ w

    return dict(jvp=jvp, hvp=hvp, ggn=ggn)[kind]


def reference(args, mode):
    h, h_t, weight, weight_t, targets = args
    kind, trainable = MODES[mode]
    both, ones = torch.cat([h, h_t]), torch.ones(len(h), device=DEVICE)
    tangent = weight_t if trainable else None
    head = (both, weight, targets, tangent, None, None)
    plain_torch = op._reference

    @torch.no_grad()
    def call():
        *_, stats, kept = plain_torch.forward(*head, 0.0, kind, kind != "jvp")
        dh = op._Rescale.apply(0 * ones, ones, kept, both) if len(kept) else None
        dw = plain_torch.backward(0 * ones, ones, *head, stats, 0.0, kind) if trainable else None
        return dh, dw

    return call


def gradient(args, mode):
    h, _, weight, _, targets = args
    trainable = MODES[mode][1]
    x, w = h.detach().requires_grad_(), weight.detach().requires_grad_(trainable)
    leaves = [x, w] if trainable else [x]
    return lambda: torch.autograd.grad(cross_entropy(x, w, targets).sum(), leaves)


IMPLEMENTATIONS = {"u2a": u2a, "plain": plain, "reference": reference}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-d{}-V{}".format(*s))
def test_dual_linear_cross_entropy(benchmark, name, mode, shape):
    args = make(*shape)
    call = IMPLEMENTATIONS[name](args, mode)
    benchmark.extra_info["peak_mb"] = round(peak_mb(call), 1)
    one = interleaved({"gradient": gradient(args, mode)}, rounds=3)["gradient"]
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    benchmark.extra_info["grads"] = round(benchmark.stats["median"] / one, 2)


@pytest.mark.parametrize("vocab", [8192, 32768, 131072])
def test_memory_does_not_grow_with_the_vocabulary(benchmark, vocab):
    call = u2a(make(256, 64, vocab), "hvp-frozen")
    benchmark.extra_info["peak_mb"] = round(peak_mb(call), 1)
    benchmark.pedantic(call, rounds=1)


def table(rounds=5):
    print(f"{torch.get_num_threads()} thread(s), {DEVICE}, {DTYPE}; seconds (gradients, peak MB)")
    for shape in SHAPES:
        for mode in MODES:
            args = make(*shape)
            calls = {k: f(args, mode) for k, f in IMPLEMENTATIONS.items()}
            times = interleaved({**calls, "gradient": gradient(args, mode)}, rounds)
            cells = [
                f"{k} {times[k]:.3f} ({times[k] / times['gradient']:.2f}, {peak_mb(c):.0f} MB)"
                for k, c in calls.items()
            ]
            print(f"{shape} {mode:14s} {'  '.join(cells)}", flush=True)
    for vocab in (8192, 32768, 131072):
        args = make(256, 64, vocab)
        cells = [f"{m} {peak_mb(u2a(args, m)):.0f} MB" for m in ("jvp", "hvp-frozen")]
        print(f"256 x 64 x {vocab}: {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table()
