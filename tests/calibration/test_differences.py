# SPDX-License-Identifier: Apache-2.0
"""Statistics of a difference of two tensors, and Gram matrices put together from cross moments."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse import open_data
from onnxcollapse.calibration import Gram, Ref, collect, open_session
from onnxcollapse.calibration.leastsquares import ridge_fit
from onnxcollapse.calibration.statistics import Cross, GramMatrix, Moments
from tests.support import residual, rows


@pytest.fixture(scope="module")
def case():
    """A model, its data, and what the tensors are on the fit part."""
    model = residual()
    feeds = {"x": rows(200, 8), "s": rows(200, 3, seed=2)}
    data = open_data(feeds, model)
    part = {name: np.concatenate([batch[name] for batch in data.batches("fit")]) for name in feeds}
    return model, data, part


def tensor(model, part, name):
    copy = model.clone()
    value = next(v for node in copy.graph for v in node.outputs if v.name == name)
    copy.graph.outputs.append(value)
    with open_session(copy, provider="cpu") as session:
        return session.run(part)[name].astype(np.float64)


@pytest.mark.parametrize("cuts", [(), ("h1", "h2", "h3")])
def test_a_difference_is_that_of_the_tensors_across_segments(case, cuts):
    model, data, part = case
    gain = Ref("h3", "reference", minus="h1")
    wanted = [Cross(Ref("h1"), gain), Moments(gain)]
    found = collect(model, wanted, data, provider="cpu", reference=model, cuts=cuts)
    first, third = (tensor(model, part, name) for name in ("h1", "h3"))
    difference = third - first
    np.testing.assert_allclose(found.fit(wanted[1]).mean, difference.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.fit(wanted[1]).variance, difference.var(0), rtol=1e-4)
    covariance = (first - first.mean(0)).T @ (difference - difference.mean(0)) / len(first)
    np.testing.assert_allclose(found.fit(wanted[0]).covariance, covariance, atol=1e-4)


def test_sums_put_together_fit_as_those_gathered_together(case):
    model, data, _ = case
    x, y = Ref("h1"), Ref("h2")
    whole = collect(model, [Gram((x,), (y,))], data, provider="cpu")
    apart = collect(model, [Gram((x,)), Cross(x, y)], data, provider="cpu")
    joint = [GramMatrix.assembled(of(Gram((x,))), of(Cross(x, y)), y) for of in (apart.fit, apart.heldout)]
    known = [of(Gram((x,), (y,))) for of in (whole.fit, whole.heldout)]
    a, b = ridge_fit(*joint, 1, 2), ridge_fit(*known, 1, 2)
    np.testing.assert_allclose(a.matrix, b.matrix, atol=1e-4)
    assert a.error == pytest.approx(b.error, rel=1e-4)
    assert joint[0].power(2) == pytest.approx(known[0].power(2), rel=1e-5)


def test_a_part_that_is_subtracted_is_a_tensor_of_the_model():
    gain = Ref("b", "reference", axis=1, minus="a")
    assert gain.parts == (gain, Ref("a", axis=1))
    assert Ref("b").parts == (Ref("b"),)
