# SPDX-License-Identifier: Apache-2.0
"""A decoder merged for runs without and with a cache, and data for it."""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from onnxcollapse import Model, open_data
from onnxcollapse.calibration import open_session
from onnxcollapse.calibration.filling import complete
from tests.passes.crossed import crossed, samples
from tests.passes.merging import merged


@functools.cache
def proto(post=False) -> bytes:
    return merged(crossed(caching="given", post=post), crossed(caching="taken", post=post)).to_bytes()


def decoder(post=False) -> Model:
    return Model(ir.from_proto(onnx.load_from_string(proto(post))))


def data(model, seed=0, count=48):
    return open_data(samples(crossed(caching="given"), count, seed=seed), model)


def logits(model, seed=5, **inputs):
    feeds = samples(crossed(caching="given"), 6, seed=seed) | inputs
    with open_session(model, provider="cpu") as session:
        return session.run(complete(feeds, model.signature()))["logits"]


def names(values):
    return [value.name for value in values]
