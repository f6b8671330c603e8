# SPDX-License-Identifier: Apache-2.0
"""Statistics for proposals, and the walk that applies what was chosen and fits each anew."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxcollapse.calibration import Dataset, Plan, Statistics, Store, Sweep
from onnxcollapse.calibration.statistics import Request
from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit
from onnxcollapse.rewriting.passes import (
    Pass,
    blamed,
    look_closer_of,
    requests_again_of,
    requests_of,
    site_of,
    sites_of,
)
from onnxcollapse.rewriting.progress import Progress
from onnxcollapse.rewriting.proposal import Decline, Proposal, Site
from onnxcollapse.rewriting.selection import Candidate, held, node_key


@dataclass(frozen=True, eq=False)
class Place:
    """A site of a pass, and its nodes with their numbers in the graph."""

    maker: Pass
    site: Site
    nodes: tuple[tuple[int, ir.Node], ...]

    @classmethod
    def of(cls, maker: Pass, site: Site, order: Mapping[ir.Node, int]) -> Place:
        """Finds a site's place in an order of the graph's nodes."""
        return cls(maker, site, tuple((order[node], node) for node in site.nodes if node in order))

    @functools.cached_property
    def key(self) -> tuple[str, str, frozenset[str]]:
        """Pass, site and nodes: equal while nothing has changed there."""
        return self.maker.describe(), self.site.name, frozenset(node_key(node) for _, node in self.nodes)

    def candidate(self, offer: Proposal) -> Candidate:
        """Makes a candidate of a proposal for this place."""
        nodes = self.nodes
        if offer.tensors is not None:
            nodes = tuple((n, node) for n, node in nodes if not offer.tensors.isdisjoint(_names(node)))
        return Candidate(
            self.maker,
            offer,
            min((number for number, _ in nodes), default=0),
            frozenset(key for _, node in nodes for key in held(node, offer.cuts)),
            tensors=frozenset(name for _, node in nodes for name in _names(node)),
        )


def _names(node: ir.Node) -> list[str]:
    return [value.name for value in node.outputs if value.name]


def apply(model: Model, maker: Pass, proposal: Proposal, *, outline: bool = False) -> None:
    """Applies a proposal and leaves a valid graph with nothing dead in it.

    Args:
        model: Edited in place.
        maker: The pass.
        proposal: The proposal.
        outline: Whether only sizes will be taken of the model, so that the proposal need not be fitted to it.

    Raises:
        ModelError: The rewrite failed or left no valid graph.
    """
    if outline and type(maker).outline is not Pass.outline:
        with blamed(maker):
            proposal = maker.outline(site_of(maker, model, proposal.site), proposal)
    maker.apply(model, [proposal])
    edit.finish(model)


class Fitter:
    """Gathers statistics layer by layer, for proposals and for what was chosen of them.

    Attributes:
        changed: Whether the model differs from the reference, so that targets have to come from the latter.
    """

    def __init__(
        self, reference: Model, data: Dataset, plan: Plan, provider: str, progress: Progress
    ) -> None:
        self._reference, self._data = reference, data
        self._plan, self._provider, self._progress = plan, provider, progress
        self.changed = False

    def statistics(
        self, model: Model, places: Sequence[Place]
    ) -> Iterator[tuple[Place, Statistics | Decline | None]]:
        """Gives each place with its statistics, layer by layer, so that those of one layer are held at a time.

        Those of a place that reaches over several layers wait for the last, on disk where the memory plan has no room
        for them. Statistics are there until the next place is asked for.

        Places whose passes want to look closer follow in a second walk, through a copy with what they added to it; a
        Decline stands for the statistics where they could not.
        """
        scratch: Model | None = None
        closer: list[Place] = []
        for place, statistics in self._gathered(model, places):
            if type(place.maker).look_closer is Pass.look_closer:
                yield place, statistics
                continue
            scratch = scratch or model.clone()
            try:
                site = look_closer_of(place.maker, scratch, place.site, statistics or Statistics())
            except ModelError as problem:
                yield place, Decline(place.site.name, str(problem))
                continue
            if site is None:
                yield place, statistics
            else:
                closer.append(replace(place, site=site))
        if scratch is not None and closer:
            yield from self._gathered(scratch, closer)

    def _gathered(self, model: Model, places: Sequence[Place]) -> Iterator[tuple[Place, Statistics | None]]:
        """One walk: each place with its statistics; None where it needs none."""
        requests = {place.key: tuple(requests_of(place.maker, place.site)) for place in places}
        yield from ((place, None) for place in places if not requests[place.key])
        waiting = [place for place in places if requests[place.key]]
        wanted = [request for place in waiting for request in requests[place.key]]
        sweep = self._sweep(model, wanted, self._reference if self.changed else None, ())
        with contextlib.closing(Store(sweep.spare)) as store, self._progress.task("statistics", 0) as task:
            held = Statistics(store)
            sweep.tell = task.update
            for _, statistics in sweep:
                store.add(statistics.results)
                del statistics  # or it stays while the next segment's sums are gathered
                ready = [
                    place for place in waiting if all(request in held for request in requests[place.key])
                ]
                yield from ((place, held) for place in ready)
                waiting = [place for place in waiting if place not in ready]
                store.keep_only({request for place in waiting for request in requests[place.key]})

    def realize(
        self, start: Model, chosen: Sequence[Candidate]
    ) -> tuple[Model, dict[tuple[str, str, str], Proposal]]:
        """Applies the chosen front to back in one walk through the data.

        Each is fitted again: features come from what the rewritten model before it produces, targets from the
        original (METHODS 0: compressed prefix, original target).
        """
        trial = start.clone()
        done = {item.key: item.proposal for item in chosen}
        requests = {item.key: self._requests(trial, item) for item in chosen}
        waiting = sorted(chosen, key=lambda item: item.order)
        if len(chosen) > 1 or self.changed:
            waiting = self._fit_again(trial, waiting, requests, done)
        for item in waiting:  # nothing before it, or nothing to fit
            apply(trial, item.maker, item.proposal)
        return trial, done

    def repair(
        self, start: Model, makers: Sequence[Pass], chosen: Sequence[Candidate]
    ) -> tuple[Model, list[tuple[Pass, Proposal]]]:
        """Lets passes that repair work on a copy of a model, front to back behind the first of what was rewritten.

        Args:
            start: The rewritten model.
            makers: The passes.
            chosen: What was rewritten in it.

        Returns:
            The repaired model, and what was done.
        """
        trial = start.clone()
        order = {value.name: place for place, node in enumerate(trial.graph) for value in node.outputs}
        first = min((order.get(item.proposal.site, 0) for item in chosen), default=0)
        waiting = []
        for maker in makers:
            for site in sites_of(maker, trial):
                if isinstance(site, Decline):
                    continue
                place = order.get(site.name, 0)
                if place >= first:
                    made = frozenset(name for node in site.nodes for name in _names(node))
                    waiting.append(Candidate(maker, Proposal(site.name), place, frozenset(), tensors=made))
        waiting.sort(key=lambda item: item.order)
        requests = {item.key: self._requests(trial, item) for item in waiting}
        done: dict[tuple[str, str, str], Proposal] = {}
        self._fit_again(trial, waiting, requests, done)
        return trial, [(item.maker, done[item.key]) for item in waiting if item.key in done]

    def _fit_again(
        self,
        trial: Model,
        waiting: list[Candidate],
        requests: Mapping[tuple[str, str, str], tuple[Request, ...]],
        done: dict[tuple[str, str, str], Proposal],
    ) -> list[Candidate]:
        """Walks through `trial`, fits and applies each candidate in its layer; returns those that need no fit.

        A layer's statistics come in shares where there is no room for all; those that a candidate waits for the rest of
        are what they were until something is rewritten in the layer, and are gathered again then.
        """
        wanted = [request for item in waiting for request in requests[item.key]]
        sweep = self._sweep(trial, wanted, self._reference, waiting)
        changed = -1
        with contextlib.closing(Store(sweep.spare)) as store, self._progress.task("fitting", 0) as task:
            held = Statistics(store)
            sweep.tell = task.update
            for segment, statistics in sweep:
                store.add(statistics.results)
                del statistics  # or it stays while the next share is gathered
                here = [i for i in waiting if requests[i.key] and all(r in held for r in requests[i.key])]
                for item in here:
                    stale = segment.index == changed
                    now = sweep.again(trial, self._requests(trial, item)) if stale else held
                    again = self._refit(trial, item, now) or done.get(item.key)
                    if again is None:
                        continue  # nothing to repair
                    done[item.key] = again
                    apply(trial, item.maker, again)
                    sweep.rewritten(trial)
                    changed = segment.index
                waiting = [item for item in waiting if item not in here]
                store.keep_only({request for item in waiting for request in requests[item.key]})
        return waiting

    @staticmethod
    def _site(model: Model, candidate: Candidate) -> Site:
        site: Site = site_of(candidate.maker, model, candidate.proposal.site)
        return site

    def _requests(self, model: Model, candidate: Candidate) -> tuple[Request, ...]:
        """What a candidate's fit needs in a model as it is now: a rewrite before it may have cut its input."""
        site = self._site(model, candidate)
        return tuple(requests_again_of(candidate.maker, site, candidate.proposal))

    def _refit(self, model: Model, candidate: Candidate, statistics: Statistics) -> Proposal | None:
        """Proposes the same variant again."""
        with blamed(candidate.maker):
            return candidate.maker.refit(self._site(model, candidate), candidate.proposal, statistics)

    def _sweep(
        self, model: Model, requests: Sequence[Request], reference: Model | None, edits: Iterable[Candidate]
    ) -> Sweep:
        """Cuts between layers, but not through what is rewritten on the way, in the segment of its output."""
        inside = {name for item in edits for name in item.tensors if name != item.proposal.site}
        points = [point for point in self._plan.points if point not in inside]
        return Sweep(
            model,
            requests,
            self._data,
            provider=self._provider,
            reference=reference,
            cuts=points,
            room=self._plan.sums,
        )
