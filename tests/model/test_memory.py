# SPDX-License-Identifier: Apache-2.0
"""Loading, editing, counting, comparing and saving a large model costs little memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

_FOOTPRINT = """
    import re, sys
    from pathlib import Path
    import numpy as np, onnx, onnx_ir as ir
    from onnxcollapse.model import Model, edit, flops, size
    from onnxcollapse.model import weights

    def peak():
        # Not ru_maxrss, which starts at what the parent process held.
        return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) // 1024

    folder = Path(sys.argv[1])
    Model.load(folder / "small.onnx").save(folder / "warm.onnx")
    base = peak()
    model = Model.load(folder / "large.onnx")
    tensors = [value.const_value for value in model.graph.initializers.values()]
    assert weights.equal(tensors[0], tensors[1]) and weights.equal_transposed(tensors[0], tensors[2])
    assert len({weights.digest(tensor) for tensor in tensors}) == 2
    first, second = list(model.graph.initializers.values())[:2]
    edit.replace_value(model.graph, second, first)
    edit.prune(model)
    edit.check(model, full=True)
    flops(model), size(model), model.clone(), model.skeleton()
    for tensor in tensors:
        assert weights.array(tensor)[0, 1] == 1 or weights.array(tensor)[1, 0] == 1
        weights.release(tensor)
    model.save(folder / "out.onnx", external=False)
    model.save(folder / "out.onnx", external=True)
    model.save(folder / "large.onnx")
    print(peak() - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_model_never_comes_into_memory(tmp_path, mlp):
    (tmp_path / "small.onnx").write_bytes(mlp.SerializeToString())
    _write_large(tmp_path / "large.onnx")
    size = (tmp_path / "large.onnx").stat().st_size
    command = [sys.executable, "-c", textwrap.dedent(_FOOTPRINT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert size > 190 << 20
    assert int(done.stdout) < 60
    assert (tmp_path / "large.onnx").stat().st_size < size * 0.8


def _write_large(path):
    """Three products with 64 MB weights: two alike, one their transpose."""
    matrix = np.zeros((4096, 4096), np.float32)
    matrix[:] = np.arange(4096) % 7
    tensors = [numpy_helper.from_array(m, n) for n, m in (("a", matrix), ("b", matrix), ("c", matrix.T))]
    nodes = [
        helper.make_node("MatMul", [x, w], [y])
        for x, w, y in (("x", "a", "h"), ("h", "b", "g"), ("g", "c", "y"))
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4096]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "large", infos[:1], infos[1:], tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path.write_bytes(made.SerializeToString())
