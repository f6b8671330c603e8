# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from onnxcollapse.calibration import cut_points, parse_memory, plan
from onnxcollapse.errors import OptionError
from tests.support import mlp, residual


def test_a_model_is_cut_only_where_it_does_not_fit_whole():
    model = residual()
    points = tuple(cut_points(model.graph))
    assert plan(model, 4 << 30).cuts == ()
    assert plan(model, 1).cuts == plan(model, 4 << 30).points == points


def test_what_cannot_be_cut_is_said(caplog):
    assert plan(mlp([4, 8, 4]), 1).cuts == ()
    assert "no layers to cut it at" in caplog.text


@pytest.mark.parametrize(
    "text, expected",
    [("4GB", 4 << 30), ("512mb", 512 << 20), ("2 GiB", 2 << 30), ("1.5G", 3 << 29), ("4096", 4096)],
)
def test_sizes_are_read(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "much", "4XB", "-1GB", "0", "nan", "inf"])
def test_what_is_no_size_is_one_clear_error(text):
    with pytest.raises(OptionError, match="--memory"):
        parse_memory(text)
