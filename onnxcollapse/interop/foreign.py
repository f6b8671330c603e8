# SPDX-License-Identifier: Apache-2.0
"""Calls into frameworks that may be missing and are never quiet."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator

from onnxcollapse.errors import OptionError
from onnxcollapse.quiet import STDERR, STDOUT, quiet

logger = logging.getLogger(__name__)

LINE = 300
"""Characters of other tools' messages that are passed on."""


def need(*modules: str) -> None:
    """Imports what an export needs.

    Raises:
        OptionError: A package is missing or too old; the message has the command that installs it.
    """
    for module in modules:
        try:
            with silenced():
                importlib.import_module(module)
        except ImportError as error:
            raise OptionError(
                f"export needs {module}, which cannot be imported ({first_line(error)}): "
                'pip install "onnxcollapse[export]"'
            ) from error


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drops what is logged, warned of and printed inside; with -v it goes to stderr."""
    with contextlib.ExitStack() as stack:
        if not logger.isEnabledFor(logging.INFO):
            before = logging.root.manager.disable
            stack.callback(logging.disable, before)
            logging.disable(logging.CRITICAL)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(quiet(STDOUT))
            stack.enter_context(quiet(STDERR))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def first_line(error: BaseException) -> str:
    """What an error says first, with its type where that is all it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:LINE].rstrip(".") if lines else type(error).__name__
