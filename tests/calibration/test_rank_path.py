# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.calibration import GramMatrix, rank_path, ridge_fit


@pytest.fixture
def rows():
    random = np.random.default_rng(0)
    mixing = random.normal(size=(20, 12)) @ np.diag(0.6 ** np.arange(12))
    x = random.normal(size=(600, 20)) + 0.5
    return x, np.tanh(x @ mixing) + 0.1 * random.normal(size=(600, 12)) + 1.0


def test_errors_of_all_ranks_equal_the_measured_ones(rows):
    x, y = rows
    fit, heldout = (
        GramMatrix.from_rows({"x": x[part], "y": y[part]}) for part in (slice(400), slice(400, None))
    )
    path = rank_path(fit, heldout, "x", "y", ridge_fit(fit, heldout, "x", "y"))
    for rank in (1, 3, 12):
        found = path.at(rank)
        measured = np.linalg.norm(x[400:] @ found.matrix + found.offset - y[400:]) / np.linalg.norm(y[400:])
        assert path.errors[rank - 1] == pytest.approx(measured, rel=1e-9)
        assert np.linalg.matrix_rank(found.matrix) == rank
        left, right = found.factors()
        np.testing.assert_allclose(left @ right, found.matrix, atol=1e-12)


def test_full_rank_is_the_fit_itself(rows):
    x, y = rows
    gram = GramMatrix.from_rows({"x": x, "y": y})
    base = ridge_fit(gram, gram, "x", "y")
    path = rank_path(gram, gram, "x", "y", base)
    np.testing.assert_allclose(path.at(12).matrix, base.matrix, atol=1e-10)
    assert path.errors[-1] == pytest.approx(base.error, rel=1e-9)


def test_smallest_rank_within_a_slack(rows):
    x, y = rows
    gram = GramMatrix.from_rows({"x": x, "y": y})
    path = rank_path(gram, gram, "x", "y", ridge_fit(gram, gram, "x", "y"))
    rank = path.within(0.1)
    assert path.errors[rank - 1] <= 1.1 * path.fit.error < path.errors[rank - 2]
    assert path.within(0.0) <= 12
