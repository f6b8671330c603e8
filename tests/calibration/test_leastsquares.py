# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.calibration import GramMatrix, Ref, leastsquares, linear_error, relative_error, ridge_fit
from onnxcollapse.calibration.leastsquares import Spectrum
from onnxcollapse.errors import OptionError


def problem(n=400, noise=0.1, seed=0, F=12, q=7, offset=3.0):
    rng = np.random.default_rng(seed)
    W = np.random.default_rng(99).standard_normal((F, q))
    x = rng.standard_normal((n, F)) + offset
    y = x @ W + 1.5 + noise * rng.standard_normal((n, q))
    return x, y, W


def test_equals_ridge_on_the_rows():
    x, y, _ = problem()
    gram = GramMatrix.from_rows({"x": x, "y": y})
    found = ridge_fit(gram, gram, "x", "y", ridges=[1e-2])
    xc, yc = x - x.mean(0), y - y.mean(0)
    G = xc.T @ xc / len(x)
    expected = np.linalg.solve(G + 1e-2 * np.trace(G) / 12 * np.eye(12), xc.T @ yc / len(x))
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.offset, y.mean(0) - x.mean(0) @ expected, rtol=1e-9)
    assert found.ridge == 1e-2


def test_the_bias_is_not_penalised():
    x, y, _ = problem()
    gram = GramMatrix.from_rows({"x": x, "y": y + 1e6})
    found = ridge_fit(gram, gram, "x", "y", ridges=[10.0])
    np.testing.assert_allclose((x @ found.matrix + found.offset).mean(0), y.mean(0) + 1e6, rtol=1e-12)


def test_closed_form_error_is_the_measured_one():
    x, y, W = problem(noise=0.5)
    gram = GramMatrix.from_rows({"x": x, "y": y})
    offset = np.linspace(-1, 2, 7)
    measured = np.square(y - x @ (0.9 * W) - offset).sum(1).mean()
    assert linear_error(gram, "x", "y", 0.9 * W, offset) == pytest.approx(measured, rel=1e-6)
    relative = np.sqrt(measured / np.square(y).sum(1).mean())
    assert relative_error(gram, "x", "y", 0.9 * W, offset) == pytest.approx(relative, rel=1e-6)


def test_errors_of_a_fit_are_those_of_its_two_parts():
    x, y, _ = problem(noise=1.0)
    fit, heldout = (GramMatrix.from_rows({"x": x[s], "y": y[s]}) for s in (slice(300), slice(300, None)))
    found = ridge_fit(fit, heldout, "x", "y")
    for error, rows in ((found.fit_error, slice(300)), (found.error, slice(300, None))):
        residual = y[rows] - x[rows] @ found.matrix - found.offset
        assert error == pytest.approx(np.linalg.norm(residual) / np.linalg.norm(y[rows]), rel=1e-6)
    assert found.fit_error < found.error


def test_the_ridge_is_the_best_on_held_out_rows():
    x, y, _ = problem(n=420, noise=20.0)
    fit, heldout = (GramMatrix.from_rows({"x": x[s], "y": y[s]}) for s in (slice(20), slice(20, None)))
    ridges = (1e-4, 1e-2, 1.0, 100.0)
    errors = {r: ridge_fit(fit, heldout, "x", "y", ridges=[r]).error for r in ridges}
    best = ridge_fit(fit, heldout, "x", "y", ridges=ridges)
    assert best.error == min(errors.values())
    assert errors[best.ridge] == best.error
    assert best.ridge > 1e-4


def test_several_features_and_a_target_by_ref():
    x, y, W = problem(noise=0.0)
    columns = {"a": x[:, :5], "b": x[:, 5:], Ref("y", "reference"): y}
    gram = GramMatrix.from_rows(columns)
    found = ridge_fit(gram, gram, ["a", "b"], Ref("y", "reference"), ridges=[0.0])
    np.testing.assert_allclose(found.matrix, W, atol=1e-9)
    assert found.error < 1e-6


def test_rank_limited_fit_is_the_best_of_its_rank():
    x, y, _ = problem(noise=0.3)
    gram = GramMatrix.from_rows({"x": x, "y": y})
    found = ridge_fit(gram, gram, "x", "y", ridges=[0.0], rank=3)
    assert np.linalg.matrix_rank(found.matrix) == 3
    xc, yc = x - x.mean(0), y - y.mean(0)
    fitted = xc @ np.linalg.lstsq(xc, yc, rcond=None)[0]
    u, s, vt = np.linalg.svd(fitted, full_matrices=False)
    np.testing.assert_allclose(xc @ found.matrix, u[:, :3] * s[:3] @ vt[:3], atol=1e-8)
    left, right = found.factors()
    assert (left.shape, right.shape) == ((12, 3), (3, 7))
    np.testing.assert_allclose(left @ right, found.matrix, atol=1e-12)


def test_a_rank_beyond_the_targets_is_no_limit():
    x, y, _ = problem()
    gram = GramMatrix.from_rows({"x": x, "y": y})
    full, limited = ridge_fit(gram, gram, "x", "y"), ridge_fit(gram, gram, "x", "y", rank=50)
    np.testing.assert_allclose(limited.matrix, full.matrix, atol=1e-10)
    with pytest.raises(OptionError, match="no factors"):
        full.factors()


def test_a_strong_ridge_shrinks_towards_the_prior():
    x, y, W = problem(noise=0.0)
    gram = GramMatrix.from_rows({"x": x, "y": y})
    prior = W + 0.1
    found = ridge_fit(gram, gram, "x", "y", ridges=[1e9], prior=prior)
    np.testing.assert_allclose(found.matrix, prior, atol=1e-6)
    np.testing.assert_allclose(
        ridge_fit(gram, gram, "x", "y", ridges=[0.0], prior=prior).matrix, W, atol=1e-8
    )


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_singular_features(ridge):
    x, y, _ = problem(noise=0.0)
    doubled = np.concatenate([x, x, np.full((len(x), 2), 7.0)], axis=1)
    gram = GramMatrix.from_rows({"x": doubled, "y": y})
    found = ridge_fit(gram, gram, "x", "y", ridges=[ridge])
    assert np.isfinite(found.matrix).all()
    assert found.error < (1e-5 if ridge == 0 else 1e-3)
    np.testing.assert_allclose(found.matrix[:12], found.matrix[12:24], atol=1e-6)  # minimum norm


def test_fewer_rows_than_features():
    x, y, _ = problem(n=5)
    gram = GramMatrix.from_rows({"x": x, "y": y})
    found = ridge_fit(gram, gram, "x", "y", ridges=[0.0])
    assert np.isfinite(found.matrix).all()
    assert found.fit_error < 1e-6


def test_constant_features_give_the_mean():
    _, y, _ = problem()
    gram = GramMatrix.from_rows({"x": np.full((400, 3), 5.0), "y": y})
    found = ridge_fit(gram, gram, "x", "y")
    np.testing.assert_allclose(found.matrix, 0, atol=1e-12)
    np.testing.assert_allclose(found.offset, y.mean(0), rtol=1e-12)


def test_targets_of_zeros():
    x, y, _ = problem()
    gram = GramMatrix.from_rows({"x": x, "y": 0 * y})
    assert ridge_fit(gram, gram, "x", "y").error == 0
    assert relative_error(gram, "x", "y", np.ones((12, 7)), np.zeros(7)) == np.inf


@pytest.mark.parametrize("options", [{"ridges": []}, {"ridges": [-1.0]}, {"rank": 0}])
def test_impossible_options(options):
    x, y, _ = problem()
    gram = GramMatrix.from_rows({"x": x, "y": y})
    with pytest.raises(OptionError):
        ridge_fit(gram, gram, "x", "y", **options)


@pytest.mark.parametrize("noise", [0.01, 1.0, 20.0, 300.0])
def test_a_spectrum_finds_the_ridge_that_trying_each_finds(noise):
    """Of several targets, by one decomposition; the fit is the same in every bit."""
    ridges = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
    for seed in range(5):
        x, y, _ = problem(n=60, noise=noise, seed=seed)
        parts = slice(30), slice(30, None)
        features = [GramMatrix.from_rows({"x": x[part]}) for part in parts]
        fit, heldout = (GramMatrix.from_rows({"x": x[part], "y": y[part]}) for part in parts)
        spectrum = Spectrum.of(*features)
        assert spectrum is Spectrum.of(*features)
        quick = ridge_fit(fit, heldout, "x", "y", ridges, spectrum=spectrum)
        slow = ridge_fit(fit, heldout, "x", "y", ridges)
        assert (quick.ridge, quick.error, quick.fit_error) == (slow.ridge, slow.error, slow.fit_error)
        np.testing.assert_array_equal(quick.matrix, slow.matrix)


def test_a_spectrum_leaves_singular_features_to_the_solver_and_wide_ones_alone(monkeypatch):
    x, y, _ = problem(noise=1.0)
    x = np.concatenate([x, x[:, :3]], axis=1)
    gram = GramMatrix.from_rows({"x": x, "y": y})
    features = GramMatrix.from_rows({"x": x})
    ridges = (0.0, 1e-2)
    quick = ridge_fit(gram, gram, "x", "y", ridges, spectrum=Spectrum.of(features, features))
    assert quick.error == ridge_fit(gram, gram, "x", "y", ridges).error
    monkeypatch.setattr(leastsquares, "WIDEST", 14)
    assert Spectrum.of(features, features) is None


def test_a_spectrum_goes_with_the_sums_it_is_of():
    x, _, _ = problem()
    gram = GramMatrix.from_rows({"x": x})
    before = len(Spectrum._shared)
    Spectrum.of(gram, gram)
    assert len(Spectrum._shared) == before + 1
    del gram
    assert len(Spectrum._shared) == before
