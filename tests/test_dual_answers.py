"""From hidden states of stacked rows to log-probabilities of a batch's answers: every kind of head.

The oracle is torch.func.jvp of float64 logits, and autograd through that.
"""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.func import jvp
from torch.nn import functional as F

from u2a.batch import Row, collate
from u2a.dual import Dual
from u2a.logps import dual_logps
from u2a_kernels.testing import randn

BATCH = collate([Row("a", (1, 2), (3, 4, 5)), Row("b", (5,), (0,)), Row("c", (2, 2, 1), (6, 6))])
ROW, AT = BATCH.answer.nonzero(as_tuple=True)
HEADS = {  # bias, soft cap, LoRA
    "plain": (False, None, False),
    "bias": (True, None, False),
    "bias-cap": (True, 2.0, False),
    "cap": (False, 2.0, False),
    "lora": (True, 2.0, True),
}
LORA = dict(r=2, lora_alpha=3)


def values(p, cap):
    """(logits `[n, V]`, log-probabilities `[n]`) of the answers; p["h"] the hidden states."""
    h = p["h"][ROW, AT - 1]
    z = F.linear(h, p["weight"], p.get("bias"))
    if "a" in p:
        z = z + 1.5 * (h @ p["a"].T) @ p["b"].T
    z = z if cap is None else cap * torch.tanh(z / cap)
    return z, torch.log_softmax(z, -1).gather(1, BATCH.ids[ROW, AT, None])[:, 0]


def case(bias, lora, trainable):
    """Hidden states and head, of which those that are trained have a direction: always the factors
    of LoRA, weight and bias if `trainable`."""
    shapes = dict(h=(3, 5, 4), weight=(7, 4), **(dict(bias=(7,)) if bias else {}))
    shapes |= dict(a=(2, 4), b=(7, 2)) if lora else {}
    p = {n: randn(*s, seed=1 + i, dtype=torch.float64) for i, (n, s) in enumerate(shapes.items())}
    p = {n: t.requires_grad_(n in "hab" or trainable) for n, t in p.items()}
    v = {n: randn(*t.shape, seed=9 + i, dtype=t.dtype) for i, (n, t) in enumerate(p.items())}
    return p, {n: t if p[n].requires_grad else torch.zeros_like(t) for n, t in v.items()}


def made(p):
    """(module with these parameters, {their names here: the module's})."""
    trainable = p["weight"].requires_grad
    head = nn.Linear(4, 7, bias="bias" in p, dtype=torch.float64).requires_grad_(trainable)
    head.load_state_dict({n: p[n] for n in ("weight", "bias") if n in p})
    names = dict(head.named_parameters())
    if "a" not in p:
        return head, names
    holder = inject_adapter_in_model(LoraConfig(**LORA, target_modules=["0"]), nn.Sequential(head))
    head = holder[0]
    names |= {"a": head.lora_A["default"].weight, "b": head.lora_B["default"].weight}
    for n in "ab":
        names[n].data = p[n].detach().clone()
    for n in ("weight", "bias"):
        names[n].requires_grad_(trainable)  # peft freezes what it wraps
    return head, names


def ours(p, v, cap, mode):
    """(stacked h and the head's parameters, what `dual_logps` says of them)."""
    head, names = made(p)
    h = torch.cat([p["h"], v["h"]]).detach().requires_grad_()
    given = {n: v[n] for n, q in names.items() if q.requires_grad}
    by_parameter = {id(names[n]): t for n, t in given.items()}
    backbone = lambda **_: SimpleNamespace(last_hidden_state=h)  # noqa: E731
    weight_t, bias_t = given.get("weight"), given.get("bias")
    run = Dual(head, backbone, head, weight_t, mode, bias_t, cap, by_parameter)
    lp, logp_t, curvature = dual_logps(run, BATCH)
    return {"h": h, **names}, (lp.logp, logp_t, curvature)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_answers_of_stacked_rows(name, trainable):
    bias, cap, lora = HEADS[name]
    p, v = case(bias, lora, trainable)
    logp, logp_t = jvp(lambda p: values(p, cap)[1], (p,), (v,))
    z, z_t = jvp(lambda p: values(p, cap)[0], (p,), (v,))
    prob = torch.softmax(z, -1)
    u = (prob * (z_t - (prob * z_t).sum(-1, keepdim=True))).detach()
    a, b = (torch.arange(len(ROW), dtype=torch.float64).add(k).cos() for k in (0, 3))
    at = [n for n in p if p[n].requires_grad]
    want = {  # (cotangent of h, weight, bias; of the tangent half of h)
        "hvp": ((a * logp + b * logp_t).sum(), (b * logp).sum()),
        "ggn": (-(b[:, None] * u * z).sum(), None),
    }
    for mode, (total, tangent) in want.items():
        leaves, got = ours(p, v, cap, mode)
        for x, y in zip(got, (logp, logp_t, (u * z_t).sum(-1)), strict=True):
            close(x, y)
        sent = (a * got[0] + b * got[1]).sum()
        found = torch.autograd.grad(sent, [leaves[n] for n in at])
        exact = torch.autograd.grad(total, [p[n] for n in at], retain_graph=True)
        half = torch.zeros_like(p["h"])
        if tangent is not None:
            (half,) = torch.autograd.grad(tangent, p["h"], retain_graph=True)
        close(found[0], torch.cat([exact[0], half]))
        for x, y in zip(found[1:], exact[1:], strict=True):
            close(x, y)
