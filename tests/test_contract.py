"""Every op answers the same questions: values, gradients, opcheck, compile, layouts, NaN rows."""

import pytest
import torch

from cases import Case, all_cases, cast, outputs
from u2a_kernels._triton import INTERPRET
from u2a_kernels.testing import assert_within_budget

CASES = all_cases()


def elements(case: Case, variant: str) -> int:
    args = case.inputs(variant, torch.float64)
    return sum(args[n].numel() for n in case.differentiable if args.get(n) is not None)


SMALL = [
    pytest.param(c, v, id=f"{c}-{v}")
    for c in CASES
    for v in c.variants
    if elements(c, v) <= 3000  # gradcheck is for small inputs; test_gradients covers the large ones
]
BY_DTYPE = [
    pytest.param(c, v, d, id=f"{c}-{v}-{str(d).removeprefix('torch.')}")
    for c in CASES
    for v in c.variants
    for d in c.dtypes
]
FIRST = [pytest.param(c, c.variants[0], id=c.name) for c in CASES]


def implementations(case: Case, dtype: torch.dtype):
    """The op, and its launchers where they run on CPU tensors; tests/test_cuda.py has the GPU."""
    yield "op", case.public
    if dtype != torch.float64 and INTERPRET:
        yield from case.launchers.items()


def gradients(case: Case, function, args, weights=None):
    """Gradients of a fixed weighting of the differentiable outputs; zeros where no path leads."""
    leaves = {
        n: args[n].detach().clone().requires_grad_()
        for n in case.differentiable
        if args.get(n) is not None
    }
    out = outputs(function(**{**args, **leaves}))
    picked = [out[i] for i in case.grad_outputs]
    if weights is None:
        weights = [
            torch.arange(o.numel(), dtype=torch.float64, device=o.device).cos().view(o.shape)
            for o in picked
        ]
    total = sum((o.double() * w).sum() for o, w in zip(picked, weights, strict=True))
    if not total.requires_grad:
        return {n: torch.zeros_like(t) for n, t in leaves.items()}
    got = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    zeros = (
        torch.zeros_like(t) if g is None else g for g, t in zip(got, leaves.values(), strict=True)
    )
    return dict(zip(leaves, zeros, strict=True))


@pytest.mark.parametrize("case, variant, dtype", BY_DTYPE)
def test_values(case, variant, dtype):
    args = case.inputs(variant, dtype)
    exact = outputs(case.oracle(**cast(args, torch.float64)))
    baseline = outputs(case.oracle(**args))
    for name, function in implementations(case, dtype):
        for i, out in enumerate(outputs(function(**args))):
            assert_within_budget(out, exact[i], baseline[i], f"{case} {name} output {i}")


@pytest.mark.parametrize("case, variant, dtype", BY_DTYPE)
def test_gradients(case, variant, dtype):
    args = case.inputs(variant, dtype)
    exact = gradients(case, case.oracle, cast(args, torch.float64))
    baseline = gradients(case, case.oracle, args)
    functions = {"op": case.public}
    if dtype != torch.float64 and INTERPRET:
        functions |= case.backward_launchers
    for label, function in functions.items():
        for name, got in gradients(case, function, args).items():
            assert got.dtype == args[name].dtype
            assert_within_budget(got, exact[name], baseline[name], f"{case} {label} d/d{name}")


@pytest.mark.parametrize("case, variant", SMALL)
def test_gradcheck(case, variant):
    args = case.inputs(variant, torch.float64)
    names = [n for n in case.differentiable if isinstance(args.get(n), torch.Tensor)]
    leaves = [args[n].detach().clone().requires_grad_() for n in names]

    def function(*tensors):
        out = outputs(case.public(**{**args, **dict(zip(names, tensors, strict=True))}))
        return tuple(out[i] for i in case.grad_outputs)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "requires-grad"])
@pytest.mark.parametrize("case, variant", FIRST)
def test_opcheck(case, variant, layout):
    args = case.inputs(variant, torch.float32)
    for name, t in args.items():
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            continue
        if layout == "transposed" and t.ndim >= 2:
            args[name] = t.mT.contiguous().mT
        if layout == "requires-grad" and name in case.differentiable:
            args[name] = t.clone().requires_grad_()
    torch.library.opcheck(case.overload, case.op_args(args))


@pytest.mark.parametrize("case, variant", FIRST)
def test_compile(case, variant):
    torch._dynamo.reset()
    args = case.inputs(variant, torch.float32)
    compiled = torch.compile(case.public, fullgraph=True, backend="aot_eager")
    for got, want in zip(outputs(compiled(**args)), outputs(case.public(**args)), strict=True):
        assert torch.equal(got, want)
    got = gradients(case, compiled, args)
    for name, want in gradients(case, case.public, args).items():
        assert torch.equal(got[name], want), name


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("case, variant", FIRST)
def test_layouts(case, variant, layout):
    """Non-contiguous inputs give what their contiguous copies give, on every implementation."""
    args = case.inputs(variant, torch.float32)
    odd, plain = dict(args), dict(args)
    for name, t in args.items():
        if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.ndim < 2:
            continue
        if layout == "transposed":
            odd[name] = t.mT.contiguous().mT
        elif layout == "strided":
            odd[name] = torch.stack([t, t + 1], -1)[..., 0]
        else:
            odd[name] = t[..., :1, :].expand_as(t)
        plain[name] = odd[name].contiguous()
    for label, function in implementations(case, torch.float32):
        for a, b in zip(outputs(function(**odd)), outputs(function(**plain)), strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max() + 1), msg=label
            )


@pytest.mark.parametrize("case, variant", FIRST)
def test_nan_stays_in_its_row(case, variant):
    for label, function in implementations(case, torch.float32):
        args = case.inputs(variant, torch.float32)
        clean = outputs(function(**args))
        args = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        keep = case.spoil(args)
        spoiled = outputs(function(**args))
        assert any(torch.isnan(o).any() for o in spoiled), "the NaN must reach its own row"
        for a, b in zip(keep(spoiled), keep(clean), strict=True):
            assert a.numel() and torch.equal(a, b), label


ERRORS = [pytest.param(c, label, id=f"{c}-{label}") for c in CASES for label in c.errors]


@pytest.mark.parametrize("case, label", ERRORS)
def test_wrong_input_is_named(case, label):
    change, exception, pattern = case.errors[label]
    args = change(case.inputs(case.variants[0], torch.float32))
    with pytest.raises(exception, match=pattern):
        case.public(**args)


@pytest.mark.parametrize("case, variant", FIRST)
def test_forward_mode_ad_is_refused(case, variant):
    args = case.inputs(variant, torch.float32)
    name = case.differentiable[0]
    rest = {k: v for k, v in args.items() if k != name}
    with pytest.raises(RuntimeError, match=f"{name} carries a forward-mode AD tangent"):
        torch.func.jvp(lambda t: case.public(**{name: t}, **rest), (args[name],), (args[name],))


@pytest.mark.parametrize("case, variant", FIRST)
def test_double_backward_is_refused(case, variant):
    args = case.inputs(variant, torch.float64)
    leaf = args[case.differentiable[0]].clone().requires_grad_()
    out = outputs(case.public(**{**args, case.differentiable[0]: leaf}))[case.grad_outputs[0]]
    (grad,) = torch.autograd.grad((out**2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
