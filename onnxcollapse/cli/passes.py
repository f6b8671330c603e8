# SPDX-License-Identifier: Apache-2.0
"""``onnxcollapse passes``: what is registered, with options and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import click

from onnxcollapse.cli import options
from onnxcollapse.cli.console import print_json, table
from onnxcollapse.errors import OptionError


@click.command()
@options.as_json
def passes(as_json: bool) -> None:
    """Lists the registered passes, what they do, and their options with types and defaults."""
    from onnxcollapse.rewriting import registry

    found: list[dict[str, Any]] = []
    broken: list[dict[str, str]] = []
    for name in registry.names():
        try:
            found.append(_describe(name, registry.load(name)))
        except OptionError as error:
            broken.append({"pass": name, "reason": str(error)})
    if as_json:
        print_json({"passes": found, "broken": broken})
        return
    rows = [row for item in found for row in _rows(item)]
    table("", ("pass", "kind", "what it does", "option", "type", "default"), rows)
    for item in broken:
        click.echo(item["reason"], err=True)


def _describe(name: str, kind: type) -> dict[str, Any]:
    from onnxcollapse.rewriting.passes import describe_options

    return {
        "pass": name,
        "kind": "exact" if _is_exact(kind) else "lossy",
        "summary": (inspect.getdoc(kind) or "").split("\n")[0],
        "options": [
            {"option": option, "type": type_name, "default": default}
            for option, type_name, default in describe_options(kind)
        ],
    }


def _is_exact(kind: type) -> bool:
    """Asks an instance where the pass can be made without options; one that needs some is lossy until told."""
    try:
        return bool(kind().exact)
    except TypeError:
        return False


def _rows(item: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    head = (item["pass"], item["kind"], item["summary"])
    for option in item["options"] or [{"option": "", "type": "", "default": ""}]:
        yield (*head, option["option"], option["type"], option["default"])
        head = ("", "", "")
