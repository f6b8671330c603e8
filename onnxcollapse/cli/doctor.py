# SPDX-License-Identifier: Apache-2.0
"""``onnxcollapse doctor``: what is installed, which providers really work, and what clashes."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import click

from onnxcollapse.cli import options
from onnxcollapse.cli.console import console, print_json, table

PACKAGES = (
    "onnxcollapse", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnx-graphsurgeon", "numpy", "scipy",
    "torch", "optimum", "optimum-onnx", "transformers", "tokenizers", "pillow", "matplotlib",
)  # fmt: skip
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")


@click.command()
@options.as_json
def doctor(as_json: bool) -> None:
    """Shows versions, execution providers and whether they work, and clashing installations."""
    document = examine()
    if as_json:
        print_json(document)
    else:
        table(
            "", ("package", "version"), [(k, v or "not installed") for k, v in document["versions"].items()]
        )
        table("\nProviders", ("provider", "state"), list(document["providers"].items()))
        out = console()
        out.print(f"\nPython {document['python']} on {document['platform']}", markup=False)
        for problem in document["problems"]:
            out.print(f"Problem: {problem}", markup=False)
        if not document["problems"]:
            out.print("No problems found")
    if document["problems"]:
        raise SystemExit(1)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def clashes(versions: dict[str, str | None]) -> list[str]:
    """Says which runtimes overwrite each other's files: all of them install the module ``onnxruntime``."""
    installed = [name for name in RUNTIMES if versions.get(name)]
    if len(installed) < 2:
        return []
    return [
        f"{' and '.join(installed)} are installed together and overwrite each other; "
        f"pip uninstall -y {' '.join(installed)} and install the one you need again"
    ]


def _providers() -> dict[str, str]:
    """Runs a one-node model on each provider that is built in, because being built in says little."""
    from onnxcollapse.calibration.providers import available_providers, works

    return {
        name: "works" if works(name) else "built in, but does not work here" for name in available_providers()
    }


def examine() -> dict[str, Any]:
    """Gathers everything `doctor` shows, as plain JSON types."""
    versions = {name: _version(name) for name in dict.fromkeys((*PACKAGES, *RUNTIMES))}
    problems, providers = clashes(versions), dict[str, str]()
    if not any(versions[name] for name in RUNTIMES):
        problems.append("no ONNX Runtime is installed; pip install onnxruntime-gpu (or onnxruntime)")
    else:
        try:
            providers = _providers()
        except Exception as error:  # what a broken installation leads to
            problems.append(f"ONNX Runtime is installed but cannot be imported ({error}); install it again")
    return {
        "versions": {name: version for name, version in versions.items() if version or name in PACKAGES},
        "providers": providers,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "problems": problems,
    }
