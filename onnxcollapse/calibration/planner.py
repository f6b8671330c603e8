# SPDX-License-Identifier: Apache-2.0
"""Decides from a memory limit whether a model runs whole or segment by segment."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from onnxcollapse.calibration.segments import cut_points
from onnxcollapse.calibration.sizes import parse_size
from onnxcollapse.model import Model, size

logger = logging.getLogger(__name__)

SESSION_SHARE = 3
"""A session over n bytes of weights reaches about this many times n: mapped pages, packed copies, activations."""

BASE = 400 << 20
"""What the process holds beside sessions: libraries, the graph, statistics of one segment."""


@dataclass(frozen=True)
class Plan:
    """How a model is run.

    Attributes:
        points: Tensors between the model's layers.
        cuts: Those at which it is cut to be run: none when a session over the whole model fits.
    """

    points: tuple[str, ...]
    cuts: tuple[str, ...]


def plan(model: Model, limit: int | None = None) -> Plan:
    """Plans the runs of a model.

    Args:
        model: The model.
        limit: Bytes of resident memory; None for half of what is free.
    """
    limit = limit if limit is not None else _free() // 2
    points = tuple(cut_points(model.graph))
    whole = BASE + SESSION_SHARE * size(model).bytes
    cuts = () if whole <= limit else points
    if cuts:
        logger.info("memory plan: %d segments; one session would take %s", len(cuts) + 1, _text(whole))
    elif whole > limit:
        logger.warning(
            "the model has no layers to cut it at and may need %s, over %s", _text(whole), _text(limit)
        )
    else:
        logger.info("memory plan: one session of about %s, under the limit of %s", _text(whole), _text(limit))
    return Plan(points, cuts)


def parse_memory(text: str) -> int:
    """Reads ``4GB``, ``512MB`` or a number of bytes.

    Raises:
        OptionError: Not of that form.
    """
    return parse_size(text, "--memory")


def peak_resident() -> int:
    """The largest resident size that this process had, in bytes; 0 where the platform does not tell.

    Not from getrusage where Linux says it better: there a process starts with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _free() -> int:
    """Memory that is available; a guess of 8 GiB where the platform does not tell."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def _text(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 1 << 30 else f"{count / 2**20:.0f} MB"
