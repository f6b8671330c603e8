# SPDX-License-Identifier: Apache-2.0
"""What optimize, sweep and analyze are all given, read in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxcollapse.errors import OptionError

if TYPE_CHECKING:
    from onnxcollapse.calibration import Dataset
    from onnxcollapse.model import Model
    from onnxcollapse.rewriting.passes import Pass


@dataclass(frozen=True)
class Given:
    """A model, its data and how to work on them.

    Attributes:
        model: The model.
        data: Calibration data; None without any.
        passes: Those that were chosen.
        provider: Where to calibrate and measure.
        memory: Bytes of resident memory to stay under; None for half of what is free.
    """

    model: Model
    data: Dataset | None
    passes: list[Pass]
    provider: str
    memory: int | None

    def settings(self) -> dict[str, Any]:
        """The keywords that every run takes."""
        return {"passes": self.passes, "provider": self.provider, "memory": self.memory}


def read(
    model: str,
    calib: str | None,
    *,
    window: int | None,
    metric: str,
    measure: str | None,
    specs: Sequence[str],
    align: int,
    provider: str,
    memory: str | None,
    seed: int,
) -> Given:
    """Reads what the options name; what can be checked without the model is checked before it is loaded.

    Raises:
        OnnxCollapseError: Something cannot be used.
    """
    from onnxcollapse.calibration import open_data, parse_memory
    from onnxcollapse.calibration.providers import chain
    from onnxcollapse.model import Model
    from onnxcollapse.rewriting import registry
    from onnxcollapse.verification.metrics import check

    check(metric)
    passes = registry.chosen(specs, {"align": align}, measure)
    if provider != "auto":
        chain(provider)  # an unknown one is an error, also where nothing will run on it
    if calib is None and window is not None:
        raise OptionError(f"--window {window}: there is no text to cut; give --calib text:FILE")
    limit = None if memory is None else parse_memory(memory)
    loaded = Model.load(model)
    data = None if calib is None else open_data(calib, loaded, seed=seed, window=window)
    return Given(loaded, data, passes, provider, limit)
