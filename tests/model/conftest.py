# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import difflib

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def _weight(shape, name="", seed=0, dtype=np.float32):
    array = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return numpy_helper.from_array(array, name)


def _proto(nodes, initializers=(), inputs=(("x", ["b", 32]),), outputs=(("y", ["b", 32]),), **options):
    """A model of float tensors; options go to helper.make_model."""
    graph = helper.make_graph(
        list(nodes),
        "main",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs],
        list(initializers),
    )
    options.setdefault("opset_imports", [helper.make_opsetid("", 17)])
    options.setdefault("ir_version", 10)
    return helper.make_model(graph, **options)


def _canonical(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with everything that has no meaning put into one form: tensor encoding, order of maps."""
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    _visit(out)
    return out


def _visit(message) -> None:
    for field, value in list(message.ListFields()):
        if field.message_type is None:
            continue
        repeated = not hasattr(value, "ListFields")
        for item in value if repeated else [value]:
            _visit(item)
        if field.name in (
            "metadata_props",
            "value_info",
            "quantization_annotation",
            "quant_parameter_tensor_names",
        ):
            items = sorted(value, key=lambda item: item.SerializeToString())
            del value[:]
            value.extend(items)
    if isinstance(message, TensorProto) and message.data_type != TensorProto.STRING:
        raw = onnx.numpy_helper.to_array(message)
        packed = helper.make_tensor("t", message.data_type, message.dims, raw.reshape(-1)).raw_data
        content = packed or numpy_helper.tobytes_little_endian(raw)
        for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            message.ClearField(name)
        message.raw_data = content
        message.ClearField("data_location")  # onnx.load writes the default out
    if isinstance(message, onnx.NodeProto):
        message.domain = "" if message.domain == "ai.onnx" else message.domain
        while message.output and not message.output[-1]:
            message.output.pop()


@pytest.fixture
def weight():
    return _weight


@pytest.fixture
def proto():
    return _proto


def _assert_same(a: onnx.ModelProto, b: onnx.ModelProto, note: str = "") -> None:
    first, second = _canonical(a), _canonical(b)
    if first != second:
        texts = [text_format.MessageToString(m).splitlines() for m in (second, first)]
        pytest.fail(note + "\n".join(list(difflib.unified_diff(*texts, n=6))[:60]))


@pytest.fixture
def assert_same():
    return _assert_same


@pytest.fixture
def written(tmp_path):
    """Writes a proto as tmp_path/model.onnx."""

    def write(model, name="model.onnx"):
        path = tmp_path / name
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return path

    return write


@pytest.fixture
def mlp():
    """x @ w + b, Relu, @ v, all weights above the threshold that keeps them in the file."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="up"),
        helper.make_node("Add", ["h", "b"], ["hb"], name="bias"),
        helper.make_node("Relu", ["hb"], ["r"], name="act"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="down"),
    ]
    weights = [_weight((32, 512), "w"), _weight((512,), "b", 1), _weight((512, 32), "v", 2)]
    return _proto(nodes, weights)
