"""One module of a model on stacked rows [x; x_t]: its value, gradient and Gauss-Newton gradient.

The oracle is torch.func.jvp of the module's plain float64 forward, and autograd through that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import transformers as hf
from peft import LoraConfig, inject_adapter_in_model
from tiny_index import FAMILIES
from tiny_models import _plain_norm, _plain_router
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from cases import outputs
from u2a.dual_modules import Site
from u2a.dual_table import overrides
from u2a_kernels.testing import randn

IDS = torch.tensor([[3, 1, 0, 5], [2, 3, 6, 1], [4, 4, 2, 0]])
X = 1.5 * randn(3, 5, 16, seed=1, dtype=torch.float64)
X_T = randn(3, 5, 16, seed=2, dtype=torch.float64)


@dataclass(frozen=True)
class Module:
    """`make` builds it; `x` and its tangent, or None where `ids` go in; `plain` replaces the
    forward of submodules that leave float64; frozen parameters have no direction."""

    make: Callable[[], nn.Module]
    x: tuple[torch.Tensor, torch.Tensor] | None = (X, X_T)
    plain: Callable[[nn.Module], Callable] | None = None
    frozen: bool = False


def part(family: str, path: str) -> nn.Module:
    model = FAMILIES[family]()
    model.config._experts_implementation = "eager"
    return model.get_submodule(path)


def plain_parts(m: nn.Module) -> Callable:
    """Norms and routers in float64."""
    for sub in m.modules():
        for suffix, forward in (("RMSNorm", _plain_norm), ("TopKRouter", _plain_router)):
            if type(sub).__name__.endswith(suffix):
                sub.forward = partial(forward, sub)
    return m.forward


def padded(m: nn.Embedding) -> Callable:
    """The row of padding_idx is a constant to autograd."""

    def forward(ids: torch.Tensor) -> torch.Tensor:
        pad = torch.arange(m.num_embeddings)[:, None] == (m.padding_idx or -1)
        weight = torch.where(pad, m.weight.detach(), m.weight)
        return F.embedding(ids, weight)

    return forward


def written_out_norm(m: nn.LayerNorm) -> Callable:
    """torch's own layer_norm has a wrong tangent under nested jvp."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        c = x - x.mean(-1, keepdim=True)
        return c * torch.rsqrt((c * c).mean(-1, keepdim=True) + m.eps) * m.weight + m.bias

    return forward


class Positions(nn.Module):
    """Token embeddings and learned positions, added as the decoder of `family` adds them."""

    def __init__(self, family: str, path: str) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 16), part(family, path)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        e, at = self.tokens(ids), torch.arange(ids.shape[1])[None]
        if isinstance(self.positions, hf.models.opt.modeling_opt.OPTLearnedPositionalEmbedding):
            return e + self.positions(None, 0, position_ids=at.expand(len(e), -1))
        return e + self.positions(at)


def adapted(base: nn.Embedding) -> nn.Module:
    """LoRA around an embedding."""
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["0"])
    return inject_adapter_in_model(config, nn.Sequential(base))[0].requires_grad_()


def padded_factors(m: nn.Module) -> Callable:
    """The column of padding_idx is a constant to autograd."""
    base, scale = padded(m.base_layer), getattr(m.base_layer, "embed_scale", 1)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        a, b = m.lora_embedding_A["default"], m.lora_embedding_B["default"]
        pad = torch.arange(a.shape[1])[None] == (m.base_layer.padding_idx or -1)
        low = F.embedding(ids, torch.where(pad, a.detach(), a).T) @ b.T
        return (base(ids) + 2.5 * low) * scale

    return forward


LLAMA = "model.layers.0."
MODULES = {
    "linear": Module(lambda: nn.Linear(16, 7)),
    "conv1d": Module(lambda: Conv1D(7, 16)),
    "layer_norm": Module(lambda: nn.LayerNorm(16, eps=1e-2), plain=written_out_norm),
    "relu": Module(nn.ReLU),
    "gelu": Module(lambda: ACT2FN["gelu"]),
    "gelu_new": Module(lambda: ACT2FN["gelu_new"]),
    "embedding": Module(lambda: nn.Embedding(7, 16, padding_idx=3), None, padded),
    "embedding with LoRA": Module(
        lambda: adapted(nn.Embedding(7, 16, padding_idx=3)), None, padded_factors
    ),
    "scaled embedding with LoRA": Module(
        lambda: adapted(part("gemma3", "model.embed_tokens")), None, padded_factors
    ),
    "embedding without padding": Module(lambda: nn.Embedding(7, 16), None),
    "embedding, no direction": Module(lambda: nn.Embedding(7, 16), None, frozen=True),
    "rms_norm": Module(lambda: part("llama", "model.norm"), plain=plain_parts),
    "one_plus_rms_norm": Module(lambda: part("gemma", "model.norm"), plain=plain_parts),
    "scaled_embedding": Module(
        lambda: part("gemma3", "model.embed_tokens"),
        None,
        lambda m: lambda ids: padded(m)(ids) * m.embed_scale,
    ),
    "opt positions": Module(lambda: Positions("opt", "model.decoder.embed_positions"), None),
    "gpt2 positions": Module(lambda: Positions("gpt2", "transformer.wpe"), None),
    "gated_mlp": Module(lambda: part("llama", LLAMA + "mlp")),
    "gated_mlp gelu": Module(lambda: part("gemma", LLAMA + "mlp")),
    "packed_mlp": Module(lambda: part("phi3", LLAMA + "mlp")),
    "sparse normalised": Module(lambda: part("mixtral", LLAMA + "mlp"), plain=plain_parts),
    "sparse": Module(lambda: part("olmoe", LLAMA + "mlp"), plain=plain_parts),
    "shared_and_sparse": Module(lambda: part("qwen2_moe", LLAMA + "mlp"), plain=plain_parts),
}


def built(case: Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The module with weights away from their initial values, and a direction of them."""
    torch.manual_seed(0)
    m = case.make().double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn_like(p), alpha=0.4)
    return m, {n: torch.randn_like(p) * (not case.frozen) for n, p in m.named_parameters()}


def ours(m: nn.Module, v: dict[str, torch.Tensor], mode: str, inputs) -> torch.Tensor:
    tokens = m.tokens if isinstance(m, Positions) else getattr(m, "base_layer", m)
    site = Site({id(p): v[n] for n, p in m.named_parameters() if v[n].any()}, mode, tokens)
    for sub in m.modules():
        if not isinstance(sub, Positions):
            sub.__dict__.update(overrides(sub, site, root=sub is m))
    return outputs(m(*inputs))[0]


def plain_forward(case: Module, m: nn.Module, rest: tuple) -> Callable:
    """(parameters, x...) -> y; the module's own forward, or `case.plain`."""
    m = copy.deepcopy(m)
    if case.plain is not None:
        m.forward = case.plain(m)
    return lambda params, *x: outputs(functional_call(m, params, (*x, *rest)))[0]


@pytest.mark.parametrize("name", MODULES)
def test_module_on_stacked_rows(name):
    case = MODULES[name]
    m, v = built(case)
    params = dict(m.named_parameters())
    leaves = [] if case.x is None else [torch.cat(case.x).requires_grad_()]
    inputs, rest = (leaves, ()) if leaves else ([IDS], (IDS,))
    f = plain_forward(case, m, rest)
    stacked = leaves[0].chunk(2) if leaves else None
    ends = (params, *([stacked[0]] if leaves else []))
    want = torch.cat(jvp(f, ends, (v, *([stacked[1]] if leaves else []))))
    wrt = [*params.values(), *leaves]
    c = torch.arange(want.numel(), dtype=torch.float64).cos().view_as(want)
    want_g = torch.autograd.grad((want * c).sum(), wrt, retain_graph=True)
    half = want.chunk(2)[0]
    want_ggn = torch.autograd.grad((half * c.chunk(2)[0]).sum(), wrt, allow_unused=True)
    got = ours(m, v, "hvp", inputs)
    close(got, want)
    for a, b in zip(torch.autograd.grad((got * c).sum(), wrt), want_g, strict=True):
        close(a, b)
    c = torch.cat([c.chunk(2)[0], torch.zeros_like(half)])  # the head's: the primal half alone
    for sub in m.modules():
        sub.__dict__.pop("forward", None)
    got = torch.autograd.grad((ours(m, v, "ggn", inputs) * c).sum(), wrt)
    for a, b in zip(got, want_ggn, strict=True):
        close(a, torch.zeros_like(a) if b is None else b)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * max(1e-3, float(b.detach().abs().max())))
