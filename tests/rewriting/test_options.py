# SPDX-License-Identifier: Apache-2.0
"""Budgets, targets and passes as they are written on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from onnxcollapse import Budget, Pass, Target
from onnxcollapse.errors import OptionError
from onnxcollapse.rewriting import registry
from onnxcollapse.rewriting.passes import build, describe_options
from tests.rewriting.branches import Drop


@pytest.mark.parametrize("text", ["params=0.75", "flops=0.5", "bytes=1e-3", "params=0.999"])
def test_targets(text):
    target = Target.parse(text)
    assert f"{target.measure}={target.share:g}" == str(target)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    "text", ["", "params", "params=", "=0.5", "params=1", "params=0", "params=-1", "params=nan", "params=inf",
             "params=0.5x", "Params=0.5", "latency", "speed=0.5", "params=0,5"],
)  # fmt: skip
def test_targets_that_are_none(text):
    with pytest.raises(OptionError, match=r"params=0\.75|between 0 and 1") as caught:
        Target.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [-1e-9, math.nan, math.inf, -math.inf])
def test_budgets_that_are_none(error):
    with pytest.raises(OptionError, match="0 or more"):
        Budget(error)


def test_budgets():
    assert Budget().cap == 0.01
    assert Budget(0.0).cap == 0.0
    assert Budget(None, target=Target("params", 0.5)).cap == math.inf
    with pytest.raises(OptionError, match="an error, a target, or both"):
        Budget(None)


@dataclass(frozen=True)
class Optioned(Drop):
    """Has options of every type."""

    name: ClassVar[str] = "optioned"
    claims: bool = False
    depth: int = 3
    share: float = 0.5
    label: str = "text"
    kind: Literal["one", "two"] = "one"
    rank: int | None = None
    mode: Literal["auto"] | float = "auto"

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"depth {self.depth} must be 0 or more")


@pytest.fixture
def registered(monkeypatch):
    """Registers classes or anything else under names, in the place of all that is installed."""

    class Point:
        value = "somewhere:Class"

        def __init__(self, load: Callable[[], object]) -> None:
            self.load = load

    def register(**points: object) -> None:
        def loader(point):
            return point if callable(point) and not isinstance(point, type) else lambda: point

        table = {name.replace("_", "-"): Point(loader(point)) for name, point in points.items()}
        monkeypatch.setattr(registry, "_entry_points", lambda: table)

    return register


@pytest.mark.parametrize(
    "options, expected",
    [
        ("", {}),
        ("depth=4", {"depth": 4}),
        ("depth = 4 , share=1e-3", {"depth": 4, "share": 1e-3}),
        ("share=2", {"share": 2.0}),
        ("label=a b=c", {"label": "a b=c"}),
        ("kind=two", {"kind": "two"}),
        ("rank=8", {"rank": 8}),
        ("rank=none", {"rank": None}),
        ("mode=0.5", {"mode": 0.5}),
        ("mode=auto", {"mode": "auto"}),
        ("claims=yes", {"claims": True}),
        ("claims=0", {"claims": False}),
        ("claims=TRUE", {"claims": True}),
    ],
)
def test_options_become_what_they_are_annotated_with(registered, options, expected):
    registered(optioned=Optioned)
    made = registry.parse(f"optioned:{options}" if options else "optioned")
    assert made == Optioned(**expected)
    for name, value in expected.items():
        assert type(getattr(made, name)) is type(value)
    spec = made.describe()
    assert " " in spec or registry.parse(spec) == made


@pytest.mark.parametrize(
    "spec, message",
    [
        ("other", "unknown pass 'other'; registered are: optioned"),
        ("", "unknown pass ''"),
        ("optioned:depth", "'depth' is no option=value"),
        ("optioned:width=3", "pass 'optioned' has no option 'width'; it has: .*depth"),
        ("optioned:depth=three", "option 'depth' is 'three', but takes int"),
        ("optioned:depth=1.5", "'1.5', but takes int"),
        ("optioned:share=lots", "takes float"),
        ("optioned:kind=three", r"takes one\|two"),
        ("optioned:rank=few", "takes int or none"),
        ("optioned:mode=never", "takes auto or float"),
        ("optioned:claims=maybe", "takes bool"),
        ("optioned:depth=-1", "pass 'optioned': depth -1 must be 0 or more"),
    ],
)
def test_bad_specs(registered, spec, message):
    registered(optioned=Optioned)
    with pytest.raises(OptionError, match=message) as caught:
        registry.parse(spec)
    assert "\n" not in str(caught.value)


def test_entries_that_are_no_passes_are_named(registered):
    def missing():
        raise ModuleNotFoundError("No module named 'gone'")

    registered(gone=missing, number=int, drop=Drop, misnamed=Optioned)
    assert registry.load("drop") is Drop
    with pytest.raises(OptionError, match=r"pass 'gone' .* cannot be imported: No module named 'gone'"):
        registry.load("gone")
    with pytest.raises(OptionError, match=r"pass 'number' .* is no subclass of onnxcollapse\.Pass"):
        registry.load("number")
    with pytest.raises(OptionError, match=r"pass 'misnamed' .* calls itself 'optioned'"):
        registry.load("misnamed")


def test_without_a_name_all_run_that_need_no_options_the_exact_ones_first(registered):
    @dataclass(frozen=True)
    class Needs(Drop):
        name: ClassVar[str] = "needs"
        path: str = None  # type: ignore[assignment]

    class Exact(Drop):
        name: ClassVar[str] = "z-exact"
        exact = True

    @dataclass(frozen=True)
    class Required(Pass):
        name: ClassVar[str] = "required"
        script: str

        def sites(self, model):
            return []

        def propose(self, site, statistics):
            return []

        def rewrite(self, model, site, proposal):
            return None

    registered(z_exact=Exact, drop=Drop, required=Required)
    assert [item.name for item in registry.defaults()] == ["z-exact", "drop"]
    with pytest.raises(OptionError, match="pass 'required' needs the option 'script'"):
        registry.parse("required")
    assert describe_options(Required) == [("script", "str", "required")]
    assert build(Required, {"script": "x.py"}).describe() == "required:script=x.py"


def test_installed_passes_are_the_ones_in_the_project_file():
    assert {"cleanup", "collapse-ffn", "fold-affine", "graphsurgeon", "stable-neurons", "tie-weights"} <= set(
        registry.names()
    )
    assert registry.names() == sorted(registry.names())
    for item in registry.defaults():
        assert type(item) is registry.load(item.name)
        assert registry.parse(item.describe()) == item
