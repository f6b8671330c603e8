# SPDX-License-Identifier: Apache-2.0
"""A minimal causal decoder, with a KV cache or without."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from onnxcollapse import Model
from tests.support import Net

VOCABULARY, WIDTH, HEADS = 23, 16, 2
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"


def decoder(
    layers=(0, 1), cached=True, *, past=PAST, present=PRESENT, hidden=32, seed=3, broken=0.0, masked=False
):
    """input_ids -> logits; layers are drawn by their numbers, `broken` moves the first one's, `masked` takes a mask."""
    net, caches = Net(seed), []
    random = np.random.default_rng(seed)
    table = random.normal(size=(VOCABULARY, WIDTH))
    hidden_state = net.op("Gather", net.const(table, "embedding"), "input_ids")
    places = net.op("Gather", net.const(random.normal(size=(80, WIDTH)), "places"), "position_ids")
    h = net.op("Add", hidden_state, places, name="h")
    positions = net.op("Unsqueeze", "position_ids", net.const([1, 3], dtype=np.int64))
    for number in layers:
        random = np.random.default_rng((seed, number))
        moved = broken if number == layers[0] else 0.0
        h = _layer(net, h, number, random, positions, hidden, moved, (past, present) if cached else None)
        if cached:
            caches += [(past.format(number, kind), present.format(number, kind)) for kind in ("key", "value")]
    net.op("MatMul", h, net.const(table.T / 4), name="logits")
    return _model(net, caches, masked)


def _layer(net, h, number, random, positions, hidden, moved, names):
    def matrix(rows, columns, fade=1.0):
        drawn = random.normal(size=(rows, columns)) / rows**0.5 + moved * random.normal(size=(rows, columns))
        return net.const(drawn * fade ** np.arange(rows)[:, None])

    def heads(perm):
        flat = net.op("Reshape", net.op("MatMul", h, matrix(WIDTH, WIDTH)), shape)
        return net.op("Transpose", flat, perm=perm)

    shape = net.const([0, 0, HEADS, WIDTH // HEADS], dtype=np.int64)
    query, key, value = (heads([0, 2, 1, 3]) for _ in range(3))
    if names is not None:
        past, present = names
        key = net.op("Concat", past.format(number, "key"), key, name=present.format(number, "key"), axis=2)
        value = net.op(
            "Concat", past.format(number, "value"), value, name=present.format(number, "value"), axis=2
        )
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 1, 3, 2]))
    length = net.op("Squeeze", net.op("Shape", key, start=2, end=3))
    scalar = [net.const(number, dtype=np.int64) for number in (0, 1)]
    later = net.op("Greater", net.op("Range", scalar[0], length, scalar[1]), positions)
    weights = net.op("Softmax", net.op("Where", later, net.const(-1e9), scores), axis=-1)
    mixed = net.op("Transpose", net.op("MatMul", weights, value), perm=[0, 2, 1, 3])
    merged = net.op("Reshape", mixed, net.const([0, 0, WIDTH], dtype=np.int64))
    h = net.op("Add", h, net.op("MatMul", merged, matrix(WIDTH, WIDTH)))
    active = net.op("Relu", net.op("MatMul", h, matrix(WIDTH, hidden)))
    return net.op("Add", h, net.op("MatMul", active, matrix(hidden, WIDTH, 0.8)), name=f"h{number}")


def _model(net, caches, masked):
    def ids(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.INT64, shape)

    def cache(name, length):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", HEADS, length, WIDTH // HEADS])

    mask = [ids("attention_mask", "b", "t")] if masked else []  # right padding is behind what is looked at
    graph = helper.make_graph(
        net.nodes,
        "decoder",
        [
            ids("input_ids", "b", "s"),
            ids("position_ids", "b", "s"),
            *mask,
            *(cache(past, "p") for past, _ in caches),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", VOCABULARY]),
            *(cache(present, "t") for _, present in reversed(caches)),
        ],
        net.initializers,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return Model(ir.from_proto(proto))


def windows(count=24, length=16, seed=0):
    """Token ids [count, length]."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (count, length))
