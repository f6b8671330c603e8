# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse.model import scratch, weights
from onnxcollapse.model.source import FileTensor


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_large_tensors_lie_on_disk_and_read_back(dtype):
    arrays = [np.arange(40_000 + i).astype(dtype).reshape(1, -1) for i in range(3)]
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    held = [scratch.hold(array.copy(), kind, f"t{i}") for i, array in enumerate(arrays)]
    for array, tensor in zip(arrays, held, strict=True):
        assert isinstance(tensor, FileTensor) is (array.nbytes >= scratch.SMALLEST)
        np.testing.assert_array_equal(weights.array(tensor).view(np.uint8), array.view(np.uint8))
        assert b"".join(weights.chunks(tensor)) == array.tobytes()
    assert len({weights.identity(tensor) for tensor in held}) == 3


def test_more_than_one_file_is_used_when_one_is_full(monkeypatch):
    monkeypatch.setattr(scratch, "_CAPACITY", 1 << 17)
    monkeypatch.setattr(scratch, "_spills", [])
    held = [scratch.hold(np.full(20_000, i, np.float32), ir.DataType.FLOAT, "t") for i in range(4)]
    assert len({id(tensor.source) for tensor in held}) > 1
    for index, tensor in enumerate(held):
        assert (weights.array(tensor) == index).all()


def test_without_room_they_stay_in_memory(monkeypatch):
    def full(capacity):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch, "_Spill", full)
    monkeypatch.setattr(scratch, "_spills", [])
    tensor = scratch.hold(np.ones(40_000, np.float32), ir.DataType.FLOAT, "t")
    assert not isinstance(tensor, FileTensor)
    with pytest.raises(ValueError, match="read-only"):
        tensor.numpy()[0] = 2
