# SPDX-License-Identifier: Apache-2.0
"""Runs data through a model segment by segment, so that one segment's weights are in memory at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.data import DataPart, Dataset
from onnxcollapse.calibration.planner import peak_resident
from onnxcollapse.calibration.providers import Provider
from onnxcollapse.calibration.segments import Segment, extract, segments
from onnxcollapse.calibration.sessions import Session, State, adopt
from onnxcollapse.calibration.tape import Tape
from onnxcollapse.model import Model

logger = logging.getLogger(__name__)

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Amendment:
    """What an edited segment needs besides its own feeds.

    Attributes:
        feed: Gives more feeds by batch number and batch.
        states: Tensors that stay on the device from batch to batch, by the names of their inputs.
    """

    feed: Callable[[int, Feeds], Feeds]
    states: Mapping[str, State]


Amend = Callable[[Model], Amendment]
"""Edits a segment's scratch model before it is opened."""


@dataclass(frozen=True)
class Step:
    """One batch that has gone through one segment.

    Attributes:
        part: Part of the data that it belongs to.
        number: Its number in the order of the walk.
        batch: The model's own feeds.
        outputs: What was asked for.
        last: Whether it is the last batch of its part.
        session: Ran it; holds the states.
    """

    part: DataPart
    number: int
    batch: Feeds
    outputs: Feeds
    last: bool
    session: Session


class Walk:
    """A dataset on its way through a model.

    Attributes:
        segments: Where the model is cut.
        place: The segment that comes next.
        tape: Tensors that segments yet to come read.
        limit: About how many samples of each part; None for all.
        held: Names of tensors that are not forgotten, whoever reads them.
        provider: What the last segment ran on; None before the first.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        cuts: Sequence[str] = (),
        *,
        parts: Sequence[DataPart] = ("all",),
        limit: int | None = None,
        provider: str = "auto",
        tape: Tape | None = None,
        place: int = 0,
    ) -> None:
        self._model = model
        self._data, self._parts, self.limit = data, tuple(parts), limit
        self._requested = provider
        self.segments: list[Segment] = segments(model.graph, cuts)
        self.tape = tape or Tape()
        self.held: frozenset[str] = frozenset()
        self.place = place
        self.provider: Provider | None = None

    @property
    def segment(self) -> Segment:
        """The segment that comes next."""
        return self.segments[self.place]

    @property
    def done(self) -> bool:
        """Whether the data is through."""
        return self.place >= len(self.segments)

    def batches(self) -> Iterator[tuple[DataPart, int, Feeds, bool]]:
        """Every batch with its part, its number in the order of the walk, and whether it is its part's last."""
        number = 0
        for part in self._parts:
            batches = iter(self._data.batches(part, self.limit))
            batch = next(batches, None)
            while batch is not None:
                after = next(batches, None)
                yield part, number, batch, after is None
                number, batch = number + 1, after

    def pass_through(
        self,
        model: Model | None = None,
        wanted: Sequence[str] = (),
        *,
        amend: Amend | None = None,
        hold: bool = True,
    ) -> Iterator[Step]:
        """Runs every batch through the segment that comes next, without moving on.

        Args:
            model: Run this one's segment instead; its rewritten nodes lie in this segment only.
            wanted: Tensors of the segment to give out.
            amend: Adds probes and what they read.
            hold: Put what later segments read on the tape; a second pass overwrites the first.

        Yields:
            A step for each batch, as it is computed.
        """
        segment, source = self.segment, model or self._model
        gives = list(segment.gives) if hold else []
        outputs = list(dict.fromkeys([*gives, *wanted]))
        if not outputs and amend is None:
            return
        ends = outputs if amend is None else dict.fromkeys([*outputs, *segment.gives, *segment.outputs])
        types = {name: ir.DataType.from_numpy(self.tape.dtype(name)) for name in segment.reads}
        ranks = {name: self.tape.rank(name) for name in segment.reads}
        scratch = extract(source, segment, list(ends), types, ranks)
        more = None if amend is None else amend(scratch)
        self.tape.drop(gives)
        began = time.perf_counter()
        with adopt(scratch, self._requested, None if more is None else more.states) as session:
            self.provider = session.provider
            for part, number, batch, last in self.batches():
                feeds = {**batch, **{name: self.tape.get(name, number) for name in segment.reads}}
                results = session.run(feeds if more is None else {**feeds, **more.feed(number, batch)})
                for name in gives:
                    self.tape.put(name, results[name])
                yield Step(part, number, batch, results, last, session)
        logger.debug(
            "segment %d of %d: %.2f s, peak resident %d MB so far",
            segment.index + 1, len(self.segments), time.perf_counter() - began, peak_resident() >> 20,
        )  # fmt: skip

    def move_on(self, *, keep: bool = False) -> None:
        """Goes to the next segment and, unless all is to be kept, forgets what no one will ask for any more."""
        self.place += 1
        if keep:
            return
        later = {name for segment in self.segments[self.place :] for name in segment.reads}
        passed = {name for segment in self.segments[: self.place] for name in segment.gives}
        shown = {name for segment in self.segments for name in segment.outputs}
        self.tape.drop(passed - later - shown - self.held)

    def run(self, outputs: Sequence[str] = (), *, keep: bool = False) -> None:
        """Takes the data to the last segment; outputs of the model that are made on the way wait on the tape."""
        while self.place < len(self.segments) - 1:
            made = [
                name for name in outputs if name in self.segment.outputs and name not in self.segment.gives
            ]
            for step in self.pass_through(wanted=made):
                for name in made:
                    self.tape.put(name, step.outputs[name])
            self.move_on(keep=keep)

    def finish(self, outputs: Sequence[str]) -> Iterator[Step]:
        """Runs the last segment and gives the outputs of every batch; may be repeated.

        Args:
            outputs: Outputs of the model, as they were given to `run`.
        """
        here = [name for name in outputs if name in self.segment.outputs]
        before = [name for name in outputs if name not in here]
        for step in self.pass_through(wanted=here, hold=False):
            taped = {name: self.tape.get(name, step.number) for name in before}
            yield replace(step, outputs={n: (step.outputs | taped)[n] for n in outputs})

    def close(self) -> None:
        """Forgets everything on the tape."""
        self.tape.close()
