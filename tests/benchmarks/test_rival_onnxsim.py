# SPDX-License-Identifier: Apache-2.0
import ast
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import rival_onnxsim as driver


@pytest.fixture
def model(tmp_path):
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.arange(5), "ints")]
    free = helper.make_tensor_value_info("past", TensorProto.FLOAT, ["batch", 2, "past", 8])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x, free], [y], tensors)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.fixture
def calibration(tmp_path):
    path = tmp_path / "calib.npz"
    np.savez(path, x=np.arange(15, dtype=np.float32).reshape(5, 3), unknown=np.zeros(5))
    return path


@pytest.fixture
def onnxsim(monkeypatch):
    """A stand-in: `apply_structured_pruning` drops columns of `w`, the others do nothing or fail on all data."""

    def cut(model, sparsity):
        small = onnx.ModelProto()
        small.CopyFrom(model)
        weight = numpy_helper.to_array(small.graph.initializer[0])
        kept = weight[:, : round(weight.shape[1] * (1 - sparsity))]
        small.graph.initializer[0].CopyFrom(numpy_helper.from_array(kept.copy(), "w"))
        return small

    def fail(model, sparsity, calibration_data):
        if len(calibration_data) == 1:  # the probe for a form of the graph that matches
            return cut(model, sparsity)
        raise MemoryError(f"no room for {len(calibration_data)} batches")

    module = types.ModuleType("onnxsim")
    module.apply_structured_pruning = cut
    module.apply_structured_wanda_pruning = fail
    module.apply_transformer_block_pruning = lambda model, sparsity, calibration_data: model
    module.simplify = lambda model: (model, True)
    monkeypatch.setitem(sys.modules, "onnxsim", module)
    return module


def ran(capsys, model, calibration, output, method, *options, ratio="0.5"):
    assert driver.main([str(model), str(calibration), ratio, method, str(output), *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_driver_runs_without_onnxcollapse_and_needs_only_numpy_to_start():
    names = set()
    for node in ast.walk(ast.parse(Path(driver.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert not names & {"onnxcollapse", "benchmarks", "models"}
    command = [sys.executable, driver.__file__, "--help"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "ratio" in done.stdout


def test_float_initializers_are_counted_with_their_zeros(model):
    assert driver.count(onnx.load(model)) == (12, 1)


def test_batches_cover_the_data_and_fill_what_it_lacks(model, calibration):
    batches = list(driver.feeds(onnx.load(model), calibration, batch=2))
    assert [len(batch["x"]) for batch in batches] == [2, 2, 1]
    assert [batch["past"].shape for batch in batches] == [(2, 2, 0, 8), (2, 2, 0, 8), (1, 2, 0, 8)]
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in batches]), np.arange(15.0).reshape(5, 3))
    assert sum(len(b["x"]) for b in driver.feeds(onnx.load(model), calibration, 3, samples=3)) == 3


def test_what_was_cut_is_reported_and_written(onnxsim, model, calibration, tmp_path, capsys):
    row = ran(capsys, model, calibration, tmp_path / "out.onnx", "magnitude")
    assert row["error"] is None and row["prepared"] is None and row["removes"] == "neurons"
    assert (row["params_before"], row["params_after"]) == (12, 6)
    assert driver.count(onnx.load(tmp_path / "out.onnx")) == (6, row["zeros_after"])


def test_what_the_rival_raises_is_the_reason(onnxsim, model, calibration, tmp_path, capsys):
    row = ran(capsys, model, calibration, tmp_path / "out.onnx", "wanda", "--batch", "1")
    assert row["error"] == "MemoryError: no room for 5 batches"
    assert not (tmp_path / "out.onnx").exists()


def test_a_graph_in_which_nothing_matches_is_an_error(
    onnxsim, model, calibration, tmp_path, capsys, monkeypatch
):
    forms = []
    monkeypatch.setattr(driver, "with_shapes", lambda model, batch: forms.append(set(batch)) or model)
    loaded = onnx.load(model)
    loaded.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "read_by_nothing"))
    onnx.save(loaded, model)
    monkeypatch.setattr(
        driver, "_optimized", lambda path: forms.append(path) or driver.without_unused(onnx.load(path))
    )
    row = ran(capsys, model, calibration, tmp_path / "out.onnx", "blocks")
    assert row["error"].startswith("RivalError: apply_transformer_block_pruning matches nothing")
    assert forms == [model, {"x", "past"}]
    assert not (tmp_path / "out.onnx").exists()


def test_the_form_that_matches_is_named(onnxsim, model, calibration, tmp_path, capsys):
    pruned = onnxsim.apply_structured_pruning

    def simplify(model):
        other = onnx.ModelProto()
        other.CopyFrom(model)
        other.producer_name = "simplified"
        return other, True

    onnxsim.simplify = simplify
    onnxsim.apply_structured_pruning = lambda m, sparsity: pruned(m, sparsity) if m.producer_name else m
    row = ran(capsys, model, calibration, tmp_path / "out.onnx", "magnitude")
    assert row["prepared"] == "simplify" and row["params_after"] == 6


def test_data_that_does_not_fit_is_an_error(onnxsim, model, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", z=np.zeros(3))
    row = ran(capsys, model, tmp_path / "other.npz", tmp_path / "out.onnx", "magnitude")
    assert "has none of the model's inputs ['x', 'past']" in row["error"]


@pytest.mark.parametrize("ratio", ["0", "1.2", "-1", "much"])
def test_a_ratio_out_of_range_is_refused(ratio, capsys):
    with pytest.raises(SystemExit):
        driver.main(["m.onnx", "c.npz", ratio, "wanda", "o.onnx"])
    assert "ratio" in capsys.readouterr().err


def test_weights_left_behind_are_removed_and_those_of_branches_kept(model):
    loaded = onnx.load(model)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])],
    )
    loaded.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
    loaded.graph.initializer.extend(
        numpy_helper.from_array(np.ones(2, np.float32), name) for name in ("inner", "left_behind")
    )
    names = [tensor.name for tensor in driver.without_unused(loaded).graph.initializer]
    assert names == ["w", "inner"]


def test_the_shapes_of_a_residual_stream_are_stated():
    x = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    table = numpy_helper.from_array(np.ones((5, 4), np.float32), "table")
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("Add", ["embedded", "one"], ["stream"]),
        helper.make_node("ReduceSum", ["stream"], ["total"], keepdims=0),
        helper.make_node("Add", ["total", "one"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [table, one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    stated = driver.with_shapes(model, {"ids": np.zeros((3, 2), np.int64)})
    (info,) = stated.graph.value_info
    assert info.name == "stream"
    dims = info.type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", "sequence", 4]
    assert len(stated.graph.output) == 1 and not model.graph.value_info
