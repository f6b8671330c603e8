# SPDX-License-Identifier: Apache-2.0
"""Small models built from ONNX text, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcollapse.model.model import Model

Build = Callable[..., Model]


def build_model(text: str, path: Path | None = None, **weights: np.ndarray) -> Model:
    """A model from ONNX text, its weights given by name (`__` stands for a dot)."""
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name.replace("__", ".")))
    return Model(ir.from_proto(proto), path)


@pytest.fixture
def build() -> Build:
    return build_model


@pytest.fixture
def mlp() -> Callable[..., Model]:
    """x [N, 20] -> z [N, 30] -> a = relu(z) -> y [N, 5]."""

    def make(seed: int = 0, opset: int = 17, dtype: str = "float", batch: str = "N") -> Model:
        rng = np.random.default_rng(seed)
        kind = {"float": np.float32, "float16": np.float16, "double": np.float64}[dtype]
        return build_model(
            f"""<ir_version: 8, opset_import: ["" : {opset}]>
            mlp ({dtype}[{batch},20] x) => ({dtype}[{batch},5] y) {{
                z = MatMul(x, w1)
                a = Relu(z)
                y = MatMul(a, w2)
            }}""",
            w1=(rng.standard_normal((20, 30)) / 4).astype(kind),
            w2=(rng.standard_normal((30, 5)) / 4).astype(kind),
        )

    return make


@pytest.fixture
def encoder() -> Callable[..., Model]:
    """Token ids [B, S] with a mask -> h [B, S, 6] -> pooled [B, 6]; h is NaN where there is padding."""

    def make(seed: int = 0) -> Model:
        rng = np.random.default_rng(seed)
        return build_model(
            """<ir_version: 8, opset_import: ["" : 17]>
            encoder (int64[B,S] input_ids, int64[B,S] attention_mask) => (float[B,S,6] h, float[B,6] pooled)
            <int64[1] last = {2}, int64[1] one = {1}, float zero = {0}> {
                e = Gather(table, input_ids)
                m = Cast<to = 1>(attention_mask)
                m3 = Unsqueeze(m, last)
                weight = Div(m3, m3)
                h = Mul(e, weight)
                real = Cast<to = 9>(attention_mask)
                real3 = Unsqueeze(real, last)
                kept = Where(real3, e, zero)
                pooled = ReduceSum<keepdims = 0>(kept, one)
            }""",
            table=rng.standard_normal((50, 6)).astype(np.float32),
        )

    return make
