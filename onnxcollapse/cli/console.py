# SPDX-License-Identifier: Apache-2.0
"""Everything that is written to the console: results to stdout, progress, logs and errors to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from onnxcollapse.errors import OnnxCollapseError

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcollapse.rewriting.journal import Entry


class Group(click.Group):
    """Turns what the user can mend into one line on stderr and an exit status, never into a traceback."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Reads the options before the command."""
        with _one_line():
            return super().make_context(*args, **options)

    def invoke(self, context: click.Context) -> Any:
        """Reads the command's options and runs it."""
        with _one_line():
            return super().invoke(context)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "onnxcollapse"
        fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)
    except OnnxCollapseError as error:
        fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except MemoryError:
        fail("out of memory; give less calibration data or run on a larger machine", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"'{error.filename}'" if error.filename else "a file or the output"
        fail(f"cannot read or write {where}: {error.strerror or error}; check path, rights and space", 2)


@contextlib.contextmanager
def user_code() -> Iterator[None]:
    """Sends what scripts, metrics and readers print to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def fail(message: str, status: int) -> None:
    """Writes one line to stderr and ends the process."""
    click.echo("onnxcollapse: " + " ".join(message.split()), err=True)
    sys.exit(status)


def console(*, stderr: bool = False) -> Console:
    """Makes a console that is as wide as its terminal, or wide enough for a table when there is none."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else 160)


def set_up_logging(verbosity: int) -> None:
    """Sends the log to stderr: the package's warnings always, others' and more with each ``-v``."""
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbosity, 2)]
    others = logging.WARNING if verbosity else logging.ERROR
    logging.basicConfig(level=others, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("onnxcollapse").setLevel(level)


def print_json(document: dict[str, Any]) -> None:
    """Writes one JSON document to stdout."""
    from onnxcollapse.rewriting.journal import plain

    click.echo(json.dumps(plain(document), indent=1, allow_nan=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes a table to stdout; right-aligned where all of a column are numbers."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        made.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    console().print(made)


def grouped(left: Sequence[Entry]) -> list[tuple[str, str, str, str]]:
    """One row for all variants of a site that were left for the same reason; the journal has each."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for e in left:
        groups.setdefault((e.pass_name, e.site, e.outcome, e.reason), []).append(e.variant)
    return [
        (
            name,
            site + (f" ({len(variants)} variants)" if len(variants) > 1 else f" {variants[0]}".rstrip()),
            outcome,
            why,
        )
        for (name, site, outcome, why), variants in groups.items()
    ]


def _is_number(cell: object) -> bool:
    return (
        str(cell)
        .replace(",", "")
        .replace(".", "")
        .replace("-", "")
        .replace("e", "")
        .replace("%", "")
        .isdigit()
    )


class Bars:
    """Progress bars with rate and remaining time, on stderr and only on a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet or not sys.stderr.isatty()

    def __enter__(self) -> Any:
        from onnxcollapse.rewriting.progress import Progress

        if self._quiet:
            return Progress()
        from onnxcollapse.cli.bars import RichProgress

        self._bars = RichProgress(console(stderr=True))
        return self._bars.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._quiet:
            self._bars.stop()
