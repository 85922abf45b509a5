"""The contract's questions on a GPU: compiled kernels behind the dispatcher, against float64 on the
CPU. Skipped without a GPU, where the same kernels are interpreted and compiled ahead of time."""

import pytest
import torch
from test_contract import BY_DTYPE, FIRST, gradients

import u2a_kernels
from cases import cast, outputs
from u2a_kernels.testing import assert_within_budget, randn

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda")


def on_device(args):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in args.items()}


@pytest.mark.parametrize("case, variant, dtype", BY_DTYPE)
def test_values(case, variant, dtype):
    args = case.inputs(variant, dtype)
    exact = outputs(case.oracle(**cast(args, torch.float64)))
    baseline = outputs(case.oracle(**args))
    for i, out in enumerate(outputs(case.public(**on_device(args)))):
        assert out.device.type == DEVICE.type
        assert_within_budget(out.cpu(), exact[i], baseline[i], f"{case} output {i}")


@pytest.mark.parametrize("case, variant, dtype", BY_DTYPE)
def test_gradients(case, variant, dtype):
    args = case.inputs(variant, dtype)
    exact = gradients(case, case.oracle, cast(args, torch.float64))
    baseline = gradients(case, case.oracle, args)
    for name, got in gradients(case, case.public, on_device(args)).items():
        assert_within_budget(got.cpu(), exact[name], baseline[name], f"{case} d/d{name}")


@pytest.mark.parametrize("case, variant", FIRST)
def test_same_bits_twice(case, variant):
    args = on_device(case.inputs(variant, torch.bfloat16))
    for a, b in zip(outputs(case.public(**args)), outputs(case.public(**args)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_written_onto_themselves(dtype):
    """The loss head leaves its 16-bit gradient where fp32 logits are still read, in many rounds."""
    n, d, vocab = 512, 64, 20000
    h = (randn(2 * n, d, seed=1) / 8).to(DEVICE, dtype).requires_grad_()
    weight = randn(vocab, d, seed=2).to(DEVICE, dtype)
    targets = (torch.arange(n, device=DEVICE) * 7) % vocab

    def gradient():
        _, loss_t, _ = u2a_kernels.dual_linear_cross_entropy(h, weight, targets)
        return torch.autograd.grad(loss_t.sum(), h)[0]

    first = gradient()
    for _ in range(50):
        assert torch.equal(gradient(), first)


@pytest.mark.parametrize("case, variant", FIRST)
def test_opcheck(case, variant):
    args = on_device(case.inputs(variant, torch.float32))
    torch.library.opcheck(case.overload, case.op_args(args))
