"""kronfluence's EK-FAC of the curvature that `u2a.curvature.EKFAC` approximates, by its own fit and
its own preconditioning. Its modules are wrapped in a copy of the model."""

from __future__ import annotations

import copy
import tempfile
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from u2a.batch import AnswerLogps
from u2a.curvature.model import ModelCurvature
from u2a.products import answer_logps
from u2a.tree import Tree

INSTALLED = find_spec("kronfluence") is not None


def coefficients(op: ModelCurvature) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ids `[T]`, length, c `[T]`) of each row; c_t = |d sum_i w_i l_i / d logp_t|, 0 elsewhere."""
    found = []
    for batch in op._batches:
        lp = answer_logps(op.model, batch)
        leaf = lp.logp.detach().requires_grad_()
        each = op.loss(AnswerLogps(leaf, lp.row, lp.count, index=lp.index))
        w = 1 / op.rows if op.weights is None else op.weights[batch.index].to(each)
        (first,) = torch.autograd.grad((w * each).sum(), leaf)
        c = first.new_zeros(batch.ids.shape)
        c[batch.answer] = first.abs()
        found += list(zip(batch.ids, batch.length, c, strict=True))
    return found


def dataset(op: ModelCurvature, draws: int) -> list[dict[str, Tensor]]:
    """Rows padded to the longest, each `draws` times."""
    rows = coefficients(op)
    width = int(max(length for _, length, _ in rows))
    items = []
    for ids, length, c in rows:
        ids, c = (F.pad(x, (0, max(0, width - len(x))))[:width] for x in (ids, c))
        items.append({"ids": ids, "c": c, "mask": (torch.arange(width) < length).long()})
    return items * draws


def _task(modules: list[str], rows: int) -> Any:
    from kronfluence.task import Task

    class Tokens(Task):
        """A row's loss is sum_t sqrt(rows c_t) nll of a drawn token: the mean over rows of squared
        gradients is then the Gauss-Newton matrix of sum_i w_i l_i, in expectation."""

        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            z = model(input_ids=batch["ids"]).logits[:, :-1]
            if not sample:
                raise NotImplementedError("only the true Fisher is asked for")
            y = torch.distributions.Categorical(logits=z.detach()).sample()
            each = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
            return (each * (rows * batch["c"][:, 1:]).sqrt().flatten()).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            raise NotImplementedError("factors alone are used")

        def get_influence_tracked_modules(self) -> list[str]:
            return modules

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch["mask"]

    return Tokens()


class Ekfac:
    """Factors fitted once; `inverse(gradient, damping)` as `u2a.curvature.EKFAC` has it."""

    def __init__(self, op: ModelCurvature, draws: int, batch: int = 16) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments

        modules = [n.removesuffix(".weight") for n in op.like]
        task = _task(modules, op.rows)
        model = prepare_model(copy.deepcopy(op.model), task)
        wide = torch.float64
        arguments = FactorArguments(
            strategy="ekfac", activation_covariance_dtype=wide, gradient_covariance_dtype=wide,
            per_sample_gradient_dtype=wide, lambda_dtype=wide,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "ekfac", model, task, cpu=True, disable_tqdm=True, output_dir=folder,
                log_level=40,
            )  # fmt: skip
            analyzer.fit_all_factors(
                "ekfac", dataset(op, draws), per_device_batch_size=batch, factor_args=arguments
            )
            self.factors = {
                **analyzer.load_eigendecomposition("ekfac"),
                **analyzer.load_lambda_matrices("ekfac"),
            }

    def inverse(self, gradient: Tree, damping: float) -> Tree:
        from kronfluence.arguments import ScoreArguments
        from kronfluence.factor.config import FactorConfig

        config, out = FactorConfig.CONFIGS["ekfac"], {}
        arguments = ScoreArguments(damping_factor=damping, precondition_dtype=torch.float64)
        for name, g in gradient.items():
            module = name.removesuffix(".weight")
            storage = {kind: held.get(module) for kind, held in self.factors.items()}
            storage = {k: v.clone() if v is not None else None for k, v in storage.items()}
            config.prepare(storage, arguments, g.device)
            out[name] = config.precondition_gradient(g.clone(), storage)
        return out
