# SPDX-License-Identifier: Apache-2.0
"""How long stretches of a model take on a provider: measured once for each shape that occurs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcollapse.bench.eviction import eviction, passage
from onnxcollapse.bench.likeness import SMALL_INDEX, likeness
from onnxcollapse.bench.timing import interleaved
from onnxcollapse.calibration.segments import Segment, extract
from onnxcollapse.calibration.sessions import Session, adopt, main_values, open_session
from onnxcollapse.errors import ModelError, OnnxCollapseError
from onnxcollapse.model import Model, size
from onnxcollapse.model.operations import concrete

LIMIT = 10.0
"""Seconds that the rounds of one comparison should not exceed."""


@dataclass(frozen=True)
class Kind:
    """Shape and element type of a tensor for the sample that is run."""

    shape: tuple[int, ...]
    dtype: ir.DataType


@dataclass(frozen=True)
class _Stretch:
    """A model of its own, what it is fed, and where it is from.

    Attributes:
        whole: The model that it is a part of.
        rest: Bytes to read between two runs, in the place of the rest of the model.
        computed: Inputs that are fed what the whole model computes there.
    """

    model: Model
    feeds: dict[str, np.ndarray]
    key: str
    whole: Model
    rest: int = 0
    computed: tuple[str, ...] = ()


class StretchTimer:
    """Measures stretches of models on one sample; equal ones are measured once, however often they occur.

    Attributes:
        measured: How many models have been timed so far.
    """

    def __init__(
        self,
        sample: Mapping[str, np.ndarray],
        provider: str = "auto",
        *,
        rounds: int = 9,
        warmup: int = 3,
        repeats: int = 5,
        min_seconds: float = 0.002,
    ) -> None:
        """Prepares a timer; nothing runs yet.

        Args:
            sample: Feeds of one sample, or of one batch where the models fix its size, by input name.
            provider: See open_session.
            rounds: Turns of each stretch; the median over them counts (see Timing.steady).
            warmup: Untimed calls before.
            repeats: Runs in a turn.
            min_seconds: There are more where a turn would not last about so long.
        """
        self._sample, self._provider = dict(sample), provider
        self._rounds, self._warmup = rounds, warmup
        self._repeats, self._min_seconds = repeats, min_seconds
        self._known: dict[tuple[str, ...], tuple[float, ...]] = {}
        self.measured = 0

    def tensors(self, model: Model) -> dict[str, Kind]:
        """Shape and type that a model's tensors have for the sample, as far as they can be inferred.

        Those of a model may be given to several measurements of its stretches.
        """
        names = {spec.name for spec in (*model.signature().inputs, *model.signature().overridable)}
        shapes = {name: array.shape for name, array in self._sample.items() if name in names}
        graph = concrete(model, shapes=shapes)
        found = {}
        for info in [*graph.input, *graph.value_info, *graph.output]:
            tensor = info.type.tensor_type
            settled = tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)
            if settled and tensor.elem_type:
                shape = tuple(dim.dim_value for dim in tensor.shape.dim)
                found[info.name] = Kind(shape, ir.DataType(tensor.elem_type))
        return found

    def seconds(
        self, model: Model, inputs: Sequence[str], output: str, tensors: Mapping[str, Kind] | None = None
    ) -> float:
        """Median seconds of the stretch of a model that lies between tensors, on random numbers.

        Args:
            model: The model.
            inputs: Names of the tensors that the stretch reads, constants left out.
            output: Name of the tensor that it makes.
            tensors: What `tensors` returned for this model.

        Raises:
            ModelError: The stretch is not bounded by these tensors, a shape is not known, or it does not run.
        """
        return self._time([self._cut(model, inputs, output, tensors or self.tensors(model))])[0]

    def compare(
        self,
        a: Model,
        b: Model,
        inputs: Sequence[str],
        output: str,
        tensors: Mapping[str, Kind] | None = None,
    ) -> tuple[float, float]:
        """Median seconds of the stretches of two models between the same tensors, measured in turns.

        Args:
            a: A model.
            b: Another; it need not have inputs that it does not read, and those that it has are shaped as in `a`.
            inputs: As for `seconds`.
            output: As for `seconds`.
            tensors: What `tensors` returned for `a`.

        Raises:
            ModelError: As for `seconds`.
        """
        kinds = tensors or self.tensors(a)
        there = main_values(b.graph)
        left = self._cut(a, inputs, output, kinds)
        right = self._cut(b, [name for name in inputs if name in there], output, kinds)
        seconds = self._time([left, right])
        return seconds[0], seconds[1]

    def whole(self, model: Model) -> float:
        """Median seconds of a whole model on the sample; raises ModelError where it does not run."""
        return self._time([self._entire(model)])[0]

    def compare_whole(self, a: Model, b: Model, *, again: bool = False) -> tuple[float, float]:
        """Median seconds of two whole models on the sample, measured in turns.

        Args:
            a: A model.
            b: Another.
            again: Measure although equal models have been measured before.

        Raises:
            ModelError: One of them does not run.
        """
        pair = [self._entire(a), self._entire(b)]
        if again:
            self._known.pop(tuple(stretch.key for stretch in pair), None)
        seconds = self._time(pair)
        return seconds[0], seconds[1]

    def _entire(self, model: Model) -> _Stretch:
        return _Stretch(model.clone(), self._sample, likeness(model, self._sample), model)

    def _cut(self, model: Model, inputs: Sequence[str], output: str, tensors: Mapping[str, Kind]) -> _Stretch:
        there = main_values(model.graph)
        missing = next((name for name in (*inputs, output) if name not in there), None)
        if missing is not None:
            raise ModelError(f"the model has no tensor '{missing}' to cut at; name another")
        unknown = next((name for name in inputs if name not in tensors), None)
        if unknown is not None:
            raise ModelError(f"the shape of '{unknown}' cannot be inferred; measure the whole model")
        names = tuple(dict.fromkeys(inputs))
        segment = Segment(0, (), names, (), (), frozenset())
        try:
            part = extract(model, segment, [output], {name: tensors[name].dtype for name in names})
        except ValueError as error:
            raise ModelError(f"'{output}' needs more than {', '.join(names)}: {error}") from error
        feeds, computed = self._feeds(part, tensors)
        rest = passage(size(model).bytes - size(part).bytes)
        return _Stretch(part, feeds, f"{likeness(part, feeds)} {rest}", model, rest, computed)

    def _feeds(
        self, part: Model, tensors: Mapping[str, Kind]
    ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """The sample where the stretch reads it; elsewhere normal numbers, and zeros for integers and bools."""
        random = np.random.default_rng(0)
        feeds, computed = {}, []
        for value in part.graph.inputs:
            name = value.name or ""
            if value.is_initializer():
                continue
            if name in self._sample:
                feeds[name] = self._sample[name]
            elif value.dtype is not None and value.dtype.is_floating_point():
                feeds[name] = random.standard_normal(tensors[name].shape).astype(value.dtype.numpy())
            elif value.dtype is not None and value.dtype != ir.DataType.STRING:
                feeds[name] = np.zeros(tensors[name].shape, value.dtype.numpy())
                if feeds[name].size <= SMALL_INDEX and value.dtype.is_integer():
                    computed.append(name)  # it may be a shape, which zeros are none of
            else:
                raise ModelError(f"'{name}' is {value.dtype}, which cannot be drawn; measure the whole model")
        return feeds, tuple(computed)

    def _time(self, stretches: Sequence[_Stretch]) -> tuple[float, ...]:
        """Times stretches in turns, each that differs once."""
        different = {stretch.key: stretch for stretch in stretches}
        key = tuple(different)
        if key not in self._known:
            with contextlib.ExitStack() as stack:
                calls = []
                for stretch in different.values():
                    session, feeds = self._open(stretch)
                    stack.enter_context(session)
                    calls.append(session.prepared(feeds))
                rest = max(stretch.rest for stretch in stretches)
                timings = interleaved(
                    calls,
                    rounds=self._rounds,
                    warmup=self._warmup,
                    repeats=self._repeats,
                    min_seconds=self._min_seconds,
                    between=stack.enter_context(eviction(rest, self._provider)),
                    limit=LIMIT,
                )
            self.measured += len(timings)
            self._known[key] = tuple(timing.steady for timing in timings)
        seconds = dict(zip(key, self._known[key], strict=True))
        return tuple(seconds[stretch.key] for stretch in stretches)

    def _open(self, stretch: _Stretch) -> tuple[Session, dict[str, np.ndarray]]:
        """Opens a session and runs it once."""
        feeds = stretch.feeds
        if stretch.computed:
            with open_session(stretch.whole, provider=self._provider, outputs=stretch.computed) as source:
                feeds = {**feeds, **source.run(self._sample)}
        session = adopt(stretch.model.clone(), self._provider)
        try:
            session.run(feeds)
        except OnnxCollapseError:
            session.close()
            raise
        return session, feeds
