# SPDX-License-Identifier: Apache-2.0
"""What passes say about the sites they look at: proposals to rewrite them and declines with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import onnx_ir as ir


class Site(Protocol):
    """A place in a model that a pass may rewrite; every class of `structure` that has these two is one.

    The name has to identify the place in every copy of the graph: the name of the tensor it produces does.
    """

    @property
    def name(self) -> str:
        """Name of the tensor that the site produces."""

    @property
    def nodes(self) -> Iterable[ir.Node]:
        """The nodes that a rewrite takes away; sites that share one exclude each other.

        Nothing that is computed before the first of them may change: a candidate is priced from there on.
        """


@dataclass(frozen=True)
class Saving:
    """What a rewrite takes away (negative: adds).

    Attributes:
        params: Parameters.
        bytes: Stored bytes.
        flops: Floating-point operations.
        nodes: Nodes.
        latency: Seconds for one sample; measured only where the target names it, else 0.
    """

    params: int = 0
    bytes: int = 0
    flops: int = 0
    nodes: int = 0
    latency: float = 0.0

    def __sub__(self, other: Saving) -> Saving:
        return Saving(
            self.params - other.params,
            self.bytes - other.bytes,
            self.flops - other.flops,
            self.nodes - other.nodes,
            self.latency - other.latency,
        )

    def of(self, measure: str) -> float:
        """Returns the saving in one measure: ``params``, ``bytes``, ``flops``, ``nodes`` or ``latency``."""
        saved: float = getattr(self, measure)
        return saved

    def objection(self) -> str | None:
        """Says why a rewrite with this saving would leave the model no better, or None when it pays."""
        grown = [name for name in ("params", "bytes", "flops") if self.of(name) < 0]
        if grown:
            return "would grow the model: " + ", ".join(f"{name} by {-self.of(name):,}" for name in grown)
        if not any((self.params, self.bytes, self.flops, self.nodes > 0)):
            return "would save nothing"
        return None


@dataclass(frozen=True)
class GraphSite:
    """The whole graph as one site, for passes that work on all of it at once.

    Attributes:
        saving: What a dry run took away.
    """

    nodes: tuple[ir.Node, ...] = ()
    name: str = "graph"
    saving: Saving = field(default_factory=Saving)


@dataclass(frozen=True)
class Proposal:
    """One rewrite at one site.

    Attributes:
        site: Name of the site; the pass finds it again by that name when the rewrite is applied.
        variant: Which of the site's alternatives this is, unique within the site and pass.
        detail: In words, for the journal.
        predicted_error: Relative error at the site's own output on held-out data, in closed form; 0 if exact.
        saving: Predicted saving; the engine measures the real one when it applies the rewrite. An exact rewrite
            that predicts one is applied and measured together with others, one that does not by itself.
        payload: What the pass needs to do it, such as a fitted matrix; nobody else looks into it.
        tensors: Names of the tensors whose nodes it takes away, where these are not all of the site's.
        cost: What the pass itself says that it costs, in units of its own; then it is not measured alone, and the
            passes chosen among have to use the same units. None to have it measured at the outputs.
        gone: Names of the tensors of whole layers that leave for good: config files count these.
        cuts: What it changes of the operators among its nodes: one that cuts their ``width`` (output channels) and
            one that cuts their ``rank`` do not exclude each other, and the rank is cut first.
    """

    site: str
    variant: str = ""
    detail: str = ""
    predicted_error: float = 0.0
    saving: Saving = field(default_factory=Saving)
    payload: Any = field(default=None, compare=False, repr=False)
    tensors: frozenset[str] | None = None
    cost: float | None = None
    gone: frozenset[str] = frozenset()
    cuts: Literal["width", "rank", "both"] = "both"


@dataclass(frozen=True)
class Decline:
    """A site that a pass looked at and left as it was, and why."""

    site: str
    reason: str
