# SPDX-License-Identifier: Apache-2.0
"""Small models with one hidden layer each, of all spellings, from x to y."""

from __future__ import annotations

import numpy as np

from tests.support import Net

IMAGE = (2, 3, 8, 8)


class Builder(Net):
    """A Net with the operators of image models."""

    def normal(self, *shape):
        return self.random.normal(size=shape) / max(np.prod(shape[1:]), 1) ** 0.5

    def conv(self, x, ins, outs, kernel=3, name=None, bias=True, **attributes):
        operands = [self.const(self.normal(outs, ins, kernel, kernel))]
        operands += [self.const(self.normal(outs))] if bias else []
        if "auto_pad" not in attributes:
            attributes.setdefault("pads", [kernel // 2] * 4)
        return self.op("Conv", x, *operands, name=name, **attributes)

    def batch_norm(self, x, channels):
        vectors = [self.normal(channels), self.normal(channels), self.normal(channels)]
        variance = np.abs(self.normal(channels)) + 0.5
        return self.op("BatchNormalization", x, *(self.const(v) for v in (*vectors, variance)), epsilon=1e-3)

    def gemm(self, x, ins, outs, name=None, trans=True):
        weight = self.normal(outs, ins) if trans else self.normal(ins, outs)
        return self.op(
            "Gemm", x, self.const(weight), self.const(self.normal(outs)), name=name, transB=int(trans)
        )

    def finish(self, x, y, opset=17):
        return self.model({"x": list(x)}, {"y": y}, opset)

    def image(self, opset=17):
        return self.finish(IMAGE, ["n", 5, "h", "w"], opset)

    def vector(self, opset=17):
        return self.finish(IMAGE, ["n", 5], opset)


def plain(spelling="gemm", activation="Relu"):
    net = Builder()
    hidden = net.op(activation, net.dense("x", 4, 6, spelling=spelling))
    net.dense(hidden, 6, 5, spelling=spelling, name="y")
    return net.finish([3, 4], [3, 5])


def gemm_factors():
    """alpha, beta, a bias [1, C], and one that is a single number."""
    net = Builder()
    up, bias = net.const(net.normal(4, 6)), net.const(net.normal(1, 6))
    hidden = net.op("Tanh", net.op("Gemm", "x", up, bias, alpha=0.5, beta=3.0))
    down = net.op("Gemm", hidden, net.const(net.normal(6, 6)), net.const([0.3]), alpha=2.0)
    net.gemm(net.op("Sigmoid", down), 6, 5, name="y", trans=False)
    return net.finish([3, 4], [3, 5])


def weight_left():
    net = Builder()
    up = net.op("MatMul", net.const(net.normal(6, 4)), "x")
    hidden = net.op("Relu", net.op("Add", net.const(net.normal(6, 1)), up))
    net.op("MatMul", net.const(net.normal(5, 6)), hidden, name="y")
    return net.finish([2, 4, 3], [2, 5, 3])


def swiglu():
    net = Builder()
    gate = net.dense("x", 4, 6)
    silu = net.op("Mul", gate, net.op("Sigmoid", gate))
    net.linear(net.op("Mul", silu, net.dense("x", 4, 6)), net.normal(6, 5), name="y")
    return net.finish([2, 3, 4], [2, 3, 5])


def erf_gelu():
    """Five nodes, one of which has a constant for each channel, and a bias apart."""
    net = Builder()
    z = net.dense("x", 4, 6)
    erf = net.op("Erf", net.op("Div", z, net.const(np.sqrt(2))))
    gate = net.op("Mul", z, net.op("Add", erf, net.const(1.0)))
    scaled = net.op("Mul", gate, net.const(np.linspace(0.3, 0.7, 6).reshape(1, 6)))
    net.dense(net.op("Add", scaled, net.const(net.normal(6))), 6, 5, name="y")
    return net.finish([2, 3, 4], [2, 3, 5])


def conv_pool():
    net = Builder()
    pooled = net.op(
        "MaxPool", net.op("Relu", net.batch_norm(net.conv("x", 3, 6), 6)), kernel_shape=[2, 2], strides=[2, 2]
    )
    net.conv(pooled, 6, 5, name="y", strides=[2, 1], dilations=[1, 2], pads=[0, 1, 2, 1])
    return net.image()


def conv_flatten():
    net = Builder()
    net.gemm(net.op("Flatten", net.op("Relu", net.conv("x", 3, 6, strides=[2, 2]))), 96, 5, name="y")
    return net.vector()


def conv_reshape(target=(0, -1), matmul=True):
    net = Builder()
    hidden = net.op("Relu", net.conv("x", 3, 6, strides=[4, 4], bias=False))
    flat = net.op("Reshape", hidden, net.const(target, dtype=np.int64))
    shifted = net.op("Add", flat, net.const(net.normal(24)))
    if matmul:
        net.linear(shifted, net.normal(24, 5), name="y")
    else:
        net.gemm(shifted, 24, 5, name="y")
    return net.vector()


def depthwise():
    net = Builder()
    hidden = net.op("Clip", net.conv("x", 3, 6, kernel=1), net.const(0.0), net.const(6.0))
    own = net.op(
        "Conv",
        hidden,
        net.const(net.normal(6, 1, 3, 3)),
        net.const(net.normal(6)),
        group=6,
        pads=[1, 1, 1, 1],
    )
    net.conv(net.op("HardSwish", own), 6, 5, kernel=1, name="y")
    return net.image()


def global_pool(squeeze=False):
    net = Builder()
    pooled = net.op("GlobalAveragePool", net.op("LeakyRelu", net.conv("x", 3, 6)))
    flat = (
        net.op("Squeeze", pooled, net.const([2, -1], dtype=np.int64))
        if squeeze
        else net.op("Flatten", pooled)
    )
    net.gemm(flat, 6, 5, name="y")
    return net.vector()


def mean_of_positions():
    net = Builder()
    hidden = net.op(
        "InstanceNormalization", net.conv("x", 3, 6), *(net.const(net.normal(6)) for _ in range(2))
    )
    net.dense(net.op("ReduceMean", hidden, axes=[-1, 2], keepdims=0), 6, 5, name="y")
    return net.vector()


def prelu_pad_resize():
    net = Builder()
    act = net.op("PRelu", net.conv("x", 3, 6), net.const(net.random.uniform(0.1, 0.9, (6, 1, 1))))
    padded = net.op("Pad", act, net.const([0, 0, 1, 0, 0, 0, 0, 2], dtype=np.int64), mode="reflect")
    resized = net.op("Resize", padded, "", net.const([1, 1, 2, 2]), mode="nearest")
    net.conv(net.op("Mul", resized, net.const(net.normal(1, 6, 1, 1))), 6, 5, name="y")
    return net.image()


def self_gated():
    """Each channel is scaled by its own mean, and the bias of either Conv is an Add."""
    net = Builder()
    hidden = net.op("Add", net.conv("x", 3, 6, bias=False), net.const(net.normal(6, 1, 1)))
    scaled = net.op("Mul", hidden, net.op("Sigmoid", net.op("GlobalAveragePool", hidden)))
    net.op("Add", net.conv(scaled, 6, 5, bias=False), net.const(net.normal(1, 5, 1, 1)), name="y")
    return net.image()


def direct():
    net = Builder()
    net.conv(net.conv("x", 3, 6, kernel=1), 6, 5, name="y", auto_pad="SAME_UPPER")
    return net.image()


NETS = {
    # name: model, description of the region, group, FeedForward
    "gemm": (plain, "Relu", 1, True),
    "matmul": (lambda: plain("matmul", "Elu"), "Elu", 1, True),
    "weight left": (weight_left, "Relu", 1, True),
    "swiglu": (swiglu, "Sigmoid-Mul", 1, True),
    "erf-gelu": (erf_gelu, "Div-Erf-Add-Mul", 1, True),
    "conv pool": (conv_pool, "BatchNormalization-Relu-MaxPool", 9, False),
    "conv flatten": (conv_flatten, "Relu", 16, False),
    "reshape [0, -1]": (conv_reshape, "Relu-Add", 4, False),
    "reshape [n, -1]": (lambda: conv_reshape((2, -1)), "Relu-Add", 4, False),
    "reshape [0, f]": (lambda: conv_reshape((0, 24), matmul=False), "Relu-Add", 4, False),
    "reshape [n, f]": (lambda: conv_reshape((2, 24)), "Relu-Add", 4, False),
    "depthwise": (depthwise, "Clip-Conv-HardSwish", 1, False),
    "global pool": (global_pool, "LeakyRelu-GlobalAveragePool", 1, False),
    "global pool, squeezed": (lambda: global_pool(True), "LeakyRelu-GlobalAveragePool", 1, False),
    "mean": (mean_of_positions, "InstanceNormalization-ReduceMean", 1, False),
    "prelu, pad, resize": (prelu_pad_resize, "PRelu-Pad-Resize-Mul", 9, False),
    "self-gated": (self_gated, "GlobalAveragePool-Sigmoid-Mul", 9, False),
    "direct": (direct, "Identity", 9, False),
}
