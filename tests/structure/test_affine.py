# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.structure import affine_of

C = np.float32([0.5, -2.0, 3.0])
POSITIVE = np.float32([0.5, 2.0, 3.0])
X2, X4 = "float[2,3] x", "float[2,3,4,4] x"

AFFINE = {
    "add": (X2, "y = Add(x, c)", {"c": C}, -1),
    "add first": (X2, "y = Add(c, x)", {"c": C.reshape(1, 3)}, -1),
    "sub": (X2, "y = Sub(x, c)", {"c": C}, -1),
    "sub first": (X2, "y = Sub(c, x)", {"c": C}, -1),
    "mul": (X4, "y = Mul(x, c)", {"c": C.reshape(3, 1, 1)}, -3),
    "mul scalar": (X4, "y = Mul(c, x)", {"c": np.float32(2)}, None),
    "div": (X4, "y = Div(x, c)", {"c": C.reshape(1, 3, 1, 1)}, -3),
    "neg": (X2, "y = Neg(x)", {}, None),
    "identity": (X2, "y = Identity(x)", {}, None),
    "dropout": (X2, "y = Dropout(x)", {}, None),
    "dropout ratio": (X2, "y = Dropout(x, r)", {"r": np.float32(0.5)}, None),
    "dropout off": (X2, "y = Dropout(x, r, t)", {"r": np.float32(0.5), "t": np.array(False)}, None),
    "leaky one": (X2, "y = LeakyRelu <alpha = 1.0> (x)", {}, None),
    "prelu one": (X2, "y = PRelu(x, c)", {"c": np.ones(3, np.float32)}, None),
    "cast same": (X2, "y = Cast <to = 1> (x)", {}, None),
    "batch norm": (
        X4,
        "y = BatchNormalization <epsilon = 0.01> (x, g, c, m, v)",
        {"g": C, "c": C[::-1].copy(), "m": POSITIVE, "v": POSITIVE},
        1,
    ),
}


@pytest.mark.parametrize("case", AFFINE)
def test_equals_the_runtime(parse, run, rng, case):
    given, body, weights, axis = AFFINE[case]
    model = parse(f"g ({given}) => (float[] y) {{ {body} }}", weights)
    affine = affine_of(model.graph[0])
    assert affine.axis == axis
    assert (affine.input.name, affine.output.name) == ("x", "y")
    assert affine.scale.dtype == affine.shift.dtype == np.float64
    x = rng.normal(size=[int(dim) for dim in affine.input.shape]).astype(np.float32)
    y = run(model, {"x": x}, ["y"])[0]
    ours = np.moveaxis(x, axis or 0, -1) * affine.scale + affine.shift
    np.testing.assert_allclose(np.moveaxis(ours, -1, axis or 0), y, rtol=1e-5, atol=1e-6)


NOT_AFFINE = {
    "two tensors": ("float[2,3] x, float[2,3] z", "y = Mul(x, z)", {}),
    "constant divided": (X2, "y = Div(c, x)", {"c": C}),
    "varies along two axes": (X2, "y = Add(x, c)", {"c": np.ones((2, 3), np.float32) * 2}),
    "overridable": (f"{X2}, float[3] c", "y = Add(x, c)", {"c": C}),
    "prelu near one": (X2, "y = PRelu(x, c)", {"c": np.float32([1, 1, 0.999999])}),
    "leaky near one": (X2, "y = LeakyRelu <alpha = 0.999> (x)", {}),
    "leaky default": (X2, "y = LeakyRelu(x)", {}),
    "relu": (X2, "y = Relu(x)", {}),
    "cast": (X2, "y = Cast <to = 10> (x)", {}),
    "dropout training": (X2, "y = Dropout(x, r, t)", {"r": np.float32(0.5), "t": np.array(True)}),
    "dropout overridable": (
        f"{X2}, bool t",
        "y = Dropout(x, r, t)",
        {"r": np.float32(0.5), "t": np.array(False)},
    ),
    "dropout mask": (X2, "y, m = Dropout(x) z = Not(m)", {}),
    "integers": ("int64[2,3] x", "y = Add(x, c)", {"c": np.int64([1, 2, 3])}),
    "batch norm training": (
        X2,
        "y = BatchNormalization <training_mode = 1> (x, c, c, c, c)",
        {"c": POSITIVE},
    ),
    "batch norm of data": (f"{X2}, float[3] d", "y = BatchNormalization (x, c, d, c, c)", {"c": POSITIVE}),
}


@pytest.mark.parametrize("case", NOT_AFFINE)
def test_refused(parse, case):
    given, body, weights = NOT_AFFINE[case]
    model = parse(f"g ({given}) => (float[] y) {{ {body} }}", weights)
    assert affine_of(model.graph[0]) is None


def test_contrib_op_of_the_same_name_is_none(parse):
    model = parse("g (float[2,3] x) => (float[] y) { y = my.Identity(x) }", domains=["my"])
    assert affine_of(model.graph[0]) is None
