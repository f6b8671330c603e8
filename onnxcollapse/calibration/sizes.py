# SPDX-License-Identifier: Apache-2.0
"""Sizes in bytes as people write them."""

from __future__ import annotations

from onnxcollapse.errors import OptionError

_UNITS = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}


def parse_size(text: str, option: str) -> int:
    """Reads ``4GB``, ``512MB`` or a number of bytes.

    Args:
        text: The size.
        option: What it was given for, as the user wrote it; named in errors.

    Returns:
        Bytes, at least 1.

    Raises:
        OptionError: Not of that form.
    """
    number = text.strip().upper().rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text.strip().upper()[len(number) :].replace("IB", "B")
    try:
        value = float(number) * _UNITS[unit if unit in _UNITS else unit + "B"]
    except (KeyError, ValueError):
        raise OptionError(f"{option} {text}: give a size such as 4GB or 512MB") from None
    if not 1 <= value < float("inf"):
        raise OptionError(f"{option} {text}: the limit must be above 0 and a number")
    return int(value)
