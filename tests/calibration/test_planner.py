# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.calibration import Gram, Ref, Sweep, cut_points, open_data, parse_memory, plan
from onnxcollapse.calibration.planner import BASE
from onnxcollapse.errors import OptionError
from onnxcollapse.model import size
from onnxcollapse.model.activations import peak_activations
from tests.support import mlp, residual


def test_a_model_is_cut_only_where_it_does_not_fit_whole():
    model = residual()
    points = tuple(cut_points(model.graph))
    assert plan(model, 4 << 30).cuts == ()
    assert plan(model, 1).cuts == plan(model, 4 << 30).points == points
    assert plan(model, 1).measuring == points
    assert plan(model, 4 << 30).measuring == points[-1:]


def test_what_cannot_be_cut_is_said(caplog):
    assert plan(mlp([4, 8, 4]), 1).cuts == plan(mlp([4, 8, 4]), 1).measuring == ()
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


def test_segments_are_as_long_as_fits():
    model = residual()
    points = cut_points(model.graph)
    room = 2 * size(model).bytes
    few = plan(model, BASE + room).cuts
    assert 0 < len(few) < len(points)
    assert set(few) < set(points)


def test_batches_shrink_until_their_activations_fit():
    model = mlp([512, 2048, 512])
    data = open_data({"x": np.zeros((600, 512), np.float32)}, model)
    need = peak_activations(model, data.shapes())
    assert 4 * (512 + 2048) <= need <= 4 * (512 + 2 * 2048 + 512)
    assert plan(model, 64 << 30, data).batch is None
    tight = plan(model, BASE + 4 * 100 * need, data)
    assert tight.batch is not None and 50 <= tight.batch <= 100
    assert len(next(data.in_batches_of(tight.batch).batches("all"))["x"]) == tight.batch
    assert len(next(data.batches("all"))["x"]) == data.batch_size


def test_sums_that_do_not_fit_together_are_gathered_one_after_the_other():
    model = mlp([8, 16, 8, 16, 8])
    data = open_data({"x": np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)}, model)
    names = [node.outputs[0].name for node in model.graph if node.op_type == "Relu"]
    requests = [Gram((Ref(name),)) for name in names]
    [(_, together)] = list(Sweep(model, requests, data, provider="cpu"))
    apart = [statistics for _, statistics in Sweep(model, requests, data, provider="cpu", room=1)]
    assert len(apart) == len(requests) > 1
    for request, statistics in zip(requests, apart, strict=True):
        assert request in statistics
        np.testing.assert_allclose(statistics.fit(request).matrix, together.fit(request).matrix, rtol=1e-12)


def test_what_the_widest_share_leaves_of_the_room_is_spare():
    model = mlp([8, 16, 8, 16, 8])
    data = open_data({"x": np.zeros((64, 8), np.float32)}, model)
    names = [node.outputs[0].name for node in model.graph if node.op_type == "Relu"]
    requests = [Gram((Ref(name),)) for name in names]
    one = {name: 32 * width**2 for name, width in zip(names, (16, 8, 16), strict=True)}
    both, widest = sum(one.values()), max(one.values())

    def spare(room):
        return Sweep(model, requests, data, provider="cpu", room=room).spare

    assert spare(None) is None
    assert spare(both + 5) == 5
    assert spare(both - 1) == both - 1 - (one[names[0]] + one[names[1]])
    assert spare(widest) == spare(1) == spare(0) == 0
