# SPDX-License-Identifier: Apache-2.0
"""``onnxcollapse passes``: what is registered, with options and defaults."""

from __future__ import annotations

import inspect

import click

from onnxcollapse.cli import options
from onnxcollapse.cli.console import print_json, table
from onnxcollapse.errors import OptionError


@click.command()
@options.as_json
def passes(as_json: bool) -> None:
    """Lists the registered passes, what they do, and their options with types and defaults."""
    from onnxcollapse.rewriting import registry
    from onnxcollapse.rewriting.passes import describe_options

    rows, broken = [], []
    for name in registry.names():
        try:
            kind = registry.load(name)
        except OptionError as error:
            broken.append((name, "", str(error), "", ""))
            continue
        exact = "exact" if _is_exact(kind) else "lossy"
        summary = (inspect.getdoc(kind) or "").split("\n")[0]
        rows += [(name, exact, summary, *option) for option in describe_options(kind) or [("", "", "")]]
    if as_json:
        print_json({"passes": [_record(row) for row in rows], "broken": [row[0] for row in broken]})
        return
    shown, last = [], ""
    for name, exact, summary, option, kind_name, default in rows:
        first = name != last
        shown.append((name if first else "", exact if first else "", summary if first else "",
                      option, kind_name, default))  # fmt: skip
        last = name
    table("", ("pass", "kind", "what it does", "option", "type", "default"), shown)
    for name, _, reason, *_ in broken:
        click.echo(f"{name}: {reason}", err=True)


def _is_exact(kind: type) -> bool:
    """Asks an instance where the pass can be made without options; a pass that needs some is lossy until told."""
    try:
        return bool(kind().exact)
    except TypeError:
        return False


def _record(row: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(("pass", "kind", "summary", "option", "type", "default"), row, strict=True))
