"""Breaking any one term of a formula makes a test fail: see `mutate`."""

from __future__ import annotations

import importlib
import warnings
from functools import partial
from types import ModuleType

import pytest
import test_contract as contract
import test_dual
import test_dual_answers as answers
import test_dual_attention as attention
import test_dual_ggn as ggn
import test_dual_linear as linear
import test_dual_linear_cross_entropy as head
import test_dual_modules as modules
import test_dual_ops as ops
import test_losses_pipeline as pipeline
import test_products as products
import torch
from mutate import reached, served_by, survivors

from cases import all_cases
from u2a import logps
from u2a import products as chain_rule
from u2a.dual_modules import path
from u2a.dual_table import TABLE
from u2a_kernels import _norm

CASES = {c.name: c for c in all_cases() if c.name.startswith("dual_")}
SKIPPED = (  # how much is held at once, where any value is right; shapes, which opcheck compares;
    # the choice of a kernel; refusals
    "chunk_rows", "_tiles", "_groups", "_fake", "grouped", "sparse",
)  # fmt: skip
VARIANTS = {  # the smallest that reach every line; the default is all but the large
    "dual_attention": ["one", "grouped", "window-cache-cap", "blind", "packed", "full"],
    "dual_linear_cross_entropy": ["direction", "capped", "bias", "no-direction", "ignored"],
    "dual_softmax": ["odd", "one", "masked", "large", "dim"],
}
LARGE = ("block", "block-tanh", "tiles", "empty")
# Changed lines that compute the same, by reason.
SAME = {
    "how much is held at once": (
        "size = max(2, min(QUERIES, PIECE // max(1, group.rep * s)))",
        "size = max(1, min(QUERIES, PIECE // max(2, group.rep * s)))",
        "size = max(1, min(QUERIES, PIECE // max(1, s)))",
        "size = max(1, min(QUERIES, PIECE // max(1, group.rep)))",
        "step = chunk_rows(weight.shape[1], h.device)",
        "count = 1 if not rows else 1 if mode == 'ggn' else 2",
    ),
    "reads keys that are hidden anyway": (
        "low = 0 if window is None else max(0, start + s - t - window - 1)",
        "low = 0 if window is None else max(0, start + s - t - window)",
        "low = 0 if window is None else max(0, start - s - t - window + 1)",
        "low = 0 if window is None else max(0, s - t - window + 1)",
        "low = 0 if window is None else max(0, start - t - window + 1)",
    ),
    "a mask of blind rows where none is blind": tuple(
        f"blind = (last < 0).repeat(group.rep, 1) if {test} < t else None"
        for test in ("start - s", "s", "start")
    )
    + ("blind = (last < 0).repeat(group.rep, 1) if start + s <= t else None",),
    "both halves have one shape, and so have k and all of its groups": (
        "t, s = (group.view(halves(x)[1], rep).shape[2] for x, rep in ((q, group.rep), (k, 1)))",
        "t, s = (group.view(halves(x)[0], rep).shape[2] for x, rep in ((q, group.rep), (k, 2)))",
    ),
    "a shift of the logits, which only rounding sees": (
        "a = a + top",
        "a = a",
        "pass",
    ),
    "the last of two dimensions": (
        "h = h.reshape(-1, h.shape[1])",
        "s, chosen = torch.topk(p, top_k, dim=1)",
        "s_t = p_t.gather(1, chosen)",
        "total = s.sum(1, keepdim=True)",
        "s_t = (s_t - s * s_t.sum(1, keepdim=True)) / total",
        "inner = gated(*both.chunk(2, dim=1))",
    ),
    "a refusal": (
        "if batch.answer.device.type != 'cpu' and bool(batch.answer[:, 0].any()):",
        "if kind in GELU or kind != RELU:",
    ),
    "the factor is 1 wherever the map is swapped": (
        "y0.addmm_(torch.cat([u0, u1], 1), both)",
        "y1.addmm_(u1, w)",
    ),
    "statistics that only the fused kernels read": tuple(
        f"per_row = (loss, loss_t, curvature, top, {rest})"
        for rest in (
            "torch.exp(norm), own + loss_t",
            "torch.exp(-norm), own - loss_t",
            "torch.exp(-norm), loss_t",
            "torch.exp(-norm), own",
        )
    ),
    "a row that is thrown away, a start value that is replaced": (
        "x, x_t = (torch.where(used, half[rows], 1).to(acc) for half in (primal, tangent))",
        "found = 1",
    ),
    "an empty placeholder that is thrown away": (
        "dw = weight.new_zeros(weight.shape if weight_grad else 1, dtype=acc)",
        "db = weight.new_zeros(1 if bias is None else bias.shape[0], dtype=acc)",
    ),
}
SAME_LINES = {line for lines in SAME.values() for line in lines}


def unnoticed(functions, checks):
    """Survivors that are not known to compute the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = survivors(functions, list(checks))
    return [m for m in found if m.split(" -> ")[-1] not in SAME_LINES]


def references(name):
    """{op: reference} of the forward and the backward, wherever the op keeps them."""
    module = importlib.import_module(f"u2a_kernels.ops.{name}")
    found = getattr(module, "reference", module)
    if isinstance(found, ModuleType):
        forward = getattr(found, "forward", None) or found.reference
        backward = getattr(found, "backward", None) or found.reference_bwd
    else:
        forward, backward = found, module.reference_bwd
    return {name: forward, f"{name}_bwd": backward}


# Another op or entry with the same formulas, and where those are.
SAME_OP = {"dual_glu": "dual_act", "dual_layer_norm": "dual_rms_norm"}
FORMULAS = {"dual_layer_norm": (_norm.reference, _norm.reference_bwd)}


def checks(name):
    for case in (CASES[name], CASES.get(f"{name}-frozen"), CASES.get(SAME_OP.get(name, ""))):
        if case is None:
            continue
        for variant in VARIANTS.get(name, [v for v in case.variants if v not in LARGE]):
            yield partial(contract.test_gradients, case, variant, torch.float64)
            yield partial(contract.test_values, case, variant, torch.float64)
    yield from EXTRA.get(name, [])


def patched(test, *args):
    with pytest.MonkeyPatch.context() as patch:
        test(*args, monkeypatch=patch)


def in_pieces(variant, monkeypatch):
    ops.test_attention_pieces_change_nothing(monkeypatch, variant)


def chunked(mode, monkeypatch):
    head.test_chunks_change_nothing_and_bound_the_memory(monkeypatch, mode)


EXTRA = {
    "dual_lora_linear": [linear.test_lora_ggn_is_the_plain_backward_of_the_primal_half],
    "dual_attention": [
        *(partial(patched, attention.test_statistics, n) for n in (1 << 18, 1)),
        *(partial(patched, in_pieces, v) for v in ("window-cache-cap", "blind", "packed")),
        ggn.test_attention_ggn_is_the_plain_backward_of_the_primal_half,
        partial(ops.test_attention_without_queries_or_keys, True, 0, 3),
        partial(ops.test_attention_without_queries_or_keys, False, 3, 0),
    ],
    "dual_softmax": [ggn.test_softmax_ggn_is_the_plain_backward_of_the_primal_half],
    "dual_linear": [ggn.test_linear_ggn_is_the_plain_backward_of_the_primal_half],
    "dual_linear_cross_entropy": [
        ggn.test_head_ggn_ignores_the_cotangent_of_the_loss,
        *(partial(ggn.test_second_order_product, "ggn", frozen) for frozen in ((), ("head",))),
        ggn.test_capped_head_ggn_is_the_curvature_at_the_capped_logits,
        *(partial(patched, chunked, mode) for mode in ("hvp", "ggn")),
        head.test_ignored_tokens_are_never_read,
        head.test_curvature_survives_a_common_shift,
    ],
}


@pytest.mark.parametrize("name", [n for n in CASES if "-" not in n and n not in SAME_OP.values()])
def test_every_term_of_an_op(name):
    found = references(name)
    if name in FORMULAS:
        found |= references(SAME_OP[name])
    roots = FORMULAS.get(name, found.values())
    functions = reached(*roots, home=("u2a_kernels.ops.", "u2a_kernels._norm"), skip=SKIPPED)
    with served_by(found):
        left = unnoticed(functions, checks(name))
    assert not left, "\n".join(left)


HOMES = ("u2a.dual_", "u2a.grouped", "u2a.logps")  # where a module's formulas live


def by_function():
    """{function: the modules whose handlers reach it}."""
    found = {}
    for name, case in modules.MODULES.items():
        built, _ = modules.built(case)
        handlers = [TABLE[path(type(m))] for m in built.modules() if path(type(m)) in TABLE]
        for function in reached(*handlers, home=HOMES, skip=SKIPPED):
            found.setdefault(function, []).append(name)
    return found


def test_every_term_of_a_module():
    left = []
    for function, names in by_function().items():
        every = [partial(modules.test_module_on_stacked_rows, n) for n in names]
        if function.__name__ == "relu":
            every.append(test_dual.test_relu_keeps_a_nan_and_has_no_slope_at_zero)
        left += unnoticed([function], every)
    assert not left, "\n".join(left)


def test_every_term_of_the_answers():
    functions = reached(logps.dual_logps, home=HOMES, skip=SKIPPED)
    every = [
        partial(answers.test_answers_of_stacked_rows, n, t)
        for n in answers.HEADS
        for t in (True, False)
    ]
    left = unnoticed(functions, every)
    assert not left, "\n".join(left)


def test_every_term_of_the_chain_rule():
    products_of = [
        getattr(chain_rule, n) for n in ("gradient", "hvp", "ggnvp", "quadratic", "jvp_scores")
    ]
    paired = pipeline.model.__wrapped__()
    functions = reached(*products_of, home=("u2a.products", "u2a.batch"), skip=SKIPPED)
    every = [
        partial(products.test_products_equal_double_backward, "gpt2-gelu", False),
        partial(products.test_scores_equal_a_loop_of_gradients, "gpt2-gelu", False, products.npo),
        products.test_a_scalar_objective_is_a_mean_over_rows,
        partial(pipeline.test_products_against_autograd_and_differences, paired, "altpo"),
        partial(pipeline.test_curvature_of_pairs, paired),
        partial(pipeline.test_outer_gains_predict, paired, "flat_tv"),
        partial(pipeline.test_wrong_problems_are_named, paired),
        products.test_wrong_losses_and_batches_are_named,
    ]
    left = unnoticed(functions, every)
    assert not left, "\n".join(left)
