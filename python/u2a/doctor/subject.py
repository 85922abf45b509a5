"""What `u2a doctor` asks of a model, and of the data of a configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from u2a.batch import Batch, collate
from u2a.config import Config
from u2a.curvature import GaussNewton, Hessian, symmetry
from u2a.curvature.gauge import limit_of
from u2a.doctor import Check, guarded, measured, passed
from u2a.doctor.layer import LIMIT, batch_of, build, compare, loss
from u2a.errors import ConfigError, DataError, GuardError
from u2a.products import jvp_scores
from u2a.tree import signs_like, trainable
from u2a.workspace import Workspace, quiet

ALONE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
CANARY = "The answer ends here"


class Subject:
    """The model of a configuration, or one by name with a LoRA of rank 8 on all linears."""

    def __init__(self, cfg: Config | None, name: str | None, revision: str | None) -> None:
        quiet()
        self.cfg = cfg
        self.name = cfg.model.name if cfg else str(name)
        self.options: dict[str, Any] = {
            "revision": cfg.model.revision if cfg else revision,
            "trust_remote_code": bool(cfg and cfg.model.trust_remote_code),
        }
        self.folder = tempfile.TemporaryDirectory(prefix="u2a-doctor-")
        self.work = Workspace(cfg, Path(self.folder.name)) if cfg else None

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.name, **self.options)

    def adapted(self, base: nn.Module) -> nn.Module:
        """The adapter of the configuration on another base, its B no longer 0."""
        from peft import LoraConfig, get_peft_model

        r, targets = 8, "all-linear"
        if self.cfg:
            r = self.cfg.lora.r
            named = self.cfg.lora.targets
            targets = named if named == "all-linear" else list(named)  # type: ignore[assignment]
        options = LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM")
        return filled(get_peft_model(base, options).eval())  # type: ignore[arg-type]

    @cached_property
    def model(self) -> nn.Module:
        if self.work is not None:
            return filled(self.work.model)
        from transformers import AutoModelForCausalLM

        base: Any = AutoModelForCausalLM.from_pretrained(
            self.name, use_safetensors=True, dtype="auto", **self.options
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return self.adapted(base.to(device))


def filled(model: nn.Module) -> nn.Module:
    """Random B factors: with B = 0 most of the second derivative is not there to be seen."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def layers(subject: Subject) -> Iterator[Check]:
    model = build(subject.config)
    kinds = subject.config.model_type
    for what, value in compare(model).items():
        yield measured(f"{kinds} layer: {what}", value, LIMIT)
    for what, value in compare(subject.adapted(model).double()).items():
        yield measured(f"{kinds} layer, LoRA: {what}", value, LIMIT)


def gauges(subject: Subject) -> Iterator[Check]:
    model = subject.model
    batch = real_batch(subject)
    limit = limit_of(trainable(model))
    for kind in (GaussNewton, Hessian):
        value = symmetry(kind(model, batch, loss), raises=False)
        yield measured(f"model: symmetry of {kind.__name__}", value, limit, "gauge")


def real_batch(subject: Subject) -> Batch:
    """Rows of the data, or random ones; of different lengths."""
    if subject.work is not None:
        rows = sorted(subject.work.data.forget[:64], key=len)
        return collate([rows[0], rows[len(rows) // 2], rows[-1]] if len(rows) > 2 else rows)
    return batch_of(subject.config.vocab_size, ((4, 12), (2, 3), (6, 7)))


def independence(subject: Subject) -> Iterator[Check]:
    """Row alone, in its batch, and with more padding."""
    model, batch = subject.model, real_batch(subject)
    v = signs_like(trainable(model), torch.Generator().manual_seed(3))
    together = jvp_scores(model, batch, loss, v)
    alone = [jvp_scores(model, _row(batch, i), loss, v)[0] for i in range(len(batch))]
    pad = torch.zeros(len(batch), 5, dtype=torch.int64, device=batch.ids.device)
    wider = Batch(
        torch.cat([batch.ids, pad], 1), torch.cat([batch.answer, pad.bool()], 1), batch.length,
        batch.index,
    )  # fmt: skip
    padded = jvp_scores(model, wider, loss, v)
    limit = max(ALONE.get(p.dtype, 1e-4) for p in model.parameters())
    for name, other in (("alone", torch.stack(alone)), ("with more padding", padded)):
        gap = ((other - together).abs().max() / together.abs().max()).item()
        yield measured(f"model: rows {name}", gap, limit)


def _row(batch: Batch, i: int) -> Batch:
    n = int(batch.length[i])
    at = slice(i, i + 1)
    return Batch(batch.ids[at, :n], batch.answer[at, :n], batch.length[at], batch.index[at] * 0)


def data(subject: Subject) -> Iterator[Check]:
    from u2a.encode import Encoder

    work, cfg = subject.work, subject.cfg
    assert work is not None and cfg is not None
    found = work.data
    sizes = ", ".join(f"{n} {s['rows']}" for n, s in found.stats.items() if "rows" in s)
    yield passed("data: read and disjoint", True, sizes, DataError.exit_code)
    tokenizer = work.tokenizer
    prompt, (answer,) = Encoder(tokenizer, cfg.data.max_tokens, "plain").encode("x", (CANARY,))
    eos = tokenizer.eos_token_id
    yield passed(
        "data: an answer's end is learnt", answer[-1] == eos and answer.count(eos) == 1,
        f"last token {answer[-1]}, eos {eos}, pad {tokenizer.pad_token_id}", DataError.exit_code,
    )  # fmt: skip
    rows = found.forget + found.retain
    empty = sum(not r.answer_ids for r in rows)
    yield passed(
        "data: every row has answer tokens", not empty, f"{empty} of {len(rows)} without",
        DataError.exit_code,
    )  # fmt: skip
    biggest = max((max(r.prompt_ids + r.answer_ids) for r in rows), default=0)
    vocab = subject.config.vocab_size
    yield passed(
        "data: token ids fit the model", biggest < vocab, f"largest {biggest}, vocabulary {vocab}",
        DataError.exit_code,
    )  # fmt: skip


def examine(cfg: Config | None, name: str | None, revision: str | None = None) -> list[Check]:
    subject = Subject(cfg, name, revision)
    found = guarded("layer", ConfigError.exit_code, partial(layers, subject))
    if cfg is not None:
        found += guarded("data", DataError.exit_code, partial(data, subject))
    if subject.work is None and not _weights(subject.name):
        note = "no .safetensors weights there"
        return [*found, Check("model", "skip", note)]
    for name_, check in (("model: symmetry", gauges), ("model: rows", independence)):
        found += guarded(name_, GuardError.exit_code, partial(check, subject))
    return found


def _weights(name: str) -> bool:
    """A hub id is taken to have weights."""
    folder = Path(name)
    return not folder.is_dir() or any(folder.glob("*.safetensors"))
