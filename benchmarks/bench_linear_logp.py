"""linear_logp against logits + log_softmax: scoring, gradient with a frozen head, full gradient.

`gemms` is the time over that of one h W^T. Scoring takes 1 product and a frozen head 2, as in
plain torch; a full gradient takes 4, making logits again, where plain torch keeps them and takes 3.
On a GPU Liger-Kernel's and cut-cross-entropy's losses run beside it, where installed; why one does
not is said.
`python benchmarks/bench_linear_logp.py [threads]` prints interleaved medians.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from _measure import interleaved, peak_mb

import u2a_kernels
from u2a_kernels.ops.linear_logp import reference, reference_bwd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = (
    [(8192, 4096, 128256), (8192, 2048, 32000)]
    if DEVICE == "cuda"
    else [(512, 256, 8192), (1024, 512, 32000)]
)
MODES = {"score": (), "frozen-head": ("h",), "full": ("h", "weight")}


def plain(h, weight, targets):
    return F.log_softmax(h @ weight.T, -1).gather(1, targets[:, None])[:, 0]


class Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets):
        logp, lse, unit = reference(h, weight, targets, None, 0.0, 1.0, ctx.needs_input_grad[0])
        ctx.save_for_backward(h, weight, targets, lse, unit)
        return logp

    @staticmethod
    def backward(ctx, grad):
        h, weight, targets, lse, unit = ctx.saved_tensors
        dw = None
        if ctx.needs_input_grad[1]:
            dw, _ = reference_bwd(grad, h, weight, targets, None, lse, 0.0, 1.0)
        return grad[:, None] * unit, dw, None


def liger():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")  # its gradients know one scalar only
    return lambda h, weight, targets: -loss(weight, h, targets)


def cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, weight, targets: -linear_cross_entropy(h, weight, targets, reduction="none")


def peers():
    """Losses of other packages, and why those that do not run are absent."""
    found, absent = {}, {}
    for make_one in (liger, cut_cross_entropy):
        name = make_one.__name__
        try:
            if DEVICE == "cuda":
                found[name] = make_one()
            else:
                absent[name] = "needs a GPU"
        except ModuleNotFoundError as why:
            absent[name] = f"not installed ({why})"
    return found, absent


PEERS, ABSENT = peers()
IMPLEMENTATIONS = {
    "u2a": u2a_kernels.linear_logp,
    "torch": plain,
    "reference": Reference.apply,
    **PEERS,
}


def make(n, d, v):
    h = torch.randn(n, d, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(v, d, device=DEVICE, dtype=DTYPE) / d**0.5
    return dict(h=h, weight=weight, targets=torch.randint(0, v, (n,), device=DEVICE))


def caller(function, args, mode):
    leaves = [args[name].requires_grad_() for name in MODES[mode]]

    def call():
        with torch.set_grad_enabled(bool(leaves)):
            logp = function(args["h"], args["weight"], args["targets"])
            return torch.autograd.grad(logp.sum(), leaves) if leaves else logp

    return call


def gemm_caller(args):
    return lambda: args["h"].detach() @ args["weight"].detach().T


SKIPPED = [pytest.param(n, marks=pytest.mark.skip(reason=why)) for n, why in ABSENT.items()]


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, *SKIPPED])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-d{}-V{}".format(*s))
def test_linear_logp(benchmark, name, mode, shape):
    args = make(*shape)
    call = caller(IMPLEMENTATIONS[name], args, mode)
    benchmark.extra_info["peak_mb"] = round(peak_mb(call), 1)
    gemm = interleaved({"gemm": gemm_caller(args)}, rounds=3)["gemm"]
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    products = 1 + len(MODES[mode])  # what plain torch needs; 2 N d V operations each
    seconds = benchmark.stats["median"]
    n, d, v = shape
    benchmark.extra_info["gflop_s"] = round(products * 2 * n * d * v / seconds / 1e9, 1)
    benchmark.extra_info["gemms"] = round(seconds / gemm, 2)


def table(rounds=7):
    print(f"{torch.get_num_threads()} thread(s), {DEVICE}, {DTYPE}; seconds (gemms, peak MB)")
    for name, why in ABSENT.items():
        print(f"{name}: {why}")
    for shape in SHAPES:
        for mode in MODES:
            args = make(*shape)
            calls = {k: caller(f, args, mode) for k, f in IMPLEMENTATIONS.items()}
            times = interleaved({**calls, "gemm": gemm_caller(args)}, rounds)
            cells = [
                f"{k} {times[k]:.3f} ({times[k] / times['gemm']:.2f}, {peak_mb(c):.0f} MB)"
                for k, c in calls.items()
            ]
            ratio = times["torch"] / times["u2a"]
            print(f"{shape} {mode:12s} {'  '.join(cells)}  torch/u2a {ratio:.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table()
