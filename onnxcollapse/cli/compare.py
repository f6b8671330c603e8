# SPDX-License-Identifier: Apache-2.0
"""``onnxcollapse compare``: the outputs of two models side by side."""

from __future__ import annotations

import click

from onnxcollapse.cli import options
from onnxcollapse.cli.console import console, print_json, set_up_logging, table, user_code


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--data", required=True, metavar="DATA", help="Inputs to run both on, in any form that --calib takes."
)
@options.window
@options.provider
@options.seed
@options.as_json
@options.verbose
def compare(
    a: str, b: str, data: str, window: int | None, provider: str, seed: int, as_json: bool, verbose: int
) -> None:
    """Runs A and B on the same data and shows how far B's outputs are from A's, in every metric.

    Of language models the perplexities are shown as well.
    """
    set_up_logging(verbose)
    from onnxcollapse.calibration import open_data
    from onnxcollapse.model import Model
    from onnxcollapse.verification import compare as measure

    with user_code():
        first, second = Model.load(a), Model.load(b)
        dataset = open_data(data, first, seed=seed, window=window)
        found = measure(first, second, dataset, provider=provider)
    document = found.to_dict()
    if as_json:
        print_json(document)
        return
    metrics = list(dict.fromkeys(name for values in document["outputs"].values() for name in values))
    rows = [
        (output, *(_cell(values.get(name)) for name in metrics))
        for output, values in document["outputs"].items()
    ]
    table(f"{b} against {a}", ("output", *metrics), rows)
    out = console()
    for side, names in (("only in A", document["missing"]), ("only in B", document["extra"])):
        if names:
            out.print(f"Outputs {side}: {', '.join(names)}", markup=False)
    for note in dict.fromkeys(document["notes"].values()):
        names = ", ".join(name for name, why in document["notes"].items() if why == note)
        out.print(f"Not compared: {names} ({note})", markup=False)
    if (both := document.get("perplexity")) is not None:
        change = f" ({both['b'] / both['a'] - 1:+.2%})"
        out.print(f"Perplexity: A {both['a']:.5g}, B {both['b']:.5g}{change}", markup=False)
    out.print(f"Measured on {document['provider']}", markup=False)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
