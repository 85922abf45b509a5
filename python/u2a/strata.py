"""Which forget and retain rows a training step sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class Strata(Sampler[list[int]]):
    """Micro-steps of row numbers: forget rows 0..n_f-1 once per epoch, retain rows n_f.. cycling.

    The order is a function of (seed, epoch) alone, so a resumed run sees the same batches.
    """

    def __init__(self, sizes: tuple[int, int], batch: tuple[int, int], seed: int) -> None:
        self.n_f, self.n_r = sizes
        self.b_f, self.b_r = min(batch[0], self.n_f), min(batch[1], self.n_r)
        self.seed = seed
        self.epoch: Callable[[], int] = lambda: 0

    def __len__(self) -> int:
        return -(-self.n_f // self.b_f)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch())
        forget = torch.randperm(self.n_f, generator=generator).tolist()
        retain: list[int] = []
        for k in range(0, self.n_f, self.b_f):
            while len(retain) < self.b_r:
                retain += torch.randperm(self.n_r, generator=generator).tolist()
            taken, retain = retain[: self.b_r], retain[self.b_r :]
            yield forget[k : k + self.b_f] + [self.n_f + i for i in taken]
