# SPDX-License-Identifier: Apache-2.0
"""What tests of collapse-layers share: models with a residual stream, offers by site and variant."""

from __future__ import annotations

import numpy as np

from onnxcollapse import Budget, Target, optimize
from tests.passes import narrowing
from tests.support import Net, data_for

WIDTH = 16


def stream(layers=6, *, linear=(), post=False, weights=None, scale=0.4):
    """h + FFN(norm(h)), or norm(h + FFN(h)) with `post`; activations have slopes of 1 in the layers in `linear`."""
    net = Net(1)
    gamma, beta = (net.const(net.random.normal(1, 0.1, size=WIDTH)) for _ in range(2))
    h = net.dense("x", WIDTH, WIDTH, name="h0")
    for layer in range(layers):
        x = h if post else net.op("LayerNormalization", h, gamma, beta, name=f"n{layer}", axis=-1)
        up, down = (
            net.random.normal(size=shape) / shape[0] ** 0.5 * scale**0.5
            for shape in ((WIDTH, 40), (40, WIDTH))
        )
        if weights is not None:
            up, down = weights[layer]
        hidden = net.linear(x, up, np.full(40, 0.1), name=f"z{layer}")
        slopes = [net.const(np.full(40, float(layer in linear)))] if linear else []
        hidden = net.op("PRelu" if linear else "Tanh", hidden, *slopes, name=f"a{layer}")
        total = net.op(
            "Add", h, net.linear(hidden, down, np.full(WIDTH, 0.05), name=f"u{layer}"), name=f"s{layer}"
        )
        h = net.op("LayerNormalization", total, gamma, beta, name=f"h{layer + 1}", axis=-1) if post else total
    net.dense(h, WIDTH, 5, name="y")
    return net.model({"x": ["n", WIDTH]}, {"y": ["n", 5]})


def offers(model, data, item):
    """What the pass offers, by site and variant."""
    found = narrowing.offers(model, data, item)
    return {(offer.site, offer.variant): offer for group in found.values() for offer in group}


def shrink(model, x, *passes, target=0.6, budget=None, metric="rel-l2"):
    """A model made smaller by some passes."""
    return optimize(
        model,
        data_for(model, x),
        budget=Budget(budget, metric, None if target is None else Target("params", target)),
        passes=passes,
        provider="cpu",
    )
