# SPDX-License-Identifier: Apache-2.0
"""What planning costs: time of every stage against one plain forward run of the same data.

    taskset -c 0 python -m benchmarks.planning -o out                     # SmolLM2-135M, 64 x 256 tokens, 4 layers out
    python -m benchmarks.planning -o out --samples 16 --layers 2

All is measured in one process: a forward run, the optimal plan with the repair that follows it (`collapse-layers`,
`refit`), and a forward run again, since the machine is noisy. `cpu` and `wall` of a stage are ratios to the mean of
both forward runs; pinned to one core the two agree where nothing else runs there. `plan` is everything up to the
measurement of the chosen plan, `all` also what repairs it and the exact rewrites and measurements behind that.
`forward` gives seconds, as they are. What belongs to no stage counts as `rest`.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import machine
from benchmarks.layers import METHODS
from benchmarks.rows import aligned, run
from onnxcollapse import Budget, Target, optimize
from onnxcollapse.calibration import Dataset, open_data, open_session
from onnxcollapse.model import Model, size
from onnxcollapse.rewriting import registry
from onnxcollapse.rewriting.exact import ExactStage
from onnxcollapse.rewriting.fitting import Fitter
from onnxcollapse.rewriting.lossy import LossyStage
from onnxcollapse.rewriting.pipeline import Result
from onnxcollapse.rewriting.pricing import Pricer
from onnxcollapse.structure.spans import Span, first_projection, streams
from onnxcollapse.verification import Verifier

Row = dict[str, Any]

STAGES: dict[str, tuple[type, str]] = {
    "exact": (ExactStage, "run"),
    "statistics": (LossyStage, "_candidates"),
    "prices": (Pricer, "price"),
    "fit": (Fitter, "realize"),
    "repair": (Fitter, "repair"),
    "measure": (Verifier, "error"),
}
"""What a stage is called here, and the call that it is."""


@dataclass(frozen=True)
class Moment:
    """A point in time: CPU seconds of the process, and seconds on the wall."""

    cpu: float
    wall: float

    @classmethod
    def now(cls) -> Moment:
        """This one."""
        return cls(time.process_time(), time.perf_counter())

    def __sub__(self, other: Moment) -> Moment:
        return Moment(self.cpu - other.cpu, self.wall - other.wall)

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.cpu + other.cpu, self.wall + other.wall)

    def over(self, other: Moment) -> Row:
        """Both as ratios."""
        return {"cpu": round(self.cpu / other.cpu, 2), "wall": round(self.wall / other.wall, 2)}


NOTHING = Moment(0.0, 0.0)


class Watch:
    """Times calls of some methods; one inside another counts for the outer one alone.

    Attributes:
        calls: Stage, begin and end of each call, in order.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Moment, Moment]] = []
        self._inside = False

    @contextmanager
    def on(self, stages: dict[str, tuple[type, str]]) -> Iterator[None]:
        """Watches methods by the name of their stage."""
        with ExitStack() as stack:
            for stage, (owner, name) in stages.items():
                stack.enter_context(mock.patch.object(owner, name, self._timed(stage, getattr(owner, name))))
            yield

    def _timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **options: Any) -> Any:
            if self._inside:
                return call(*args, **options)
            self._inside, begin = True, Moment.now()
            try:
                return call(*args, **options)
            finally:
                self._inside = False
                self.calls.append((stage, begin, Moment.now()))

        return timed


def rows(
    calls: Sequence[tuple[str, Moment, Moment]], whole: tuple[Moment, Moment], forward: Moment
) -> list[Row]:
    """A row for each stage, for the plan and for all.

    Args:
        calls: As a watch has them.
        whole: Begin and end of everything.
        forward: Of one plain run.
    """
    begin, end = whole
    chosen = next((stop for stage, _, stop in _behind(calls, "fit") if stage == "measure"), end)
    spent: dict[str, Moment] = {}
    for stage, start, stop in calls:
        where = "plan" if stop.wall <= chosen.wall else "behind it"
        spent[f"{where}: {stage}"] = spent.get(f"{where}: {stage}", NOTHING) + (stop - start)
    rest = (end - begin) - sum(spent.values(), NOTHING)
    found = [{"stage": "forward", "cpu": round(forward.cpu, 1), "wall": round(forward.wall, 1)}]
    found += [{"stage": stage, **took.over(forward)} for stage, took in [*spent.items(), ("rest", rest)]]
    found.append({"stage": "plan", **(chosen - begin).over(forward)})
    return [*found, {"stage": "all", **(end - begin).over(forward)}]


def _behind(calls: Sequence[tuple[str, Moment, Moment]], stage: str) -> list[tuple[str, Moment, Moment]]:
    """The calls behind the first one of a stage; all where there is none."""
    place = next((number for number, call in enumerate(calls) if call[0] == stage), -1)
    return list(calls[place + 1 :])


def measure(folder: Path, samples: int, layers: int) -> list[Row]:
    """Plans in this process."""
    model = Model.load(folder / "model.onnx")
    with np.load(folder / "calib.npz") as arrays:
        data = open_data({name: arrays[name][:samples] for name in arrays.files}, model)
    before = _forward(model, data)
    watch = Watch()
    with watch.on(STAGES):
        begin = Moment.now()
        result = _plan(model, data, layers)
        end = Moment.now()
    after = _forward(model, data)
    forward = Moment((before.cpu + after.cpu) / 2, (before.wall + after.wall) / 2)
    facts = {"samples": samples, "layers": layers, "cores": len(os.sched_getaffinity(0))}
    spread = {"forwards": [[round(one.cpu, 1), round(one.wall, 1)] for one in (before, after)]}
    reached = {"error": result.error, "met": result.met, **spread}
    found = [facts | row for row in rows(watch.calls, (begin, end), forward)]
    return [*found[:-1], found[-1] | reached]


def _forward(model: Model, data: Dataset) -> Moment:
    """One plain run of all data, the session open."""
    with open_session(model, provider="cpu") as session:
        begin = Moment.now()
        for batch in data.batches("all"):
            session.run(batch)
        return Moment.now() - begin


def _plan(model: Model, data: Dataset, layers: int) -> Result:
    """The optimal plan with so many layers gone, a map in the place of each if need be."""
    stream = max(streams(model.graph), key=lambda found: len(found.layers))
    reader = first_projection(Span(stream.layers[:1], 1))
    width = 0 if reader is None else reader.in_features
    saved = layers * (stream.layers[0].params - width**2 - width)
    budget = Budget(None, "kl", Target("params", 1 - 0.999 * saved / size(model).params))
    passes = registry.chosen(["cleanup", *METHODS["fit+refit"]])
    return optimize(model, data, budget=budget, passes=passes, provider="cpu")


def table(found: Sequence[Row]) -> str:
    """Rows as text."""
    names = ("stage", "cpu", "wall")
    return "\n".join(aligned([names, *(tuple(str(row[name]) for name in names) for row in found)]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--samples", type=int, default=64, help="windows of 256 tokens")
    parser.add_argument("--layers", type=int, default=4, help="layers to take out")
    args = parser.parse_args(arguments)
    folder = args.output / "smollm2"
    run("-m", "models.smollm2", "-o", str(folder))
    found = measure(folder, args.samples, args.layers)
    print(table(found))
    print(machine.write("planning", found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
