# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

from __future__ import annotations

import click

provider = click.option(
    "--provider", default="auto", show_default=True, help="auto, cpu, cuda, tensorrt or an ONNX Runtime name."
)
as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else there."
)
verbose = click.option("-v", "--verbose", count=True, help="Log more; twice for everything.")
seed = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the split into fit and held-out part.",
)
