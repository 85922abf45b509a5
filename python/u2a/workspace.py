"""From a configuration to the objects of a run: model, adapter, data, inner and outer problem."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from u2a.adapter import snapshot
from u2a.batch import Pair
from u2a.config import Config
from u2a.data import Prepared, prepare
from u2a.errors import DataError
from u2a.generate import Sampling
from u2a.inner import InnerProblem, inner_solve, sub_optimality
from u2a.losses import get_loss
from u2a.objective_names import DRAWN
from u2a.objectives import Likelihood, Margin, Objective, PairSet, Preference
from u2a.outer import Outer, SolveSettings
from u2a.rewards import Reward, ToTarget, load_reward
from u2a.rundir import file_hash
from u2a.trainer import U2AConfig, U2ATrainer


def model_digest(name: str, revision: str | None) -> str:
    """Content hash of a local model's weights and configuration; a hub id with its revision."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision or 'main'}"
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    if not any(f.suffix == ".safetensors" for f in files):
        raise DataError(f"{folder}: no .safetensors weights (pickle formats are not read)")
    return ",".join(f"{f.name}:{file_hash(f)}" for f in files)


def quiet() -> None:
    """One line a stage is enough: no bars for loading a file, no warnings meant for developers."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


class _Events(TrainerCallback):
    """Passes the trainer's log lines on to the run's events."""

    def __init__(self, report: Callable[..., None] | None) -> None:
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.report is not None and logs:
            self.report("train", {"step": state.global_step, **logs})


class Workspace:
    """Everything heavy, made when first asked for. `folder` holds trainer output."""

    def __init__(
        self, cfg: Config, folder: Path, report: Callable[..., None] | None = None
    ) -> None:
        self.cfg, self.folder, self.report = cfg, folder, report
        quiet()
        if cfg.run.threads:
            torch.set_num_threads(cfg.run.threads)
        torch.use_deterministic_algorithms(cfg.run.deterministic, warn_only=True)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        m = self.cfg.model
        return AutoTokenizer.from_pretrained(
            m.name, revision=m.revision, trust_remote_code=m.trust_remote_code
        )

    @cached_property
    def data(self) -> Prepared:
        return prepare(self.cfg, self.tokenizer)

    @cached_property
    def model(self) -> nn.Module:
        """The base model with a fresh adapter, in eval mode (adapter dropout is 0)."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        m, lora = self.cfg.model, self.cfg.lora
        base = AutoModelForCausalLM.from_pretrained(
            m.name,
            revision=m.revision,
            dtype=getattr(torch, m.dtype),
            trust_remote_code=m.trust_remote_code,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
        base.config.use_cache = False
        torch.manual_seed(self.cfg.run.seed)
        targets = lora.targets if lora.targets == "all-linear" else list(lora.targets)
        model = get_peft_model(
            base,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                target_modules=targets,
                lora_dropout=0.0,
                task_type="CAUSAL_LM",
            ),
        )
        if lora.train == "b":
            for name, p in model.named_parameters():
                p.requires_grad_(p.requires_grad and "lora_B" in name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(device).eval()
        self.fresh = snapshot(model)
        return model

    @cached_property
    def problem(self) -> InnerProblem:
        """The inner problem, all weights 0; theta_0 is the fresh adapter, whatever is loaded."""
        u, n, model = self.cfg.unlearn, len(self.data.forget), self.model
        loss = get_loss(u.loss, u.beta, **u.options)
        return InnerProblem.build(
            model,
            self.data.forget,
            torch.zeros(n),
            loss,
            start=self.fresh,
            retain=self.data.retain,
            retain_weight=u.retain_weight,
            anchor=u.anchor,
            partners=self.data.partners,
            batch_tokens=u.batch_tokens,
        )

    @cached_property
    def outer(self) -> Outer:
        s = self.cfg.solve
        _ = self.problem
        return Outer(
            self.model,
            self.problem,
            self.objective(self.data.pa),
            self.objective(self.data.validation),
            SolveSettings(s.method, s.curvature, s.damping, s.precond, s.tol, s.max_iter),
            self.resolve,
            report=self.report,
        )

    def objective(self, pairs: list[Pair]) -> Objective:
        """The configured J on these pairs."""
        o, tokens = self.cfg.objective, self.cfg.unlearn.batch_tokens
        if o.name == "likelihood":
            return Likelihood([p.chosen for p in pairs], tokens)
        if o.name in DRAWN:
            return self._drawn(pairs)
        made = {"dpo": Preference, "margin": Margin}[o.name]
        return made(PairSet.build(self.model, pairs, tokens), o.beta, tokens)

    def _drawn(self, pairs: list[Pair]) -> Objective:
        """J of the model's own answers to the prompts of these pairs."""
        o, tokens = self.cfg.objective, self.cfg.unlearn.batch_tokens
        assert o.reward is not None
        how = Sampling(
            samples=o.samples, max_new_tokens=o.max_new_tokens, seed=self.cfg.run.seed
        )  # fmt: skip
        given = [p.chosen for p in pairs], self.tokenizer, load_reward(o.reward), how, tokens
        if o.name == "reward":
            return Reward(*given)
        return ToTarget(*given, divergence=o.divergence, target=o.target, beta=o.beta)

    def resolve(self, problem: InnerProblem) -> dict[str, Any]:
        """Inner solve between rounds: to the optimum by L-BFGS, or by training. `inner_gradient`,
        the largest slope of F left, says how far from the optimum it ends."""
        u = self.cfg.unlearn
        if u.solver == "lbfgs" or not problem.support:
            result = inner_solve(self.model, problem, u.tol, u.max_iter)
            return {"inner_gradient": result.grad_max, "inner_evaluations": result.evaluations}
        facts = self.unlearn(problem, guard=False)
        return {**facts, "inner_gradient": sub_optimality(self.model, problem)}

    def unlearn(self, problem: InnerProblem, *, guard: bool = True) -> dict[str, Any]:
        """Weighted unlearning from the model's present adapter by U2ATrainer."""
        u, g, cfg = self.cfg.unlearn, self.cfg.guard, self.cfg
        args = U2AConfig(
            output_dir=str(self.folder / "trainer"),
            max_steps=u.steps,
            learning_rate=u.lr,
            per_device_train_batch_size=u.batch_rows,
            retain_batch_size=u.retain_rows,
            batch_tokens=u.batch_tokens,
            harmonise=u.harmonise,
            optim={"adamw": "adamw_torch", "sgd": "sgd"}[u.optimizer],
            weight_decay=0.0,
            max_grad_norm=0.0,
            lr_scheduler_type="cosine",
            logging_steps=max(u.steps // 20, 1),
            disable_tqdm=True,
            report_to=cfg.log.report_to,
            seed=cfg.run.seed,
            use_cpu=not torch.cuda.is_available(),
            guard=guard,
            max_kl=g.max_kl,
            max_retain_ppl_ratio=g.max_retain_ppl_ratio,
            on_trip=g.on_trip,
        )
        trainer = U2ATrainer(self.model, args, problem=problem, callbacks=[_Events(self.report)])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trip = trainer.guard_callback.trip if trainer.guard_callback else None
        self.model.eval()
        return {
            "steps": trainer.state.global_step,
            "objective": problem.value(self.model),
            "guard": f"step {trip.step}: {trip.reason}" if trip else "",
        }

    def save_adapter(self, folder: Path) -> None:
        self.model.save_pretrained(str(folder))  # type: ignore[operator]

    def load_adapter(self, folder: Path) -> None:
        """Puts a saved adapter into the model; every key must match both ways."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        path = folder / "adapter_model.safetensors"
        flags = {n: p.requires_grad for n, p in self.model.named_parameters()}
        result: Any = set_peft_model_state_dict(self.model, load_file(path))
        missing = [k for k in result.missing_keys if "lora_" in k]
        if missing or result.unexpected_keys:
            odd = (missing + list(result.unexpected_keys))[:3]
            raise DataError(f"{path}: adapter and model differ in parameters, e.g. {odd}")
        for n, p in self.model.named_parameters():
            p.requires_grad_(flags[n])
