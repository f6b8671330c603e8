# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcollapse.calibration import GramMatrix, eliminate, refit_subset, ridge_fit, surgery
from onnxcollapse.calibration.leastsquares import relative_error
from onnxcollapse.calibration.surgery import removal_order
from onnxcollapse.errors import OptionError


def rows(n=300, F=12, q=5, f=3, seed=0, noise=0.1):
    """Correlated features a, skip features x, and targets of both."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, f)) + 1.0
    a = np.maximum(x @ rng.standard_normal((f, F)) + rng.standard_normal((n, F)), 0)
    y = a @ rng.standard_normal((F, q)) + x @ rng.standard_normal((f, q)) + 2.0
    return {"x": x, "a": a, "y": y + noise * rng.standard_normal((n, q))}


def halves(columns, at=None):
    at = at or len(columns["y"]) * 2 // 3
    return tuple(
        GramMatrix.from_rows({k: v[s] for k, v in columns.items()}) for s in (slice(at), slice(at, None))
    )


def brute_order(columns, removals, ridge, group=1, fixed=False, weights=None):
    """Greedy optimal brain surgeon with a fresh inverse after each removal, from the rows."""
    a, y = columns["a"], columns["y"]
    x = columns["x"] if fixed else a[:, :0]
    stack, target = np.hstack([x, a]), y - y.mean(0)
    stack = stack - stack.mean(0)
    A = stack.T @ stack / len(a)
    A += ridge * np.trace(A) / len(A) * np.eye(len(A))
    C = stack.T @ target / len(a) * np.sqrt(1.0 if weights is None else weights)
    left, order = list(range(a.shape[1] // group)), []
    for _ in range(removals):
        index = [*range(x.shape[1]), *(x.shape[1] + g * group + i for g in left for i in range(group))]
        H = np.linalg.inv(A[np.ix_(index, index)])
        W = H @ C[index]
        spans = [slice(x.shape[1] + p * group, x.shape[1] + (p + 1) * group) for p in range(len(left))]
        costs = [np.trace(W[s].T @ np.linalg.inv(H[s, s]) @ W[s]) for s in spans]
        order.append(left.pop(int(np.argmin(costs))))
    return order


def order_of(columns, group, removals, ridge=1e-3, fixed=False, weights=None):
    gram = GramMatrix.from_rows(columns)
    stay = gram.columns("x" if fixed else ())
    index = gram.columns("a").reshape(-1, group)
    return removal_order(
        gram, stay, index, gram.columns("y"), removals, ridge=ridge, weights=weights
    ).tolist()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("q", [5, 40])  # 40 targets are more than features: W is kept thin
def test_order_is_that_of_exact_greedy_elimination(group, fixed, q):
    columns = rows(F=12, q=q)
    expected = brute_order(columns, 12 // group, 1e-3, group, fixed)
    assert order_of(columns, group, 12 // group, fixed=fixed) == expected


def test_a_step_of_several_groups_is_greedy_within():
    columns = rows(n=900, F=140)  # 140 // 64 = 2 groups in a step
    assert order_of(columns, 1, 30) == brute_order(columns, 30, 1e-3)


@pytest.mark.parametrize("group", [1, 4])
def test_blocked_elimination_is_as_good_as_the_exact_one(group, monkeypatch):
    rng = np.random.default_rng(1)
    z = rng.standard_normal((2000, 40))
    a = z @ rng.standard_normal((40, 400)) + 0.05 * rng.standard_normal((2000, 400))
    y = a @ (rng.standard_normal((400, 30)) * np.exp(rng.standard_normal((400, 1))))
    gram = GramMatrix.from_rows({"a": a, "y": y})
    counts = [320 // group, 200 // group, 100 // group, 20 // group]

    def errors(steps):
        monkeypatch.setattr(surgery, "STEPS_PER_FOLD", steps)
        fits = eliminate(gram, gram, "a", "y", counts, ridges=[1e-3], group=group)
        return np.array([fit.fit_error for fit in fits])

    exact, blocked = errors(10**9), errors(64 // group)
    assert np.all(blocked <= 1.02 * exact)
    assert exact[-1] > 2 * exact[0]  # not all sets are alike here


def test_duplicated_and_dependent_features_leave_at_no_error():
    columns = rows(F=10, noise=0.0)
    a = columns["a"]
    mixing = np.random.default_rng(3).standard_normal((10, 8))
    columns["a"] = np.hstack([a, a[:, ::-1], a @ mixing])
    fit, heldout = halves(columns)
    found = eliminate(fit, heldout, "a", "y", [28, 10, 9], fixed="x", ridges=[1e-9])
    assert found[1].error < 1e-6 and found[1].fit_error < 1e-6
    assert np.linalg.matrix_rank(columns["a"][:, found[1].keep]) == 10
    assert found[2].error > 1e-3


def test_singular_features_are_no_obstacle_without_a_ridge():
    columns = rows(F=10, noise=0.0)
    columns["a"] = np.hstack([columns["a"]] * 3)
    fit, heldout = halves(columns)
    found = eliminate(fit, heldout, "a", "y", [10], fixed="x", ridges=[0.0])[0]
    assert sorted(found.keep % 10) == list(range(10))
    assert found.error < 1e-6


def test_rounding_in_the_sums_raises_the_ridge_only(caplog):
    columns = rows(F=10)
    columns["a"] = np.hstack([columns["a"]] * 3)
    gram = GramMatrix.from_rows(columns)
    noise = np.random.default_rng(0).standard_normal(gram.matrix.shape) * 1e-6 * gram.matrix.max()
    rough = GramMatrix(gram.count, gram.refs, gram.widths, gram.matrix + noise + noise.T)  # indefinite
    index, y = gram.columns("a"), gram.columns("y")
    with caplog.at_level("DEBUG"):
        order = removal_order(rough, np.empty(0, np.intp), index[:, None], y, 20, ridge=0.0)
    assert "goes on with ridge" in caplog.text
    kept = set(range(30)) - set(order.tolist())
    assert len(kept) == len({i % 10 for i in kept}) == 10


def test_indefinite_sums_are_an_error():
    gram = GramMatrix.from_rows(rows())
    index = gram.columns("a")[:, None]
    gram.matrix[6, 7] = gram.matrix[7, 6] = 1e6 * gram.matrix.max()
    with pytest.raises(OptionError, match="indefinite"):
        removal_order(gram, gram.columns("x"), index, gram.columns("y"), 3, ridge=1e-3)


def test_sums_that_are_not_finite_are_an_error():
    gram = GramMatrix.from_rows(rows())
    gram.matrix[5, 6] = gram.matrix[6, 5] = np.nan
    index = gram.columns("a")[:, None]
    with pytest.raises(OptionError, match="not finite"):
        removal_order(gram, np.empty(0, np.intp), index, gram.columns("y"), 3, ridge=1e-3)


def test_errors_are_those_of_the_rows():
    columns = rows(noise=1.0)
    fit, heldout = halves(columns, 200)
    for found in eliminate(fit, heldout, "a", "y", [9, 4, 0], fixed="x"):
        features = np.hstack([columns["x"], columns["a"][:, found.keep]])
        residual = columns["y"] - features @ found.matrix - found.offset
        for error, part in ((found.fit_error, slice(200)), (found.error, slice(200, None))):
            measured = np.linalg.norm(residual[part]) / np.linalg.norm(columns["y"][part])
            assert error == pytest.approx(measured, rel=1e-6)


def test_groups_leave_together_and_the_matrix_follows_the_kept_ones():
    columns = rows(F=12, noise=0.0)
    truth = np.random.default_rng(5).standard_normal((6, 5))
    columns["y"] = columns["a"][:, [2, 3, 6, 7, 10, 11]] @ truth + 1.0
    fit, heldout = halves(columns)
    found = eliminate(fit, heldout, "a", "y", [3], group=2, ridges=[0.0])[0]
    assert found.keep.tolist() == [1, 3, 5] and found.keep.dtype == np.intp
    np.testing.assert_allclose(found.matrix, truth, atol=1e-9)
    np.testing.assert_allclose(found.offset, 1.0, atol=1e-8)


def test_a_group_counts_by_its_whole_and_not_by_its_parts():
    rng = np.random.default_rng(2)
    a = rng.standard_normal((500, 4))
    a[:, 1] = a[:, 0] + 0.01 * rng.standard_normal(500)  # either of the first two could leave alone
    columns = {"a": a, "y": 3 * a[:, :1] + 3 * a[:, 1:2] + a[:, 2:3] + a[:, 3:]}
    fit, heldout = halves(columns)
    assert eliminate(fit, heldout, "a", "y", [1], group=2)[0].keep.tolist() == [0]


def test_fixed_features_never_leave_and_come_first():
    columns = rows(noise=0.0)
    truth = np.random.default_rng(5).standard_normal((4, 5))
    columns["x"][:, 0] *= 1e-3  # the first that would leave
    columns["y"] = np.hstack([columns["x"], columns["a"][:, [7]]]) @ truth
    fit, heldout = halves(columns)
    found = eliminate(fit, heldout, "a", "y", [1], fixed="x", ridges=[0.0])[0]
    assert found.keep.tolist() == [7]
    np.testing.assert_allclose(found.matrix, truth, atol=1e-6)


def test_dead_and_constant_features_fold_into_the_offset():
    columns = rows(F=8, noise=0.0)
    effect = np.random.default_rng(6).standard_normal((2, 5))
    a = columns["a"]
    columns["y"] = columns["y"] + np.array([0.0, 7.0]) @ effect
    columns["a"] = np.hstack([np.zeros((300, 1)), a, np.full((300, 1), 7.0)])
    fit, heldout = halves(columns)
    whole, fewer, least = eliminate(fit, heldout, "a", "y", [10, 8, 7], fixed="x", ridges=[1e-9])
    assert fewer.keep.tolist() == list(range(1, 9))
    assert max(whole.error, fewer.error) < 1e-6 < 1e-3 < least.error
    assert set(least.keep) < set(fewer.keep)


def test_only_dead_features_and_none():
    columns = rows()
    columns["a"] = np.zeros((300, 4))
    fit, heldout = halves(columns)
    assert eliminate(fit, heldout, "a", "y", [2, 4], fixed="x")[0].keep.tolist() == [2, 3]
    assert eliminate(fit, heldout, (), "y", [0], fixed="x")[0].matrix.shape == (3, 5)


def test_no_group_and_all_groups():
    columns = rows()
    fit, heldout = halves(columns)
    none, every, bare = (
        *eliminate(fit, heldout, "a", "y", [0, 12], fixed="x"),
        eliminate(fit, heldout, "a", "y", [0])[0],
    )
    only_x, both = ridge_fit(fit, heldout, "x", "y"), ridge_fit(fit, heldout, ["x", "a"], "y")
    np.testing.assert_array_equal(none.matrix, only_x.matrix)
    np.testing.assert_array_equal(every.matrix, both.matrix)
    assert none.keep.size == 0 and every.keep.tolist() == list(range(12))
    assert bare.matrix.shape == (0, 5)
    np.testing.assert_allclose(bare.offset, columns["y"][:200].mean(0), rtol=1e-12)


def test_counts_come_back_in_their_order_and_nest():
    fit, heldout = halves(rows(F=20))
    found = eliminate(fit, heldout, "a", "y", [3, 11, 3, 7])
    assert [len(f.keep) for f in found] == [3, 11, 3, 7]
    assert set(found[0].keep) < set(found[3].keep) < set(found[1].keep)


def test_refit_of_a_set_is_the_ridge_fit_of_its_columns():
    columns = rows(noise=3.0)
    fit, heldout = halves(columns)
    chosen = columns["a"].reshape(-1, 4, 3)[:, [0, 2]].reshape(-1, 6)
    expected = ridge_fit(*halves({"x": columns["x"], "k": chosen, "y": columns["y"]}), ["x", "k"], "y")
    found = refit_subset(fit, heldout, "a", "y", [2, 0], fixed="x", group=3)
    assert found.keep.tolist() == [0, 2]
    np.testing.assert_allclose(found.matrix, expected.matrix, rtol=1e-9)
    np.testing.assert_allclose(found.offset, expected.offset, rtol=1e-9)
    assert (found.ridge, found.error) == (expected.ridge, pytest.approx(expected.error, rel=1e-9))


def block(n, width=48, q=6, seed=0):
    """Features of a hidden layer on n rows, with what a Linear makes of them, and its weights."""
    rng = np.random.default_rng(seed)
    mixing, weights = rng.standard_normal((10, width)), rng.standard_normal((width, q))
    a = np.maximum(rng.standard_normal((n, 10)) @ mixing, 0)
    return {"a": a, "y": a @ weights + 1.0}, weights


def test_with_a_prior_nothing_is_lost_where_nothing_leaves():
    columns, weights = block(20)
    fit, heldout = halves(columns)
    [found] = eliminate(fit, heldout, "a", "y", [48], prior=weights)
    np.testing.assert_allclose(found.matrix, weights, atol=1e-9)
    np.testing.assert_allclose(found.offset, 1.0, atol=1e-9)
    assert found.error < 1e-6 < 0.1 < eliminate(fit, heldout, "a", "y", [48])[0].error


@pytest.mark.parametrize("one_ridge", [False, True])
def test_with_few_rows_a_prior_leaves_a_fraction_of_the_error(one_ridge):
    columns, weights = block(45)
    fit, heldout = halves(columns)
    counts, fresh = [44, 36], GramMatrix.from_rows(block(3000)[0])
    plain = eliminate(fit, heldout, "a", "y", counts, one_ridge=one_ridge)
    steady = eliminate(fit, heldout, "a", "y", counts, one_ridge=one_ridge, prior=weights)
    for one, two in zip(plain, steady, strict=True):
        assert two.error < 0.7 * one.error
        worse, better = (
            relative_error(fresh, fresh.columns("a")[f.keep], "y", f.matrix, f.offset) for f in (one, two)
        )
        assert better < 0.7 * worse


def test_a_prior_is_of_the_groups_that_stay():
    columns = rows(noise=3.0)
    fit, heldout = halves(columns)
    prior = np.random.default_rng(1).standard_normal((columns["a"].shape[1], columns["y"].shape[1]))
    own = prior.reshape(-1, 3, prior.shape[1])[[0, 2]].reshape(6, -1)
    chosen = columns["a"].reshape(-1, 4, 3)[:, [0, 2]].reshape(-1, 6)
    sums = halves({"x": columns["x"], "k": chosen, "y": columns["y"]})
    whole = np.concatenate([np.zeros((columns["x"].shape[1], prior.shape[1])), own])
    expected = ridge_fit(*sums, ["x", "k"], "y", [0.1], prior=whole)
    found = refit_subset(fit, heldout, "a", "y", [2, 0], fixed="x", group=3, ridges=[0.1], prior=prior)
    np.testing.assert_allclose(found.matrix, expected.matrix, rtol=1e-9)
    with pytest.raises(OptionError, match=r"a prior of shape \(3, 5\) is none of \(12, 5\) weights"):
        refit_subset(fit, heldout, "a", "y", [0], prior=prior[:3])


def test_the_choice_beats_a_random_one():
    fit, heldout = halves(rows(n=600, F=40, f=6))
    found = eliminate(fit, heldout, "a", "y", [10])[0]
    rng = np.random.default_rng(0)
    others = [refit_subset(fit, heldout, "a", "y", rng.permutation(40)[:10]).error for _ in range(10)]
    assert found.error < 0.9 * min(others)


def test_weights_steer_the_choice_but_not_the_fit():
    rng = np.random.default_rng(4)
    a = rng.standard_normal((400, 4))
    fit, heldout = halves({"a": a, "y": a @ np.diag([1.0, 2.0, 3.0, 4.0])})
    plain = eliminate(fit, heldout, "a", "y", [2])[0]
    steered = eliminate(fit, heldout, "a", "y", [2], weights=np.array([100.0, 10.0, 1.0, 0.0]))[0]
    assert (plain.keep.tolist(), steered.keep.tolist()) == ([2, 3], [0, 1])
    given = refit_subset(fit, heldout, "a", "y", [0, 1])
    np.testing.assert_array_equal(steered.matrix, given.matrix)
    assert steered.error == given.error > plain.error


@pytest.mark.parametrize("q", [5, 40])
def test_weighted_order_is_that_of_scaled_targets(q):
    columns = rows(q=q)
    weights = np.random.default_rng(8).random(q) ** 4
    expected = brute_order(columns, 12, 1e-3, weights=weights)
    assert order_of(columns, 1, 12, weights=weights) == expected != order_of(columns, 1, 12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"counts": []}, "counts"),
        ({"counts": [13]}, "0 to 12"),
        ({"counts": [-1, 3]}, "0 to 12"),
        ({"counts": [2.5]}, "whole"),
        ({"group": 5}, "no groups of 5"),
        ({"group": 0}, "no groups of 0"),
        ({"fixed": ["x", "a"]}, "both removable and fixed"),
        ({"ridges": ()}, "ridges"),
        ({"ridges": (-1.0,)}, "ridges"),
        ({"weights": np.ones(4)}, "weights must be 5"),
        ({"weights": np.array([1.0, 1, 1, 1, -1])}, "weights"),
        ({"weights": np.zeros(5)}, "weights"),
    ],
)
def test_bad_options_are_errors(change, words):
    fit, heldout = halves(rows())
    with pytest.raises(OptionError, match=words):
        eliminate(fit, heldout, "a", "y", change.pop("counts", [3]), **change)


@pytest.mark.parametrize("keep", [[1, 1], [12], [-1]])
def test_bad_sets_are_errors(keep):
    fit, heldout = halves(rows())
    with pytest.raises(OptionError, match="groups to keep"):
        refit_subset(fit, heldout, "a", "y", keep)


def test_sums_of_different_tensors_are_an_error():
    fit, _ = halves(rows())
    _, other = halves(rows(F=11))
    with pytest.raises(OptionError, match="different tensors"):
        eliminate(fit, other, "a", "y", [3])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]), st.integers(1, 20), st.booleans())
def test_fewer_groups_never_fit_better(seed, group, q, fixed):
    columns = rows(n=90, F=12, q=q, seed=seed, noise=1.0)
    fit, heldout = halves(columns)
    counts = range(12 // group + 1)
    stay = "x" if fixed else ()
    found = eliminate(fit, heldout, "a", "y", list(counts), fixed=stay, group=group, ridges=[0.0])
    for fewer, more in pairwise(found):
        assert set(fewer.keep) < set(more.keep)
        assert fewer.fit_error >= more.fit_error * (1 - 1e-9)
