# SPDX-License-Identifier: Apache-2.0
"""The picture of a sweep; the only place that needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def draw(document: Mapping[str, Any]) -> bytes:
    """Draws error, and quality where it was measured, against the share of the model that is left.

    Args:
        document: What ``onnxcollapse sweep --json`` prints.

    Returns:
        A PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, measure = document["targets"], document["measure"]
    quality = list(document["quality"])
    figure = Figure(figsize=(5.5 * (1 + bool(quality)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + bool(quality), squeeze=False)[0]
    _curve(panels[0], rows, measure, "error", f"{document['metric']} on held-out data", COLORS[0])
    for name, color in zip(
        quality, [COLORS[place % len(COLORS)] for place in range(len(quality))], strict=True
    ):
        _curve(panels[1], rows, measure, name, name, color)
    for panel, title in zip(panels, ("calibration data", "evaluation data"), strict=False):
        panel.set(xlabel=f"{measure} left (%)", ylabel="error at the outputs", title=title)
        panel.grid(alpha=0.3)
        panel.legend()
    file = BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _curve(
    panel: Any, rows: Sequence[Mapping[str, Any]], measure: str, name: str, label: str, color: str
) -> None:
    """Draws one line; what misses its target is hollow."""
    points = [
        (100 * row[f"{measure}_left"], row[name], row["met"]) for row in rows if math.isfinite(row[name])
    ]
    points = sorted([(100.0, 0.0, True), *points])  # the model that was given
    panel.plot([x for x, _, _ in points], [y for _, y, _ in points], color=color, label=label)
    for x, y, met in points:
        panel.plot(x, y, "o", color=color, markerfacecolor=color if met else "white")
