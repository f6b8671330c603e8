# SPDX-License-Identifier: Apache-2.0
"""What a model is made of, how near its parts are to linear, and what could be saved; nothing is changed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from onnxcollapse.calibration import Dataset, Sweep
from onnxcollapse.calibration.leastsquares import ridge_fit
from onnxcollapse.calibration.statistics import Cosine, Gram, Ref, Request
from onnxcollapse.model import Model, Size, flops, size
from onnxcollapse.rewriting.budget import Budget
from onnxcollapse.rewriting.ground import Ground
from onnxcollapse.rewriting.journal import Entry, Journal
from onnxcollapse.rewriting.opening import Opening
from onnxcollapse.rewriting.passes import Pass
from onnxcollapse.rewriting.progress import Progress
from onnxcollapse.rewriting.proposal import Saving
from onnxcollapse.rewriting.registry import defaults
from onnxcollapse.structure import FeedForward, feedforwards
from onnxcollapse.structure.spans import Span, first_projection, streams

ELSEWHERE = "{}: nothing to show here; what searches by itself, or repairs behind other passes, works in optimize alone"


@dataclass(frozen=True)
class Layer:
    """One of a run of isomorphic layers.

    Attributes:
        start: The tensor before it.
        end: The tensor behind it.
        params: Parameters.
        similarity: Mean cosine of the two over held-out rows; near 1 it changes little. None without data.
    """

    start: str
    end: str
    params: int
    similarity: float | None = None


@dataclass(frozen=True)
class Block:
    """A feed-forward block.

    Attributes:
        site: Its name, that of its output.
        d_in: Input channels.
        d_hidden: Neurons.
        d_out: Output channels.
        gated: Whether it has a gate.
        activation: What lies between its Linears.
        params: Parameters.
        linearity: Share of the output's power that the best affine map of the input explains on held-out rows (1 minus
            the squared relative error of METHODS 0); 1 for a linear block, 0 where none explains anything. None
            without data.
    """

    site: str
    d_in: int
    d_hidden: int
    d_out: int
    gated: bool
    activation: str
    params: int
    linearity: float | None = None


@dataclass(frozen=True)
class Offer:
    """A rewrite that could be done, as it is by itself.

    Attributes:
        pass_name: The pass, with its options.
        site: Name of the site.
        variant: Which alternative of the site.
        detail: In words.
        saving: What it would take away.
        predicted_error: Relative error at the site, in closed form on held-out statistics; 0 if exact.
        impact: Error at the outputs, measured on some held-out samples or estimated from variants that were; None for
            an exact rewrite.
    """

    pass_name: str
    site: str
    variant: str
    detail: str
    saving: Saving
    predicted_error: float
    impact: float | None


@dataclass(frozen=True)
class Analysis:
    """What is known of a model.

    Attributes:
        size: Of the model.
        flops: Of one calibration sample; dynamic dimensions are 1 without data.
        tidied: Size behind the exact rewrites: of the model that all the rest is said of.
        layers: Each run of layers, front to back.
        blocks: Feed-forward blocks, front to back.
        offers: What could be rewritten, exact rewrites first; variants of one site exclude each other.
        declined: What passes looked at and left, and why.
        metric: What impacts are measured in.
        provider: What measured; empty without data.
        seconds: Wall time.
        notes: What else the user should know.
    """

    size: Size
    flops: int
    tidied: Size
    layers: tuple[tuple[Layer, ...], ...]
    blocks: tuple[Block, ...]
    offers: tuple[Offer, ...]
    declined: tuple[Entry, ...]
    metric: str
    provider: str
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain JSON types."""
        return {
            "params": self.size.params,
            "bytes": self.size.bytes,
            "nodes": self.size.nodes,
            "flops": self.flops,
            "after_exact": asdict(self.tidied),
            "layers": [[asdict(layer) for layer in run] for run in self.layers],
            "feedforwards": [asdict(block) for block in self.blocks],
            "offers": [
                {
                    "pass": offer.pass_name,
                    "site": offer.site,
                    "variant": offer.variant,
                    "params_saved": offer.saving.params,
                    "bytes_saved": offer.saving.bytes,
                    "flops_saved": offer.saving.flops,
                    "nodes_saved": offer.saving.nodes,
                    "predicted_error": offer.predicted_error,
                    "impact": offer.impact,
                    "detail": offer.detail,
                }
                for offer in self.offers
            ],
            "declined": [
                {
                    "pass": entry.pass_name,
                    "site": entry.site,
                    "variant": entry.variant,
                    "reason": entry.reason,
                }
                for entry in self.declined
            ],
            "metric": self.metric,
            "provider": self.provider,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }


def analyze(
    model: Model,
    data: Dataset | None = None,
    *,
    metric: str = "rel-l2",
    passes: Sequence[Pass] | None = None,
    provider: str = "auto",
    memory: int | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Says what a model is made of and what passes offer for it: what `optimize` would choose from in its first round.

    Passes with a search of their own and those that repair offer nothing here; a note says so.

    Args:
        model: Left as it is.
        data: Calibration data; without it there are the structure and the exact rewrites.
        metric: Of errors at the outputs.
        passes: Those to ask; by default all that are registered and need no options.
        provider: Where statistics and errors are computed.
        memory: Bytes of resident memory to stay under; by default half of what is free.
        progress: Told how far the work is.

    Raises:
        OnnxCollapseError: The model, data, metric or provider cannot be used.
    """
    began = time.perf_counter()
    chosen = list(defaults(measure="params") if passes is None else passes)
    exact = [item for item in chosen if item.exact]
    lossy = list(dict.fromkeys(item for item in chosen if not item.exact))
    asked = [item for item in lossy if not (item.searches or item.repairs)]
    journal, progress = Journal(), progress or Progress()
    budget = Budget(sys.float_info.max, metric)
    ground = Ground(model, data, budget, chosen, provider, memory, Opening())
    work, notes = ground.model.clone(), list[str]()
    ground.exact_stage(work, exact, journal).run()
    offers = [
        Offer(e.pass_name, e.site, e.variant, e.reason, e.saving, e.predicted_error, None)
        for e in journal.of("kept")
    ]
    runs, found = _runs(work), feedforwards(work.graph, work.ir.functions.values())[0]
    known: dict[str, float] = {}
    if ground.data is None:
        notes.append(
            "structure and exact rewrites only: --calib DATA would say what else could be saved, at what error"
        )
    else:
        cut = ground.work_plan(work)
        similarities = {span.name: _alike(span) for run in runs for span in run}
        linearities = {block.name: _gram(block) for block in found}
        requests: list[Request] = [*similarities.values(), *linearities.values()]
        sweep = Sweep(work.alone(), requests, ground.data, provider=provider, cuts=cut.points, room=cut.sums)
        known = dict(_measured(sweep, similarities, linearities))
    stage = ground.lossy_stage(work, asked, journal, progress)
    if stage is not None:
        offers += [
            Offer(
                item.maker.describe(), item.proposal.site, item.proposal.variant, item.proposal.detail,
                item.saving, item.proposal.predicted_error, item.impact,
            )
            for item in stage.look()
        ]  # fmt: skip
    elsewhere = [item.describe() for item in lossy if item.searches or (item.repairs and not asked)]
    if elsewhere:
        notes.append(ELSEWHERE.format(", ".join(elsewhere)))
    measured_in = metric if ground.verifier is None else ground.verifier.pricing_metric
    if measured_in != metric:
        notes.append(f"errors at the outputs are in {measured_in}: {metric} is of whole models, in optimize")
    if data is not None and not data.evidence:
        notes.append("the calibration data is random: these errors say nothing about real inputs")
    return Analysis(
        size(model),
        flops(ground.model, shapes=None if ground.data is None else ground.data.shapes()),
        size(work),
        tuple(tuple(_layer(span, known.get(span.name)) for span in run) for run in runs),
        tuple(_block(block, known.get(block.name)) for block in found),
        tuple(offers),
        tuple(entry for entry in journal if entry.outcome != "kept"),
        measured_in,
        "" if ground.verifier is None else ground.verifier.provider.obtained,
        time.perf_counter() - began,
        tuple(notes),
    )


def _measured(
    sweep: Sweep, similarities: Mapping[str, Cosine], linearities: Mapping[str, Gram]
) -> Iterator[tuple[str, float]]:
    """Similarities of layers and linearities of blocks, by their names, a segment's sums at a time."""
    for _, statistics in sweep:
        for name, alike in similarities.items():
            if alike in statistics:
                yield name, statistics.heldout(alike).mean
        for name, gram in linearities.items():
            if gram in statistics:
                fit, heldout = statistics.fit(gram), statistics.heldout(gram)
                error = ridge_fit(fit, heldout, gram.features, gram.targets).error
                yield name, max(0.0, 1.0 - error**2)  # with few rows a fit can do worse than the map to 0


def _runs(model: Model) -> list[list[Span]]:
    return [[Span((layer,), 1) for layer in stream.layers] for stream in streams(model.graph)]


def _alike(span: Span) -> Cosine:
    reader = first_projection(span)
    convolved = any(node.op_type == "Conv" for node in span.nodes)
    axis = reader.axis if reader is not None else 1 if convolved else -1
    return Cosine(Ref(span.start.name or "", axis=axis), Ref(span.end.name or "", axis=axis))


def _gram(block: FeedForward) -> Gram:
    return Gram(
        (Ref(block.input.name or "", axis=block.up.axis),),
        (Ref(block.output.name or "", axis=block.down.axis),),
    )


def _layer(span: Span, similarity: float | None) -> Layer:
    return Layer(span.start.name or "", span.end.name or "", span.params, similarity)


def _block(block: FeedForward, linearity: float | None) -> Block:
    return Block(
        block.name,
        block.d_in,
        block.d_hidden,
        block.d_out,
        block.gate is not None,
        block.activation,
        block.params,
        linearity,
    )
