"""What published packages give. Two tiny models in float64 (GPT-2, all parameters; Llama, LoRA) for
those that differentiate models; float32 Triton kernels behind a sine for those that are kernels, as
an operation in the middle of a model is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from _second_order import Problem, Setting, inner
from _second_order_ways import WAYS, _Logits
from repro import (
    Found,
    Repro,
    attention,
    collected,
    cross_entropy,
    cubed,
    draws,
    rms_norm,
    silu,
    single,
    targets,
    twice,
)
from shims import interpreted
from torch import Tensor, nn
from torch.func import grad, jvp
from torch.nn import functional as F
from truth import whole

FOUND: list[Repro] = []
HV, GV = "H v", "G v (Gauss-Newton)"
MODELS = {
    "GPT-2": Setting("gpt2", 16, 64, "tiny", "float64"),
    "Llama LoRA": Setting("llama", 16, 64, "tiny", "float64"),
}


def _ways(names: tuple[str, ...]) -> None:
    for way in (w for w in WAYS if w.name in names):
        for model, s in MODELS.items():
            tool, _, how = way.name.partition(", ")
            quantity = f"{HV if way.of == 'hvp' else GV} of {model}"

            def run(way=way, s=s) -> Found:
                found, want = way.make(s)(), whole(s)[way.of]
                return list(found.values()), [want[n] for n in found]

            collected(FOUND, f"{tool}, {how}" if how else tool, quantity)(run)


_ways(("curvlinops Hessian, eager", "curvlinops GGN, eager", "double backward, eager"))


def _flat(p: Problem, found: Tensor, of: str, s: Setting) -> Found:
    want = [whole(s)[of][n] for n in p.params]
    parts = found.split([w.numel() for w in want])
    return [a.view_as(w) for a, w in zip(parts, want, strict=True)], want


def _logits(out: Any) -> Tensor:
    return out.logits[:, :-1].flatten(0, 1)


def _eigenthings(s: Setting, of: str, kind: str, **options: Any) -> Found:
    from hessian_eigenthings import operators

    p = Problem.of(s, "eager")
    data = [{"input_ids": p.ids, "labels": p.ids}]
    loss = lambda model, batch: p.loss()  # noqa: E731
    if kind == "GGNOperator":
        y = p.ids[:, 1:].flatten()
        outputs = lambda model, batch: _logits(model(**batch))  # noqa: E731
        operator = operators.GGNOperator(
            p.model, [{"input_ids": p.ids}], outputs, lambda z, batch: F.cross_entropy(z, y)
        )
    else:
        operator = operators.HessianOperator(p.model, data, loss, **options)
    v = torch.cat([t.flatten() for t in p.v.values()])
    return _flat(p, operator.matvec(v), of, s)


def _pyhessian(s: Setting) -> Found:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    p = Problem.of(s, "eager")
    data = p.ids, p.ids[:, 1:].flatten()
    made = hessian(_Logits(p.model), nn.CrossEntropyLoss(), data=data, cuda=False)
    got = hessian_vector_product(made.gradsH, made.params, list(p.v.values()))
    return list(got), [whole(s)["hvp"][n] for n in p.params]


def _dattri(s: Setting, mode: str) -> Found:
    from dattri.func.hessian import hvp

    p = Problem.of(s, "eager")
    point, v = (torch.cat([t.detach().flatten() for t in x.values()]) for x in (p.params, p.v))

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([t.numel() for t in p.params.values()])
        named = zip(p.params.items(), parts, strict=True)
        return p.loss({n: part.view_as(t) for (n, t), part in named})

    return _flat(p, hvp(loss, mode=mode)((point,), v), "hvp", s)


@contextmanager
def _liger(s: Setting) -> Iterator[Problem]:
    """Liger's modules in a Llama; what it replaces in transformers is put back."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
    from transformers.models.llama import modeling_llama

    p, before = Problem.of(replace(s, dtype="float32"), "eager"), dict(vars(modeling_llama))
    try:
        _apply_liger_kernel_to_instance(model=inner(p.model))
        with interpreted():
            yield p
    finally:
        vars(modeling_llama).update(before)


def _liger_model(s: Setting, of: str) -> Found:
    with _liger(s) as p:
        leaves = list(p.params.values())
        got = torch.autograd.grad(p.loss(), leaves, create_graph=of == "hvp")
        if of == "hvp":
            got = torch.autograd.grad(got, leaves, list(p.v.values()))
    return list(got), [whole(s)[of][n] for n in p.params]


for _name, _s in MODELS.items():
    _of = f"{HV} of {_name}"
    collected(FOUND, "PyHessian", _of)(lambda s=_s: _pyhessian(s))
    collected(FOUND, "hessian-eigenthings, autograd", _of)(
        lambda s=_s: _eigenthings(s, "hvp", "HessianOperator")
    )
    collected(FOUND, "hessian-eigenthings, finite differences", _of)(
        lambda s=_s: _eigenthings(s, "hvp", "HessianOperator", method="finite_difference")
    )
    collected(FOUND, "hessian-eigenthings GGN", f"{GV} of {_name}")(
        lambda s=_s: _eigenthings(s, "ggn", "GGNOperator")
    )
    for _mode in ("rev-rev", "rev-fwd"):
        collected(FOUND, f"dattri hvp, {_mode}", _of)(lambda s=_s, m=_mode: _dattri(s, m))
for _of, _quantity in (("gradient", "gradient"), ("hvp", f"{HV}, double backward")):
    collected(FOUND, "Liger in all of Llama", f"{_quantity} of Llama LoRA")(
        lambda of=_of: _liger_model(MODELS["Llama LoRA"], of)
    )


def _fused_loss(h: Tensor, w: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(h, w, targets().to(h.device))[0]


def _loss(h: Tensor, w: Tensor) -> Tensor:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return LigerCrossEntropyFunction.apply(h @ w.T, targets().to(h.device), None)[0]


def _swiglu(a: Tensor, b: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return cubed(LigerSiLUMulFunction.apply(a, b))


def _rms_norm(x: Tensor, w: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return cubed(LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False))


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from jvp_flash_attention.jvp_attention import attention as flash

    return cubed(flash(q, k, v, causal=True, warp_specialize=False, USE_TMA=False))


Shapes = list[tuple[int, ...]]
ROWS, HEAD, HEADS = [(8, 32), (8, 32)], [(8, 16), (64, 16)], [(1, 2, 64, 32)] * 3
KERNELS: dict[str, tuple[Any, Any, Shapes]] = {
    "Liger fused linear cross-entropy": (
        _fused_loss, lambda h, w: cross_entropy(h, w, targets()), HEAD,
    ),
    "Liger cross-entropy": (_loss, lambda h, w: cross_entropy(h, w, targets()), HEAD),
    "Liger SiLU-mul": (_swiglu, lambda a, b: cubed(silu(a) * b), ROWS),
    "Liger RMSNorm": (_rms_norm, lambda x, w: cubed(rms_norm(x, w)), [(8, 32), (32,)]),
    "jvp_flash_attention": (_flash, lambda *a: cubed(attention(*a)), HEADS),
}  # fmt: skip


def _once(f: Any, xs: Sequence[Tensor], vs: Sequence[Tensor]) -> Sequence[Tensor]:
    xs = [x.clone().requires_grad_() for x in xs]
    return torch.autograd.grad(f(*xs), xs)


def _forward_over_reverse(f: Any, xs: Sequence[Tensor], vs: Sequence[Tensor]) -> Sequence[Tensor]:
    return jvp(grad(f, tuple(range(len(xs)))), tuple(xs), tuple(vs))[1]


def _kernel(name: str, how: Any, truth: Any) -> Found:
    """Inputs go through a sine, so that something of the graph is left where the kernel has none:
    a gradient without a graph at all would raise."""
    f, true, shapes = KERNELS[name]
    xs, vs = draws(*shapes)
    want = truth(lambda *a: true(*map(torch.sin, a)), xs, vs)
    with interpreted():
        got = how(lambda *a: f(*map(torch.sin, a)), single(xs), single(vs))
    return [g.cpu() for g in got], want


for _name in KERNELS:
    for _quantity, _how, _true in (
        ("gradient", _once, _once),
        (f"{HV}, double backward", twice, twice),
        (f"{HV}, jvp of grad", _forward_over_reverse, twice),
    ):
        collected(FOUND, _name, _quantity)(
            lambda n=_name, how=_how, true=_true: _kernel(n, how, true)
        )
