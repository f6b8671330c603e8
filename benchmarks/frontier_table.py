# SPDX-License-Identifier: Apache-2.0
"""The frontier's rows as text, and how far what was predicted holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.rows import aligned

Row = dict[str, Any]

HEAD = (
    "method",
    "share",
    "params",
    "flops",
    "quality",
    "lost",
    "error",
    "predicted",
    "seconds",
    "MiB",
    "load",
    "note",
)


def text(rows: Sequence[Row]) -> str:
    """One table a model, and below each how predictions compare with what was measured."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == model]
        original = next((row["quality"] for row in here if row["method"] == "original"), None)
        measure = next((row["measure"] for row in here if "measure" in row), "quality")
        body = aligned([HEAD, *(_cells(row, original) for row in here)])
        parts.append("\n".join([f"{model} ({measure})", *body, *predictions(here), ""]))
    return "\n".join(parts)


def predictions(rows: Sequence[Row]) -> list[str]:
    """How predictions hold for ours with and without its parts, and for the rest, whose errors are larger."""
    ours = [row for row in rows if row.get("group") in ("ours", "ablation")]
    rest = [row for row in rows if row not in ours]
    return [f"ours and ablations: {prediction(ours)}", f"controls and published: {prediction(rest)}"]


def prediction(rows: Sequence[Row]) -> str:
    """Rank correlation of predicted errors with effects over all kept rewrites, and the worst ratio of a total."""
    from scipy.stats import spearmanr

    pairs = [pair for row in rows for pair in row.get("rewrites", ())]
    ratios = [row["predicted"] / row["error"] for row in rows if row.get("error") and row.get("predicted")]
    if len(pairs) < 3 or not ratios:  # a correlation of two points says nothing
        return "no predictions to compare"
    rank = float(spearmanr([p for p, _ in pairs], [i for _, i in pairs]).statistic)
    worst = max(ratios, key=lambda ratio: abs(math.log(ratio)))
    return (
        f"{len(pairs)} rewrites: rank correlation of predicted error and effect {rank:.2f}; "
        f"predicted / measured total {min(ratios):.2f} to {max(ratios):.2f}, worst {worst:.2f}"
    )


def _cells(row: Row, original: float | None) -> tuple[str, ...]:
    quality = row.get("quality")
    lost = None if quality is None or original is None else original - quality
    return (
        row["method"],
        _number(row["share"], "g"),
        _number(row.get("params_left"), ".4f"),
        _number(row.get("flops_left"), ".4f"),
        _number(quality, ".4f"),
        _number(lost, "+.4f"),
        _number(row.get("error"), ".4g"),
        _number(row.get("predicted"), ".4g"),
        _number(row.get("seconds"), ".1f"),
        _number(row.get("peak_rss_mib"), ".0f"),
        _number(row.get("load"), ".1f"),
        "; ".join(
            filter(None, (row.get("note"), row.get("problem"), "" if row.get("met", True) else "not met"))
        ),
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
