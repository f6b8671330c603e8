# SPDX-License-Identifier: Apache-2.0
"""What an exporter hands over to be checked and moved into place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from onnxcollapse.interop.agreement import Run


@dataclass(frozen=True)
class Draft:
    """An exported model that nobody has checked yet.

    Attributes:
        model: The .onnx file.
        runs: Makes the runs that it is checked by; the source computes when they are asked for.
        task: What the model was exported for, for a Hugging Face source.
        beside: What was exported with it: the encoder of a decoder.
    """

    model: Path
    runs: Callable[[], Iterable[Run]]
    task: str | None = None
    beside: tuple[Draft, ...] = ()
