"""Reading an index: scores and top rows for query features, streamed in blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from u2a.errors import CorruptError, DataError
from u2a.index.spec import Spec, spec_of
from u2a.index.store import NOT_FINITE, SCHEMA, made_with, shard_name
from u2a.rundir import RunDir

Metric = Literal["dot", "cosine", "preconditioned"]
METRICS = ("dot", "cosine", "preconditioned")


class Index:
    """Features of a data set, row by row in its order; opened, verified and never written.

    `dim` features a row, made by `spec` over the parameters of `layout`; `norm [n]` their lengths,
    `flag [n]` (1 written, 2 not finite, 4 no answer token), `uid` 32 hex digits a row. Features
    stay on disk and are read in blocks.
    """

    def __init__(self, path: str | Path, *, block_rows: int = 8192) -> None:
        """Raises DataError where there is no finished index, CorruptError when a shard differs from
        its marker."""
        self.folder = RunDir(path)
        self.folder.path = self.folder.path.resolve()
        self.block_rows = block_rows
        meta = self._meta()
        self.dim: int = meta["dim"]
        self.spec: Spec = spec_of(meta["spec"])
        self.layout: dict[str, tuple[int, int]] = {k: tuple(v) for k, v in meta["layout"].items()}
        self._files: list[Path] = []
        norms, flags, uids, start = [], [], [], 0
        for number, stop in enumerate(meta["stops"]):
            with self._open(number, made_with(start, stop, self.dim, meta["dtype"])) as f:
                norms.append(f.get_tensor("norm"))
                flags.append(f.get_tensor("flag"))
                uids += [bytes(u).hex() for u in f.get_tensor("uid").tolist()]
            start = stop
        if start != meta["rows"]:
            want = meta["rows"]
            raise CorruptError(f"{self.folder.path}: {start} rows in shards, {want} in meta.json")
        self.norm, self.flag, self.uid = torch.cat(norms), torch.cat(flags), uids

    def _meta(self) -> dict[str, Any]:
        path = self.folder.path / "meta.json"
        try:
            meta = json.loads(path.read_text())
        except FileNotFoundError:
            raise DataError(f"{self.folder.path}: no finished index (no meta.json)") from None
        except ValueError as e:
            raise CorruptError(f"{path}: not JSON: {e}") from None
        if meta.get("schema") != SCHEMA:
            raise DataError(f"{path}: schema {meta.get('schema')}, this u2a reads {SCHEMA}")
        return meta

    def _open(self, number: int, made: dict[str, Any]) -> Any:
        name = shard_name(number)
        if not self.folder.is_done(name, made):
            raise CorruptError(f"{self.folder.path}: {name} is missing or unfinished; scan again")
        path = self.folder.file(f"{name}.safetensors")
        self._files.append(path)
        return safe_open(path, "pt")

    def __len__(self) -> int:
        return self.norm.shape[0]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their unit-length features in float32), in order."""
        start = 0
        for path in self._files:
            with safe_open(path, "pt") as f:
                g = f.get_slice("g")
                rows = g.get_shape()[0]
                for at in range(0, rows, self.block_rows):
                    block = g[at : min(at + self.block_rows, rows)].float()
                    yield slice(start + at, start + at + len(block)), block
                start += rows

    def features(self, rows: Tensor | None = None) -> Tensor:
        """Features `[n, dim]` float32 at their own length, of all rows or of the rows given."""
        found = torch.cat([block for _, block in self.blocks()]) * self.norm[:, None]
        return found if rows is None else found[rows]

    def second_moment(self) -> Tensor:
        """F^T F / n over the finite rows, `[dim, dim]` float64: the joint empirical Fisher."""
        total = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        good = (self.flag & NOT_FINITE) == 0
        for rows, block in self.blocks():
            scaled = block.double() * (self.norm[rows].double() * good[rows])[:, None].nan_to_num(0)
            total.addmm_(scaled.T, scaled)
        return total / max(1, int(good.sum()))

    def precondition(self, q: Tensor, damping: float | str = "rel:0.1") -> Tensor:
        """(F^T F / n + lambda I)^-1 q for q `[dim]` or `[Q, dim]`, in float64.

        `damping`: lambda, or "rel:r" for r times the mean of the min(n, dim) eigenvalues of
        F^T F / n that n rows can make different from 0.
        """
        moment, good = self.second_moment(), int(((self.flag & NOT_FINITE) == 0).sum())
        if isinstance(damping, str):
            if not damping.startswith("rel:"):
                raise ValueError(f"damping must be a number or 'rel:' and one, got {damping!r}")
            damping = float(damping[4:]) * float(moment.trace()) / min(self.dim, max(1, good))
        if not damping > 0:
            raise ValueError(f"damping must be above 0, got {damping}")
        moment.diagonal().add_(damping)
        factor = torch.linalg.cholesky(moment)
        solved = torch.cholesky_solve(self._queries(q).double().T, factor).T
        return solved if q.ndim == 2 else solved[0]

    def _queries(self, q: Tensor) -> Tensor:
        rows = q if q.ndim == 2 else q[None]
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(
                f"q must be [dim] or [Q, dim] with dim = {self.dim}, got {list(q.shape)}"
            )
        return rows.detach().cpu()

    def _scored(
        self, q: Tensor, metric: Metric, damping: float | str
    ) -> Iterator[tuple[slice, Tensor]]:
        """(rows, scores `[rows, Q]`), NaN for rows that are not finite."""
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        queries = self._queries(q).float()
        if metric == "preconditioned":
            queries = self.precondition(queries, damping).float()
        if metric == "cosine":
            queries = torch.nn.functional.normalize(queries, dim=1)
        bad = (self.flag & NOT_FINITE) != 0
        for rows, block in self.blocks():
            scores = block @ queries.T
            if metric != "cosine":
                scores *= self.norm[rows, None]
            yield rows, scores.masked_fill(bad[rows, None], torch.nan)

    def scores(
        self, q: Tensor, metric: Metric = "dot", *, damping: float | str = "rel:0.1"
    ) -> Tensor:
        """Scores of all rows, `[n]` or `[n, Q]` float32; NaN for rows that are not finite.

        Args:
            q: `[dim]` or `[Q, dim]` query features of the same spec and parameters.
            metric: "dot" <f_i, q>, "cosine", or "preconditioned" <f_i, A^-1 q> with
                A = F^T F / n + lambda I, the joint damped inverse in feature space.
            damping: see `precondition`.
        """
        found = torch.cat([s for _, s in self._scored(q, metric, damping)])
        return found if q.ndim == 2 else found[:, 0]

    def topk(
        self, q: Tensor, k: int, metric: Metric = "dot", *, damping: float | str = "rel:0.1"
    ) -> tuple[Tensor, Tensor]:
        """(scores, row numbers) of the k best rows, `[k]` or `[Q, k]`, best first; equal scores in
        the order of the rows. Holds one block and k rows per query at a time."""
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be from 1 to n = {len(self)}, got {k}")
        best = rows_of = None
        for rows, scores in self._scored(q, metric, damping):
            value = scores.T.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            at = torch.arange(rows.start, rows.stop).expand_as(value)
            if best is not None and rows_of is not None:
                value, at = torch.cat([best, value], 1), torch.cat([rows_of, at], 1)
            order = value.argsort(dim=1, descending=True, stable=True)[:, :k]
            best, rows_of = value.gather(1, order), at.gather(1, order)
        assert best is not None and rows_of is not None
        return (best, rows_of) if q.ndim == 2 else (best[0], rows_of[0])
