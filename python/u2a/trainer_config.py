"""The settings of `U2ATrainer`."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from u2a.errors import EnvironmentError_
from u2a.losses import get_loss


@dataclass
class U2AConfig(TrainingArguments):
    """TrainingArguments and the inner problem.

    `per_device_train_batch_size` forget rows per micro-step, with `retain_batch_size` retain rows
    (None: as many); `batch_tokens` cuts either for memory only. `beta` and `retain_weight` None:
    the loss's own. `max_kl` nats per token and `max_retain_ppl_ratio` are the guard's bands, read
    every `guard_every` steps; `guard=False` turns it off. `harmonise`: where the gradients of
    forgetting and of retaining (with the anchor) oppose each other, each loses what opposes the
    other before they are summed (LTU, arXiv 2407.10494; no longer the gradient of F).
    """

    loss: str = "npo"
    beta: float | None = None
    retain_weight: float | None = None
    anchor: float = 0.0
    batch_tokens: int = 8192
    retain_batch_size: int | None = None
    harmonise: bool = False
    guard: bool = True
    guard_every: int = 10
    max_kl: float = 2.0
    max_retain_ppl_ratio: float = 1.3
    on_trip: str = "stop-keep-last-good"
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    save_strategy: str = "no"
    report_to: None | str | list[str] = "none"

    def __post_init__(self) -> None:
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        super().__post_init__()
        get_loss(self.loss, self.beta)
        if self.logging_nan_inf_filter:
            raise ValueError("logging_nan_inf_filter: wanted False (it hides a NaN), got True")
        if self.fp16:
            raise ValueError("fp16: not supported (its scaler skips steps silently); use bf16")


def one_device(args: TrainingArguments) -> None:
    if args.world_size > 1 or args.n_gpu > 1:
        raise EnvironmentError_(
            f"U2ATrainer: wanted one process and one device, got world size {args.world_size} "
            f"and {args.n_gpu} GPUs; set CUDA_VISIBLE_DEVICES to one"
        )
