# SPDX-License-Identifier: Apache-2.0
"""Measures candidates against one reference on the same data: the global gate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from onnxcollapse.calibration.data import DataPart, Dataset
from onnxcollapse.calibration.masks import is_cache_name
from onnxcollapse.calibration.providers import Provider, chain
from onnxcollapse.calibration.tape import Tape
from onnxcollapse.calibration.walk import Feeds, Walk
from onnxcollapse.model.model import Model
from onnxcollapse.verification import metrics

CACHE_BYTES = 256 << 20
"""Reference outputs up to this size are kept, larger ones computed again."""


@dataclass(frozen=True)
class States:
    """What a model's data is at each of its cut points, so that a candidate need not run from the start.

    Attributes:
        points: The cut points.
        makes: The tensors computed before the first point, between each two, and behind the last.
        walk: Holds the states.
        part: The part of the data.
        limit: How many samples of it.
    """

    points: tuple[str, ...]
    makes: tuple[frozenset[str], ...]
    walk: Walk
    part: DataPart
    limit: int | None

    def place(self, tensors: Iterable[str]) -> int:
        """The first segment in which one of these tensors is computed; 0 when none is known."""
        wanted = set(tensors)
        return next((index for index, made in enumerate(self.makes) if made & wanted), 0)

    def __enter__(self) -> States:
        return self

    def __exit__(self, *exception: object) -> None:
        self.walk.close()


class Verifier:
    """Measures candidates against one reference on the same data.

    The reference's outputs are kept where they are small; else the states before its last segment are, on disk.

    Attributes:
        metric: Its metric's spec.
        cuts: Where models are cut to be run.
    """

    def __init__(
        self,
        reference: Model,
        data: Dataset,
        metric: str = "rel-l2",
        provider: str = "auto",
        cuts: Sequence[str] = (),
    ) -> None:
        """Prepares a verifier; the reference runs when it is first needed.

        Args:
            reference: The model the candidates come from.
            data: Data for it.
            metric: Metric spec.
            provider: See open_session; all models run on it.
            cuts: Tensors to cut the models at, so that one segment's weights are in memory at a time.

        Raises:
            MetricError: The metric is unknown.
        """
        self.metric, self.cuts = metric, tuple(cuts)
        metrics.metric(metric)
        self._reference = reference.clone()
        self._data, self._provider = data, provider
        self._walks: dict[tuple[DataPart, int | None], Walk] = {}
        self._cache: dict[tuple[DataPart, int | None], list[Feeds]] = {}
        self._cached_bytes = 0
        self._obtained: Provider | None = None

    @property
    def provider(self) -> Provider:
        """What models run on: as the last one did, or as one would."""
        return self._obtained or Provider(self._provider, chain(self._provider)[0])

    def error(self, model: Model, part: DataPart = "heldout", limit: int | None = None) -> float:
        """The metric's error of a candidate at its outputs.

        Args:
            model: The candidate.
            part: The part of the data.
            limit: About how many samples of it, None for all.

        Returns:
            The error; infinite when an output becomes NaN.

        Raises:
            MetricError: An output that is no KV cache is missing or has another shape.
            ModelError: The candidate cannot run.
        """
        result = metrics.metric(self.metric)
        walk = Walk(model, self._data, self.cuts, parts=[part], limit=limit, provider=self._provider)
        for batch, outputs, reference in self._pairs(walk, model, part, limit):
            result.update(outputs, reference, batch)
        return result.value()

    def states(
        self, model: Model, points: Sequence[str], part: DataPart = "heldout", limit: int | None = None
    ) -> States:
        """Runs a model once and keeps its states, on disk, for candidates that differ from it in one place.

        Args:
            model: The model that candidates are made from.
            points: Its cut points.
            part: The part of the data.
            limit: About how many samples of it, None for all.
        """
        walk = Walk(model, self._data, points, parts=[part], limit=limit, provider=self._provider)
        makes = tuple(segment.makes for segment in walk.segments)
        walk.run(self._wanted(model), keep=True)
        return States(tuple(points), makes, walk, part, limit)

    def error_from(self, states: States, place: int, model: Model) -> float:
        """The error of a candidate by running only what lies behind a point.

        Args:
            states: Those of the model it was made from.
            place: The first segment in which the candidate differs.
            model: The candidate.

        Returns:
            As `error` for the part and limit of the states.
        """
        if place == 0:
            return self.error(model, states.part, states.limit)
        cuts = states.points if self.cuts else states.points[place - 1 : place]
        result = metrics.metric(self.metric)
        walk = Walk(
            model,
            self._data,
            cuts,
            parts=[states.part],
            limit=states.limit,
            provider=self._provider,
            tape=Tape(states.walk.tape),
            place=place if self.cuts else 1,
        )
        for batch, outputs, reference in self._pairs(walk, model, states.part, states.limit):
            result.update(outputs, reference, batch)
        return result.value()

    def _pairs(
        self, walk: Walk, model: Model, part: DataPart, limit: int | None
    ) -> Iterator[tuple[Feeds, Feeds, Feeds]]:
        """Every batch with the candidate's and the reference's outputs; only the last segment's are in memory."""
        wanted = self._wanted(model)
        try:
            walk.run(wanted)
            for step, reference in zip(walk.finish(wanted), self._references(part, limit), strict=True):
                yield step.batch, step.outputs, reference
            self._obtained = walk.provider
        finally:
            walk.close()

    def close(self) -> None:
        """Frees the reference's states and outputs."""
        for walk in self._walks.values():
            walk.close()
        self._walks.clear()
        self._cache.clear()
        self._cached_bytes = 0

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _wanted(self, model: Model) -> list[str]:
        """All outputs for a user's metric; what it takes to run without the caches for a built-in one."""
        names = [spec.name for spec in model.signature().outputs]
        if self.metric not in metrics.METRICS:
            return names
        return [name for name in names if not is_cache_name(name)] or names

    def _references(self, part: DataPart, limit: int | None) -> Iterator[Feeds]:
        """The reference's outputs batch by batch: from memory where they are there, else from its last segment."""
        key = (part, limit)
        if key in self._cache:
            yield from self._cache[key]
            return
        wanted = self._wanted(self._reference)
        if key not in self._walks:
            walk = Walk(
                self._reference, self._data, self.cuts, parts=[part], limit=limit, provider=self._provider
            )
            self._walks[key] = walk
            walk.run(wanted)
        kept: list[Feeds] | None = []
        size = 0
        for step in self._walks[key].finish(wanted):
            size += sum(getattr(array, "nbytes", 0) for array in step.outputs.values())
            if kept is not None and self._cached_bytes + size <= CACHE_BYTES:
                kept.append(step.outputs)
            else:
                kept = None
            yield step.outputs
        if kept is not None:
            self._cache[key] = kept
            self._cached_bytes += size
            self._walks.pop(key).close()
