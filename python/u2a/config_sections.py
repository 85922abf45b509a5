"""Sections of a configuration, frozen and strict; `config_select`, `config_eval` have theirs."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, field_validator
from pydantic import ValidationInfo as Info

from u2a.loss_names import loss_name
from u2a.objective_names import function_name

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


def _damping(value: Any) -> float | str:
    number = value
    kind, _, share = value.partition(":") if isinstance(value, str) else ("", "", "")
    if value == "auto":
        number = 1.0
    elif kind in ("rel", "auto"):
        try:
            number = float(share)
        except ValueError:
            number = None
    if isinstance(number, bool | str) or not isinstance(number, int | float):
        raise ValueError("a number >= 0, 'auto', or 'rel:' and a number, as in 'rel:0.1'")
    if not (math.isfinite(number) and number >= 0):
        raise ValueError("finite and >= 0, absolute or as 'rel:0.1'")
    return value if isinstance(value, str) else float(number)


def _precond(value: Any) -> str:
    kind, _, rank = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind == "nystrom" and rank.isascii() and rank.isdigit() and int(rank) >= 1:
        return str(value)
    if value not in ("none", "jacobi", "kfac", "ekfac"):
        raise ValueError("none, jacobi, kfac, ekfac or 'nystrom:' and a rank, as in 'nystrom:64'")
    return str(value)


def _targets(value: Any) -> str | list[str]:
    names = value if isinstance(value, list) else []
    if value != "all-linear" and not (names and all(isinstance(n, str) and n for n in names)):
        raise ValueError("'all-linear' or a list of module names")
    return value  # type: ignore[no-any-return]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelConfig(Section):
    name: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    trust_remote_code: bool = False

    @field_validator("trust_remote_code")
    @classmethod
    def _pinned(cls, value: bool, info: Info) -> bool:
        if value and not info.data.get("revision"):
            raise ValueError("false, or a pinned model.revision beside it")
        return value


class SourceConfig(Section):
    """One data set: a .jsonl, .json, .csv or .parquet file, or the id of a `datasets` repository.

    `columns` maps our column name to the file's. `prefer` and `pairs` matter for rows with two
    judged responses. `fraction` keeps rows by content hash, then `limit` keeps the first so many.
    """

    path: str = Field(min_length=1)
    split: str = "train"
    revision: str | None = None
    columns: dict[str, str] = {}
    prefer: Literal["safer", "better"] = "safer"
    pairs: Literal["one-safe", "all"] = "all"
    limit: Count | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0


class DataConfig(Section):
    """`holdout`: share of pa that becomes validation, and test, and of retain that becomes
    retain_test (utility is measured there), where no file is given for them. `alternates`: an
    answer to put in place of each forget row's, for losses of pairs."""

    forget: SourceConfig
    pa: SourceConfig
    retain: SourceConfig
    retain_test: SourceConfig | None = None
    validation: SourceConfig | None = None
    test: SourceConfig | None = None
    alternates: SourceConfig | None = None
    holdout: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    max_tokens: Annotated[int, Field(ge=2)] = 1024
    template: Literal["auto", "plain"] = "auto"
    disjoint: Literal["error", "drop", "warn"] = "error"


class LoraConfig(Section):
    r: Count = 16
    alpha: Count = 32
    targets: Annotated[str | list[str], PlainValidator(_targets)] = "all-linear"
    train: Literal["b", "ab"] = "ab"


class ObjectiveConfig(Section):
    """`reward` and `divergence` draw `samples` answers of at most `max_new_tokens` to every prompt
    of the pairs and need `reward`, "module:function" as TRL's. `divergence`: minus that (of
    `u2a.losses.fdpg`) from a `target`, "rlhf" (temperature `beta`) or "binary" (reward > 0)."""

    name: Literal["dpo", "margin", "likelihood", "reward", "divergence"] = "dpo"
    beta: Positive = 0.3
    reward: Annotated[str | None, PlainValidator(function_name)] = None
    samples: Annotated[int, Field(ge=2)] = 4
    max_new_tokens: Count = 64
    divergence: Literal["js", "forward_kl", "reverse_kl", "tv", "chi2_forward", "chi2_reverse"] = (
        "js"
    )
    target: Literal["rlhf", "binary"] = "rlhf"


class SolveConfig(Section):
    """As `u2a.solve`. `curvature` "fisher": of per-example gradients, what "woodbury" and "datainf"
    need."""

    method: Literal[
        "cg", "minres", "neumann", "woodbury", "kfac", "ekfac", "datainf", "diagonal", "identity"
    ] = "cg"
    curvature: Annotated[Literal["ggn", "hessian", "fisher"], Field(validate_default=True)] = "ggn"
    damping: Annotated[float | str, PlainValidator(_damping)] = "rel:0.1"
    precond: Annotated[str, PlainValidator(_precond)] = "none"
    tol: Positive = 1e-4
    max_iter: Count = 50

    @field_validator("curvature")
    @classmethod
    def _has_rows(cls, value: str, info: Info) -> str:
        if info.data.get("method") in ("woodbury", "datainf") and value != "fisher":
            raise ValueError(f"fisher, which solve.method {info.data['method']} needs")
        return value

    @field_validator("precond")
    @classmethod
    def _goes_with(cls, value: str, info: Info) -> str:
        method = info.data.get("method", "cg")
        if value != "none" and method not in ("cg", "minres", "neumann"):
            raise ValueError(f"none beside solve.method {method}")
        return value


class UnlearnConfig(Section):
    """`loss`, `beta` (null: the loss's own) and `options` as in `u2a.losses`; `anchor` is the
    lambda of lambda/2 ||theta - theta_0||^2.

    `solver`: how the inner problem is solved between rounds, exactly by L-BFGS (small models; `tol`
    on the largest gradient entry, `max_iter`) or by `steps` steps of the trainer. The final
    unlearning is the trainer's: `steps` of `batch_rows` forget and `retain_rows` retain rows.
    `harmonise`: its steps, as in `u2a.trainer.U2AConfig`.
    """

    loss: Annotated[str, PlainValidator(loss_name)] = "npo"
    beta: Positive | None = None
    options: dict[str, float] = {}
    retain_weight: NonNegative = 1.0
    harmonise: bool = False
    anchor: NonNegative = 0.0
    lr: Positive = 1e-5
    steps: Count = 100
    batch_tokens: Count = 8192
    batch_rows: Count = 16
    retain_rows: Count = 16
    optimizer: Literal["adamw", "sgd"] = "adamw"
    solver: Literal["lbfgs", "trainer"] = "trainer"
    tol: Positive = 1e-5
    max_iter: Count = 100

    @field_validator("harmonise")
    @classmethod
    def _retains(cls, value: bool, info: Info) -> bool:
        if value and not info.data.get("retain_weight"):
            raise ValueError("false beside unlearn.retain_weight 0")
        return value


class GuardConfig(Section):
    max_kl: Positive = 2.0
    max_retain_ppl_ratio: Annotated[float, Field(gt=1)] = 1.3
    on_trip: Literal["stop-keep-last-good", "fail"] = "stop-keep-last-good"


class ValidateConfig(Section):
    """Predicted against realised gain: `candidates` single-example unlearnings at each weight."""

    candidates: Annotated[int, Field(ge=0)] = 0
    weights: Annotated[list[Positive], Field(min_length=1)] = [0.01]


class LogConfig(Section):
    """`report_to` goes to the trainer; nothing is reported by default."""

    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"


class RunConfig(Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Count | None = None
    deterministic: bool = False
    require_fused: bool = False
