"""YAML 1.2, strictly: what PyYAML's SafeLoader would let through silently is a fault.

Refused with the line: duplicate keys, tags other than the JSON types, more than 20 aliases, several
documents. `no`, `off`, `12:30:00` and dates stay strings; `1e-5` is a float; `010` is ten.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_ALIASES = 20
MAX_DEPTH = 50
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + t for t in ("null", "bool", "int", "float", "str", "seq", "map")}
_SCALARS = [
    ("null", r"null|Null|NULL|~|", "nN~\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    aliases = 0
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        self.aliases += self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.aliases > MAX_ALIASES or self.depth > MAX_DEPTH:
            what = f"{MAX_ALIASES} aliases" if self.aliases > MAX_ALIASES else f"{MAX_DEPTH} levels"
            raise yaml.composer.ComposerError(None, None, f"more than {what}", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


for _name, _pattern, _first in _SCALARS:
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(
            _TAG + _name, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )
_Loader.add_constructor(_TAG + "int", _int)


def parse(text: str) -> tuple[Any, list[str]]:
    """`text` -> (data, faults). A fault begins "line L: "; data is None if unreadable."""
    if len(text) > MAX_BYTES:
        return None, [f"line 1: {len(text)} characters, wanted at most {MAX_BYTES}"]
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        faults: list[str] = []
        _check(node, "", faults, set())
        if any("tag" in f for f in faults):
            return None, faults
        data = None if node is None else loader.construct_document(node)
        return data, faults
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        return None, [f"line {line}: {' '.join(filter(None, (e.context, e.problem)))}"]
    except (yaml.YAMLError, ValueError) as e:
        return None, [f"line 1: {e}"]
    finally:
        loader.dispose()


def _check(node: yaml.Node | None, path: str, faults: list[str], seen: set[int]) -> None:
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    line = node.start_mark.line + 1
    if node.tag not in _PLAIN:
        faults.append(f"line {line}: {path or 'top'}: tag {node.tag!r} refused, wanted plain YAML")
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _check(item, f"{path}[{i}]", faults, seen)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            at = key.start_mark.line + 1
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            here = f"{path}.{name}" if path else name
            if not isinstance(key, yaml.ScalarNode):
                faults.append(f"line {at}: {here}: key is a tag of its own, wanted a plain word")
            elif name in first:
                faults.append(f"line {at}: {here}: duplicate key, first on line {first[name]}")
            first.setdefault(name, at)
            _check(value, here, faults, seen)


def dump(data: Any) -> str:
    """Plain block YAML that `parse` reads back to equal data."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
