"""What is wrong with a configuration, one line each: path, value, wanted, nearest name."""

from __future__ import annotations

import difflib
import reprlib
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from u2a import strict_yaml

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
REFUSED_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".py", ".joblib")


def is_file(name: str, found: Path, folder_only: bool = False) -> bool:
    """Whether `name` means a local path; otherwise it is a hub id."""
    if name.startswith((".", "/", "~")) or found.exists():
        return True
    suffixes = () if folder_only else DATA_SUFFIXES + REFUSED_SUFFIXES
    return name.lower().endswith(suffixes) if suffixes else False


def missing_file(where: str, path: Path, why: str = "no such file") -> str:
    """One line for a path that cannot be read, with the nearest name in its folder."""
    try:
        siblings = [p.name for p in path.parent.iterdir()]
    except OSError:
        return f"{where}: {why}, wanted a file; no folder {path.parent}"
    return f"{where}: {why}, wanted a readable file{_nearest(path.name, siblings)}"


def describe(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Every fault of a pydantic error on `root`, in the order of the file's sections."""
    return [_line(e, root) for e in error.errors(include_url=False)]


def _line(error: Any, root: type[BaseModel]) -> str:
    loc, kind, ctx = error["loc"], error["type"], error.get("ctx", {})
    where = ".".join(str(part) for part in loc) or "(top)"
    value = reprlib.repr(error.get("input"))
    if kind == "extra_forbidden":
        names = _keys(_descend(root, loc[:-1]))
        near = _nearest(str(loc[-1]), names)
        return f"{where}: unknown key, wanted one of {', '.join(names)}{near}"
    if kind == "missing":
        return f"{where}: missing, wanted {_kind_of(_descend(root, loc))}"
    if kind == "literal_error":
        options = get_args(_without_none(_annotation(root, loc)))
        words = ", ".join(str(o) for o in options)
        return f"{where}: {value}, wanted one of {words}{_nearest(str(error['input']), options)}"
    wanted = str(ctx["error"]) if "error" in ctx else error["msg"].removeprefix("Input should be ")
    return f"{where}: {value}, wanted {wanted[:1].lower() + wanted[1:]}"


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return f", nearest {close[0]!r}" if close else ""


def _keys(model: Any) -> list[str]:
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return []
    return [f.alias or name for name, f in model.model_fields.items()]


def _kind_of(annotation: Any) -> str:
    keys = _keys(annotation)
    return f"a section ({', '.join(keys)})" if keys else getattr(annotation, "__name__", "a value")


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        rest = [a for a in get_args(annotation) if a is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def _annotation(model: Any, loc: tuple[Any, ...]) -> Any:
    """The annotation at `loc`, None where there is no such field."""
    for part in loc:
        model = _without_none(model)
        fields = model.model_fields if _keys(model) else {}
        named = [f for name, f in fields.items() if (f.alias or name) == part]
        if not named:
            return None
        model = named[0].annotation
    return model


def _descend(model: Any, loc: tuple[Any, ...]) -> Any:
    return _without_none(_annotation(model, loc))


def set_override(data: Any, key: str, text: str, root: type[BaseModel], faults: list[str]) -> None:
    """Puts `text`, read as the type of the field `key`, into nested `data`; faults are appended."""
    parts = tuple(key.split("."))
    annotation = _annotation(root, parts)
    plain = _without_none(annotation)
    options = get_args(plain) if get_origin(plain) is Literal else ()
    wants_text = plain is str or any(isinstance(o, str) for o in options)
    value: Any = text
    if not wants_text or (plain is not annotation and text in ("null", "~", "")):
        value, problems = strict_yaml.parse(text)
        if problems:
            faults.extend(f"--set {key}={text}: {p}" for p in problems)
            return
    for part in parts[:-1]:
        child = data.get(part)
        if child is not None and not isinstance(child, dict):
            faults.append(f"--set {key}: {part} is not a section")
            return
        data[part] = dict(child or {})
        data = data[part]
    data[parts[-1]] = value
