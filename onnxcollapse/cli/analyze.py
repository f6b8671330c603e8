# SPDX-License-Identifier: Apache-2.0
"""``onnxcollapse analyze``: what a model is made of, and what could be saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from onnxcollapse.cli import options
from onnxcollapse.cli.console import Bars, console, grouped, print_json, set_up_logging, table, user_code
from onnxcollapse.cli.given import read

if TYPE_CHECKING:
    from onnxcollapse.rewriting.analysis import Analysis, Offer

MOST = 12
"""Rows of a pass on the console; --json has all."""


@click.command()
@click.argument("model")
@click.option(
    "--calib",
    metavar="DATA",
    help="Calibration data, in any form of optimize. Without it there are the structure and the exact rewrites.",
)
@options.window
@options.metric
@options.specs
@options.align
@options.provider
@options.memory
@options.seed
@options.as_json
@options.verbose
def analyze(
    model: str,
    calib: str | None,
    window: int | None,
    metric: str,
    specs: tuple[str, ...],
    align: int,
    provider: str,
    memory: str | None,
    seed: int,
    as_json: bool,
    verbose: int,
) -> None:
    """Shows what MODEL is made of: layers and how little they change, feed-forward blocks and how linear they are.

    With --calib also what every pass could save where, and at what error; nothing is written.
    """
    set_up_logging(verbose)
    from onnxcollapse.rewriting.analysis import analyze as look

    with user_code(), Bars(quiet=as_json) as progress:
        given = read(
            model, calib, window=window, metric=metric, measure="params",
            specs=specs, align=align, provider=provider, memory=memory, seed=seed,
        )  # fmt: skip
        found = look(given.model, given.data, metric=metric, progress=progress, **given.settings())
    print_json(found.to_dict()) if as_json else _show(found)


def _show(found: Analysis) -> None:
    sizes = [("as it is", found.size, f"{found.flops:,}")]
    if found.tidied != found.size:
        sizes.append(("after exact rewrites", found.tidied, ""))
    rows = [(name, f"{at.params:,}", f"{at.bytes:,}", f"{at.nodes:,}", count) for name, at, count in sizes]
    table("", ("", "params", "bytes", "nodes", "flops"), rows)
    for run in found.layers:
        layers = [
            (str(number), layer.end, f"{layer.params:,}", _figure(layer.similarity))
            for number, layer in enumerate(run)
        ]
        table(f"\n{len(run)} layers alike", ("layer", "ends at", "params", "similarity"), layers)
    if found.blocks:
        blocks = [
            (block.site, f"{block.d_in} -> {block.d_hidden} -> {block.d_out}",
             block.activation + (", gated" if block.gated else ""), f"{block.params:,}", _figure(block.linearity))
            for block in found.blocks
        ]  # fmt: skip
        table("\nFeed-forward blocks", ("site", "channels", "activation", "params", "linearity"), blocks)
    _show_offers(found)
    if found.declined:
        table("\nLeft as it is", ("pass", "site", "outcome", "why"), _cut(grouped(found.declined)))
    out = console()
    for note in found.notes:
        out.print(f"Note: {note}", markup=False)
    on = f", measured on {found.provider}" if found.provider else ""
    out.print(f"\nAnalyzed in {found.seconds:.1f} s{on}; nothing was changed", markup=False)


def _show_offers(found: Analysis) -> None:
    """One row a site, from its gentlest variant to its hardest; of each pass those first that save most."""
    exact = [
        (offer.pass_name, offer.site, f"{offer.saving.params:,}", f"{offer.saving.nodes:,}", offer.detail)
        for offer in found.offers
        if offer.impact is None
    ]
    if exact:
        columns: tuple[str, ...] = ("pass", "site", "params saved", "nodes saved", "what")
        table("\nExact rewrites", columns, _cut(exact))
    sites: dict[tuple[str, str], list[Offer]] = {}
    for offer in found.offers:
        if offer.impact is not None:
            sites.setdefault((offer.pass_name, offer.site), []).append(offer)
    order = list(dict.fromkeys(name for name, _ in sites))
    most = {key: max(offer.saving.params for offer in offers) for key, offers in sites.items()}
    if sites:
        rows = [
            _row(*key, sites[key]) for key in sorted(sites, key=lambda key: (order.index(key[0]), -most[key]))
        ]
        columns = ("pass", "site", "variants", "params saved", "error there", f"{found.metric} at outputs")
        table("\nWhat could be saved, each by itself", columns, _cut(rows))


def _cut(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The first rows of each pass, which they begin with, and how many more there are."""
    kept: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == name]
        kept += own[:MOST]
        if len(own) > MOST:
            kept.append((name, f"... {len(own) - MOST} more: --json has all", *[""] * (len(own[0]) - 2)))
    return kept


def _row(name: str, site: str, offers: Sequence[Offer]) -> tuple[str, ...]:
    return (
        name,
        site,
        str(len(offers)),
        _span([offer.saving.params for offer in offers], "{:,}"),
        _span([offer.predicted_error for offer in offers], "{:.3g}"),
        _span([offer.impact for offer in offers if offer.impact is not None], "{:.3g}"),
    )


def _span(numbers: Sequence[float], form: str) -> str:
    ends = dict.fromkeys(form.format(number) for number in (min(numbers), max(numbers))) if numbers else ()
    return " to ".join(ends)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
