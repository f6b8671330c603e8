# SPDX-License-Identifier: Apache-2.0
"""Python objects that users name as `pkg.mod:name`."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from onnxcollapse.errors import DataError

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_object(spec: str) -> bool:
    """Whether a text has the form `pkg.mod:name`."""
    return _NAME.fullmatch(spec) is not None


def load_object(spec: str) -> Any:
    """The object of that name, its module imported as `python -m` would, the current folder first.

    Raises:
        DataError: There is no such module or name, or importing it fails.
    """
    module, _, attribute = spec.partition(":")
    found: Any = _import(module, spec)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise DataError(f"{spec}: module {module!r} has no {part!r}; correct the name")
        found = getattr(found, part)
    return found


def call_object(found: Any, spec: str) -> Any:
    """What a class or function of the user makes.

    Raises:
        DataError: It fails.
    """
    try:
        return found()
    except (Exception, SystemExit) as error:  # the user's code: anything may come
        raise DataError(
            f"{spec}: calling it fails with {type(error).__name__}: {error}; correct it"
        ) from error


def _import(module: str, spec: str) -> ModuleType:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # the user's code: anything may come
        raise DataError(f"{spec}: importing {module!r} fails with {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
