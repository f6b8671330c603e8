# SPDX-License-Identifier: Apache-2.0
"""``onnxcollapse export``: Hugging Face models and torch modules become ONNX, checked against their source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxcollapse.cli import destinations, options
from onnxcollapse.cli.console import console, print_json, set_up_logging, table, user_code
from onnxcollapse.errors import OptionError

if TYPE_CHECKING:
    from onnxcollapse.interop.agreement import Difference
    from onnxcollapse.interop.export import Exported


@click.command()
@click.argument("source")
@click.option(
    "-o",
    "--output",
    "target",
    required=True,
    help="Folder for a Hugging Face model, .onnx file for a torch module.",
)
@click.option("--opset", type=click.IntRange(min=7), help="By default what the exporter advises.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="By default fp32, or what a torch module has.",
)
@click.option(
    "--task",
    default="auto",
    show_default=True,
    help="Task of a Hugging Face model in optimum's words, as text-generation-with-past (with KV cache).",
)
@click.option(
    "--cache/--no-cache", default=None, help="Export a decoder with or without KV cache; by default with it."
)
@click.option(
    "--dynamic",
    multiple=True,
    metavar="NAME.AXIS=SYMBOL",
    help="Axis of a torch module's input that may have any size; several may be given, or none for no axis. By default "
    "axis 0 of every input, as batch.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest relative L2 difference of any output from the source's; by default 1e-3 in fp32, 2e-2 in fp16, 5e-2 "
    "in bf16.",
)
@click.option("--allow-difference", is_flag=True, help="Write the model even when the check fails.")
@options.provider
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random inputs."
)
@options.as_json
@options.verbose
def export(
    source: str,
    target: str,
    opset: int | None,
    dtype: str | None,
    task: str,
    cache: bool | None,
    dynamic: tuple[str, ...],
    tolerance: float | None,
    allow_difference: bool,
    provider: str,
    seed: int,
    as_json: bool,
    verbose: int,
) -> None:
    """Exports SOURCE to ONNX and checks the outputs against the source's on random inputs.

    SOURCE is a Hugging Face folder or id, or pkg.mod:function, which returns a torch module and its example inputs: a
    tensor, a tuple, or a dict by input name. Needs onnxcollapse[export].
    """
    set_up_logging(verbose)
    from onnxcollapse.interop.export import ExportOptions, is_torch
    from onnxcollapse.interop.export import export as run

    _check_target(source, target, of_torch=is_torch(source))
    with user_code():
        found = run(
            source,
            target,
            ExportOptions(
                opset, dtype, task, cache, dynamic, tolerance, allow_difference, seed=seed, provider=provider
            ),
        )
    print_json(found.to_dict()) if as_json else _show(found)


def _check_target(source: str, target: str, *, of_torch: bool) -> None:
    path = Path(target)
    if of_torch:
        if path.suffix != ".onnx":
            raise OptionError(f"output '{target}' is no .onnx file; a torch module needs one, as model.onnx")
        destinations.check_model(target, source, None)
        return
    if path.suffix == ".onnx":
        raise OptionError(f"output '{target}' is a file; a Hugging Face model needs a folder")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise OptionError(f"output '{target}' is the source; name another folder")
    destinations.check_folder(target)


def _show(found: Exported) -> None:
    rows = [
        (name, f"{worst.max_abs:.3g}", f"{worst.rel_l2:.3g}")
        for name, worst in _sorted(found.outputs).items()
    ]
    table("", ("output", "largest difference", "rel-l2"), rows)
    what = f"opset {found.opset}, {found.dtype}" + (f", {found.task}" if found.task else "")
    console().print(
        f"Wrote {found.model} ({what}; {found.params:,} parameters, {found.bytes:,} bytes) in {found.seconds:.1f} s",
        markup=False,
    )


def _sorted(outputs: Mapping[str, Difference]) -> dict[str, Difference]:
    return dict(sorted(outputs.items(), key=lambda item: -item[1].rel_l2))
