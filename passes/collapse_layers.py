# SPDX-License-Identifier: Apache-2.0
r"""collapse-layers: layers leave the residual stream (LaCo, arXiv 2402.11187; METHODS 4).

::

    h -- layer l+1 -- ... -- layer l+m -- h'      becomes      h -- h + norm(h) W + b      (fit)
                                                               h -- h                      (drop)
                                                               h with W_down A before it   (fold, 2505.02819)
    layer l -- layer l+1 -- ... -- layer l+m      becomes      layer l with weights made of all (rdsc, last, mean)

``fit`` is ours: h' - h is fitted in closed form from what the first projections of the span read, which in a pre-norm
net is the norm of h: what layers add depends on that and not on h, whose length differs from token to token.

The search is the engine's own (``optimal``: spans exclude each other and compete under one budget by their effect at
the outputs), or a published one: ``greedy`` takes the layers whose input and output are most alike first (ShortGPT,
2403.03853), ``laco`` merges from the top down while the final state stays alike, ``random`` is a control.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from onnxcollapse.passes.layer_caches import Caches, drop_caches
from onnxcollapse.passes.layer_plans import (
    Merge,
    Plan,
    fold_into,
    mapped,
    merge_weights,
    pass_by,
)

from onnxcollapse.calibration.leastsquares import RIDGES, LinearFit, Spectrum, ridge_fit
from onnxcollapse.calibration.sessions import main_values
from onnxcollapse.calibration.statistics import GramMatrix, Moments, Request, Statistics
from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit, scratch
from onnxcollapse.rewriting import Decline, Pass, Proposal, Saving
from onnxcollapse.structure import Block, Linear, feedforwards, linear_at
from onnxcollapse.structure.spans import (
    Span,
    Stream,
    first_projection,
    last_addition,
    skip_norm,
    streams,
)

Similarity = Callable[[Model], float]

_INNER = (
    "; layers in an If are entered only where all outputs come from it, as in a decoder merged for its cache"
)

STRONG_RIDGES = (*RIDGES, 0.3, 1.0)
"""A decade more than elsewhere; the held-out rows choose."""


@dataclass(frozen=True, eq=False)
class StreamEnd:
    """A point of the stream, and the spans that end there.

    Attributes:
        value: The point.
        plans: The ways in which what is before it may go, with a variant's name each.
        nodes: All nodes that one of them takes away.
    """

    value: ir.Value
    plans: tuple[tuple[str, Plan], ...]
    nodes: tuple[ir.Node, ...]

    @property
    def name(self) -> str:
        """The point's name."""
        return self.value.name or ""


@dataclass(frozen=True)
class CollapseLayers(Pass):
    """Takes layers, or the attention of one, out of the residual stream.

    Attributes:
        merge: What stands in for a span: a fitted map, nothing (drop), the layer before it refitted (fold), or that
            layer with weights made of all (rdsc, last, mean).
        search: optimal, or the order of a published method: greedy, laco; random as a control.
        longest: Most layers that one span may have.
        parts: Whether attention may leave without its feed-forward block, with fit and drop.
        rank: Limit of the rank of fitted maps; none for full rank.
        interval: laco: layers to step back after a merge (I of the paper).
        merged: laco: layers merged at a time (C).
        lowest: laco: lowest layer that takes part (L).
        highest: laco: layer behind the highest one that takes part (H); none for all.
        threshold: laco: least mean cosine of the final state with the original's (T).
        seed: Of the random order.
    """

    name: ClassVar[str] = "collapse-layers"
    graded: ClassVar[bool] = False
    merge: Merge = "fit"
    search: Literal["optimal", "greedy", "laco", "random"] = "optimal"
    longest: int = 4
    parts: bool = True
    rank: int | None = None
    interval: int = 2
    merged: int = 4
    lowest: int = 1
    highest: int | None = None
    threshold: float = 0.65
    seed: int = 0

    def __post_init__(self) -> None:
        if self.longest < 1 or self.merged < 1 or self.interval < 1:
            raise ValueError("longest, merged and interval must be at least 1")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank {self.rank} must be at least 1")
        if not -1.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold {self.threshold} must lie in [-1, 1]: it is a cosine")
        if self.search == "laco" and self.merge in ("fit", "fold"):
            raise ValueError(
                f"search laco looks at merged weights: it takes rdsc, last, mean or drop, not {self.merge}"
            )

    @property
    def searches(self) -> bool:
        """LaCo does, by the model's final state."""
        return self.search == "laco"

    def sites(self, model: Model) -> Iterator[StreamEnd | Decline]:
        """Finds the points of residual streams behind which a span can be taken away."""
        if self.searches:
            return
        found = streams(model.graph)
        if not found:
            inner = any(True for _ in model.graph.subgraphs())
            why = "no run of equal layers adds to a residual stream of one width"
            yield Decline("graph", why + _INNER if inner else why)
        for stream in found:
            yield from self._ends(model, stream)

    def site(self, model: Model, name: str) -> StreamEnd | None:
        """Finds a point by name; a proposal knows the rest."""
        value = main_values(model.graph).get(name)
        node = None if value is None else value.producer()
        return None if value is None or node is None else StreamEnd(value, (), (node,))

    def requests(self, site: StreamEnd) -> Sequence[Request]:
        """Asks for the sums of what the maps read and of what they have to give."""
        return [request for _, plan in site.plans for request in plan.requests()]

    def requests_again(self, site: StreamEnd, proposal: Proposal) -> Sequence[Request]:
        """Asks for those of one map."""
        plan: Plan = proposal.payload
        return plan.requests() if plan.features is not None else ()

    def propose(self, site: StreamEnd, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Offers each span that ends here, with its map."""
        if statistics is None:
            yield Decline(site.name, "no statistics were collected")
            return
        for variant, plan in site.plans:
            if plan.features is None:
                cosine = statistics.heldout(plan.alike).mean
                detail = f"{variant}: mean cosine of its ends {cosine:.4f}"
                yield self._offer(site.name, variant, plan, detail, 1.0 - cosine)
            else:
                yield self._fitted(site.name, variant, plan, statistics)

    def refit(self, site: StreamEnd, proposal: Proposal, statistics: Statistics) -> Proposal | None:
        """Fits one map again."""
        plan: Plan = proposal.payload
        if plan.features is None:
            return proposal
        return self._fitted(proposal.site, proposal.variant, plan, statistics)

    def rewrite(self, model: Model, site: StreamEnd, proposal: Proposal) -> None:
        """Lets the stream pass a span by; the point behind it keeps its name."""
        plan: Plan = proposal.payload
        values = main_values(model.graph)
        for name in (plan.start, plan.end):
            if name not in values:
                raise ModelError(f"{self.name}: tensor '{name}' is gone; an earlier rewrite consumed it")
        start, end = values[plan.start], values[plan.end]
        leaving = Caches(model.graph).leaving(start, end)
        for names in plan.weights:
            merge_weights(model, plan, [values[name] for name in names])
        if plan.merge == "fold":
            fold_into(model, plan)
        gain = mapped(model, plan, end, values) if plan.merge == "fit" else None
        pass_by(model, start, end, gain)
        drop_caches(model, leaving)

    def plan(self, model: Model, similarity: Similarity) -> list[Proposal]:
        """LaCo's search (arXiv 2402.11187, algorithm 1): from the top down, merge while the final state stays alike.

        Args:
            model: Left as it is.
            similarity: Mean cosine of a model's final state with the original's.
        """
        done: list[Proposal] = []
        model = model.clone()
        stream = _longest(model)
        if stream is None:
            return done
        place = min(self.highest or len(stream.layers), len(stream.layers)) - self.merged
        while place >= self.lowest:
            stream = _longest(model)
            if stream is None:
                break
            place = min(place, len(stream.layers) - 2)
            rest = min(self.merged - 1, len(stream.layers) - 1 - place)
            if place < self.lowest or rest < 1:
                place -= 1
                continue
            proposal = self._merging(stream, place, rest)
            trial = model.clone()
            self.apply(trial, [proposal])
            edit.finish(trial)
            alike = similarity(trial)
            if alike > self.threshold:
                detail = f"{proposal.detail}, cosine of the final state {alike:.4f}"
                done.append(replace(proposal, detail=detail, predicted_error=1.0 - alike))
                model.become(trial)
                place -= self.interval
            else:
                place -= 1
        return done

    # Finding

    def _ends(self, model: Model, stream: Stream) -> Iterator[StreamEnd | Decline]:
        longest = 1 if self.search in ("greedy", "random") else self.longest
        plans: dict[ir.Value, list[tuple[str, Plan, Span]]] = {}
        reasons: dict[str, str] = {}
        spans = stream.spans(longest)
        if self.parts and longest > 1 and self.merge in ("fit", "drop"):
            blocks = {node for block in feedforwards(model.graph)[0] for node in block.nodes}
            pieces = [part for parts in stream.parts for part in parts if part.is_residual]
            spans += [Span((part,), 0) for part in pieces if not blocks & set(part.nodes)]
        caches = Caches(model.graph)
        for span in spans:
            torn, found = caches.torn(span.start, span.end), self._plan(span, stream)
            if torn is not None:
                reasons[span.end.name or ""] = f"its layer would keep the cache '{torn.name}' and lose others"
            elif isinstance(found, Plan):
                what = f"{self.merge} {span.layers}" if span.layers else f"{self.merge} part"
                plans.setdefault(span.end, []).append((what, found, span))
            else:
                reasons[span.end.name or ""] = found
        for end, offers in plans.items():
            nodes = dict.fromkeys(node for _, plan, span in offers for node in _nodes(plan, span, model))
            yield StreamEnd(end, tuple((what, plan) for what, plan, _ in offers), tuple(nodes))
        known = {end.name for end in plans}
        yield from (Decline(name, reason) for name, reason in reasons.items() if name not in known)

    def _plan(self, span: Span, stream: Stream) -> Plan | str:
        """How a span goes, or why it cannot."""
        if self.merge in ("rdsc", "last", "mean"):
            return self._merged_weights(span, stream)
        fused = skip_norm(span.end)
        if fused is not None and self.merge != "fit" and skip_norm(span.start) is None:
            return (
                f"its end is a sum inside {fused.op_type}, its start is none that could be summed there again"
            )
        plan = Plan(
            self.merge,
            span.start.name or "",
            span.end.name or "",
            span.tensors,
            span.tensors,
            params=span.params,
            layers=span.layers,
        )
        if self.merge == "drop":
            return plan
        if self.merge == "fold":
            down = last_addition(span.start)
            if down is None:
                return "no Linear is added to the stream right before it that a map could be folded into"
            names = frozenset(v.name or "" for node in down.nodes for v in node.outputs)
            return replace(
                plan, features=down.name, like=down.name, axis=down.axis, removed=plan.removed | names
            )
        reader = first_projection(span)
        if reader is None:
            return "no Linear in it reads the stream or a norm of it, so that a map has nothing to be spelled like"
        return replace(plan, features=reader.input.name, like=reader.name, axis=reader.axis)

    def _merged_weights(self, span: Span, stream: Stream) -> Plan | str:
        """The layer before a span takes its weights in."""
        first = stream.layers.index(span.blocks[0])
        if not first:
            return "no layer before it could take its weights in"
        whole = [stream.layers[first - 1], *span.blocks]
        names = _matching(whole)
        if not names:
            return "its Linears do not correspond to those of the layer before it"
        if any(len(set(group)) < len(group) for group in names):
            return "its layers share their weights: there is nothing to merge"
        removed = Span(tuple(whole), len(span.blocks)).tensors
        ends = span.start.name or "", span.end.name or ""
        return Plan(
            self.merge, *ends, removed, span.tensors, weights=names, params=span.params, layers=span.layers
        )

    def _merging(self, stream: Stream, place: int, rest: int) -> Proposal:
        """Merges `rest` layers into the one at `place`."""
        span = Span(stream.layers[place + 1 : place + 1 + rest], rest)
        plan = self._plan(span, stream)
        if not isinstance(plan, Plan):
            raise ModelError(f"{self.name}: {span.name}: {plan}")
        detail = f"{self.merge}: {rest} layers behind layer {place} into it"
        return Proposal(
            span.end.name or "",
            f"{self.merge} {rest}",
            detail,
            tensors=span.tensors,
            payload=plan,
            gone=plan.gone,
        )

    # Fitting

    def _offer(self, site: str, variant: str, plan: Plan, detail: str, error: float) -> Proposal:
        cost = None
        if self.search == "greedy":
            cost = max(error, 0.0)
        elif self.search == "random":
            digest = hashlib.blake2b(f"{self.seed} {site}".encode(), digest_size=4).digest()
            cost = 1.0 + int.from_bytes(digest, "big") / 2**32
        maps = () if plan.fit is None or plan.merge == "fold" else (*plan.fit[0], plan.fit[1])
        saving = Saving(params=plan.params - sum(part.size for part in maps))
        gone = plan.gone if plan.layers else frozenset[str]()
        return Proposal(site, variant, detail, error, saving, plan, plan.removed, cost, gone)

    def _fitted(self, site: str, variant: str, plan: Plan, statistics: Statistics) -> Proposal:
        """Fits h' - h ~ x W + b on sums: x the features of `fit`, or what the layer before adds, for `fold`."""
        target = plan.cross.right
        parts = [
            GramMatrix.assembled(of(plan.gram), of(plan.cross), target)
            for of in (statistics.fit, statistics.heldout)
        ]
        spectrum = None
        if plan.merge == "fold":  # as published: no offset
            parts = [part.through_origin() for part in parts]
        elif self.rank is None:  # spans that start at one point share their features
            spectrum = Spectrum.of(statistics.fit(plan.gram), statistics.heldout(plan.gram))
        found = ridge_fit(parts[0], parts[1], 1, 2, STRONG_RIDGES, self.rank, spectrum=spectrum)
        whole = float(np.sum(statistics.heldout(Moments(plan.behind)).power))
        gap = parts[1].power(2)
        error = found.error * (gap / whole) ** 0.5 if whole > 0 else 0.0
        detail = (
            f"{variant}: what it adds is fitted to {found.error:.3f} of its size, ridge {found.ridge:g}"
            + (f", rank {self.rank}" if self.rank else "")
        )
        return self._offer(site, variant, replace(plan, fit=_held(found)), detail, error)


def _held(found: LinearFit) -> tuple[tuple[ir.TensorProtocol, ...], np.ndarray]:
    """Puts the matrices of a map aside; there is one for every variant until the choice is made."""
    matrices = found.factors() if found.rank is not None else (found.matrix,)
    kept = (scratch.hold(np.array(m, np.float64, order="C"), ir.DataType.DOUBLE, "map") for m in matrices)
    return tuple(kept), found.offset


def _longest(model: Model) -> Stream | None:
    return max(streams(model.graph), key=lambda stream: len(stream.layers), default=None)


def _nodes(plan: Plan, span: Span, model: Model) -> list[ir.Node]:
    """The nodes that a plan takes away or changes."""
    if plan.removed == span.tensors:
        return list(span.nodes)
    return [node for node in model.graph if any(v.name in plan.removed for v in node.outputs)]


def _matching(blocks: Sequence[Block]) -> tuple[tuple[str, ...], ...]:
    """Weights and biases of the Linears of isomorphic blocks that correspond, the first block's name first."""
    groups = []
    for nodes in zip(*(block.nodes for block in blocks), strict=True):
        found = [linear for linear in map(linear_at, nodes) if isinstance(linear, Linear)]
        if len(found) < len(nodes):
            continue
        operands: list[list[ir.Value | None]] = [[f.weight for f in found], [f.bias for f in found]]
        groups += [
            tuple(v.name or "" for v in group if v is not None) for group in operands if None not in group
        ]
    return tuple(groups)
