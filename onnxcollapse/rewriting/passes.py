# SPDX-License-Identifier: Apache-2.0
"""The protocol of a pass: it reads structure and statistics and says what it would rewrite; the engine decides.

A pass never runs the model and never measures it. It is a frozen dataclass whose fields are its options, so the
command line, the journal and the report all describe it from one place.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import logging
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Union

import onnx_ir as ir

from onnxcollapse.calibration.statistics import Request, Statistics
from onnxcollapse.errors import ModelError, OnnxCollapseError, OptionError
from onnxcollapse.model import Model, edit
from onnxcollapse.model.weights import equal
from onnxcollapse.rewriting.proposal import Decline, Proposal, Site

logger = logging.getLogger(__name__)

NOT_THERE = "the branch with a cache has no such site, and both have to stay alike"


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """One kind of rewrite.

    Subclasses are frozen dataclasses and implement `sites`, `propose` and `rewrite`, and `requests` when they
    need statistics. All three are pure readers but `rewrite`, which edits the model it is given inside a
    transaction that the engine holds.
    """

    name: ClassVar[str] = ""
    on_request: ClassVar[bool] = False
    """Whether it does what the user asked for by name: then it is applied once, and also when it saves nothing."""

    repairs: ClassVar[bool] = False
    """Whether it saves nothing and only lowers the error behind what other passes have rewritten."""

    storage: ClassVar[bool] = False
    """Whether it saves parameters and bytes only: by default it runs where the target names one of these."""

    graded: ClassVar[bool] = True
    """Whether the variants of a site differ by degree, so that a few are priced and the others interpolated."""

    @property
    def exact(self) -> bool:
        """Whether rewrites keep the function, so that they need no calibration data and no budget."""
        return False

    @property
    def searches(self) -> bool:
        """Whether it searches by itself, as some published methods do: `plan` is asked then, `propose` is not."""
        return False

    @abc.abstractmethod
    def sites(self, model: Model) -> Iterable[Site | Decline]:
        """Finds the places this pass could rewrite, in graph order, by structure alone."""

    def site(self, model: Model, name: str) -> Any:
        """The site of that name, None when there is none; overridden where it is found without all others."""
        found = (site for site in self.sites(model) if not isinstance(site, Decline))
        return next((site for site in found if site.name == name), None)

    def requests(self, site: Any) -> Sequence[Request]:
        """Names the statistics that `propose` needs for a site."""
        return ()

    def look_closer(self, scratch: Model, site: Any, statistics: Statistics) -> Any:
        """Says what else has to be known about a site, where that depends on its statistics.

        Args:
            scratch: A copy of the model, shared with other sites, to which nodes may be added whose tensors statistics
                are needed of; nothing that it computes may change.
            site: The site.
            statistics: What `requests` asked for; none where it asked for nothing.

        Returns:
            What stands for the site from then on: `requests` is asked again with it, statistics come from the
            scratch copy, and `propose` is given both. None when nothing more is needed.

        Raises:
            ModelError: That cannot be known; the site is declined with the reason.
        """
        return None

    @abc.abstractmethod
    def propose(self, site: Any, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Turns a site and its statistics into alternatives, at most one of which is applied."""

    def requests_again(self, site: Any, proposal: Proposal) -> Sequence[Request]:
        """Names the statistics that `refit` needs for a proposal; by default those of the whole site."""
        return self.requests(site)

    def refit(self, site: Any, proposal: Proposal, statistics: Statistics) -> Proposal | None:
        """Proposes the same variant again from other statistics; None when there is none any more."""
        for offer in self.propose(site, statistics):
            if isinstance(offer, Proposal) and offer.variant == proposal.variant:
                return offer
        return None

    def outline(self, site: Any, proposal: Proposal) -> Proposal:
        """The same rewrite in the shapes that a site has behind other rewrites, whatever its numbers.

        Only sizes are taken of a model that it is applied to. By default a proposal fits whatever a site has become.
        """
        return proposal

    def plan(self, model: Model, similarity: Callable[[Model], float]) -> list[Proposal]:
        """Says what a search of its own would apply, one after the other.

        Args:
            model: Not to be edited; a search works on clones.
            similarity: Runs a model and gives the mean cosine of its final state with the original's.

        Returns:
            The rewrites in their order.
        """
        return []

    @abc.abstractmethod
    def rewrite(self, model: Model, site: Any, proposal: Proposal) -> None:
        """Applies a proposal to a site of `model`; may raise `ModelError`, which rolls it back."""

    def apply(self, model: Model, proposals: Sequence[Proposal]) -> None:
        """Finds the proposals' sites in `model`, which share no nodes, and rewrites them.

        They are rewritten back to front: what a site holds of the graph before it, its input above all, is then
        still there, and what reads its output is told when the output is replaced. What follows the model is rewritten
        in the same way, but for exact rewrites, which each graph is free to have or not.

        Raises:
            ModelError: A site is not there any more, because another rewrite consumed it, or the pass fails.
        """
        along = [
            (other, [p for p in proposals if _concerns(other, site_of(self, model, p.site))])
            for other in (() if self.exact else model.followers)
        ]
        self._apply(model, proposals)
        for other, found in along:
            self._apply(other, found)

    def _apply(self, model: Model, proposals: Sequence[Proposal]) -> None:
        found = {proposal.site: site_of(self, model, proposal.site) for proposal in proposals}
        order = {node: index for index, node in enumerate(model.graph)}

        def place(proposal: Proposal) -> int:
            nodes: Iterable[ir.Node] = found[proposal.site].nodes
            return -max((order.get(node, -1) for node in nodes), default=-1)

        with blamed(self):
            for proposal in sorted(proposals, key=place):
                self.rewrite(model, found[proposal.site], proposal)

    def describe(self) -> str:
        """Returns the name with the options that differ from their defaults, as ``--pass`` takes it."""
        changed = [
            f"{field.name.replace('_', '-')}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(changed) if changed else "")


@contextlib.contextmanager
def blamed(item: Pass, model: Model | None = None) -> Iterator[None]:
    """Names the pass in what goes wrong inside it: a third party's mistake is one line, not a traceback.

    Raises:
        ModelError: The pass raised something that is no error of this package; where `model` is given and no
            valid model, that is what is said instead.
    """
    try:
        yield
    except (OnnxCollapseError, MemoryError):
        raise
    except Exception as error:
        logger.debug("pass '%s' failed", item.name, exc_info=True)
        if model is not None:
            edit.check(model, full=True)
        raise ModelError(
            f"pass '{item.name}' failed with {type(error).__name__}: {error}; -vv shows where"
        ) from error


def sites_of(item: Pass, model: Model) -> list[Site | Decline]:
    """Returns all sites of a pass; raises ModelError in the pass's name when it fails.

    Those are declined that what follows the model does not have, though it reads their weights.
    """
    with blamed(item, model):
        found = list(item.sites(model))
        for other in () if item.exact else model.followers:
            names = {site.name for site in item.sites(other) if not isinstance(site, Decline)}
            found = [
                site
                if isinstance(site, Decline) or site.name in names or not _concerns(other, site)
                else Decline(site.name, NOT_THERE)
                for site in found
            ]
    return found


def _concerns(follower: Model, site: Site) -> bool:
    """Whether what follows a model has to be rewritten as the model is at a site.

    It has not where the site's weights are the model's own, as those are that project an encoder's states, whose keys
    and values the branch with a cache is given.
    """
    read = {value for node in site.nodes for value in node.inputs if value is not None}
    weights = [value for value in read if value.is_initializer()]
    return not weights or any(_has(follower, weight) for weight in weights)


def _has(model: Model, weight: ir.Value) -> bool:
    """Whether a model reads a weight of that name or one that is equal."""
    tensor, held = weight.const_value, model.graph.initializers
    if weight.name in held or tensor is None:
        return True
    return any(v.const_value is not None and equal(v.const_value, tensor) for v in held.values())


def site_of(item: Pass, model: Model, name: str) -> Any:
    """Returns one site of a pass.

    Raises:
        ModelError: It is not there any more, or the pass fails.
    """
    with blamed(item, model):
        site = item.site(model, name)
    if site is None:
        raise ModelError(f"{item.name}: site '{name}' is gone; an earlier rewrite consumed it")
    return site


def offers_of(item: Pass, site: Site, statistics: Statistics | None) -> list[Proposal | Decline]:
    """Returns all that a pass proposes for a site; raises ModelError in the pass's name when it fails."""
    with blamed(item):
        return list(item.propose(site, statistics))


def requests_of(item: Pass, site: Site) -> list[Request]:
    """Returns the statistics that a pass needs for a site; raises ModelError in the pass's name when it fails."""
    with blamed(item):
        return list(item.requests(site))


def look_closer_of(item: Pass, scratch: Model, site: Site, statistics: Statistics) -> Any:
    """Returns what a pass makes of a site for a second look; raises ModelError as `requests_of` does."""
    with blamed(item):
        return item.look_closer(scratch, site, statistics)


def requests_again_of(item: Pass, site: Site, proposal: Proposal) -> list[Request]:
    """Returns the statistics that a pass needs to fit a proposal anew; raises ModelError as `requests_of` does."""
    with blamed(item):
        return list(item.requests_again(site, proposal))


def _members(kind: Any) -> tuple[Any, ...]:
    """Returns the alternatives of a union type, or the type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _convert(text: str, kind: Any) -> Any:
    """Reads an option's text as its annotated type; raises ValueError when it is none."""
    for member in _members(kind):
        if member is type(None):
            if text.lower() in ("none", ""):
                return None
        elif typing.get_origin(member) is typing.Literal:
            if text in typing.get_args(member):
                return text
        elif member is bool:
            if text.lower() in ("true", "false", "1", "0", "yes", "no"):
                return text.lower() in ("true", "1", "yes")
        elif member in (int, float, str):
            try:
                return member(text)
            except ValueError:
                continue
    raise ValueError(text)


def _expected(kind: Any) -> str:
    """Describes an option's type for an error message and for the list of passes."""
    words = []
    for member in _members(kind):
        if typing.get_origin(member) is typing.Literal:
            words.append("|".join(map(str, typing.get_args(member))))
        else:
            words.append("none" if member is type(None) else member.__name__)
    return " or ".join(words)


def option_types(pass_type: type[Pass]) -> dict[str, Any]:
    """Returns the annotated type of each option of a pass, by field name."""
    hints = typing.get_type_hints(pass_type)
    return {field.name: hints[field.name] for field in dataclasses.fields(pass_type)}


def takes_integer(pass_type: type[Pass], option: str) -> bool:
    """Whether a pass has an option of that name that may be an integer."""
    return int in _members(option_types(pass_type).get(option.replace("-", "_")))


def describe_options(pass_type: type[Pass]) -> list[tuple[str, str, str]]:
    """Returns (option, type, default) of each option of a pass, as the command line spells them."""
    kinds = option_types(pass_type)
    rows = []
    for field in dataclasses.fields(pass_type):
        default = "required" if field.default is dataclasses.MISSING else str(field.default)
        rows.append((field.name.replace("_", "-"), _expected(kinds[field.name]), default))
    return rows


def build(pass_type: type[Pass], options: Mapping[str, str]) -> Pass:
    """Makes a pass from options given as text.

    Raises:
        OptionError: An option is unknown, missing, or not of its type.
    """
    kinds = option_types(pass_type)
    values: dict[str, Any] = {}
    for option, text in options.items():
        field = option.replace("-", "_")
        if field not in kinds:
            known = ", ".join(name.replace("_", "-") for name in kinds) or "none"
            raise OptionError(f"pass '{pass_type.name}' has no option '{option}'; it has: {known}")
        try:
            values[field] = _convert(text, kinds[field])
        except ValueError:
            raise OptionError(
                f"pass '{pass_type.name}': option '{option}' is '{text}', but takes {_expected(kinds[field])}"
            ) from None
    missing = [
        f.name
        for f in dataclasses.fields(pass_type)
        if f.default is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise OptionError(
            f"pass '{pass_type.name}' needs the option '{missing[0]}': {pass_type.name}:{missing[0]}=..."
        )
    try:
        return pass_type(**values)
    except ValueError as error:
        raise OptionError(f"pass '{pass_type.name}': {error}") from None
    except TypeError as error:  # abstract: a method of the protocol is missing
        raise OptionError(f"pass '{pass_type.name}' cannot be made: {error}; mend its class") from error
