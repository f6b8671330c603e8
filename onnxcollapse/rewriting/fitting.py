# SPDX-License-Identifier: Apache-2.0
"""Statistics for proposals, and the walk that applies what was chosen and fits each anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnxcollapse.calibration import Dataset, Plan, Statistics, Sweep
from onnxcollapse.calibration.statistics import Request
from onnxcollapse.model import Model, edit
from onnxcollapse.rewriting.passes import Pass, blamed, requests_of, site_of, sites_of
from onnxcollapse.rewriting.progress import Progress
from onnxcollapse.rewriting.proposal import Decline, Proposal, Site
from onnxcollapse.rewriting.selection import Candidate


@dataclass(frozen=True, eq=False)
class Place:
    """A site of a pass, where in the graph it begins, and the keys of its nodes."""

    maker: Pass
    site: Site
    position: int
    nodes: frozenset[str]
    tensors: frozenset[str]

    @property
    def key(self) -> tuple[str, str, frozenset[str]]:
        """Pass, site and nodes: equal while nothing has changed there."""
        return self.maker.describe(), self.site.name, self.nodes

    def candidate(self, offer: Proposal) -> Candidate:
        """Makes a candidate of a proposal for this place."""
        return Candidate(self.maker, offer, self.position, self.nodes, tensors=self.tensors)


def apply(model: Model, maker: Pass, proposal: Proposal) -> None:
    """Applies a proposal and leaves a valid graph with nothing dead in it.

    Raises:
        ModelError: The rewrite failed or left no valid graph.
    """
    maker.apply(model, [proposal])
    edit.prune(model)
    edit.check(model)


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

    def statistics(self, model: Model, places: Sequence[Place]) -> Iterator[tuple[Place, Statistics | None]]:
        """Gives each place with its statistics, layer by layer, so that those of one layer are held at a time."""
        requests = {place.key: tuple(requests_of(place.maker, place.site)) for place in places}
        yield from ((place, None) for place in places if not requests[place.key])
        waiting = [place for place in places if requests[place.key]]
        wanted = [request for place in waiting for request in requests[place.key]]
        held = Statistics()
        sites = [place.site for place in waiting]
        sweep = self._sweep(model, wanted, self._reference if self.changed else None, sites)
        with self._progress.task("statistics", 0) as task:
            sweep.tell = task.update
            for _, statistics in sweep:
                held = Statistics({**held.results, **statistics.results})
                ready = [
                    place for place in waiting if all(request in held for request in requests[place.key])
                ]
                yield from ((place, held) for place in ready)
                waiting = [place for place in waiting if place not in ready]
                still = {request for place in waiting for request in requests[place.key]}
                held = Statistics({key: result for key, result in held.results.items() if key[1] in still})

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
        waiting = sorted(chosen, key=lambda item: item.position)
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
                    waiting.append(Candidate(maker, Proposal(site.name), place, frozenset()))
        waiting.sort(key=lambda item: item.position)
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
        """Walks through `trial`, fits and applies each candidate in its layer; returns those that need no fit."""
        wanted = [request for item in waiting for request in requests[item.key]]
        sweep = self._sweep(trial, wanted, self._reference, [self._site(trial, item) for item in waiting])
        with self._progress.task("fitting", 0) as task:
            sweep.tell = task.update
            for _, statistics in sweep:
                here = [
                    i for i in waiting if requests[i.key] and all(r in statistics for r in requests[i.key])
                ]
                for number, item in enumerate(here):
                    now = sweep.again(trial, self._requests(trial, item)) if number else statistics
                    again = self._refit(trial, item, now) or done.get(item.key)
                    if again is None:
                        continue  # nothing to repair
                    done[item.key] = again
                    apply(trial, item.maker, again)
                    sweep.rewritten(trial)
                waiting = [item for item in waiting if item not in here]
        return waiting

    @staticmethod
    def _site(model: Model, candidate: Candidate) -> Site:
        site: Site = site_of(candidate.maker, model, candidate.proposal.site)
        return site

    def _requests(self, model: Model, candidate: Candidate) -> tuple[Request, ...]:
        """What a candidate's fit needs in a model as it is now: a rewrite before it may have cut its input."""
        return tuple(requests_of(candidate.maker, self._site(model, candidate)))

    def _refit(self, model: Model, candidate: Candidate, statistics: Statistics) -> Proposal | None:
        """Proposes the same variant again."""
        with blamed(candidate.maker):
            return candidate.maker.refit(self._site(model, candidate), candidate.proposal, statistics)

    def _sweep(
        self, model: Model, requests: Sequence[Request], reference: Model | None, sites: Iterable[Site]
    ) -> Sweep:
        """Cuts between layers, but through no site: it is rewritten as a whole, in the segment of its output."""
        inside = {
            v.name for site in sites for node in site.nodes for v in node.outputs if v.name != site.name
        }
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
