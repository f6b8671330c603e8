# SPDX-License-Identifier: Apache-2.0
"""Models with Linears of low rank, of every spelling."""

from __future__ import annotations

import numpy as np

from onnxcollapse import Model
from tests.support import Net


def thin(net: Net, d_in: int, d_out: int, rank: int = 8) -> np.ndarray:
    return net.random.normal(size=(d_in, rank)) @ net.random.normal(size=(rank, d_out)) / d_in**0.5


def of_low_rank(spelling: str = "gemm") -> Model:
    """Two Linears around a Tanh, both of rank 8."""
    net = Net(2)
    hidden = net.op("Tanh", net.linear("x", thin(net, 40, 48), net.random.normal(size=48), spelling=spelling))
    net.linear(hidden, thin(net, 48, 40), net.random.normal(size=40), spelling=spelling, name="y")
    return net.model({"x": ["n", 40]}, {"y": ["n", 40]})


def pointwise() -> Model:
    net = Net(3)
    weight = thin(net, 40, 48).T[:, :, None, None]
    z = net.op("Conv", "x", net.const(weight), net.const(net.random.normal(size=48)))
    net.op("Relu", z, name="y")
    return net.model({"x": ["n", 40, 4, 4]}, {"y": ["n", 48, 4, 4]})


def on_the_left() -> Model:
    net = Net(4)
    net.op("MatMul", net.const(thin(net, 40, 48).T), "x", name="y")
    return net.model({"x": ["n", 40, 5]}, {"y": ["n", 48, 5]})


def attention_like(full: bool = False) -> Model:
    """Three Linears that read one tensor, all in one space of 8 directions, and one that reads them."""
    net = Net(5)
    h = net.dense("x", 40, 40, spelling="matmul", name="h")
    space = net.random.normal(size=(40, 40 if full else 8)) / 6
    read = [
        net.linear(h, space @ net.random.normal(size=(space.shape[1], width)), np.full(width, 0.1), name=name)
        for name, width in (("q", 40), ("k", 32), ("v", 40))
    ]
    joined = net.op("Concat", *read, axis=-1)
    net.op("Tanh", joined, name="y")
    return net.model({"x": ["n", "t", 40]}, {"y": ["n", "t", 112]})


def parallel_blocks(blocks: int = 3) -> Model:
    """h + attention-like(h) + FFN(h): query, value and the FFN's first Linear read one tensor."""
    net, h = Net(14), "x"
    for block in range(blocks):
        q, v = (net.dense(h, 48, 48, spelling="matmul", name=f"{name}{block}") for name in "qv")
        mixed = net.dense(net.op("Mul", net.op("Sigmoid", q), v), 48, 48, spelling="matmul", name=f"o{block}")
        hidden = net.op("Relu", net.dense(h, 48, 96, spelling="matmul", name=f"up{block}"))
        update = net.dense(hidden, 96, 48, spelling="matmul", name=f"down{block}")
        h = net.op("Add", h, net.op("Add", mixed, update), name=f"h{block}")
    net.dense(h, 48, 8, spelling="matmul", name="y")
    return net.model({"x": ["n", 48]}, {"y": ["n", 8]})
