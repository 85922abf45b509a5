"""Per-example features from one forward and one backward of activations, for a whole packed batch.

Parameters are frozen while a capture is open, so no weight gradient is formed and no layer input is
kept for one; taps (`u2a.index.taps`) keep what the features need instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from u2a.batch import AnswerLogps
from u2a.dual_modules import Refused, UnsupportedModel, path
from u2a.index import experts, modules
from u2a.index.modules import Handler, Site
from u2a.index.packed import NAME, Packed, hidden_states, running
from u2a.index.spec import Spec
from u2a.index.taps import Head, HeadFacts
from u2a_kernels import linear_logp

Loss = Callable[[AnswerLogps], Tensor]

TABLE: dict[str, Handler] = {
    "torch.nn.modules.linear.Linear": modules.linear,
    "torch.nn.modules.sparse.Embedding": modules.embedding,
    "torch.nn.modules.normalization.LayerNorm": modules.layer_norm,
    "torch.nn.modules.conv.Conv1d": modules.convolution,
    "torch.nn.modules.conv.Conv2d": modules.convolution,
    "transformers.pytorch_utils.Conv1D": modules.linear,
    "transformers.models.opt.modeling_opt.OPTLearnedPositionalEmbedding": modules.opt_positions,
}
FAMILIES = {
    "gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3", "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX", "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral",
    "olmoe": "Olmoe", "opt": "OPT", "phi": "Phi", "phi3": "Phi3", "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe",
}  # fmt: skip
for _package, _family in FAMILIES.items():
    _own: dict[str, Handler] = {
        "RMSNorm": partial(modules.rms_norm, heads_first=_package == "gemma3"),
        "TextScaledWordEmbedding": modules.embedding,
        "Experts": experts.experts,
        "TopKRouter": experts.router,
    }
    for _suffix, _handler in _own.items():
        TABLE[f"transformers.models.{_package}.modeling_{_package}.{_family}{_suffix}"] = _handler
# The same function in one operation that saves its input only; theirs keep five arrays.
FUSED: dict[str, modules.Forward] = {
    f"transformers.activations.{name}": partial(F.gelu, approximate="tanh")
    for name in ("NewGELUActivation", "GELUTanh")
}
CAUSAL_LMS = {
    f"transformers.models.{package}.modeling_{package}.{family}{kind}"
    for package, family in FAMILIES.items()
    for kind in ("ForCausalLM", "LMHeadModel")
}


def parts(model: nn.Module) -> tuple[nn.Module, nn.Linear, float | None]:
    """Backbone, language-model head and final soft cap of a known causal LM, also inside peft.

    Raises UnsupportedModel for any other class: what it does to its logits is not known here.
    """
    wrapped = getattr(model, "get_base_model", None)
    base: Any = wrapped() if wrapped is not None else model
    if path(type(base)) not in CAUSAL_LMS:
        raise UnsupportedModel(
            f"{path(type(base))} is not a known causal LM, wanted one of {sorted(FAMILIES)}",
            "model",
        )
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UnsupportedModel(f"output head {path(type(head))}, wanted torch.nn.Linear", "model")
    return base.base_model, head, getattr(base.config, "final_logit_softcapping", None)


class Capture:
    """An open capture, from `capture`. `names`: the captured parameters, in their order; `dim`:
    features per example; `layout`: {name: (start, stop)} in them, all names at (0, dim) for a
    sketch."""

    def __init__(self, model: nn.Module, spec: Spec, site: Site, names: Mapping[int, str]) -> None:
        self.backbone, self.head, self.softcap = parts(model)
        self.spec, self.site, self.names = spec, site, list(names.values())
        self._compiled: Callable[..., Any] | None = None
        self._ids = list(names)
        sizes = [torch.Size(site.rules[i].shape).numel() for i in self._ids]
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.dim = sizes[0] if spec.shared else ends[-1]
        spans = [(0, self.dim)] * len(sizes) if spec.shared else list(pairwise(ends))
        self.layout = dict(zip(self.names, spans, strict=True))

    def open_slots(self, examples: int, offsets: Tensor, owner: Tensor) -> list[Tensor]:
        """Puts a batch's token layout and fresh slots in place; returns the slots."""
        weight = self.head.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32

        def slot(shape: tuple[int, ...]) -> Tensor:
            zero = torch.zeros((), dtype=dtype, device=weight.device)
            return zero.expand(examples, *shape).requires_grad_()

        site = self.site
        site.offsets, site.owner = offsets, owner
        if self.spec.shared:
            one = slot((self.dim,))
            site.slots = dict.fromkeys(self._ids, one)
            return [one]
        site.slots = {i: slot(site.rules[i].shape) for i in self._ids}
        return list(site.slots.values())

    def lay(self, batch: Packed) -> list[Tensor]:
        """`open_slots` for a batch on the model's device."""
        rows = torch.arange(len(batch), device=batch.offsets.device)
        owner = torch.repeat_interleave(rows, batch.offsets.diff(), output_size=batch.ids.shape[1])
        return self.open_slots(len(batch), batch.offsets, owner)

    def answer_logps(self, batch: Packed, ref: Tensor | None = None) -> AnswerLogps:
        """Log-probabilities of a packed batch's answers, with taps in their graph."""
        backbone = self.backbone if self._compiled is None else self._compiled
        h = hidden_states(backbone, batch).index_select(0, batch.at)
        logp = self._logp(h.to(self.head.weight.dtype), batch)
        ref = None if ref is None else ref.to(logp.device, logp.dtype)
        return AnswerLogps(logp, batch.row, batch.count, ref=ref, index=batch.index)

    def _logp(self, h: Tensor, batch: Packed) -> Tensor:
        weight, bias, site = self.head.weight, self.head.bias, self.site
        logp = linear_logp(h, weight, batch.target, bias=bias, softcap=self.softcap)
        if not (site.captured(weight) or site.captured(bias)):
            return logp
        facts = HeadFacts(site.rules.get(id(weight)), site.rules.get(id(bias)), self.softcap)
        slots = site.slots.get(id(weight)), site.slots.get(id(bias))
        site.used |= {id(weight), id(bias)}
        return Head.apply(
            logp, *slots, h.detach(), weight, bias, batch.target, batch.answers, facts
        )

    def features(
        self, batch: Packed, loss: Loss, ref: Tensor | None = None, *, compile: bool = False
    ) -> Tensor:
        """Features `[B, dim]` of the gradient of every example's loss, on the model's device.

        `loss`: per-row values `[B]` that depend on their own row only, or a scalar, of which row b
        then gets its own tokens' share. `compile` the backbone, taps included.
        """
        if compile and self._compiled is None:
            self._compiled = torch.compile(self.backbone, fullgraph=True)
        batch = batch.to(self.head.weight.device)
        slots = self.lay(batch)
        with torch.enable_grad(), running(batch):
            total = loss(self.answer_logps(batch, ref)).sum()
            grads = torch.autograd.grad(total, slots, allow_unused=True)
        found = [torch.zeros_like(s) if f is None else f for f, s in zip(grads, slots, strict=True)]
        return torch.cat([f.flatten(1) for f in found], 1)

    def check_used(self) -> None:
        """Raises UnsupportedModel for captured parameters that no batch so far has used."""
        used = self.site.used
        if lost := [n for n, i in zip(self.names, self._ids, strict=True) if i not in used]:
            raise UnsupportedModel(
                [f"{n}: took no part in the forward" for n in lost],
                "u2a.index: captured parameters",
            )


def _chosen(model: nn.Module, exclude: Sequence[str]) -> dict[int, str]:
    """Trainable parameters by id, but for those whose name matches a pattern of `exclude`."""
    found = {
        id(p): name
        for name, p in model.named_parameters()
        if p.requires_grad and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not found:
        raise ValueError(
            f"u2a.index: {type(model).__name__} has no parameter with requires_grad left to capture"
            f" (exclude={list(exclude)})"
        )
    return found


def _survey(
    model: nn.Module, site: Site, head: nn.Module | None
) -> list[tuple[nn.Module, modules.Forward]]:
    """The new forward of every module that holds captured parameters; one error names the rest."""
    found, faults = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            faults.append(f"{name}: dropout p={module.p} in training mode; call model.eval()")
        if path(type(module)) in FUSED:
            found.append((module, FUSED[path(type(module))]))
        held = [n for n, p in module.named_parameters(recurse=False) if site.captured(p)]
        if not held or module is head:
            continue
        handler = TABLE.get(path(type(module)))
        try:
            if handler is None:
                raise Refused(f"no known way to capture {held}; exclude them to leave them out")
            found.append((module, handler(module, site)))
        except Refused as reason:
            faults.append(f"{name or 'the model'} ({path(type(module))}): {reason}")
    if faults:
        raise UnsupportedModel(faults, f"u2a.index: {type(model).__name__} is not supported")
    return found


@contextmanager
def tapped(
    model: nn.Module, spec: Spec, exclude: Sequence[str] = (), head: nn.Module | None = None
) -> Iterator[tuple[Site, dict[int, str]]]:
    """Freezes the model and taps its captured parameters; everything is put back on exit."""
    chosen = _chosen(model, exclude)
    found = {
        id(p): (modules.weight_shape(module, p), p)
        for module in model.modules()
        for p in module.parameters(recurse=False)
    }
    site = Site({i: spec.rule(name, *found[i]) for i, name in chosen.items()})
    new = _survey(model, site, head)
    before = [(module, module.__dict__.get("forward")) for module, _ in new]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for module, forward in new:
            module.__dict__["forward"] = forward
        for p, _ in flags:
            p.requires_grad_(False)
        yield site, chosen
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, own in before:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own


@contextmanager
def capture(model: nn.Module, spec: Spec, *, exclude: Sequence[str] = ()) -> Iterator[Capture]:
    """While open, `Capture.features(packed, loss)` gives per-example features of a causal LM.

    Args:
        model: Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, OPT, Phi, Mixtral, OLMoE or Qwen-MoE
            for causal LM, with a peft LoRA or without; its parameters with requires_grad are
            captured. A quantised base stays as it is.
        spec: `Sketch`, `Kronecker` or `Full`.
        exclude: patterns (fnmatch) of parameter names to leave out.

    Raises:
        UnsupportedModel: modules with captured parameters of a kind not known, by name.
        ValueError: nothing to capture.
    """
    backbone, head, _ = parts(model)
    config: Any = backbone.config
    implementation = config._attn_implementation
    with tapped(model, spec, exclude, head) as (site, names):
        config._attn_implementation = NAME
        try:
            yield Capture(model, spec, site, names)
        finally:
            config._attn_implementation = implementation
