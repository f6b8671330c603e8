# SPDX-License-Identifier: Apache-2.0
"""The command line: one file a command; errors of the package become one line and an exit status."""

from __future__ import annotations

import click

from onnxcollapse.cli.analyze import analyze
from onnxcollapse.cli.bench import bench
from onnxcollapse.cli.compare import compare
from onnxcollapse.cli.console import Group
from onnxcollapse.cli.doctor import doctor
from onnxcollapse.cli.export import export
from onnxcollapse.cli.optimize import optimize
from onnxcollapse.cli.passes import passes
from onnxcollapse.cli.sweep import sweep


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxcollapse")
def main() -> None:
    """Makes ONNX models structurally smaller and faster before deployment, without training.

    Start with: onnxcollapse optimize model.onnx -o small.onnx --calib data.npz
    """


for command in (optimize, sweep, analyze, compare, bench, export, passes, doctor):
    main.add_command(command)

__all__ = ["main"]
