# SPDX-License-Identifier: Apache-2.0
"""What every recipe shares: its arguments, its files, its JSON line.

A recipe builds in one folder `model.onnx`, `calib.npz` and `eval.npz` (model inputs only, samples on axis
0, never overlapping), keeps labels or reference outputs beside them, and measures the quality of any model
with that interface.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onnxcollapse.errors import OnnxCollapseError

if TYPE_CHECKING:
    import onnxruntime

MODEL, CALIBRATION, EVALUATION, STAMP = "model.onnx", "calib.npz", "eval.npz", "recipe.json"
SOURCE = "source"  # the folder that --source writes
_NOT_OPTIONS = frozenset({"output", "measure", "force", "generate"})  # they do not change what is built
_LOG = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]


class RecipeError(OnnxCollapseError):
    """A recipe lacks a package, a file or a sensible option."""


def arguments(name: str, doc: str | None, *, measures: bool = True) -> argparse.ArgumentParser:
    """A parser with what all recipes take.

    Args:
        name: the recipe's name, as in `python -m models.NAME`.
        doc: the recipe's docstring, shown as its help.
        measures: whether the recipe has a quality measure.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m models.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the model and its data")
    if measures:
        text = "print this model's quality as a JSON line instead of building"
        parser.add_argument("--measure", type=Path, metavar="MODEL", help=text)
    parser.add_argument("--force", action="store_true", help="build even when the files are there already")
    return parser


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds the option of recipes that can leave the export to `onnxcollapse export`."""
    text = f"export nothing: write the Hugging Face folder {SOURCE}, for onnxcollapse export, beside the data"
    parser.add_argument("--source", action="store_true", help=text)


def run(
    args: argparse.Namespace,
    build: Callable[[argparse.Namespace], None],
    measure: Callable[[argparse.Namespace], Mapping[str, Any]] | None = None,
) -> int:
    """Builds or measures, and answers with the exit status; errors are one line on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if measure is not None and args.measure is not None:
            print(json.dumps(dict(measure(args))))
        elif not args.force and is_built(args):
            _LOG.info("%s is already built", args.output)
        else:
            (args.output / STAMP).unlink(missing_ok=True)  # so that an interrupted build is no finished one
            build(args)
            _write_stamp(args)
    except OnnxCollapseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {error.filename or args.output}: {error.strerror or error}", file=sys.stderr)
        return OnnxCollapseError.exit_status
    return 0


def is_built(args: argparse.Namespace) -> bool:
    """Whether the output folder was built with the same options and still has its files."""
    stamp = args.output / STAMP
    if not stamp.exists() or json.loads(stamp.read_text()) != _options(args):
        return False
    built = f"{SOURCE}/config.json" if getattr(args, "source", False) else MODEL
    return "measure" not in args or all(
        (args.output / name).exists() for name in (built, CALIBRATION, EVALUATION)
    )


def require(*packages: str, install: str) -> None:
    """Checks that packages are installed; of a dotted name only the parents are imported.

    Raises:
        RecipeError: one is missing; the message has the pip command.
    """
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        raise RecipeError(f"this recipe needs {', '.join(missing)}: pip install {install}")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path that takes the target's place when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".write-", suffix=target.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files go into `folder` when the block ends well."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".write-") as temporary:
        yield Path(temporary)
        for file in Path(temporary).iterdir():
            file.replace(folder / file.name)


def write_npz(target: Path, arrays: Arrays) -> None:
    """Writes arrays by name, compressed; the same arrays give the same bytes."""
    with replacing(target) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **cast("dict[str, Any]", arrays))


def read_npz(source: Path) -> dict[str, np.ndarray]:
    """Reads arrays by name.

    Raises:
        RecipeError: the file isn't there.
    """
    if not source.exists():
        raise RecipeError(f"{source} is missing: build the recipe into {source.parent} first")
    with np.load(source, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def open_session(model: Path) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU.

    Raises:
        RecipeError: there is no such model, or ONNX Runtime refuses it.
    """
    import onnxruntime

    if not model.exists():
        raise RecipeError(f"{model} does not exist: give the path of an .onnx file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no class of their own
        first = str(error).splitlines()[0]
        raise RecipeError(f"ONNX Runtime cannot load {model}: {first}") from error


def input_names(session: onnxruntime.InferenceSession) -> list[str]:
    """The names of the model's inputs."""
    return [value.name for value in session.get_inputs()]


def outputs_in_batches(
    session: onnxruntime.InferenceSession, feeds: Arrays, output: str, batch: int = 64
) -> Iterator[tuple[np.ndarray, slice]]:
    """One output, batch by batch.

    Args:
        session: the model.
        feeds: arrays by input name, samples on axis 0; names the model doesn't have are left out.
        output: the output's name.
        batch: samples at once.

    Yields:
        The output [batch, ...] and the rows of the feeds it belongs to.
    """
    wanted = {name: feeds[name] for name in input_names(session)}
    samples = len(next(iter(wanted.values())))
    for start in range(0, samples, batch):
        rows = slice(start, min(start + batch, samples))
        (value,) = session.run([output], {name: array[rows] for name, array in wanted.items()})
        yield value, rows


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a parent of a dotted name is missing
        return False


def _options(args: argparse.Namespace) -> dict[str, Any]:
    left_out = _NOT_OPTIONS if getattr(args, "source", False) else {*_NOT_OPTIONS, "source"}
    return {key: value for key, value in sorted(vars(args).items()) if key not in left_out}


def _write_stamp(args: argparse.Namespace) -> None:
    with replacing(args.output / STAMP) as temporary:
        temporary.write_text(json.dumps(_options(args)) + "\n")
