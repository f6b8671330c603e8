# SPDX-License-Identifier: Apache-2.0
"""``onnxcollapse analyze``: what a model is made of, and what could be saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from onnxcollapse.cli import options
from onnxcollapse.cli.console import Bars, console, grouped, print_json, set_up_logging, table, user_code
from onnxcollapse.errors import OptionError

if TYPE_CHECKING:
    from onnxcollapse.rewriting.analysis import Analysis, Offer

MOST = 12
"""Sites of a pass on the console; --json has all."""


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
    from onnxcollapse.calibration import open_data, parse_memory
    from onnxcollapse.calibration.providers import chain
    from onnxcollapse.model import Model
    from onnxcollapse.rewriting import registry
    from onnxcollapse.rewriting.analysis import analyze as look
    from onnxcollapse.verification.metrics import check as check_metric

    with user_code(), Bars(quiet=as_json) as progress:
        check_metric(metric)
        passes = registry.chosen(specs, {"align": align}, "params")
        if provider != "auto":
            chain(provider)  # an unknown one is an error, also where nothing will run on it
        if calib is None and window is not None:
            raise OptionError(f"--window {window}: there is no text to cut; give --calib text:FILE")
        limit = None if memory is None else parse_memory(memory)
        loaded = Model.load(model)
        data = None if calib is None else open_data(calib, loaded, seed=seed, window=window)
        found = look(
            loaded, data, metric=metric, passes=passes, provider=provider, memory=limit, progress=progress
        )
    print_json(found.to_dict()) if as_json else _show(found)


def _show(found: Analysis) -> None:
    size = found.size
    table(
        "",
        ("params", "bytes", "flops", "nodes"),
        [(f"{size.params:,}", f"{size.bytes:,}", f"{found.flops:,}", f"{size.nodes:,}")],
    )
    for run in found.layers:
        rows = [
            (str(number), layer.end, f"{layer.params:,}", _figure(layer.similarity))
            for number, layer in enumerate(run)
        ]
        table(f"\n{len(run)} layers alike", ("layer", "ends at", "params", "similarity"), rows)
    if found.blocks:
        blocks = [
            (block.site, f"{block.d_in} -> {block.d_hidden} -> {block.d_out}",
             block.activation + (", gated" if block.gated else ""), f"{block.params:,}", _figure(block.linearity))
            for block in found.blocks
        ]  # fmt: skip
        table("\nFeed-forward blocks", ("site", "channels", "activation", "params", "linearity"), blocks)
    _show_offers(found)
    if found.declined:
        table("\nLeft as it is", ("pass", "site", "outcome", "why"), grouped(found.declined))
    out = console()
    for note in found.notes:
        out.print(f"Note: {note}", markup=False)
    on = f", measured on {found.provider}" if found.provider else ""
    out.print(f"\nAnalyzed in {found.seconds:.1f} s{on}; nothing was changed", markup=False)


def _show_offers(found: Analysis) -> None:
    """One row a site, from its gentlest variant to its hardest; of each pass those first that save most."""
    passes: dict[str, dict[str, list[Offer]]] = {}
    for offer in found.offers:
        passes.setdefault(offer.pass_name, {}).setdefault(offer.site, []).append(offer)
    rows = []
    for name, sites in passes.items():
        ordered = sorted(sites.items(), key=lambda item: -max(offer.saving.params for offer in item[1]))
        rows += [_row(name, site, offers) for site, offers in ordered[:MOST]]
        if len(ordered) > MOST:
            rows.append((name, f"... {len(ordered) - MOST} more: --json has all", *[""] * 4))
    if rows:
        columns = ("pass", "site", "variants", "params saved", "error there", f"{found.metric} at outputs")
        table("\nWhat could be saved, each by itself", columns, rows)


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
