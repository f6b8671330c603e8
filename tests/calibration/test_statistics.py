# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.calibration import Gram, GramMatrix, Moments, MomentSums, Ref, Statistics
from onnxcollapse.errors import OptionError

ROWS = np.random.default_rng(0).standard_normal((40, 9)) + 2


def test_blocks_are_means_of_products():
    x, y = ROWS[:, :4], ROWS[:, 4:]
    gram = GramMatrix.from_rows({"x": x, "y": y})
    np.testing.assert_allclose(gram.block("x", "y"), x.T @ y / 40, rtol=1e-13)
    np.testing.assert_allclose(gram.block(2, 1), y.T @ x / 40, rtol=1e-13)
    np.testing.assert_allclose(gram.block("one", Ref("x"))[0], x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(gram.block(["one", "y"], "one")[:, 0], [1, *y.mean(0)], rtol=1e-13)
    np.testing.assert_allclose(gram.mean(["x", "y"]), ROWS.mean(0), rtol=1e-13)
    assert gram.power("y") == pytest.approx(np.square(y).sum() / 40, rel=1e-13)


def test_gram_matrices_add_up():
    whole = GramMatrix.from_rows({"x": ROWS})
    halves = GramMatrix.from_rows({"x": ROWS[:13]}) + GramMatrix.from_rows({"x": ROWS[13:]})
    assert halves.count == 40
    np.testing.assert_allclose(halves.matrix, whole.matrix, rtol=1e-13)
    with pytest.raises(OptionError, match="different tensors"):
        _ = whole + GramMatrix.from_rows({"y": ROWS})


def test_selectors_that_mean_nothing():
    gram = GramMatrix.from_rows({Ref("x"): ROWS, Ref("x", "reference"): ROWS})
    with pytest.raises(OptionError, match="ambiguous"):
        gram.block("x", "one")
    with pytest.raises(OptionError, match="not in the Gram matrix"):
        gram.block("nothing", "one")
    for place in (0, 3):
        with pytest.raises(OptionError, match="count from 1"):
            gram.block(place, "one")
    assert gram.block(Ref("x", "reference"), "one").shape == (9, 1)


def test_a_tensor_may_be_feature_and_target():
    ref = Ref("x")
    gram = GramMatrix(40.0, (ref, ref), (9, 9), np.ones((19, 19)))
    assert gram.block("x", "x").shape == (9, 9)


def test_moments_add_up():
    whole, first, rest = (MomentSums.from_rows(rows) for rows in (ROWS, ROWS[:7], ROWS[7:]))
    merged = first + rest
    assert merged.count == 40
    for name in ("mean", "variance", "minimum", "maximum", "positive_rate", "negative_square", "power"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(whole.power, np.square(ROWS).mean(0), rtol=1e-12)


def test_moments_of_a_large_offset_keep_their_variance():
    merged = MomentSums.from_rows(ROWS[:20] + 1e8) + MomentSums.from_rows(ROWS[20:] + 1e8)
    np.testing.assert_allclose(merged.variance, ROWS.var(0), rtol=1e-6)


def test_results_are_found_by_equal_requests():
    gram = GramMatrix.from_rows({"x": ROWS})
    statistics = Statistics({("fit", Gram((Ref("x"),))): gram})
    assert statistics.fit(Gram((Ref("x"),))) is gram
    assert Gram((Ref("x"),)) in statistics
    assert Moments(Ref("x")) not in statistics
    with pytest.raises(OptionError, match="no heldout statistics"):
        statistics.heldout(Gram((Ref("x"),)))


def test_an_array_selects_a_part_of_a_tensor():
    x, y = ROWS[:, :4], ROWS[:, 4:]
    gram = GramMatrix.from_rows({"x": x, "y": y})
    part = gram.columns("y")[[3, 0]]
    np.testing.assert_allclose(gram.block("x", part), x.T @ y[:, [3, 0]] / 40, rtol=1e-13)
    np.testing.assert_allclose(gram.mean(part), y[:, [3, 0]].mean(0), rtol=1e-13)


def three(random, n=50):
    """Rows of a, b, c with widths 3, 4, 4."""
    return {name: random.normal(size=(n, width)) + 1.0 for name, width in (("a", 3), ("b", 4), ("c", 4))}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_projected_sums_are_those_of_the_projected_tensor(place):
    random = np.random.default_rng(0)
    rows = three(random)
    name = list(rows)[place]
    basis = random.normal(size=(rows[name].shape[1], 2))
    found = GramMatrix.from_rows(rows).projected(place, basis)
    expected = GramMatrix.from_rows(rows | {name: rows[name] @ basis})
    assert (found.count, found.refs, found.widths) == (expected.count, expected.refs, expected.widths)
    np.testing.assert_allclose(found.matrix, expected.matrix, rtol=1e-12, atol=1e-10)
    np.testing.assert_array_equal(found.matrix, found.matrix.T)


def test_a_difference_of_sums_is_the_sums_of_the_difference():
    rows = three(np.random.default_rng(1))
    whole = GramMatrix.from_rows(rows)
    before = whole.matrix.copy()
    found = whole.difference(1, 2)
    expected = GramMatrix.from_rows({"a": rows["a"], "b": rows["b"] - rows["c"]})
    assert (found.refs, found.widths) == (expected.refs, expected.widths)
    np.testing.assert_allclose(found.matrix, expected.matrix, rtol=1e-12, atol=1e-10)
    np.testing.assert_array_equal(whole.matrix, before)


def test_tensors_of_unlike_widths_have_no_difference():
    with pytest.raises(OptionError, match="tensors of 3 and 4 columns have no difference"):
        GramMatrix.from_rows(three(np.random.default_rng(1))).difference(0, 2)
