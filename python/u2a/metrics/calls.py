"""Functions of the user, named on the command line as module:function."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from u2a.errors import ConfigError
from u2a.metrics.suites.subject import Judges


def named(option: str, text: str | None) -> Any:
    """The function, None for None; modules are also looked for in the working directory.

    Raises ConfigError for another form, a module or name that is not there.
    """
    if text is None:
        return None
    module, _, name = text.partition(":")
    if not (module and name):
        raise ConfigError(f"{option} {text}: wanted module:function", "command line")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as e:
        raise ConfigError(f"{option} {text}: {e}", "command line") from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ConfigError(f"{option} {text}: {module} has no function {name}", "command line")
    return found


def judges(**given: str | None) -> Judges:
    """By the names of the fields, which are those of the options."""
    return Judges(**{field: named(f"--{field}", text) for field, text in given.items()})
