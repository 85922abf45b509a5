"""Mutation check: break one term of a formula at a time and ask the tests whether they notice.

A mutant is a function with one change in its syntax tree: a flipped sign, a missing addend or
factor, another constant or comparison, swapped halves. It takes the place of the original in
memory by its code object, so everybody who holds the function runs the mutant.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

FLIP = {ast.Add: ast.Sub, ast.Sub: ast.Add}
COMPARE = {
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip
TERMS = {  # methods that add or multiply a term onto their receiver
    "add", "sub", "mul", "div", "addcmul", "addmm", "baddbmm", "neg", "exp", "log", "masked_fill",
    "scatter_add", "index_add",
}  # fmt: skip
SKIPPED = (ast.Raise, ast.Assert, ast.JoinedStr)
PLACEHOLDERS = ("new_empty",)  # a shape, which opcheck compares with the fake's


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _swap(items: list[ast.expr]) -> list[ast.expr]:
    return [items[1], items[0], *items[2:]]


def _with(node: Any, **fields: Any) -> Any:
    found = copy.copy(node)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """Every way to break this one node."""
    match node:
        case ast.BinOp(left, op, right):
            if type(op) in FLIP:
                yield _with(node, op=FLIP[type(op)]())
            if isinstance(op, (ast.Add, ast.Sub, ast.Mult)):
                yield right
            if isinstance(op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)):
                yield left
        case ast.AugAssign(_, op):
            yield ast.Pass()
            if type(op) in FLIP:
                yield _with(node, op=FLIP[type(op)]())
        case ast.UnaryOp(ast.USub(), operand):
            yield operand
        case ast.Constant(value) if type(value) is int:
            yield ast.Constant(value + 1)
        case ast.Constant(value) if type(value) is float:
            yield ast.Constant(1.5 * value or 1.0)
        case ast.Compare(_, [op]) if type(op) in COMPARE:
            yield _with(node, ops=[COMPARE[type(op)]()])
        case ast.Call(ast.Attribute(receiver, attr)) if attr.rstrip("_") in TERMS:
            yield receiver
        case ast.Call(args=[ast.List(elts=[_, _]) as pair]) if _name(node) == "cat":
            yield _with(node, args=[_with(pair, elts=_swap(pair.elts)), *node.args[1:]])
        case ast.Call(args=[_, _, *_]) if _name(node) == "join":
            yield _with(node, args=_swap(node.args))
        case ast.Assign([ast.Tuple(elts=[_, _]) as pair], ast.Call() as call):
            if _name(call) in ("halves", "chunk"):
                yield _with(node, targets=[_with(pair, elts=_swap(pair.elts))])
    if isinstance(node, ast.Call) and any(k.arg == "alpha" for k in node.keywords):
        yield _with(node, keywords=[k for k in node.keywords if k.arg != "alpha"])


def _sites(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body that compute something."""
    if isinstance(node, SKIPPED) or isinstance(node, ast.Call) and _name(node) in PLACEHOLDERS:
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "args") and not isinstance(node, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _sites(child)


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, by: ast.AST) -> None:
        self.target, self.by = target, by

    def visit(self, node: ast.AST) -> Any:
        return self.by if node is self.target else self.generic_visit(copy.copy(node))

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                setattr(node, name, [self._any(x) for x in value])
            else:
                setattr(node, name, self._any(value))
        return node

    def _any(self, value: Any) -> Any:
        return self.visit(value) if isinstance(value, ast.AST) else value


def _code(tree: ast.Module, function: FunctionType) -> CodeType:
    flags = function.__code__.co_flags & 0x1000000  # annotations stay strings
    path = function.__code__.co_filename
    compiled = compile(ast.fix_missing_locations(tree), path, "exec", flags, dont_inherit=True)
    return next(c for c in compiled.co_consts if isinstance(c, CodeType))


def _difference(tree: ast.Module, changed: ast.Module) -> str | None:
    """The first line that changed, before and after."""
    pairs = zip(*(ast.unparse(t).splitlines() for t in (tree, changed)), strict=False)
    return next((f"{a.strip()} -> {b.strip()}" for a, b in pairs if a != b), None)


def mutants(function: FunctionType) -> Iterator[tuple[str, CodeType]]:
    """(what was changed, code of the changed function), always in the same order."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition: Any = tree.body[0]
    definition.decorator_list = []
    where = f"{function.__module__}.{function.__qualname__}"
    for statement in definition.body:
        for node in _sites(statement):
            for change in _changes(node):
                changed = _Replace(node, change).visit(tree)
                if (difference := _difference(tree, changed)) is not None:
                    yield f"{where}: {difference}", _code(changed, function)


def reached(
    *roots: Any, home: str | tuple[str, ...], skip: tuple[str, ...] = ()
) -> list[FunctionType]:
    """`roots` and the functions they use, by name, from modules whose name starts with `home`."""
    found: list[FunctionType] = []
    waiting = [getattr(r, "func", r) if isinstance(r, partial) else r for r in roots]
    while waiting:
        f = inspect.unwrap(waiting.pop(0))
        known = f in found or f.__name__ in skip
        if known or not isinstance(f, FunctionType) or not f.__module__.startswith(home):
            continue
        found.append(f)
        codes = [f.__code__]
        for code in codes:
            codes += [c for c in code.co_consts if isinstance(c, CodeType)]
        names = dict.fromkeys(n for code in codes for n in code.co_names)
        waiting += [g for n in names if isinstance(g := f.__globals__.get(n), FunctionType)]
    return found


def methods(module: ModuleType) -> list[FunctionType]:
    """The functions of a module and of its classes, those apart that build instances or hold
    variables of a function around them."""
    own = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
    for cls in [x for x in own if isinstance(x, type)]:
        for x in vars(cls).values():
            own.append(x.fget if isinstance(x, property) else getattr(x, "__func__", x))
    return [
        f
        for f in own
        if isinstance(f, FunctionType)
        and f.__module__ == module.__name__
        and f.__code__.co_filename == module.__file__
        and f.__name__ != "__init__"
        and not f.__code__.co_freevars
    ]


@contextmanager
def instead(function: FunctionType, code: CodeType) -> Iterator[None]:
    original = function.__code__
    function.__code__ = code
    try:
        yield
    finally:
        function.__code__ = original


def noticed(checks: list[Callable[[], None]]) -> bool:
    """A check fails, or the mutant cannot even run."""
    try:
        for check in checks:
            check()
    except Exception:
        return True
    return False


def survivors(
    functions: list[FunctionType],
    checks: list[Callable[[], None]],
    same: tuple[str, ...] = (),
) -> list[str]:
    """Mutants of `functions` that no check notices, those left out whose label ends as one of
    `same` says; the originals must pass every check."""
    assert functions
    assert not noticed(checks), "a check fails without any mutation"
    found = []
    for function in functions:
        for label, code in mutants(function):
            if label.endswith(same):
                continue
            with instead(function, code):
                if not noticed(checks):
                    found.append(label)
    return found


@contextmanager
def served_by(references: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Plain-torch references own the CPU while open, also where a C++ kernel is built."""
    library = torch.library.Library("u2a", "IMPL")
    for name, reference in references.items():
        library.impl(name, reference, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
