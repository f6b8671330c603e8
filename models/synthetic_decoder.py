# SPDX-License-Identifier: Apache-2.0
"""A decoder of any size with random weights in external data, for tests of memory: it says nothing about accuracy.

    python -m models.synthetic_decoder -o out/decoder                      # 6.6 GB: 30 layers of 2048, FFN 8192
    python -m models.synthetic_decoder -o out/tiny --layers 4 --width 64 --hidden 256 --vocabulary 512

Layer l is h += Attention(norm(h)), h += W2 relu(W1 norm(h)); one initializer a matrix, all in one sidecar, written
layer by layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

from models import recipe

SIDECAR = "model.onnx.data"
_OPSET, _IR_VERSION, _HEADS = 17, 8, 8


class _Writer:
    """Collects nodes, and writes weights to the sidecar as they come."""

    def __init__(self, sidecar: BinaryIO, seed: int) -> None:
        self._sidecar = sidecar
        self._random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def weight(self, name: str, rows: int, columns: int, scale: float) -> str:
        """A normal matrix, written in pieces."""
        tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[rows, columns])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", SIDECAR),
            ("offset", self._sidecar.tell()),
            ("length", 4 * rows * columns),
        ):
            tensor.external_data.add(key=key, value=str(value))
        for start in range(0, rows, 1024):
            piece = self._random.standard_normal((min(1024, rows - start), columns), np.float32)
            self._sidecar.write((piece * np.float32(scale)).tobytes())
        self.initializers.append(tensor)
        return name

    def constant(self, name: str, array: np.ndarray) -> str:
        """A small tensor, kept inside."""
        self.initializers.append(onnx.numpy_helper.from_array(array, name))
        return name

    def op(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """A node with one output."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output


def build(args: argparse.Namespace) -> None:
    """Writes the model, its weights and random token ids."""
    args.output.mkdir(parents=True, exist_ok=True)
    with recipe.replacing(args.output / SIDECAR) as temporary, temporary.open("wb") as sidecar:
        model = _decoder(_Writer(sidecar, args.seed), args)
    with recipe.replacing(args.output / recipe.MODEL) as temporary:
        temporary.write_bytes(model.SerializeToString())
    random = np.random.default_rng(args.seed + 1)
    for name, samples in ((recipe.CALIBRATION, 8), (recipe.EVALUATION, 4)):
        ids = random.integers(0, args.vocabulary, (samples, 64), np.int64)
        recipe.write_npz(args.output / name, {"input_ids": ids})


def _decoder(to: _Writer, args: argparse.Namespace) -> onnx.ModelProto:
    width, table = args.width, to.weight("embedding", args.vocabulary, args.width, 1.0)
    to.constant("gamma", np.ones(width, np.float32))
    to.constant("heads", np.array([0, 0, _HEADS, width // _HEADS], np.int64))
    to.constant("merged", np.array([0, 0, width], np.int64))
    to.constant("scale", np.array((width // _HEADS) ** -0.5, np.float32))
    value = to.op("Gather", [table, "input_ids"], "embedded")
    for layer in range(args.layers):
        value = _layer(to, f"layer.{layer}", value, width, args.hidden)
    value = to.op("LayerNormalization", [value, "gamma"], "final_norm", axis=-1)
    to.op("MatMul", [value, to.weight("head", width, args.vocabulary, width**-0.5)], "logits")
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info(
        "logits", TensorProto.FLOAT, ["batch", "sequence", args.vocabulary]
    )
    graph = helper.make_graph(to.nodes, "synthetic_decoder", [ids], [logits], to.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)


def _layer(to: _Writer, name: str, value: str, width: int, hidden: int) -> str:
    normed = to.op("LayerNormalization", [value, "gamma"], f"{name}.norm1", axis=-1)
    attended = _attention(to, name, normed, width)
    value = to.op("Add", [value, attended], f"{name}.middle")
    normed = to.op("LayerNormalization", [value, "gamma"], f"{name}.norm2", axis=-1)
    up = to.op("MatMul", [normed, to.weight(f"{name}.up", width, hidden, width**-0.5)], f"{name}.z")
    active = to.op("Relu", [up], f"{name}.a")
    down = to.op("MatMul", [active, to.weight(f"{name}.down", hidden, width, hidden**-0.5)], f"{name}.ffn")
    return to.op("Add", [value, down], f"{name}.out")


def _attention(to: _Writer, name: str, x: str, width: int) -> str:
    def heads(part: str, perm: list[int]) -> str:
        flat = to.op(
            "MatMul", [x, to.weight(f"{name}.{part}", width, width, width**-0.5)], f"{name}.{part}_flat"
        )
        split = to.op("Reshape", [flat, "heads"], f"{name}.{part}_heads")
        return to.op("Transpose", [split], f"{name}.{part}_t", perm=perm)

    query, key, val = heads("q", [0, 2, 1, 3]), heads("k", [0, 2, 3, 1]), heads("v", [0, 2, 1, 3])
    scores = to.op("Mul", [to.op("MatMul", [query, key], f"{name}.scores"), "scale"], f"{name}.scaled")
    mixed = to.op("MatMul", [to.op("Softmax", [scores], f"{name}.weights", axis=-1), val], f"{name}.mixed")
    turned = to.op("Transpose", [mixed], f"{name}.turned", perm=[0, 2, 1, 3])
    merged = to.op("Reshape", [turned, "merged"], f"{name}.merged")
    return to.op("MatMul", [merged, to.weight(f"{name}.o", width, width, width**-0.5)], f"{name}.attention")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the exit status."""
    parser = recipe.arguments("synthetic_decoder", __doc__, measures=False)
    for option, default in (
        ("layers", 30),
        ("width", 2048),
        ("hidden", 8192),
        ("vocabulary", 32_000),
        ("seed", 0),
    ):
        parser.add_argument(f"--{option}", type=int, default=default)
    return recipe.run(parser.parse_args(arguments), build)


if __name__ == "__main__":
    raise SystemExit(main())
