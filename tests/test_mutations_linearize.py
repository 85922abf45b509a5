"""Breaking any one term of a tangent sweep makes a test fail: see `mutate`."""

from __future__ import annotations

import importlib
import warnings
from functools import cache, partial

import pytest
import test_hvp_features as features
import test_linearize as linearized
import torch
from mutate import methods, survivors
from test_dual_adapters import adapted
from test_products import REF, WEIGHTS, npo
from tiny_models import direction, make, relative, rows, two_batches

from u2a.batch import collate
from u2a.linearize import attention, head, linearize
from u2a.per_example import per_example_curvature
from u2a.products import ggnvp, hvp
from u2a.tree import dot

STACKED = {"ggn": ggnvp, "hvp": hvp}
OPTIONS = dict(weights=WEIGHTS, ref=REF)


@cache
def setting(family, lora):
    """(model, batches, directions, their stacked products, v^T H_i v of every row)."""
    model, batches = make(family, lora), [collate(rows()), *two_batches()[:1]]
    batches[0].ids[:, 0] = 0  # llama-tied's padding_idx
    vs = [direction(model, s) for s in (1, 2)]
    want = {m: [f(model, batches, npo, v, **OPTIONS) for v in vs] for m, f in STACKED.items()}
    one, batch = torch.eye(5, dtype=torch.float64), batches[:1]
    each = [hvp(model, batch, npo, vs[0], weights=one[i], ref=REF) for i in range(5)]
    return model, batches, vs, want, torch.stack([dot(vs[0], h) for h in each])


def agrees(family, lora, patches=()):
    model, batches, vs, want, each = setting(family, lora)
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in patches:
            patch.setattr(module, name, value)
        for mode, right in want.items():
            lin = linearize(model, batches, npo, mode=mode, **OPTIONS)
            for a, b in zip(lin.matmat(vs), right, strict=True):
                assert relative(a, b) < 1e-11
            exact = [dot(v, b).item() for v, b in zip(vs, right, strict=True)]
            assert lin.quadratics(vs) == pytest.approx(exact, rel=1e-10)
        got = per_example_curvature(model, batches[:1], npo, vs[0], "hessian", ref=REF)
        assert (got - each).norm() < 1e-10 * each.norm()


def features_of(family, lora):
    features.test_equal_to_features_of_explicit_products(family, lora)


def frozen_factors():
    """A table of LoRA's that has no direction."""
    model, batch = adapted("gpt2, positions"), collate(rows())
    for n, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "embedding_A" not in n)
    v = direction(model, 1)
    got = linearize(model, batch, npo, ref=REF).matvec(v)
    assert relative(got, ggnvp(model, batch, npo, v, ref=REF)) < 1e-11


# No probabilities held; 16 tokens, two queries, one key head at a time.
PIECES = (
    (head, "HELD", 0), (head, "LOGITS", {"cpu": 1}),
    (attention, "QUERIES", 2), (attention, "SCORES", 1),
)  # fmt: skip
CHECKS = {
    "linear": [
        *(partial(agrees, *a) for a in (("gpt2", False), ("qwen2_moe", False))),
        *(partial(agrees, *a) for a in (("llama-tied", False), ("llama", True))),
        *(partial(features_of, *a) for a in (("llama-tied", False), ("gpt2-gelu", True))),
        frozen_factors,
    ],
    "head": [
        *(partial(agrees, f, False, PIECES) for f in ("llama-tied", "gemma2", "phi")),
        partial(agrees, "llama", True, PIECES),
        partial(agrees, "gemma2", False),
        partial(features_of, "phi", False),
        linearized.test_a_narrow_head_in_tiles,
    ],
    "nonlinear": [
        *(partial(agrees, *a) for a in (("gpt2", False), ("gemma2", False), ("olmoe", False))),
        *(partial(agrees, *a) for a in (("llama", True), ("qwen3", False))),
        *(partial(features_of, f, False) for f in ("gpt2-gelu", "qwen3")),
    ],
    "attention": [
        *(partial(agrees, f, False) for f in ("mistral", "gpt2")),
        partial(agrees, "mistral", False, PIECES),
        partial(agrees, "mistral", False, ((attention, "HELD", 0),)),
    ],
}
SKIPPED = ("make_attention",)  # the choice of a kernel
STEP = "step = max(16, LOGITS.get(self.h.device.type, 1 << 22) // "
LOW = "low = 0 if self.window is None else max(0, "
SAME = (  # ends of labels of changes that compute the same
    # how much is held at once
    STEP + "k)", STEP + "len(self.weight))", STEP.replace("16", "17") + "(len(self.weight) * k))",
    STEP.replace("1 <<", "2 <<") + "(len(self.weight) * k))",
    STEP.replace("22", "23") + "(len(self.weight) * k))",
    "for c in self._chunks(h_t.shape[1]):", "for v in range(0, len(weight), max(2, step)):",
    "step = max(2, SCORES // hidden.numel())",
    "step = len(weight) if weight.dtype != dtype else TILE",
    "return parts[0] if len(parts) == 2 else torch.cat(parts, -1)",
    # a shift of the logits' tangents, which only rounding sees
    "a_t -= a_t.gather(-1, c.y.expand(a_t.shape[0], *c.y.shape)) -> pass",
    "-> a_t += a_t.gather(-1, c.y.expand(a_t.shape[0], *c.y.shape))",
    # keys that are hidden anyway
    LOW + "start + s - t - self.window - 1)", LOW + "start + s - t - self.window)",
    LOW + "start - s - t - self.window + 1)", LOW + "s - t - self.window + 1)",
    LOW + "start - t - self.window + 1)", "keys = slice(low, t)",
    # the last of two dimensions; one of two equal columns, of two equal types
    "part = (b * t[k]).reshape(session.rows, -1).sum(1)",
    "session.second[i] += (x * d).reshape(session.rows, -1).sum(1)",
    "ones = dz.new_ones(dz.shape[1], 2) if scale is None else scale",
    "return y.view(*x_ts[0].shape[:-1], y.shape[-1]).to(x_ts[1].dtype)",
)  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_every_term_of_a_sweep(name):
    functions = methods(importlib.import_module(f"u2a.linearize.{name}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = [f for f in functions if f.__name__ not in SKIPPED]
        left = survivors(kept, CHECKS[name], SAME)
    assert not left, "\n".join(left)
