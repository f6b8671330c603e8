# SPDX-License-Identifier: Apache-2.0
"""Collects statistics: one run over the data, sums only, fp64 on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import NoReturn

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.accumulators import Accumulator
from onnxcollapse.calibration.additions import PREFIX
from onnxcollapse.calibration.data import Dataset
from onnxcollapse.calibration.masks import batch_rows, row_mask
from onnxcollapse.calibration.probes import ROWS_INPUT, ProbeSet
from onnxcollapse.calibration.segments import Segment
from onnxcollapse.calibration.sessions import UNREADABLE, main_values
from onnxcollapse.calibration.statistics import Cross, Gram, Part, Ref, Request, Result, Statistics
from onnxcollapse.calibration.tape import Tape
from onnxcollapse.calibration.walk import Amendment, Feeds, Walk
from onnxcollapse.errors import ModelError
from onnxcollapse.model.model import Model
from onnxcollapse.model.operations import concrete
from onnxcollapse.structure.channels import element_type

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all) after each batch."""

READ_OUT = 8
"""Batches whose sums gather in fp32 on the device before the host adds them up in fp64."""


def collect(
    model: Model,
    requests: Iterable[Request],
    data: Dataset,
    *,
    provider: str = "auto",
    reference: Model | None = None,
    parts: Sequence[Part] = ("fit", "heldout"),
    cuts: Sequence[str] = (),
    progress: Progress | None = None,
) -> Statistics:
    """Runs the data through a model, and a reference beside it, and sums what was asked for.

    Only the nodes the probes need run, and only sums leave the session.

    Args:
        model: The model that refs with source "model" name tensors of.
        requests: What to sum; equal requests are computed once.
        data: The calibration data.
        provider: See open_session.
        reference: The model that refs with source "reference" name tensors of; None when there are none.
        parts: The parts of the data to run.
        cuts: Tensors to cut the models at, so that one segment's weights are in memory at a time.
        progress: Told how far the run is.

    Returns:
        The sums by part and request.

    Raises:
        ModelError: A tensor cannot be probed, or the model cannot run.
        DataError: A tensor becomes NaN or infinite on this data.
    """
    results: dict[tuple[Part, Request], Result] = {}
    sweep = Sweep(model, requests, data, provider=provider, reference=reference, parts=parts, cuts=cuts)
    sweep.tell = progress
    for _, statistics in sweep:
        results |= statistics.results
    return Statistics(results)


class Sweep:
    """Goes through a model segment by segment and gives each one's statistics before the next is run.

    Whoever iterates may rewrite the segment it has just got the statistics of and say so by `rewritten`: what
    later segments see then comes from the rewritten model, while targets come from the reference, which walks beside
    it.

    Attributes:
        tell: Told how far the run is.
    """

    def __init__(
        self,
        model: Model,
        requests: Iterable[Request],
        data: Dataset,
        *,
        provider: str = "auto",
        reference: Model | None = None,
        parts: Sequence[Part] = ("fit", "heldout"),
        cuts: Sequence[str] = (),
        room: int | None = None,
    ) -> None:
        """See collect for the other arguments; a segment runs once for each share of its requests that fits `room`.

        `room` is the bytes that the sums gathered at a time may take, None for any; one request's may take more.
        """
        self._room = room
        self._requests = tuple(dict.fromkeys(requests))
        self._model, self._parts, self._data = model, parts, data
        self.tell: Progress | None = None
        beside = reference is not None and any(ref.source == "reference" for ref in _all_refs(self._requests))
        # What a rewrite took away from one of the two cannot cut the other: they walk side by side.
        graphs = [model.graph] if reference is None or not beside else [model.graph, reference.graph]
        shared = set.intersection(*(set(main_values(graph)) for graph in graphs))
        cuts = [name for name in cuts if name in shared]
        self._walk = Walk(model, data, cuts, parts=parts, provider=provider)
        self._beside = (
            Walk(reference, data, cuts, parts=parts, provider=provider) if reference and beside else None
        )
        self._reference = reference if self._beside else None
        self._extra = Tape()
        self._rewritten: Model | None = None
        self._done = 0

    def rewritten(self, model: Model) -> None:
        """Tells that the current segment was rewritten; later segments are to run on what `model` makes of it."""
        self._rewritten = model

    def __iter__(self) -> Iterator[tuple[Segment, Statistics]]:
        homes = self._homes
        last = max(homes.values(), default=-1)
        try:
            while self._walk.place <= last:
                place = self._walk.place
                later = [request for request in self._requests if homes[request] > place]
                shares = self._shares.get(place, [[]])
                yield self._walk.segment, self._statistics(shares, later, hold=place < last)
                for share in shares[1:]:
                    yield self._walk.segment, self.again(self._rewritten or self._model, share)
                self._advance(hold=place < last)
        finally:
            self._walk.close()
            self._extra.close()
            if self._beside is not None:
                self._beside.close()

    @property
    def spare(self) -> int | None:
        """Bytes of the room that are left beside the widest share; None for any."""
        if self._room is None:
            return None
        shares = [share for found in self._shares.values() for share in found]
        return max(self._room - max((sum(map(self._bytes, share)) for share in shares), default=0), 0)

    @functools.cached_property
    def _shares(self) -> dict[int, list[list[Request]]]:
        """The requests of each segment, in their order, in shares whose sums fit."""
        own: dict[int, list[Request]] = {}
        for request, place in self._homes.items():
            own.setdefault(place, []).append(request)
        return {place: self._divided(requests) for place, requests in own.items()}

    def _divided(self, requests: Sequence[Request]) -> list[list[Request]]:
        shares: list[list[Request]] = [[]]
        held = 0
        for request in requests:
            size = self._bytes(request)
            if self._room is not None and shares[-1] and held + size > self._room:
                shares.append([])
                held = 0
            shares[-1].append(request)
            held += size
        return shares

    def _bytes(self, request: Request) -> int:
        return 0 if self._room is None else _sum_bytes(request, self._widths)

    @functools.cached_property
    def _widths(self) -> Mapping[tuple[str, int], int]:
        """Channels of every tensor, by name and axis; shapes that exporters leave out are inferred for one sample."""
        graph = concrete(self._model, shapes=self._data.shapes(self._model))
        found = {}
        for info in (*graph.input, *graph.output, *graph.value_info):
            dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
            for axis, width in enumerate(dims):
                found[info.name, axis] = found[info.name, axis - len(dims)] = width
        return found

    def _advance(self, *, hold: bool) -> None:
        rewritten, self._rewritten = self._rewritten, None
        if rewritten is not None and hold:
            for _ in self._walk.pass_through(rewritten):
                pass
        self._walk.move_on()
        if self._beside is not None:
            self._beside.move_on()

    @functools.cached_property
    def _homes(self) -> dict[Request, int]:
        """The segment at which everything that a request needs is there."""
        made = {name: s.index for s in self._walk.segments for name in s.makes}
        beside = self._beside.segments if self._beside is not None else []
        made |= {f"reference {name}": segment.index for segment in beside for name in segment.makes}
        return {
            request: max((made.get(self._key(ref), 0) for ref in _all_refs([request])), default=0)
            for request in self._requests
        }

    def _key(self, ref: Ref) -> str:
        """Names a tensor across both models; one that the reference lacks is the model's."""
        beside = self._beside.segments if self._beside is not None and ref.source == "reference" else []
        return (
            f"reference {ref.value}" if any(ref.value in segment.makes for segment in beside) else ref.value
        )

    def again(self, model: Model, requests: Sequence[Request]) -> Statistics:
        """Statistics of the current segment once more, on what was rewritten in it so far.

        Args:
            model: The model as it is now.
            requests: Some of those of the current segment.
        """
        return self._collected(model, requests, (), hold=False)

    def _statistics(
        self, shares: Sequence[Sequence[Request]], later: Sequence[Request], *, hold: bool
    ) -> Statistics:
        """Those of the first share; of the reference, what all of them are about is kept."""
        made = self._walk.segment.makes
        refs = (ref for ref in _all_refs(later) if ref.value in made and self._key(ref) == ref.value)
        kept = list(dict.fromkeys(ref.value for ref in refs))  # a tensor is asked for in several ways
        self._run_beside([request for share in shares for request in share], later, hold=hold)
        if shares[0]:
            return self._collected(self._model, shares[0], kept, hold=hold)
        for step in self._walk.pass_through(wanted=kept, hold=hold):
            self._note(kept, step.outputs)
        return Statistics()

    def _collected(
        self, model: Model, requests: Sequence[Request], kept: Iterable[str], *, hold: bool
    ) -> Statistics:
        accumulators = {(part, request): Accumulator(request) for part in self._parts for request in requests}
        probing, unread = _Probing(self, requests, kept, hold=hold), 0
        for step in self._walk.pass_through(model, amend=probing.amend, hold=hold):
            unread += 1
            if step.last or unread == READ_OUT:
                states, unread = step.session.read(restart=step.last), 0
                for (part, _), accumulator in accumulators.items():
                    if part == step.part:
                        accumulator.add(probing.probes, states)
            self._note(kept, step.outputs)
            self._tell(batch_rows(step.batch))
        return Statistics({key: accumulator.result() for key, accumulator in accumulators.items()})

    def _note(self, kept: Iterable[str], outputs: Feeds) -> None:
        """Keeps tensors that a request of a later segment is about."""
        for name in kept:
            self._extra.put(name, outputs[name])

    def _run_beside(self, own: Sequence[Request], later: Sequence[Request], *, hold: bool) -> None:
        """Takes the reference through the same segment and keeps the targets that it makes."""
        if self._beside is None:
            return
        made = self._beside.segment.makes
        names = [
            ref.value
            for ref in _all_refs([*own, *later])
            if self._key(ref) != ref.value and ref.value in made
        ]
        for step in self._beside.pass_through(wanted=list(dict.fromkeys(names)), hold=hold):
            for name in dict.fromkeys(names):
                self._extra.put(f"reference {name}", step.outputs[name])

    def _tell(self, rows: int) -> None:
        total = sum(self._data.count(part) for part in self._parts) * max(len(self._walk.segments), 1)
        self._done = min(self._done + rows, total)
        if self.tell is not None:
            self.tell(self._done, total)


class _Probing:
    """The probes of one segment, and what has to be fed to them."""

    def __init__(
        self, sweep: Sweep, requests: Sequence[Request], wanted: Iterable[str], *, hold: bool
    ) -> None:
        self._sweep, self._requests = sweep, requests
        segment = sweep._walk.segment
        self._keep = list(dict.fromkeys([*(segment.gives if hold else ()), *wanted]))
        self._fed: dict[str, str] = {}
        self.probes: ProbeSet

    def amend(self, scratch: Model) -> Amendment:
        """Adds inputs for tensors that the segment does not make, and the probes."""
        names = {}
        for ref in _all_refs(self._requests):
            key = self._sweep._key(ref)
            if key != ref.value or ref.value not in main_values(scratch.graph):
                name = self._supply(scratch, key, ref)
                names[ref] = name
        inputs = {value.name for value in self._sweep._model.graph.inputs}
        masked = "attention_mask" in inputs and self._sweep._data.padded
        self.probes = ProbeSet(scratch, names, masked=masked)
        self.probes.add(self._requests, keep=self._keep)
        return Amendment(self._feed, self.probes.states)

    def _supply(self, scratch: Model, key: str, ref: Ref) -> str:
        """Adds an input for a tensor of an earlier segment, of the reference, or of the model's own inputs."""
        if key in self._fed.values():
            return next(name for name, known in self._fed.items() if known == key)
        owner = self._sweep._model if key == ref.value else self._sweep._reference
        value = main_values(owner.graph).get(ref.value) if owner is not None else None
        if value is None:
            _refuse(ref, self._sweep._model)
        name = ref.value if value.is_graph_input() and key == ref.value else f"{PREFIX}_fed_{len(self._fed)}"
        shape = None if value.shape is None else value.shape.copy()
        tape = self._sweep._extra
        known = ir.DataType.from_numpy(tape.dtype(key)) if key in tape else _readable(element_type(value))
        fed = ir.Value(name=name, type=ir.TensorType(known), shape=shape)
        scratch.graph.inputs.append(fed)
        self._fed[name] = key
        return name

    def _feed(self, number: int, batch: Feeds) -> Feeds:
        tape = self._sweep._extra
        feeds = {name: tape.get(key, number) for name, key in self._fed.items() if key in tape}
        if self.probes.needs_rows:
            mask = row_mask(batch)
            kept = np.empty(0, np.float32) if mask is None else mask.reshape(-1).astype(np.float32)
            feeds[ROWS_INPUT] = np.append(kept, np.float32(1))
        return feeds


def _readable(dtype: ir.DataType | None) -> ir.DataType:
    """The type in which a session gives a tensor out."""
    known = dtype or ir.DataType.FLOAT
    return ir.DataType.FLOAT if known in UNREADABLE else known


def _refuse(ref: Ref, model: Model) -> NoReturn:
    if any(ref.value in main_values(body) for body in model.graph.subgraphs()):
        raise ModelError(f"tensor {ref.value!r} lies in a subgraph (If, Loop, Scan) and cannot be probed")
    raise ModelError(f"tensor {ref.value!r} is not in the model's main graph; request another")


def _sum_bytes(request: Request, known: Mapping[tuple[str, int], int]) -> int:
    """About what the sums of a request take while they are gathered and read: fp32 and fp64 halves, a whole result."""
    widths = [
        known.get((ref.value, ref.axis), 0) * (prod(ref.patches.window.kernel_shape) if ref.patches else 1)
        for ref in request.refs
    ]
    if isinstance(request, Gram):
        return 32 * sum(widths) ** 2
    return 32 * widths[0] * widths[-1] if isinstance(request, Cross) else 0


def _all_refs(requests: Iterable[Request]) -> list[Ref]:
    return list(dict.fromkeys(part for request in requests for ref in request.refs for part in ref.parts))
