# SPDX-License-Identifier: Apache-2.0
"""Keeps what native code prints, past `sys.stdout` and `sys.stderr`, off the console."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

STDOUT, STDERR = 1, 2


@contextlib.contextmanager
def quiet(number: int) -> Iterator[None]:
    """Sends one of the process's streams to nowhere.

    Args:
        number: STDOUT or STDERR.
    """
    try:
        (sys.stdout if number == STDOUT else sys.stderr).flush()
        _flush()
        saved = os.dup(number)
    except (OSError, AttributeError):  # nothing to silence, as under pythonw
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, number)
        yield
    finally:
        _flush()  # what waits in C's buffer would come out behind the end
        os.dup2(saved, number)
        os.close(saved)
        os.close(sink)


def _flush() -> None:
    """Empties the buffers of C's streams where the platform lets Python get at them."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).fflush(None)
