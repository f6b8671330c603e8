# SPDX-License-Identifier: Apache-2.0
"""Measures many variants of one model in one walk: each differs from it in one segment.

::

    model      s0 -- s1 -- s2 -- s3 -- outputs
    variant a        s1' - s2 -- s3 -- outputs
    variant b              s2' - s3 -- outputs

Only a variant's own segment is opened for it. Behind that it runs through the same sessions as all others, with the
states that it produced, so that n variants cost n changed segments and their suffixes and no more sessions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcollapse.calibration.data import DataPart, Dataset
from onnxcollapse.calibration.segments import Segment, extract, joined
from onnxcollapse.calibration.sessions import Session, adopt
from onnxcollapse.calibration.tape import Tape
from onnxcollapse.calibration.walk import Feeds, Walk
from onnxcollapse.errors import MetricError, ModelError
from onnxcollapse.model import Model, walk
from onnxcollapse.verification import metrics
from onnxcollapse.verification.softmax import Kept
from onnxcollapse.verification.verifier import Verifier


@dataclass(frozen=True)
class Variant:
    """A model that differs from another in one segment.

    Attributes:
        tensors: Names of what the changed nodes compute in the other model, to find the segment.
        change: Edits a model of that segment; gives what is handed back, and why it is not to be measured or None. May
            raise ModelError.
    """

    tensors: frozenset[str]
    change: Callable[[Model], tuple[object, str | None]]


@dataclass
class Outcome:
    """What became of a variant.

    Attributes:
        error: At the outputs; infinite where it could not be measured.
        told: What its change returned.
        problem: Why it could not be measured, or None.
    """

    error: float = float("inf")
    told: object = None
    problem: str | None = None


class Trials:
    """One walk of a model with variants beside it.

    Args:
        model: The model that variants differ from.
        data: The data.
        verifier: Knows the reference, its outputs and the metric.
        points: Where the model may be cut.
        part: The part of the data.
        limit: About how many samples of it.
        provider: See open_session.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        verifier: Verifier,
        points: Sequence[str],
        *,
        part: DataPart = "heldout",
        limit: int | None = None,
        provider: str = "auto",
    ) -> None:
        self._model, self._verifier, self._provider = model, verifier, provider
        self._part: DataPart = part
        self._walk = Walk(model, data, points, parts=[part], limit=limit, provider=provider)
        self._wanted = verifier.wanted(model)
        self._tapes: dict[str, Tape] = {}
        self._metrics: dict[str, metrics.Metric] = {}
        self.outcomes: dict[str, Outcome] = {}

    @property
    def limit(self) -> int | None:
        """About how many samples are used; may be set until the walk begins."""
        return self._walk.limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._walk.limit = limit

    @property
    def segments(self) -> list[Segment]:
        """Where the model is cut."""
        return self._walk.segments

    def place(self, variant: Variant) -> int:
        """The last segment in which a variant differs; it is run there, through all that it differs in."""
        return self._reach(variant)[1]

    def _reach(self, variant: Variant) -> tuple[int, int]:
        """The first and the last segment in which a variant differs."""
        made = [s.index for s in self.segments if not s.makes.isdisjoint(variant.tensors)]
        return (made[0], made[-1]) if made else (0, 0)

    def _stretch(self, variant: Variant) -> Segment:
        """What a variant differs in, as one segment."""
        first, last = self._reach(variant)
        return self.segments[first] if first == last else joined(self.segments, first, last)

    def run(self, variants: Mapping[str, Variant]) -> Iterator[str]:
        """Walks through the model; gives each variant's key when it has been tried in its own segment.

        Whoever iterates gets all `outcomes` when the walk is over.
        """
        stretches = {key: self._stretch(variant) for key, variant in variants.items()}
        homes = {key: self.place(variant) for key, variant in variants.items()}
        self.outcomes = {key: Outcome() for key in variants}
        kept = Kept()  # variants take turns at each batch of the reference
        self._metrics = {key: metrics.metric(self._verifier.pricing_metric, kept) for key in variants}
        try:
            while not self._walk.done:
                self._hold(stretches, homes)
                yield from self._segment(self._walk.segment, variants, stretches, homes)
                self._walk.move_on()
                self._forget()
        finally:
            kept.clear()
            self._walk.close()
            for tape in self._tapes.values():
                tape.close()

    def _hold(self, stretches: Mapping[str, Segment], homes: Mapping[str, int]) -> None:
        """Keeps the states that variants yet to come begin with."""
        later = [stretches[key] for key, home in homes.items() if home > self._walk.place]
        self._walk.held = frozenset(name for stretch in later for name in stretch.reads)

    def _segment(
        self,
        segment: Segment,
        variants: Mapping[str, Variant],
        stretches: Mapping[str, Segment],
        homes: Mapping[str, int],
    ) -> Iterator[str]:
        last = segment.index == len(self.segments) - 1
        alive = [key for key in self._tapes if self.outcomes[key].problem is None]
        outputs = [name for name in segment.outputs if name in self._wanted]
        given = list(dict.fromkeys([*segment.gives, *outputs]))
        if given and (alive or not last):
            with self._open(extract(self._model, segment, given, self._types(segment))) as session:
                self._through(session, segment, given, alive, last=last)
        for key in (key for key, home in homes.items() if home == segment.index):
            self._own(key, variants[key], stretches[key], last=last)
            yield key

    def _through(
        self, session: Session, segment: Segment, given: Sequence[str], alive: Sequence[str], *, last: bool
    ) -> None:
        """Runs the model's own states and those of the variants before it through one segment."""
        for reference, (_, number, batch, _) in self._beside(last=last):
            if not last:
                self._put(
                    self._walk.tape, session.run(self._feeds(self._walk.tape, segment, number, batch)), given
                )
            for key in list(alive):
                if self.outcomes[key].problem is not None:
                    continue
                results = session.run(self._feeds(self._tapes[key], segment, number, batch))
                if reference is None:
                    self._put(self._tapes[key], results, given)
                else:
                    self._measure(key, results, reference, number, batch)
        for key in alive if last else ():
            self._finish(key)

    def _own(self, key: str, variant: Variant, segment: Segment, *, last: bool) -> None:
        """Runs a variant through what it differs in."""
        outcome = self.outcomes[key]
        outputs = [name for name in segment.outputs if name in self._wanted]
        given = list(dict.fromkeys([*segment.gives, *outputs]))
        ends = list(dict.fromkeys([*segment.gives, *segment.outputs]))
        tape = self._walk.tape
        ranks = {name: tape.rank(name) for name in segment.reads if name in tape}
        trial = extract(self._model, segment, ends, self._types(segment) | self._types_of(ends), ranks)
        tape = self._tapes[key] = Tape(self._walk.tape)
        try:
            with walk.collection_paused():
                outcome.told, outcome.problem = variant.change(trial)
            if outcome.problem is not None:
                return
            missing = [name for name in given if name not in {value.name for value in trial.graph.outputs}]
            if missing:
                raise ModelError(f"the rewrite takes away tensor {missing[0]!r}, which others read")
            with self._open(trial) as session:
                for reference, (_, number, batch, _) in self._beside(last=last):
                    results = session.run(self._feeds(self._walk.tape, segment, number, batch))
                    if reference is None:
                        self._put(tape, results, given)
                    else:
                        self._measure(key, results, reference, number, batch)
            if last:
                self._finish(key)
        except (MetricError, ModelError) as problem:
            outcome.problem = str(problem)

    def _beside(self, *, last: bool) -> Iterator[tuple[Feeds | None, tuple[DataPart, int, Feeds, bool]]]:
        """Every batch, in the last segment with the reference's outputs, which are read to their end to be kept."""
        references: Iterable[Feeds | None] = itertools.repeat(None)
        if last:
            references = self._verifier.references(self._part, self._walk.limit)
        return zip(references, self._walk.batches(), strict=False)

    def _measure(self, key: str, results: Feeds, reference: Feeds, number: int, batch: Feeds) -> None:
        tape = self._tapes[key]
        outputs = {
            name: results[name] if name in results else tape.get(name, number) for name in self._wanted
        }
        try:
            self._metrics[key].update(outputs, reference, batch)
        except (MetricError, ModelError) as problem:
            self.outcomes[key].problem = str(problem)

    def _finish(self, key: str) -> None:
        if self.outcomes[key].problem is None:
            self.outcomes[key].error = self._metrics[key].value()

    def _open(self, scratch: Model) -> Session:
        return adopt(scratch, self._provider)

    def _types(self, segment: Segment) -> dict[str, ir.DataType]:
        return self._types_of(segment.reads)

    def _types_of(self, names: Sequence[str]) -> dict[str, ir.DataType]:
        """Element types of tensors that wait on the tape; an edited segment has to declare what it gives."""
        tape = self._walk.tape
        return {name: ir.DataType.from_numpy(tape.dtype(name)) for name in names if name in tape}

    @staticmethod
    def _feeds(tape: Tape, segment: Segment, number: int, batch: Feeds) -> Feeds:
        return {**batch, **{name: tape.get(name, number) for name in segment.reads}}

    @staticmethod
    def _put(tape: Tape, results: Feeds, names: Sequence[str]) -> None:
        for name in names:
            tape.put(name, results[name])

    def _forget(self) -> None:
        """Lets go of states that no segment will read any more."""
        left = self._walk.segments[self._walk.place :]
        needed = {name for segment in left for name in segment.reads} | set(self._wanted)
        for key, tape in self._tapes.items():
            tape.keep_only(() if self.outcomes[key].problem is not None else needed)
