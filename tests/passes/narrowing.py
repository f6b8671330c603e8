# SPDX-License-Identifier: Apache-2.0
"""What tests of narrow-ffn share: redundant models, offers with the model each one makes, errors at a site."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnxcollapse.passes.narrow_ffn import NarrowFfn

from onnxcollapse import Budget, Decline, Model, optimize
from onnxcollapse.calibration import collect, open_session
from onnxcollapse.rewriting.fitting import apply
from tests.structure.hidden_nets import Builder
from tests.support import Net, data_for, relative


def run(model, array, budget=0.01, *, target=None, **options):
    budget = Budget(budget, target=target)
    return optimize(
        model, data_for(model, array), budget=budget, passes=[NarrowFfn(**options)], provider="cpu"
    )


def kept(result):
    return result.journal.of("kept")


def reasons(result):
    return [entry.reason for entry in result.journal if entry.outcome != "kept"]


def offers(model, data, item):
    """Each site's name with what the pass offers for it, statistics of all sites from one run."""
    sites = [site for site in item.sites(model) if not isinstance(site, Decline)]
    wanted = [request for site in sites for request in item.requests(site)]
    statistics = collect(model, wanted, data, provider="cpu", reference=model)
    return {site.name: list(item.propose(site, statistics)) for site in sites}


def narrowed(model, item, *proposals):
    """A copy with proposals applied."""
    copy = model.clone()
    for proposal in proposals:
        apply(copy, item, proposal)
    return copy


def at(model: Model, name: str, x: np.ndarray) -> np.ndarray:
    """A tensor of a model."""
    copy = model.clone()
    value = next(v for node in copy.graph for v in node.outputs if v.name == name)
    if not value.is_graph_output():
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        copy.graph.outputs.append(value)
    with open_session(copy, provider="cpu") as session:
        return session.run({"x": x})[name]


def heldout(data) -> np.ndarray:
    return np.concatenate([batch["x"] for batch in data.batches("heldout")])


def site_error(model, item, proposal, data) -> float:
    """Relative error at the site's output on the held-out rows, of one rewrite alone."""
    x = heldout(data)
    return relative(at(narrowed(model, item, proposal), proposal.site, x), at(model, proposal.site, x))


def redundant_up(random, d_in: int, unique: int):
    """W [d_in, 4 unique + 4] and b: neurons, copies of them, sums of always-on ones, dead and constant ones.

    Of `unique` neurons the first two are on for every input; all hidden activations are linear in `unique` of them.
    """
    up, bias = random.normal(size=(d_in, unique)) / d_in**0.5, random.normal(size=unique) * 0.1
    bias[:2] = 12.0
    sums = up[:, :1] + up[:, 1:2] @ np.linspace(0.5, 1.0, unique)[None]
    sums_bias = bias[0] + bias[1] * np.linspace(0.5, 1.0, unique)
    dead, constant = random.normal(size=(d_in, 2)), np.zeros((d_in, 2))
    matrix = np.concatenate([up, 2 * up, sums, up, dead, constant], axis=1)
    offset = np.concatenate([bias, 2 * bias, sums_bias, bias, [-90.0, -90.0], [0.7, 0.1]])
    return matrix, offset


def redundant_mlp(unique: int = 6, d_in: int = 8, d_out: int = 5, spelling: str = "gemm") -> Model:
    net = Net(3)
    matrix, offset = redundant_up(net.random, d_in, unique)
    hidden = net.op("Relu", net.linear("x", matrix, offset, spelling=spelling))
    net.dense(hidden, matrix.shape[1], d_out, spelling=spelling, name="y")
    return net.model({"x": ["n", d_in]}, {"y": ["n", d_out]})


def repeated(net: Net, columns: int, *arrays):
    """Arrays with their last axis repeated in a drawn order, alike for all, with `columns` different entries."""
    picks = np.concatenate([np.arange(columns)] * 4)
    net.random.shuffle(picks)
    return [array[..., picks] for array in arrays]


def swiglu(unique: int = 6) -> Model:
    """Gate and up of 4 copies of each neuron."""
    net = Net(4)
    gate, up = repeated(net, unique, *(net.random.normal(size=(8, unique)) for _ in range(2)))
    z = net.linear("x", gate, np.zeros(4 * unique))
    silu = net.op("Mul", z, net.op("Sigmoid", z))
    hidden = net.op("Mul", silu, net.linear("x", up))
    net.linear(hidden, net.random.normal(size=(4 * unique, 8)), name="y")
    return net.model({"x": ["n", "t", 8]}, {"y": ["n", "t", 8]})


def erf_gelu(net, z):
    erf = net.op("Erf", net.op("Div", z, net.const(np.sqrt(2))))
    return net.op("Mul", net.op("Mul", z, net.op("Add", erf, net.const(1.0))), net.const(0.5))


def gelu_block(unique: int = 6) -> Model:
    """h + FFN(h) with an erf-GELU, from a first projection and to a last one."""
    net = Net(5)
    h = net.dense("x", 8, 8, spelling="matmul", name="h")
    up, bias = repeated(net, unique, net.random.normal(size=(8, unique)), net.random.normal(size=unique))
    hidden = erf_gelu(net, net.linear(h, up, bias))
    update = net.dense(hidden, 4 * unique, 8, name="u")
    net.dense(net.op("Add", h, update, name="sum"), 8, 5, name="y")
    return net.model({"x": ["n", "t", 8]}, {"y": ["n", "t", 5]})


def redundant_conv(kernel: int, head: str = "conv", unique: int = 4) -> Model:
    """Conv with 3 copies of each channel, BatchNorm, ReLU, then pooling and a Conv, or Flatten and a Gemm."""
    net = Builder(6)
    picks = np.concatenate([np.arange(unique)] * 3)
    weight, bias = net.normal(unique, 3, kernel, kernel)[picks], net.normal(unique)[picks]
    z = net.op("Conv", "x", net.const(weight), net.const(bias), pads=[kernel // 2] * 4)
    vectors = [net.normal(unique), net.normal(unique), net.normal(unique), np.abs(net.normal(unique)) + 0.5]
    z = net.op("BatchNormalization", z, *(net.const(v[picks]) for v in vectors))
    hidden = net.op("Relu", z)
    if head == "conv":
        pooled = net.op("MaxPool", hidden, kernel_shape=[2, 2], strides=[2, 2])
        net.conv(pooled, 3 * unique, 5, kernel=kernel, name="y")
        return net.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 5, 4, 4]})
    net.gemm(net.op("Flatten", hidden), 3 * unique * 64, 5, name="y")
    return net.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 5]})


def images(samples: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(samples, 3, 8, 8)).astype(np.float32)


def correlated(samples: int, width: int, seed: int = 1) -> np.ndarray:
    """Rows of low effective rank: most of their variance in a few directions."""
    random = np.random.default_rng(seed)
    spectrum = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0] * (
        1.0 / np.arange(1, width + 1)
    )
    return (random.normal(size=(samples, width)) @ spectrum.T * 2).astype(np.float32)


def always_on(widths, seed: int = 0, on: float = 1.0, rest: float = 0.0) -> Model:
    """A ReLU chain, a share `on` of whose neurons is on for all inputs of `rows`; the rest has the bias `rest`."""
    net, value = Net(seed), "x"
    for index, (d_in, d_out) in enumerate(pairwise(widths[:-1])):
        matrix = net.random.normal(size=(d_in, d_out)) / d_in**0.5
        if index:
            matrix = np.abs(matrix)  # what is behind ReLU stays on
        offset = np.where(
            np.arange(d_out) < round(on * d_out), 9.0, rest + 0.1 * net.random.normal(size=d_out)
        )
        if index:
            matrix[:, round(on * d_out) :] *= np.where(np.arange(d_in) % 2, -1.0, 1.0)[:, None]
        value = net.op("Relu", net.linear(value, matrix, offset), name=f"a{index}")
    net.dense(value, widths[-2], widths[-1], name="y")
    return net.model({"x": ["n", widths[0]]}, {"y": ["n", widths[-1]]})
