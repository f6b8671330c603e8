# SPDX-License-Identifier: Apache-2.0
"""The decoder of an encoder-decoder: self-attention, cross-attention to an encoder's states, and an FFN per layer."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, checker, helper

from onnxcollapse import Model
from tests.support import Net

VOCABULARY, WIDTH, HEADS, HEAD, HIDDEN = 31, 16, 2, 8, 32
Caching = Literal["none", "given", "taken"]


class Crossed(Net):
    """Builds the decoder.

    Args:
        caching: As exporters split a decoder for generation: without caches; for the first token, where keys and
            values are given out, transposed once more; for those behind it, where they come in instead of the states.
        post: Whether norms lie behind the sums.
        weak: Layers that add little to the stream.
    """

    def __init__(self, caching: Caching, post: bool, weak: tuple[int, ...]) -> None:
        super().__init__(11)
        self.caching, self.post, self.weak = caching, post, weak
        self.inputs: list = []
        self.outputs: list = []
        self.scale = 1.0
        self.heads = self.const([0, 0, HEADS, HEAD], dtype=np.int64)
        self.flat = self.const([0, 0, WIDTH], dtype=np.int64)

    def build(self, layers: int) -> Model:
        self._input("input_ids", TensorProto.INT64, "batch", "length")
        self._input("encoder_attention_mask", TensorProto.INT64, "batch", "encoder_length")
        if self.caching != "taken":
            self._input("encoder_hidden_states", TensorProto.FLOAT, "batch", "encoder_length", WIDTH)
        table = self.random.normal(size=(VOCABULARY, WIDTH))
        h = self.op("Gather", self.const(table), "input_ids", name="h0")
        hidden, later = self._masks()
        for layer in range(layers):
            self.scale = 0.02 if layer in self.weak else 0.7
            h = self._added(h, lambda x, n=layer: self._attention(x, x, n, "decoder", later), f"self{layer}")
            states = "encoder_hidden_states" if self.caching != "taken" else None
            h = self._added(
                h, lambda x, n=layer, s=states: self._attention(x, s, n, "encoder", hidden), f"cross{layer}"
            )
            h = self._added(h, self._ffn, f"h{layer + 1}")
        self.op("MatMul", h if self.post else self._norm(h), self.const(table.T / 4), name="logits")
        return self._made()

    def _masks(self):
        """What is added to the scores of cross-attention, and of self-attention to those of later tokens."""
        lowest = self.const(-1e9)
        real = self.op("Cast", "encoder_attention_mask", to=TensorProto.FLOAT)
        padding = self.op("Mul", self.op("Sub", self.const(1.0), real), lowest)
        length, zero, one = (
            self._length("input_ids", 1),
            self.const(0, dtype=np.int64),
            self.const(1, dtype=np.int64),
        )
        past = self._length("past_key_values.0.decoder.key", 2) if self.caching == "taken" else zero
        keys = self.op("Range", zero, self.op("Add", past, length), one)
        queries = self.op(
            "Unsqueeze", self.op("Range", past, self.op("Add", past, length), one), self.axes(1)
        )
        later = self.op("Cast", self.op("Greater", keys, queries), to=TensorProto.FLOAT)
        return self.op("Unsqueeze", padding, self.axes(1, 2)), self.op("Mul", later, lowest)

    def axes(self, *axes: int) -> str:
        return self.const(axes, dtype=np.int64)

    def _length(self, value: str, axis: int) -> str:
        return self.op("Squeeze", self.op("Shape", value, start=axis, end=axis + 1))

    def _added(self, h, update, name):
        if self.post:
            return self._norm(self.op("Add", h, update(h), name=f"{name}_sum"), name)
        return self.op("Add", h, update(self._norm(h)), name=name)

    def _norm(self, h, name=None):
        scale, offset = (
            self.const(self.random.normal(1, 0.02, WIDTH)),
            self.const(self.random.normal(0, 0.02, WIDTH)),
        )
        return self.op("LayerNormalization", h, scale, offset, name=name, axis=-1)

    def _project(self, x, rows=WIDTH, columns=WIDTH, scale=1.0):
        return self.linear(x, self.random.normal(size=(rows, columns)) / rows**0.5 * scale)

    def _split(self, x):
        return self.op("Reshape", self._project(x), self.heads)

    def _attention(self, x, states, layer, kind, mask):
        query = self.op("Transpose", self._split(x), perm=[0, 2, 1, 3])
        if states is None:
            keys = self.op("Transpose", self._cache(layer, kind, "key"), perm=[0, 1, 3, 2])
            values = self._cache(layer, kind, "value")
            self.random.normal(
                size=(2, WIDTH, WIDTH)
            )  # of what they were made with, so that weights are the same
        else:
            split, values = self._split(states), self.op("Transpose", self._split(states), perm=[0, 2, 1, 3])
            if self.caching == "taken":
                keys = self._grown(self.op("Transpose", split, perm=[0, 2, 1, 3]), layer, kind, "key")
                keys = self.op("Transpose", keys, perm=[0, 1, 3, 2])
                values = self._grown(values, layer, kind, "value")
            else:
                keys = self.op("Transpose", split, perm=[0, 2, 3, 1])
            if self.caching == "given":
                self._give(self.op("Transpose", split, perm=[0, 2, 1, 3], name=f"present.{layer}.{kind}.key"))
                self._give(self.op("Identity", values, name=f"present.{layer}.{kind}.value"))
        scores = self.op("Add", self.op("MatMul", query, keys), mask)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), values)
        merged = self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), self.flat)
        return self._project(merged, scale=self.scale)

    def _ffn(self, x):
        return self._project(self.op("Relu", self._project(x, WIDTH, HIDDEN)), HIDDEN, WIDTH, self.scale)

    def _cache(self, layer, kind, what):
        length = "encoder_length" if kind == "encoder" else "past_length"
        return self._input(
            f"past_key_values.{layer}.{kind}.{what}", TensorProto.FLOAT, "batch", HEADS, length, HEAD
        )

    def _grown(self, new, layer, kind, what):
        name = f"present.{layer}.{kind}.{what}"
        return self._give(self.op("Concat", self._cache(layer, kind, what), new, name=name, axis=2))

    def _input(self, name, dtype, *shape):
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def _give(self, name):
        shape = ["batch", HEADS, f"{name}_length", HEAD]
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def _made(self) -> Model:
        shape = ["batch", "length", VOCABULARY]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
        graph = helper.make_graph(
            self.nodes, "crossed", self.inputs, [logits, *self.outputs], self.initializers
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        checker.check_model(proto, full_check=True)
        return Model(ir.from_proto(proto))


def crossed(layers=4, *, caching: Caching = "none", post=False, weak=(1, 2)) -> Model:
    """input_ids and encoder_hidden_states, or their keys and values, -> logits."""
    return Crossed(caching, post, weak).build(layers)


def samples(model: Model, count=48, length=6, states=5, seed=0) -> dict[str, np.ndarray]:
    """What the model wants but for the caches of its own tokens; every third sample of the encoder is padded."""
    random = np.random.default_rng(seed)
    mask = np.ones((count, states), np.int64)
    mask[::3, -2:] = 0
    feeds = {"input_ids": random.integers(0, VOCABULARY, (count, length)), "encoder_attention_mask": mask}
    for value in model.graph.inputs:
        if value.name == "encoder_hidden_states":
            feeds[value.name] = random.normal(size=(count, states, WIDTH)).astype(np.float32)
        elif ".encoder." in value.name:
            feeds[value.name] = random.normal(size=(count, HEADS, states, HEAD)).astype(np.float32)
    return feeds
