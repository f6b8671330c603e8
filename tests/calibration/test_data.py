# SPDX-License-Identifier: Apache-2.0
"""Splitting, batching, filling in and refusing data."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from onnxcollapse.calibration import open_data
from onnxcollapse.errors import DataError

X = np.arange(2000, dtype=np.float32).reshape(100, 20)
PARTS = ("fit", "heldout", "all")


def first_column(data, part, limit=None):
    return np.concatenate([batch["x"][:, 0] for batch in data.batches(part, limit)])


def test_the_split_is_a_seeded_permutation_of_the_samples(mlp):
    data = open_data({"x": X}, mlp(), seed=1)
    fit, heldout, everything = (first_column(data, part) for part in PARTS)
    assert (len(fit), len(heldout), data.samples) == (75, 25, 100)
    np.testing.assert_array_equal(everything, X[:, 0])
    assert sorted([*fit, *heldout]) == sorted(X[:, 0])
    assert (np.diff(heldout) > 0).all()
    assert set(np.diff(heldout)) != {20.0}  # drawn from everywhere, not cut off at an end
    np.testing.assert_array_equal(first_column(open_data({"x": X}, mlp(), seed=1), "heldout"), heldout)
    assert list(first_column(open_data({"x": X}, mlp(), seed=2), "heldout")) != list(heldout)


@pytest.mark.parametrize(("heldout", "count"), [(0.0, 1), (0.1, 10), (0.999, 99), (1.0, 99)])
def test_each_part_has_a_sample(mlp, heldout, count):
    data = open_data({"x": X}, mlp(), heldout=heldout)
    assert data.count("heldout") == count
    assert data.count("fit") == 100 - count


def test_two_samples_are_enough_one_is_not(mlp):
    data = open_data({"x": X[:2]}, mlp())
    assert data.count("fit") == data.count("heldout") == 1
    single = open_data({"x": X[:1]}, mlp())
    assert single.count("all") == 1  # enough to compare two models
    for part in ("fit", "heldout"):
        with pytest.raises(DataError, match="takes at least 2 samples"):
            next(single.batches(part))


def test_batch_sizes(mlp, encoder):
    def sizes(data):
        return [len(next(iter(batch.values()))) for batch in data.batches("all")]

    assert sizes(open_data({"x": np.tile(X, (6, 1))}, mlp())) == [512, 88]
    assert sizes(open_data({"x": X}, mlp(), batch_size=70)) == [70, 30]
    ids = np.ones((20, 65), np.int64)
    assert sizes(open_data({"input_ids": ids}, encoder())) == [8, 8, 4]
    assert sizes(open_data({"input_ids": ids[:, :64]}, encoder())) == [20]


def test_a_fixed_batch_size_is_respected_and_what_is_left_over_reported(mlp, caplog):
    with caplog.at_level(logging.WARNING):
        data = open_data({"x": X}, mlp(batch="16"), batch_size=5)
    assert "4 samples left over" in caplog.text
    assert data.samples == 96
    assert data.batch_size == 16
    for part, count in (("fit", 64), ("heldout", 32), ("all", 96)):
        batches = list(data.batches(part))
        assert {len(batch["x"]) for batch in batches} == {16}
        assert data.count(part) == sum(len(batch["x"]) for batch in batches) == count
    assert set(first_column(data, "fit")).isdisjoint(first_column(data, "heldout"))
    with pytest.raises(DataError, match="no full batch of 16 samples"):
        open_data({"x": X[:15]}, mlp(batch="16"))
    with pytest.raises(DataError, match="at least 2 batches of the model's fixed size"):
        next(open_data({"x": X[:16]}, mlp(batch="16")).batches("fit"))


def test_a_batch_of_one_stays_one(mlp):
    data = open_data({"x": X[:5]}, mlp(batch="1"))
    assert [batch["x"].shape for batch in data.batches("all")] == [(1, 20)] * 5


def test_a_limit_draws_from_the_whole_part(mlp):
    data = open_data({"x": X}, mlp())
    few = first_column(data, "fit", limit=10)
    assert len(few) == data.count("fit", 10) == 10
    assert set(few) <= set(first_column(data, "fit"))
    assert few.max() > 1000  # not just the beginning
    np.testing.assert_array_equal(few, first_column(data, "fit", limit=10))
    assert data.count("fit", 1000) == 75
    assert data.count("fit", 0) == 1


def test_batches_can_be_asked_for_again(mlp):
    data = open_data({"x": X}, mlp())
    np.testing.assert_array_equal(first_column(data, "fit"), first_column(data, "fit"))
    assert data.shapes() == {"x": (1, 20)}
    assert data.evidence


BAD = {
    "unknown": ({"x": X, "label": X}, "'label' is no input of the model \\(x\\); rename or remove it"),
    "missing": ({}, "input 'x' is missing \\(there is nothing\\); add it"),
    "float64": ({"x": X.astype(np.float64)}, "is float64, the model wants float32; .*astype\\('float32'\\)"),
    "float16": ({"x": X.astype(np.float16)}, "is float16, the model wants float32"),
    "int": ({"x": X.astype(np.int32)}, "is int32, the model wants float32"),
    "objects": ({"x": np.array([[None] * 20] * 4)}, "array of Python objects"),
    "strings": ({"x": np.array([["a"] * 20] * 4)}, "is <U1, the model wants float32"),
    "rank 1": ({"x": X[:, 0]}, "has shape \\[100\\], the model wants \\[N, 20\\]"),
    "rank 4": ({"x": X.reshape(10, 10, 20, 1)}, "has shape \\[10, 10, 20, 1\\], the model wants"),
    "scalar": ({"x": np.float32(3)}, "holds no samples"),
    "dimension": ({"x": X[:, :19]}, "axis 1 of input 'x' is 19, the model wants 20 of \\[N, 20\\]"),
    "nan": ({"x": np.where(X == 41, np.nan, X).astype(np.float32)}, "NaN or infinity, first at \\[2, 1\\]"),
    "inf": ({"x": np.where(X == 0, np.inf, X).astype(np.float32)}, "NaN or infinity, first at \\[0, 0\\]"),
    "no samples": ({"x": X[:0]}, "holds no samples"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays(mlp, case):
    arrays, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        open_data(arrays, mlp())
    assert "\n" not in str(caught.value)


def test_inputs_must_agree_on_the_samples(build):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4] a, float[N,4] b) => (float[N,4] y) { y = Add(a, b) }"""
    )
    with pytest.raises(DataError, match=r"disagree on the samples on axis 0 \(a 3, b 4\)"):
        open_data({"a": X[:3, :4], "b": X[:4, :4]}, model)


def test_int64_is_not_int32(encoder):
    with pytest.raises(DataError, match="is int32, the model wants int64"):
        open_data({"input_ids": np.ones((4, 5), np.int32)}, encoder())


STATE = """<ir_version: 8, opset_import: ["" : 17]>
vad (float[B,8] x, float[2,B,3] state, int64 rate) => (float[B,8] y, float[2,B,3] new) {
    y = Relu(x)
    new = Relu(state)
}"""


def test_inputs_without_a_batch_axis(build):
    """A scalar is shared; one more axis in front makes every input one sample long."""
    model = build(STATE)
    x, state = X[:6, :8].reshape(6, 1, 8), np.ones((6, 2, 1, 3), np.float32)
    for rate in (np.array(16000), np.full(6, 16000)):
        data = open_data({"x": x, "state": state, "rate": rate}, model)
        assert data.samples == 6
        batches = list(data.batches("all"))
        assert [{n: a.shape for n, a in b.items()} for b in batches] == [
            {"x": (1, 8), "state": (2, 1, 3), "rate": ()}
        ] * 6
        np.testing.assert_array_equal(batches[2]["x"], x[2])


def test_an_input_of_exactly_its_fixed_shape_is_shared(build):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4] x, float[3,4] anchors) => (float[N,3] y) {
            t = Transpose<perm = [1, 0]>(anchors)
            y = MatMul(x, t)
        }"""
    )
    data = open_data({"x": X[:10, :4], "anchors": X[:3, :4]}, model, batch_size=4)
    assert [batch["x"].shape[0] for batch in data.batches("all")] == [4, 4, 2]
    assert {batch["anchors"].shape for batch in data.batches("all")} == {(3, 4)}


def test_inputs_with_defaults_may_be_absent(build):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4] x, float[1,4] shift) => (float[N,4] y) { y = Add(x, shift) }""",
        shift=np.ones((1, 4), np.float32),
    )
    assert open_data({"x": X[:8, :4]}, model).shapes() == {"x": (1, 4)}
    given = open_data({"x": X[:8, :4], "shift": np.zeros((1, 4), np.float32)}, model)
    assert given.shapes() == {"x": (1, 4), "shift": (1, 4)}


DECODER = """<ir_version: 8, opset_import: ["" : 17]>
g (int64[batch,seq] input_ids, int64[batch,total] attention_mask, int64[batch,seq] position_ids,
   {cache}, bool[1] use_cache_branch, int64[batch,seq] token_type_ids) => (int64[batch,seq] y) {{
    y = Identity(input_ids)
}}"""

IDS = np.arange(40, dtype=np.int64).reshape(8, 5)


@pytest.mark.parametrize(
    ("cache", "shape"),
    [
        ("float[batch,3,past,16] past_key_values_0_key", (8, 3, 0, 16)),
        ("float16[batch,3,past,16] past_0_value", (8, 3, 0, 16)),
        ("float[2,batch,3,past,16] past_0", (2, 8, 3, 0, 16)),
        ("float[batch,past,32] past_key_values_0", (8, 0, 32)),
    ],
)
def test_well_known_inputs_are_filled_in(build, cache, shape):
    model = build(DECODER.format(cache=cache))
    batch = next(open_data({"input_ids": IDS}, model).batches("all"))
    name = cache.split()[-1]
    assert batch[name].shape == shape
    assert batch[name].dtype == (np.float16 if cache.startswith("float16") else np.float32)
    assert batch["attention_mask"].tolist() == [[1] * 5] * 8
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 8
    assert batch["token_type_ids"].tolist() == [[0] * 5] * 8
    assert batch["use_cache_branch"].tolist() == [False]
    assert list(batch["use_cache_branch"].shape) == [1]


def test_what_is_given_is_kept_and_positions_follow_the_mask(build):
    model = build(DECODER.format(cache="float[batch,3,past,16] past_key_values_0_key"))
    mask = np.ones((8, 5), np.int64)
    mask[0] = [0, 0, 1, 1, 1]
    mask[1] = [1, 1, 1, 0, 0]
    batch = next(open_data({"input_ids": IDS, "attention_mask": mask}, model).batches("all"))
    np.testing.assert_array_equal(batch["attention_mask"], mask)
    assert batch["position_ids"][:2].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_a_given_cache_lengthens_the_mask_and_the_positions(build):
    model = build(DECODER.format(cache="float[batch,3,past,16] past_key_values_0_key"))
    past = np.zeros((8, 3, 7, 16), np.float32)
    batch = next(open_data({"input_ids": IDS, "past_key_values_0_key": past}, model).batches("all"))
    assert batch["attention_mask"].shape == (8, 12)
    assert batch["position_ids"][0].tolist() == [7, 8, 9, 10, 11]


def test_what_cannot_be_filled_in(build):
    fixed = build(DECODER.format(cache="float[batch,3,4,16] past_key_values_0_key"))
    with pytest.raises(DataError, match="'past_key_values_0_key' is missing"):
        open_data({"input_ids": IDS}, fixed)
    model = build(DECODER.format(cache="float[batch,3,past,16] encoder_states"))
    with pytest.raises(DataError, match="'encoder_states' is missing"):
        open_data({"input_ids": IDS}, model)


def test_dimensions_of_minus_one_are_free(build):
    """As Paddle's exporter writes them."""
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3,H,W] x) => (float[N,3,1,1] y) { y = GlobalAveragePool(x) }"""
    )
    model.graph.inputs[0].shape = type(model.graph.inputs[0].shape)([-1, 3, -1, -1])
    x = np.ones((40, 3, 4, 5), np.float32)
    assert open_data({"x": x}, model).shapes() == {"x": (1, 3, 4, 5)}
    assert open_data("random:40", model).shapes() == {"x": (1, 3, 64, 64)}


def test_large_samples_come_in_small_batches(build):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3,H,W] x) => (float[N,3,1,1] y) { y = GlobalAveragePool(x) }"""
    )
    x = np.ones((6, 3, 600, 600), np.float32)
    assert open_data({"x": x}, model).batch_size == 3
    assert open_data({"x": x}, model, batch_size=6).batch_size == 6
