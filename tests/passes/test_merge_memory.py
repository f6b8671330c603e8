# SPDX-License-Identifier: Apache-2.0
"""merge-ffn: sums of windows that overlap stay inside the room that the memory plan has for them."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
from onnxcollapse.passes.ffn_ties import Sums
from onnxcollapse.passes.merge_ffn import MergeFfn

from onnxcollapse import Budget, Decline, Target, optimize
from onnxcollapse.calibration import plan, planner, tape
from onnxcollapse.calibration.statistics import CrossMoments, GramMatrix
from onnxcollapse.rewriting import storage
from onnxcollapse.rewriting.fitting import Fitter, Place
from onnxcollapse.rewriting.passes import offers_of
from onnxcollapse.rewriting.progress import Progress
from tests.passes.test_merge_ffn import HIDDEN, WIDTH, different, kept
from tests.support import data_for, rows

ONE = 32 * (HIDDEN + WIDTH) ** 2
"""What the plan takes the sums of one block for: of both parts, gathered and read out."""


class Alive:
    """Bytes of all matrices of sums that anybody holds, and the most there were."""

    def __init__(self):
        self.now = self.most = 0
        self._known = set()

    def watch(self, array):
        key, size = id(array), array.nbytes
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(array, self._gone, key, size)

    def _gone(self, key, size):
        self._known.discard(key)
        self.now -= size


@pytest.fixture
def alive(monkeypatch):
    counted = Alive()
    for kind, names in ((GramMatrix, ["matrix"]), (CrossMoments, ["covariance"]), (Sums, ["G", "C"])):

        def init(self, *args, _names=names, _init=kind.__init__, **kwargs):
            _init(self, *args, **kwargs)
            for name in _names:
                counted.watch(getattr(self, name))

        monkeypatch.setattr(kind, "__init__", init)
    monkeypatch.setattr(tape, "IN_MEMORY", 1)  # matrices as small as these would stay in memory
    monkeypatch.setattr(storage, "measure", lambda *arguments: (_ for _ in ()).throw(OSError()))
    return counted


def merged(item, memory):
    model, x = different("plain", 7), rows(300, WIDTH)
    budget = Budget(None, target=Target("params", 0.7))
    return optimize(model, data_for(model, x), budget=budget, passes=[item], provider="cpu", memory=memory)


@pytest.mark.parametrize(("tie", "ones"), [("fit", 0), ("fit", 1), ("average", 0)])
def test_sums_of_windows_that_overlap_stay_inside_the_room_for_them(tie, ones, alive):
    free = merged(MergeFfn(tie, window=4), None)
    assert alive.most > 3 * ONE  # so that the bounds below are bounds
    alive.most = alive.now
    tight = merged(MergeFfn(tie, window=4), planner.BASE + 4 * ones * ONE)
    assert alive.most <= max(ones, 1) * ONE
    assert [entry.site for entry in kept(tight)] == [entry.site for entry in kept(free)]
    assert tight.error == pytest.approx(free.error, rel=1e-5)  # in smaller batches, whose sums are of fp32


def offered(item, form, room):
    """What the pass offers where sums have this room: sites, errors and the bytes of weights."""
    model, x = different(form, 6), rows(300, WIDTH)
    order = {node: number for number, node in enumerate(model.graph)}
    places = [Place.of(item, site, order) for site in item.sites(model) if not isinstance(site, Decline)]
    limited = replace(plan(model), sums=room)
    fitter = Fitter(model.clone(), data_for(model, x), limited, "cpu", Progress())
    return [
        (
            offer.site,
            offer.predicted_error,
            [matrix.tobytes() for matrix in offer.payload.weights()[0].matrices],
        )
        for place, statistics in fitter.statistics(model, places)
        for offer in offers_of(item, place.site, statistics)
    ]


def test_a_wider_window_takes_no_more(alive):
    most = []
    for window in (2, 3, 5):
        alive.most = alive.now
        offered(MergeFfn(window=window), "plain", 0)
        most.append(alive.most)
    assert max(most) <= ONE
    assert len(set(most)) == 1


@pytest.mark.parametrize(("form", "tie"), [("gated", "fit"), ("gemm", "average")])
def test_what_is_offered_does_not_depend_on_where_sums_wait(form, tie, alive):
    found = [offered(MergeFfn(tie, window=3), form, room) for room in (None, 5 * ONE, 0)]
    assert [site for site, *_ in found[0]] == ["u2", "u3", "u4", "u5"]
    assert found[0] == found[1] == found[2]
