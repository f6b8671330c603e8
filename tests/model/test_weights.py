# SPDX-License-Identifier: Apache-2.0
"""Reading tensors in pieces and comparing them."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, weights

TYPES = [np.float32, np.float16, np.float64, np.int64, np.int8, np.bool_, np.complex64, np.complex128,
         ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4, ml_dtypes.uint4]  # fmt: skip


@pytest.fixture
def filed(tmp_path):
    """Puts arrays into a model file; returns their tensors."""

    def put(*arrays):
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        tensors = [numpy_helper.from_array(array, f"t{i}") for i, array in enumerate(arrays)]
        graph = helper.make_graph(
            [helper.make_node("Relu", ["x"], ["y"])], "g", infos[:1], infos[1:], tensors
        )
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        path.write_bytes(helper.make_model(graph).SerializeToString())
        return [value.const_value for value in Model.load(path).graph.initializers.values()]

    return put


def _open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def memory(array):
    return ir.tensor(array)


@pytest.mark.parametrize("dtype", TYPES)
def test_bytes_and_arrays_are_those_of_the_tensor(filed, dtype):
    array = np.random.default_rng(0).integers(0, 2, (57, 41)).astype(dtype)
    proto = numpy_helper.from_array(array)
    [tensor] = filed(array)
    for held in (tensor, memory(array)):
        assert b"".join(weights.chunks(held)) == proto.raw_data
        assert np.array_equal(weights.array(held), array)
        assert weights.array(held).dtype == array.dtype
        assert not weights.array(held).flags.writeable
        assert weights.digest(held) == weights.digest(tensor)
    assert weights.equal(tensor, memory(array))


def test_chunks_are_bounded(filed):
    array = np.arange(3_000_001, dtype=np.float32)
    [tensor] = filed(array)
    for held in (tensor, memory(array)):
        sizes = [len(chunk) for chunk in weights.chunks(held)]
        assert max(sizes) == 4 << 20
        assert sum(sizes) == array.nbytes


def test_strings_are_told_apart():
    one, two = (ir.tensor(np.array(texts, object)) for texts in ([b"ab", b"c\x00"], [b"a", b"bc\x00"]))
    assert weights.digest(one) != weights.digest(two)
    assert not weights.equal(one, two)
    assert weights.equal(one, ir.tensor(np.array([b"ab", b"c\x00"], object)))


def test_digest_depends_on_type_and_shape():
    array = np.zeros((4, 6), np.float32)
    forms = [array, array.reshape(6, 4), array.view(np.int32), array.reshape(24)]
    assert len({weights.digest(memory(form)) for form in forms}) == 4
    assert not any(weights.equal(memory(array), memory(form)) for form in forms[1:])


def test_equality_is_of_bits():
    assert not weights.equal(memory(np.float32([0.0])), memory(np.float32([-0.0])))
    assert weights.equal(memory(np.float32([np.nan])), memory(np.float32([np.nan])))
    assert weights.equal_transposed(memory(np.float32([[np.nan, 1]])), memory(np.float32([[np.nan], [1]])))
    assert not weights.equal_transposed(memory(np.float32([[0.0]])), memory(np.float32([[-0.0]])))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(57, 41), (1, 2000), (2000, 1)])
def test_transposes(filed, dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    other = array.copy()
    other[-1, -1] = not other[-1, -1]
    for a, b in [filed(array, array.T.copy()), (memory(array), memory(array.T.copy()))]:
        assert weights.equal_transposed(a, b)
        assert weights.equal_transposed(b, a)
    a, b = filed(other, array.T.copy())
    assert not weights.equal_transposed(a, b)
    assert not weights.equal_transposed(a, memory(array.T.copy()))


def test_what_is_no_transpose():
    a = memory(np.zeros((3, 4), np.float32))
    assert not weights.equal_transposed(a, memory(np.zeros((3, 4), np.float32)))
    assert not weights.equal_transposed(a, memory(np.zeros((4, 3), np.float64)))
    assert not weights.equal_transposed(memory(np.zeros(4)), memory(np.zeros(4)))
    assert weights.equal_transposed(memory(np.zeros((0, 4))), memory(np.zeros((4, 0))))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.booleans())
def test_transposes_in_small_tiles(rows, columns, seed, change):
    array = np.random.default_rng(seed).integers(0, 5, (rows, columns)).astype(np.float32)
    other = array.T.copy()
    if change:
        other[seed % columns, seed % rows] += 1
    kept, weights._TILE = weights._TILE, 128
    try:
        assert weights.equal_transposed(memory(array), memory(other)) == (not change)
    finally:
        weights._TILE = kept


def test_a_computed_value_has_no_array():
    with pytest.raises(ModelError, match="'h' is computed at run time"):
        weights.array(ir.Value(name="h"))


def test_views_stay_valid_after_release(filed):
    array = np.arange(100_000, dtype=np.float32)
    [tensor] = filed(array)
    view = weights.array(tensor)
    weights.release(tensor)
    assert np.array_equal(view, array)
    assert np.array_equal(weights.array(tensor), array)
    weights.release(memory(array))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_release_lets_pages_go(filed):
    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    [tensor] = filed(np.ones((2000, 4000), np.float32))
    before = resident()
    assert weights.array(tensor).sum() == 8_000_000
    assert resident() - before > 30_000
    weights.release(tensor)
    assert resident() - before < 1000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_are_closed_when_nobody_uses_them(filed):
    gc.collect()
    before = _open_files()
    tensors = filed(np.ones(1000, np.float32))
    weights.array(tensors[0])
    assert _open_files() > before
    del tensors
    gc.collect()
    assert _open_files() == before


def test_identity_is_of_what_is_stored(filed):
    array = np.ones(1000, np.float32)
    a, b = filed(array, array)
    assert weights.identity(a) != weights.identity(b)
    assert weights.identity(a) == weights.identity(a)
    held = memory(array)
    assert weights.identity(held) == weights.identity(held) != weights.identity(memory(array))
