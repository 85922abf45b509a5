"""Files and hub data sets -> (source, columns) rows, with file and line in every fault.

JSONL and CSV are read line by line here, because the usual loaders report neither file nor line and
fill missing keys with None. No loading script and no pickle is ever read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u2a.config_faults import DATA_SUFFIXES, REFUSED_SUFFIXES
from u2a.errors import DataError, EnvironmentError_

if TYPE_CHECKING:
    from u2a.config import SourceConfig

MAX_FAULTS = 10
MAX_FIELD = 1 << 27
SourceRow = tuple[str, dict[str, Any]]


class RowFaults:
    """Collects row errors of one data set; the tenth, or `check`, raises DataError with all."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lines: list[str] = []

    def add(self, source: str, what: str) -> None:
        self.lines.append(f"{source}: {what}")
        if len(self.lines) >= MAX_FAULTS:
            raise DataError(f"{self.path}: the first {MAX_FAULTS} bad rows", self.lines)

    def check(self) -> None:
        if self.lines:
            raise DataError(f"{self.path}: {len(self.lines)} bad rows", self.lines)


def read_rows(spec: SourceConfig, faults: RowFaults) -> Iterator[SourceRow]:
    """Rows of a local file or a `datasets` id. Raises DataError or EnvironmentError_."""
    path = Path(spec.path)
    suffix = path.suffix.lower()
    if suffix in REFUSED_SUFFIXES:
        raise DataError(
            f"{path}: {suffix} refused (it can run code or is not a table), wanted one of "
            f"{', '.join(DATA_SUFFIXES)}: convert it to JSONL or Parquet"
        )
    if not path.is_file():
        return _hub_rows(spec)
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix == ".csv":
        return _csv_rows(path, faults)
    if suffix in DATA_SUFFIXES:
        return _json_rows(path, faults)
    raise DataError(f"{path}: unknown file type, wanted one of {', '.join(DATA_SUFFIXES)}")


def _lines(path: Path, faults: RowFaults) -> Iterator[tuple[int, str, bool]]:
    """(line number, text with its line end, whether the line ends properly) of the good lines."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            where = f"{path}:{number}"
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as e:
                faults.add(f"{where}:{e.start + 1}", f"byte 0x{raw[e.start]:02x} is not UTF-8")
                continue
            if "\0" in text:
                faults.add(f"{where}:{raw.index(0) + 1}", "NUL byte, wanted text")
                continue
            yield number, text, raw.endswith(b"\n")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = sorted({k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i])})
        raise ValueError(f"column given twice: {', '.join(twice)}")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}, wanted finite numbers")


def _json_rows(path: Path, faults: RowFaults) -> Iterator[SourceRow]:
    for number, text, ended in _lines(path, faults):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except json.JSONDecodeError as e:
            if ended:
                faults.add(f"{where}:{e.colno}", f"not JSON: {e.msg}")
            else:
                faults.add(where, "truncated last line: no line end and not complete JSON")
        except (ValueError, RecursionError) as e:
            faults.add(where, "nested too deeply" if isinstance(e, RecursionError) else str(e))
        else:
            if isinstance(row, dict):
                yield where, row
            else:
                faults.add(where, f"{type(row).__name__}, wanted one JSON object a line")


def _csv_rows(path: Path, faults: RowFaults) -> Iterator[SourceRow]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD))
    reader = csv.DictReader((text for _, text, _ in _lines(path, faults)), strict=True)
    line = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as e:
            faults.add(f"{path}:{reader.line_num}", f"not CSV: {e}")
            return
        if row is None:
            return
        where, line = f"{path}:{max(line + 1, 2)}", reader.line_num
        if None in row or None in row.values():
            faults.add(where, f"wanted {len(reader.fieldnames or ())} fields as in the header")
        else:
            yield where, {k: _csv_value(v) for k, v in row.items()}


def _csv_value(text: str) -> Any:
    """CSV has no types: the words true and false become booleans, small whole numbers ints."""
    word = text.strip().lower()
    if word in ("true", "false"):
        return word == "true"
    return int(word) if word in ("0", "1") else text


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as e:
        raise DataError(f"{path}: not readable as Parquet after row {number}: {e}") from None


def _hub_rows(spec: SourceConfig) -> Iterator[SourceRow]:
    import datasets

    name = f"{spec.path}[{spec.split}]"
    try:
        data = datasets.load_dataset(spec.path, split=spec.split, revision=spec.revision)
    except (ConnectionError, TimeoutError) as e:
        raise EnvironmentError_(f"{name}: the hub cannot be reached: {e}") from None
    except (RuntimeError, ValueError, OSError, StopIteration) as e:
        what = f"{type(e).__name__}: {e}"
        if "script" in str(e).lower():
            what = f"data set scripts are refused, wanted Parquet, JSONL or CSV files ({e})"
        raise DataError(f"{name}: cannot be loaded: {what}") from None
    for number, row in enumerate(data, 1):
        yield f"{name}:{number}", dict(row)
