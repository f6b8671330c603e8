# SPDX-License-Identifier: Apache-2.0
"""Renders a run as one HTML page that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnxcollapse.rewriting.journal import Entry
from onnxcollapse.rewriting.pipeline import Result

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0 0 2rem; width: 100%; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.s { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }
.bar { background: #e8e8e8; height: .8rem; } .bar div { background: #3a6ea5; height: 100%; }
.note { background: #fff6d6; padding: .5rem 1rem; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } th, td { border-color: #444; }
.bar { background: #333; } .note { background: #443a10; } }
"""


def render(result: Result, summary: dict[str, Any]) -> str:
    """Renders a run.

    Args:
        result: What `pipeline.optimize` returned.
        summary: The document that ``--json`` prints.

    Returns:
        A complete HTML document.
    """
    facts = result.journal.facts
    left = [entry for entry in result.journal if entry.outcome != "kept"]
    parts = [
        f"<h1>onnxcollapse: {_text(facts.get('model') or 'model')}</h1>",
        *(f"<p class=note>{_text(note)}</p>" for note in result.notes),
        f"<p>{_text(_verdict(result))}</p>",
        _sizes(summary),
        "<h2>Rewritten</h2>",
        _table(
            (
                "pass",
                "site",
                "what was done",
                "params saved",
                "predicted error",
                "alone at outputs",
                "error after",
            ),
            (
                (e.pass_name, e.site, e.reason, e.saving.params, e.predicted_error, e.impact, e.error)
                for e in result.journal.of("kept")
            ),
        ),
        "<h2>Left as it was</h2>",
        _table(
            ("pass", "site", "outcome", "why", "predicted error", "alone at outputs"), map(_left_row, left)
        ),
        "<h2>The run</h2>",
        _table(("fact", "value"), [(key, _fact(value)) for key, value in facts.items()]),
    ]
    body = "\n".join(parts)
    head = f"<meta charset=utf-8><title>onnxcollapse report</title><style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def _fact(value: object) -> str:
    """Writes a fact, the parts of one that has several behind their names."""
    if not isinstance(value, Mapping):
        return str(value)
    parts = [
        f"{key}: "
        + (
            ", ".join(f"{k}={v}" for k, v in part.items()) or "none"
            if isinstance(part, Mapping)
            else str(part)
        )
        for key, part in value.items()
    ]
    return "; ".join(parts)


def _left_row(entry: Entry) -> tuple[object, ...]:
    site = f"{entry.site} ({entry.variant})" if entry.variant else entry.site
    return entry.pass_name, site, entry.outcome, entry.reason, entry.predicted_error, entry.impact


def _verdict(result: Result) -> str:
    if result.error is None:
        return "The error at the outputs was not measured: no calibration data was given, only exact rewrites ran."
    cap = "without a cap" if result.budget.error is None else f"inside the budget of {result.budget.error:g}"
    if not result.met:
        cap = "which misses what was asked for"
    return (
        f"Error at the outputs on held-out data: {result.error:.4g} ({result.budget.metric}), {cap}; "
        f"measured on {result.provider}."
    )


def _sizes(summary: dict[str, Any]) -> str:
    rows = []
    for name in ("params", "bytes", "flops", "latency"):
        before, after = summary[f"{name}_before"], summary[f"{name}_after"]
        if before is None:
            continue
        share = after / before if before else 1.0
        sizes = (f"{1e3 * n:.4g} ms" if name == "latency" else f"{n:,}" for n in (before, after))
        cells = "".join(f"<td class=n>{cell}" for cell in (*sizes, f"{share - 1:+.1%}"))
        rows.append(
            f"<tr><td>{name}{cells}"
            f"<td style='width:40%'><div class=bar><div style='width:{100 * min(share, 1):.1f}%'></div></div></tr>"
        )
    return "<table><tr><th><th>before<th>after<th>change<th>what is left</tr>" + "".join(rows) + "</table>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    made = ["<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows]
    if not made:
        return "<p>Nothing.</p>"
    return (
        "<table><tr>" + "".join(f"<th>{_text(c)}" for c in columns) + "</tr>" + "\n".join(made) + "</table>"
    )


def _cell(value: object) -> str:
    if value is None:
        return "<td>"
    if isinstance(value, float):
        return f"<td class=n>{value:.4g}"
    if isinstance(value, int):
        return f"<td class=n>{value:,}"
    return f"<td class=s>{_text(value)}"


def _text(value: object) -> str:
    return html.escape(str(value))
