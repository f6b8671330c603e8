# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

from __future__ import annotations

import click

provider = click.option(
    "--provider",
    default="auto",
    show_default=True,
    metavar="NAME[:DEVICE][,OPT=VALUE...]",
    help="auto, cpu, cuda, tensorrt or an ONNX Runtime name, as cuda:1,gpu_mem_limit=4GB. TF32 is off on CUDA unless "
    "use_tf32=1 is given.",
)
window = click.option(
    "--window",
    type=click.IntRange(min=2),
    metavar="TOKENS",
    help="Tokens a window of text:FILE; by default what the model takes, 128 at most.",
)
metric = click.option(
    "--metric",
    default="rel-l2",
    show_default=True,
    help="rel-l2, cosine, kl or top1 (1 - top-1 agreement); for language models perplexity (its relative growth) or "
    "continuation (1 - agreement of greedy continuations); or file.py:function.",
)
specs = click.option(
    "--pass",
    "specs",
    multiple=True,
    metavar="NAME[:OPT=VALUE,...]",
    help="Run this pass; several run in the order given.",
)
align = click.option(
    "--align",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Make widths that a pass chooses multiples of this, unless its --pass says align=N itself.",
)
memory = click.option(
    "--memory", metavar="SIZE", help="Resident memory to stay under, as 4GB; half of what is free by default."
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
