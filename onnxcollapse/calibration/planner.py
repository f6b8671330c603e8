# SPDX-License-Identifier: Apache-2.0
"""Decides from a memory limit how long segments are, how many samples a batch has and how many sums are held."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxcollapse.calibration.data import Dataset
from onnxcollapse.calibration.segments import Segment, cut_points, segments
from onnxcollapse.calibration.sizes import parse_size
from onnxcollapse.model import Model, size
from onnxcollapse.model.activations import peak_activations

logger = logging.getLogger(__name__)

SESSION_SHARE = 3
"""A session over n bytes of weights reaches about this many times n: mapped pages, packed copies, activations."""

BASE = 400 << 20
"""What the process holds beside sessions: libraries, the graph, tables of the journal."""


@dataclass(frozen=True)
class Plan:
    """How a model is run inside a memory limit.

    Attributes:
        points: Tensors between the model's layers.
        cuts: Those at which it is cut to be run: none when a session over the whole model fits.
        batch: Samples a batch at most; None for what suits the data.
        sums: Bytes that the Gram matrices held at a time may take; None for no limit.
    """

    points: tuple[str, ...]
    cuts: tuple[str, ...]
    batch: int | None = None
    sums: int | None = None

    @property
    def measuring(self) -> tuple[str, ...]:
        """Where models are cut whose outputs are compared.

        Behind the last layer too: of a reference whose outputs are too large to be kept, only what lies behind it has
        to run again for each model that is held against it.
        """
        return tuple(dict.fromkeys([*self.cuts, *self.points[-1:]]))


def plan(model: Model, limit: int | None = None, data: Dataset | None = None) -> Plan:
    """Plans the runs of a model: half of the memory is for weights, a quarter for activations, one for sums.

    Args:
        model: The model.
        limit: Bytes of resident memory; None for half of what is free.
        data: What is run through it, to choose a batch size for.
    """
    limit = limit if limit is not None else _free() // 2
    room = max(limit - BASE, 1)
    points = tuple(cut_points(model.graph))
    whole = BASE + SESSION_SHARE * size(model).bytes
    cuts = () if whole <= limit else _fewest(model, points, room // 2)
    batch = None if data is None else _batch(model, data, room // 4)
    if cuts:
        logger.info("memory plan: %d segments; one session would take %s", len(cuts) + 1, _text(whole))
    elif whole > limit:
        logger.warning(
            "the model has no layers to cut it at and may need %s, over %s", _text(whole), _text(limit)
        )
    else:
        logger.info("memory plan: one session of about %s, under the limit of %s", _text(whole), _text(limit))
    logger.info(
        "memory plan: %s samples a batch, sums of %s at a time",
        batch or (data.batch_size if data else "all"), _text(room // 4),
    )  # fmt: skip
    return Plan(points, cuts, batch, room // 4)


def _fewest(model: Model, points: Sequence[str], room: int) -> tuple[str, ...]:
    """Cuts so that segments are as long as sessions over them fit."""
    cuts: list[str] = []
    held = 0
    for segment in segments(model.graph, points):
        weight = SESSION_SHARE * _weights(model, segment)
        if held and held + weight > room and segment.index:
            cuts.append(points[segment.index - 1])
            held = 0
        held += weight
    return tuple(cuts)


def _weights(model: Model, segment: Segment) -> int:
    """Bytes of the weights that a segment reads."""
    read = {
        value.name: value.const_value.nbytes
        for node in model.graph
        if any(output.name in segment.makes for output in node.outputs)
        for value in node.inputs
        if value is not None and value.const_value is not None
    }
    return sum(read.values())


def _batch(model: Model, data: Dataset, room: int) -> int | None:
    """A batch size whose activations fit; halved from what the data would have."""
    need = peak_activations(model, data.shapes())
    batch = data.batch_size
    while batch > 1 and batch * need > room:
        batch //= 2
    return None if batch == data.batch_size else batch


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
