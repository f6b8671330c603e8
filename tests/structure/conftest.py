# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest


def _parse(text: str, weights=None, opset: int = 17, domains=()) -> ir.Model:
    """A model from the text of a graph (and functions), with initializers by name."""
    imports = "".join(f', "{domain}" : 1' for domain in domains)
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{imports}]>\n{text}')
    for name, array in (weights or {}).items():
        tensor = (
            array
            if isinstance(array, onnx.TensorProto)
            else ir.to_proto(ir.tensor(np.asarray(array), name=name))
        )
        proto.graph.initializer.append(tensor)
    return ir.from_proto(proto)


def _run(model: ir.Model, feeds, outputs) -> list[np.ndarray]:
    """Values by name, intermediate ones included, computed by ONNX Runtime without optimisation."""
    proto = ir.to_proto(model)
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in outputs if name not in known
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(list(outputs), feeds)


@pytest.fixture
def parse():
    return _parse


@pytest.fixture
def run():
    return _run


@pytest.fixture
def rng():
    return np.random.default_rng(0)
