# SPDX-License-Identifier: Apache-2.0
"""Other tools that prune ONNX files without training, each in a virtual environment of its own.

    python -m benchmarks.rivals MODEL --calib DATA.npz --ratios 0.5 0.25 -o out
    python -m benchmarks.rivals MODEL --calib DATA.npz --params-shares 0.16 0.05 --methods wanda magnitude -o out

The rival is onnxsim 0.8, the one package on PyPI found to remove neurons or blocks from an ONNX file. Looked
at besides: onnxslim 0.1.98, onnxoptimizer 0.4.2, onnx-tool 1.0.1, onnxscript 0.7.2, onnx-neural-compressor 1.0
and ONNX Runtime's optimizers have no pruning; olive-ai 0.13 has SliceGPT and SparseGPT, both as passes on
PyTorch models. `benchmarks/rival_onnxsim.py` runs onnxsim and says which settings it gets. Its environment lies
in the cache of `models.fetch` (`ONNXCOLLAPSE_CACHE`) and takes some 250 MB; it needs no torch.

A row tells `ratio` (the share kept of what the method removes), `params_before` and `params_after` (elements of
the float initializers), `zeros_after` (those that are zero: methods that remove `weights` shrink nothing),
`share` (params_after / params_before; for those methods the share that is not zero), `seconds` (the rival's
own work, without imports, loading and saving), `prepared` and `error`, null or why it could not be done.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numpy.polynomial import Polynomial

from benchmarks.rival_onnxsim import METHODS as _ONNXSIM
from models.fetch import cache_folder
from onnxcollapse.errors import OnnxCollapseError

_LOG = logging.getLogger(__name__)

METHODS = tuple(_ONNXSIM)
REQUIREMENTS = ("onnxsim==0.8.*", "onnxruntime>=1.24")
TRIES = 6
CLOSE = 0.02  # a share within 2 % of the one asked for is what was asked for
_DRIVER = Path(__file__).with_name("rival_onnxsim.py")
_STAMP = "ready.json"


class RivalError(OnnxCollapseError):
    """A rival's environment cannot be set up."""


def environment() -> Path:
    """The Python of onnxsim's environment, which is made in the cache when it isn't there or is incomplete.

    Raises:
        RivalError: the environment cannot be made, or pip cannot install into it.
    """
    folder = cache_folder() / "rivals" / "onnxsim"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / _STAMP
    wanted = json.dumps(REQUIREMENTS)
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    _LOG.info("installing %s into %s", ", ".join(REQUIREMENTS), folder)
    shutil.rmtree(folder, ignore_errors=True)
    _command([sys.executable, "-m", "venv", str(folder)], f"no virtual environment could be made in {folder}")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS]
    _command(pip, f"pip could not install {', '.join(REQUIREMENTS)}")
    stamp.write_text(wanted, encoding="utf-8")  # last: an interrupted installation is made anew
    return python


def run(
    method: str,
    model: Path,
    calibration: Path,
    ratio: float | None,
    output: Path,
    *,
    params_share: float | None = None,
    samples: int | None = None,
    timeout: float = 3600,
) -> dict[str, Any]:
    """Prunes a model with a rival's method; a rival that fails is a row with the reason, never an exception.

    Args:
        method: one of METHODS.
        model: the .onnx file.
        calibration: .npz, arrays by input name, samples on axis 0.
        ratio: share kept of what the method removes, above 0 and at most 1; None with `params_share`.
        output: the file to write.
        params_share: instead of `ratio`, the share of the parameters to arrive at; the ratio is searched for
            in at most six tries without the method's recovery, which changes no size.
        samples: uses the first samples of the calibration data only; None for all.
        timeout: seconds that one run of the rival may take.

    Returns:
        The row, as the module describes it; `tries` counts the search's runs.

    Raises:
        ValueError: the method is unknown, or not exactly one of `ratio` and `params_share` is given.
    """
    if method not in METHODS:
        raise ValueError(f"{method} is no rival's method: choose from {', '.join(METHODS)}")
    if (ratio is None) == (params_share is None):
        raise ValueError("give either a ratio or a params_share")
    for name, value in (("ratio", ratio), ("params_share", params_share)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is {value:g}: it must be above 0 and at most 1")
    try:
        python = environment()
    except RivalError as error:
        return {"method": method, "ratio": ratio, "share": None, "error": str(error)}

    def attempt(name: str, share: float, target: Path) -> dict[str, Any]:
        return _attempt(python, name, model, calibration, share, target, samples, timeout)

    if params_share is None:
        return attempt(method, float(ratio or 0), output)
    with tempfile.TemporaryDirectory(prefix="rival-") as folder:
        plain = method.partition("+")[0]
        tries = search(lambda r: attempt(plain, r, Path(folder) / "try.onnx"), params_share)
    if tries[-1]["error"]:
        return {**tries[-1], "method": method, "tries": len(tries)}
    best = min(tries, key=lambda row: abs(row["share"] - params_share))
    return {**attempt(method, best["ratio"], output), "tries": len(tries)}


def search(attempt: Callable[[float], dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """Tries ratios until the share of the parameters left is within 2 % of the one wanted, at most six.

    Args:
        attempt: gives the row of a ratio, with `share` and `error`.
        share: the share wanted, above 0 and at most 1.

    Returns:
        The rows, in order; the last one has an error where the rival failed, and ends the search.
    """
    rows: list[dict[str, Any]] = []
    known = [(1.0, 1.0)]  # (ratio, share)
    ratio = share
    while len(rows) < TRIES:
        rows.append(attempt(ratio))
        if rows[-1]["error"] or abs(rows[-1]["share"] - share) <= CLOSE * share:
            break
        known.append((ratio, rows[-1]["share"]))
        ratio = _next_ratio(known, share)
    return rows


def _next_ratio(known: list[tuple[float, float]], share: float) -> float:
    """The ratio at which the parabola through the nearest points has the share; bisection where it hasn't.

    Cutting all widths by the same ratio leaves a quadratic of it: a weight between two cut layers shrinks
    twice, one with a cut layer at one end only once.
    """
    low = max((r for r, s in known if s < share), default=0.0)
    high = min((r for r, s in known if s > share), default=1.0)
    points = sorted(known, key=lambda point: abs(point[1] - share))[:3]
    if len(points) > 1:
        curve = Polynomial.fit([r for r, _ in points], [s for _, s in points], len(points) - 1)
        roots = map(complex, (curve - share).roots())
        inside = [r.real for r in roots if abs(r.imag) < 1e-9 and low < r.real < high]
        if inside:
            return inside[0]
    return (low + high) / 2


def _attempt(
    python: Path,
    method: str,
    model: Path,
    calibration: Path,
    ratio: float,
    output: Path,
    samples: int | None,
    timeout: float,
) -> dict[str, Any]:
    """One run of the driver, as a row."""
    row: dict[str, Any] = {"method": method, "ratio": ratio, "share": None, "error": None}
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [
        str(python),
        str(_DRIVER),
        str(model),
        str(calibration),
        repr(float(ratio)),
        method,
        str(output),
    ]
    if samples is not None:
        command += ["--samples", str(samples)]
    surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, env=surroundings
        )
    except subprocess.TimeoutExpired:
        return {**row, "error": f"not done after {timeout:g} seconds"}
    except OSError as error:
        return {**row, "error": f"the rival's Python cannot be run: {error}"}
    if done.returncode:
        return {**row, "error": f"ended with status {done.returncode}: {_last(done.stderr)}"}
    try:
        row |= json.loads(_last(done.stdout))
    except ValueError:
        return {**row, "error": f"printed no result: {_last(done.stderr)}"}
    if row["error"] is None:
        left = row["params_after"] if _ONNXSIM[method].shrinks else row["params_after"] - row["zeros_after"]
        row["share"] = left / row["params_before"]
    return row


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _command(command: Sequence[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RivalError(f"{failure}: {_last(done.stderr)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs rivals and prints a JSON line for each; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True, help=".npz, arrays by input name")
    parser.add_argument("--ratios", nargs="+", type=float, default=[], help="shares kept of what is removed")
    parser.add_argument("--params-shares", nargs="+", type=float, default=[], help="shares of the parameters")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--samples", type=int, help="use the first N samples of the data only")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one run may take")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the models")
    args = parser.parse_args(argv)
    asked = [("ratio", value) for value in args.ratios] + [("params", value) for value in args.params_shares]
    if not asked:
        parser.error("give --ratios or --params-shares")
    if outside := [value for _, value in asked if not 0 < value <= 1]:
        parser.error(f"{outside[0]:g} is no share: it must be above 0 and at most 1")
    for method in args.methods:
        for kind, value in asked:
            target = args.output / f"{method}-{kind}-{value:g}.onnx"
            ratio, share = (value, None) if kind == "ratio" else (None, value)
            row = run(method, args.model, args.calib, ratio, target, params_share=share,
                      samples=args.samples, timeout=args.timeout)  # fmt: skip
            print(json.dumps({"model": str(args.model), **row, "output": str(target)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
