# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse import open_data
from onnxcollapse.calibration import Gram, Moments, Ref, Sweep, collect, cut_points
from onnxcollapse.calibration.segments import extract, joined, segments
from onnxcollapse.calibration.tape import Tape
from onnxcollapse.calibration.walk import Walk
from onnxcollapse.model import size
from tests.support import LAYERS, WIDTH, outputs, residual, rows


@pytest.fixture
def model():
    return residual()


@pytest.fixture
def data(model):
    return open_data({"x": rows(300, WIDTH), "s": rows(300, 3, seed=2)}, model, batch_size=64)


def requests():
    return [
        Gram((Ref("h0"), Ref("a0")), (Ref("u0"),)),
        Gram((Ref("h3"), Ref("a3")), (Ref("u3", "reference"),)),
        Moments(Ref("a4")),
        Moments(Ref("x")),
        Gram((Ref("h1"),), (Ref("h4"),)),  # between two segments
        Gram((Ref("x"),), (Ref("h2", "reference"),)),
    ]


def arrays(result):
    return [v for v in vars(result).values() if isinstance(v, np.ndarray)]


def assert_same(a, b, tolerance=1e-5):
    assert a.results.keys() == b.results.keys()
    for key, result in a.results.items():
        for mine, theirs in zip(arrays(result), arrays(b.results[key]), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


def test_layers_are_the_cut_points(model):
    assert cut_points(model.graph) == [f"h{i}" for i in range(LAYERS + 1)]


def test_joined_segments_are_those_between_fewer_points(model):
    cuts = cut_points(model.graph)
    found = segments(model.graph, cuts)
    for first in range(len(found)):
        for last in range(first, len(found)):
            fewer = segments(model.graph, [*cuts[:first], *cuts[last:]])[first]
            one = joined(found, first, last)
            assert (one.index, one.makes) == (fewer.index, fewer.makes)
            for field in ("feeds", "reads", "gives", "outputs"):
                assert sorted(getattr(one, field)) == sorted(getattr(fewer, field))


def test_segments_hold_every_node_once_and_carry_the_side_path(model):
    cuts = cut_points(model.graph)
    found = segments(model.graph, cuts)
    assert len(found) == LAYERS + 2
    made = [name for segment in found for name in segment.makes]
    assert len(made) == len(set(made)) == len(model.graph)
    assert found[0].gives == ("scale", "h0") or set(found[0].gives) == {"scale", "h0"}
    assert set(found[2].reads) == {"h1", "scale"}
    assert found[-1].outputs == ("y",)


def test_extracted_segments_hold_their_own_weights_only(model):
    cuts = cut_points(model.graph)
    parts = [extract(model, s, [*s.gives, *s.outputs]) for s in segments(model.graph, cuts)]
    assert sum(size(part).params for part in parts) == size(model).params


@pytest.mark.parametrize("cuts", [(), ("h2",), tuple(f"h{i}" for i in range(LAYERS + 1))])
def test_a_walk_gives_the_outputs_of_the_whole(model, data, cuts):
    walk = Walk(model, data, cuts, parts=("all",), provider="cpu")
    walk.run(["y"])
    for _ in range(2):  # the last segment may be run again
        for step in walk.finish(["y"]):
            whole = outputs(model, **step.batch)["y"]
            np.testing.assert_allclose(step.outputs["y"], whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cuts", [("h1", "h3"), tuple(f"h{i}" for i in range(LAYERS + 1))])
def test_statistics_of_segments_equal_those_of_the_whole(model, data, cuts):
    other = residual(seed=1)
    whole = collect(model, requests(), data, provider="cpu", reference=other)
    parts = collect(model, requests(), data, provider="cpu", reference=other, cuts=cuts)
    assert_same(parts, whole)


def test_what_is_rewritten_changes_what_later_segments_see_but_not_the_targets(model, data):
    changed = residual(seed=3)  # stands for the rewritten prefix: the same names, other weights
    cuts = cut_points(model.graph)
    late = Gram((Ref("h4"),), (Ref("u4", "reference"),))
    early = Moments(Ref("a0"))
    sweep = Sweep(model, [early, late], data, provider="cpu", reference=model, cuts=cuts)
    seen = {}
    for segment, statistics in sweep:
        seen |= statistics.results
        if segment.index == 1:
            sweep.rewritten(changed)
    plain = collect(model, [early, late], data, provider="cpu", reference=model)
    gram, untouched = seen["fit", late], plain.fit(late)
    targets = slice(1 + WIDTH, None)
    np.testing.assert_allclose(gram.matrix[targets, targets], untouched.matrix[targets, targets], rtol=1e-5)
    assert not np.allclose(gram.block("h4", "h4"), untouched.block("h4", "h4"), rtol=1e-2)


def test_only_the_segment_that_was_rewritten_runs_twice(model, data, monkeypatch):
    opened, real = [], Walk.pass_through

    def counted(self, *arguments, **options):
        opened.append(self.place)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Walk, "pass_through", counted)
    sweep = Sweep(model, [Moments(Ref("a4"))], data, provider="cpu", cuts=cut_points(model.graph))
    for segment, _ in sweep:
        if segment.index == 1:
            sweep.rewritten(model)
    assert opened == [0, 1, 1, 2, 3, 4, 5]


def test_statistics_again_after_an_edit_in_the_same_segment(model, data):
    request = Moments(Ref("u1"))
    sweep = Sweep(model, [request], data, provider="cpu", cuts=cut_points(model.graph))
    for _, statistics in sweep:
        if request in statistics:
            changed = residual(seed=3)
            again = sweep.again(changed, [request])
            assert not np.allclose(again.fit(request).mean, statistics.fit(request).mean)


def test_tapes_give_back_what_was_put_and_forget_what_is_dropped():
    tape = Tape()
    arrays = [np.arange(n, dtype=np.float16).reshape(1, n) for n in (3, 0, 5)]
    arrays += [arrays[0].T, np.array(7, np.float16)]  # columns, and one number
    for array in arrays:
        tape.put("a", array)
    for number in (2, 0, 1, 4, 3):
        found = tape.get("a", number)
        assert found.shape == arrays[number].shape
        np.testing.assert_array_equal(found, arrays[number])
    tape.drop(["a"])
    assert "a" not in tape


def test_a_cut_that_a_rewrite_took_away_from_one_model_cuts_neither(model, data):
    """A model whose last layers are gone has fewer segments than its reference."""
    short = residual()
    for name in [f"h{i}" for i in range(2, LAYERS + 1)]:
        next(v for node in short.graph for v in node.outputs if v.name == name).name = f"{name}_other"
    cuts = cut_points(model.graph)
    wanted = [Gram((Ref("h1"),), (Ref("y", "reference"),))]
    whole = collect(short, wanted, data, provider="cpu", reference=model)
    assert_same(collect(short, wanted, data, provider="cpu", reference=model, cuts=cuts), whole)
