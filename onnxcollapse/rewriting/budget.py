# SPDX-License-Identifier: Apache-2.0
"""What the user allows and wants: the largest error at the outputs, and optionally a target size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxcollapse.errors import OptionError

MEASURES = ("params", "flops", "bytes", "latency")


@dataclass(frozen=True)
class Target:
    """Keep at most this share of the model's parameters, FLOPs, bytes or measured latency.

    Attributes:
        measure: ``params``, ``flops``, ``bytes`` or ``latency``.
        share: Share to keep, in (0, 1).
    """

    measure: str
    share: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads ``params=0.75``.

        Raises:
            OptionError: Not of that form, an unknown measure, or a share outside (0, 1).
        """
        measure, _, share = text.partition("=")
        if measure not in MEASURES:
            raise OptionError(
                f"target '{text}': '{measure}' is no measure; use {', '.join(MEASURES)}, as in params=0.75"
            )
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not 0.0 < value < 1.0:
            raise OptionError(
                f"target '{text}': the share to keep must lie between 0 and 1, as in {measure}=0.75"
            )
        return cls(measure, value)

    def __str__(self) -> str:
        return f"{self.measure}={self.share:g}"


@dataclass(frozen=True)
class Budget:
    """How much error is accepted, in which metric, and what is wanted for it.

    Attributes:
        error: Largest error accepted at the outputs on held-out data; None for no cap, which needs a target.
        metric: Name of a metric, or ``file.py:function``.
        target: Size to reach at the least error; None saves as much as the error allows.
    """

    error: float | None = 0.01
    metric: str = "rel-l2"
    target: Target | None = None

    def __post_init__(self) -> None:
        if self.error is None and self.target is None:
            raise OptionError("a budget needs an error, a target, or both")
        if self.error is not None and not (self.error >= 0.0 and math.isfinite(self.error)):
            raise OptionError(
                f"budget {self.error}: the largest error accepted must be a number of 0 or more"
            )

    @property
    def cap(self) -> float:
        """The largest error accepted, infinite when there is no cap."""
        return math.inf if self.error is None else self.error
