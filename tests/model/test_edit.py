# SPDX-License-Identifier: Apache-2.0
"""The edits that rewrites are made of: names stay unique, outputs stay, captured uses are found."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model
from onnxcollapse.model.edit import (
    add_initializer,
    check,
    insert_before,
    like,
    prune,
    replace_value,
    unique_name,
)

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

BRANCHES = """
g (float[n,4] x, bool cond) => (float[n,4] y) {
    h = Relu(x)
    p = If (cond) <
        then_branch = then () => (float[n,4] t) { inner = Neg(h)  t = Neg(inner) },
        else_branch = els () => (float[n,4] e) { e = Add(h, h) }
    >
    y = Add(p, h)
}
"""


def parse(text, opset=17):
    return Model(
        ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}'))
    )


def run(model, **feeds):
    check(model, full=True)
    session = onnxruntime.InferenceSession(model.to_bytes(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    x = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)
    return dict(zip(names, session.run(names, {"x": x, **feeds}), strict=True)), x


def value(model, name):
    found = [
        v for g in [model.graph, *model.graph.subgraphs()] for n in g for v in n.outputs if v.name == name
    ]
    found += [v for v in [*model.graph.inputs, *model.graph.initializers.values()] if v.name == name]
    return found[0]


def test_names_are_unique_over_nodes_values_and_subgraphs():
    model = parse(BRANCHES)
    value(model, "h").producer().name = "first"
    for taken in ("x", "h", "inner", "e", "first"):
        assert unique_name(model.graph, taken) == f"{taken}_1"
    assert unique_name(model.graph, "free") == "free"
    add_initializer(model.graph, "free", np.zeros(1), FLOAT)
    add_initializer(model.graph, "free", np.zeros(1), FLOAT)
    assert list(model.graph.initializers) == ["free", "free_1"]
    then = value(model, "p").producer().attributes["then_branch"].as_graph()
    assert unique_name(then, "h") == "h_1"  # captured there


def test_an_initializer_is_cast_once_and_cannot_change():
    model = parse(BRANCHES)
    array = np.array([[1 / 3, 1e-30], [2.0, -4.0]])
    added = add_initializer(model.graph, "w", array, HALF)
    array[:] = 0
    numbers = added.const_value.numpy()
    assert numbers.dtype == np.float16
    assert np.array_equal(numbers, np.array([[1 / 3, 1e-30], [2.0, -4.0]]).astype(np.float16))
    assert (added.dtype, list(added.shape)) == (HALF, [2, 2])
    with pytest.raises(ValueError, match="read-only"):
        numbers[0] = 1
    same = np.ones(3, np.float32)
    kept = add_initializer(model.graph, "v", same, FLOAT)
    same[:] = 0
    assert kept.const_value.numpy().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(HALF, 65504.0), (FLOAT, 3.4e38), (ir.DataType.BFLOAT16, 3.38e38), (ir.DataType.FLOAT8E4M3FN, 448.0),
     (ir.DataType.FLOAT8E5M2, 57344.0)],
)  # fmt: skip
def test_a_number_that_does_not_fit_is_an_error(dtype, limit):
    model = parse(BRANCHES)
    assert np.isfinite(add_initializer(model.graph, "w", np.array([-limit]), dtype).const_value.numpy()).all()
    with pytest.raises(ModelError, match=f"'w'.*does not fit into {dtype.name}"):
        add_initializer(model.graph, "w", np.array([1.0, -limit * 2]), dtype)
    assert list(model.graph.initializers) == ["w"]


def test_numbers_that_are_not_finite_pass():
    model = parse(BRANCHES)
    mask = add_initializer(model.graph, "mask", np.array([0, -np.inf, np.nan]), HALF).const_value.numpy()
    assert np.isneginf(mask[1])
    assert np.isnan(mask[2])


@pytest.mark.parametrize(
    "dtype", [ir.DataType.INT64, ir.DataType.INT4, ir.DataType.BOOL, ir.DataType.BFLOAT16]
)
def test_other_types_are_written_as_they_are(dtype, tmp_path):
    model = parse(BRANCHES)
    array = np.array([1, 0, 1, 1, 0] * 700).astype(dtype.numpy())
    added = add_initializer(model.graph, "w", array, dtype)
    model.save(tmp_path / "out.onnx")
    again = Model.load(tmp_path / "out.onnx").graph.initializers["w"].const_value
    assert again.dtype == dtype
    assert np.array_equal(again.numpy(), added.const_value.numpy())
    assert again.numpy().dtype == (ml_dtypes.bfloat16 if dtype == ir.DataType.BFLOAT16 else dtype.numpy())


def test_inserted_nodes_and_their_outputs_get_free_names():
    model = parse(BRANCHES)
    anchor = value(model, "p").producer()
    first = ir.Node("", "Abs", [value(model, "h")], name="first")
    first.outputs[0].name = "inner"  # taken in the branch
    second = ir.Node("", "Abs", [first.outputs[0]])
    third = ir.Node("", "Abs", [second.outputs[0]])
    insert_before(model.graph, anchor, [first, second, third])
    assert [(n.name, n.outputs[0].name) for n in (first, second, third)] == [
        ("first", "inner_1"),
        ("Abs", "Abs_out"),
        ("Abs_1", "Abs_1_out"),
    ]
    assert [n.op_type for n in model.graph] == ["Relu", "Abs", "Abs", "Abs", "If", "Add"]
    check(model, full=True)


def test_inserting_into_another_graph_is_an_error():
    model = parse(BRANCHES)
    inner = value(model, "t").producer()
    with pytest.raises(ModelError, match="insert into its own graph"):
        insert_before(model.graph, inner, ir.Node("", "Abs", [value(model, "h")]))


def test_captured_uses_are_replaced():
    model = parse(BRANCHES)
    old = value(model, "h")
    node = ir.Node("", "Mul", [value(model, "x"), value(model, "x")])
    insert_before(model.graph, old.producer(), node)
    replace_value(model.graph, old, node.outputs[0])
    assert not old.uses()
    assert prune(model) == 1
    for cond in (True, False):
        out, x = run(model, cond=np.array(cond))
        assert np.allclose(out["y"], x * x * (2 if cond else 3), rtol=1e-6)


def test_a_value_can_be_replaced_by_a_function_of_itself():
    model = parse(BRANCHES)
    old = value(model, "h")
    offset = add_initializer(model.graph, "offset", np.ones(4), FLOAT)
    first = ir.Node("", "Add", [old, offset])
    second = ir.Node("", "Mul", [first.outputs[0], old])
    insert_before(model.graph, value(model, "p").producer(), [first, second])
    replace_value(model.graph, old, second.outputs[0])
    out, x = run(model, cond=np.array(False))
    h = np.maximum(x, 0)
    assert np.allclose(out["y"], 3 * (h + 1) * h, rtol=1e-6)


def test_an_output_keeps_name_type_and_position():
    model = parse("g (float[n,4] x) => (float[n,4] a, float[n,4] y) { a = Abs(x)  h = Relu(x)  y = Neg(h)  }")
    old = value(model, "y")
    old.doc_string = "the answer"
    old.metadata_props["k"] = "v"
    old.shape = ir.Shape(["n", 4])
    node = ir.Node("", "Exp", [value(model, "h")])
    insert_before(model.graph, old.producer(), node)
    replace_value(model.graph, old, node.outputs[0])
    prune(model)
    [_, new] = model.graph.outputs
    assert new.producer().op_type == "Exp"
    assert (new.name, new.doc_string, dict(new.metadata_props)) == ("y", "the answer", {"k": "v"})
    assert list(new.shape) == ["n", 4]
    assert "Neg" not in [n.op_type for n in model.graph]
    out, x = run(model)
    assert list(out) == ["a", "y"]
    assert np.allclose(out["y"], np.exp(np.maximum(x, 0)), rtol=1e-6)


@pytest.mark.parametrize("replacement", ["x", "w", "a"])
def test_an_output_made_by_an_input_initializer_or_other_output_goes_through_an_identity(replacement):
    model = parse("g (float[n,4] x) => (float[n,4] a, float[n,4] y) { a = Abs(x)  h = Relu(x)  y = Neg(h)  }")
    add_initializer(model.graph, "w", np.ones((2, 4)), FLOAT)
    new = value(model, replacement)
    replace_value(model.graph, value(model, "y"), new)
    prune(model)
    assert [v.name for v in model.graph.outputs] == ["a", "y"]
    assert new.name == replacement
    out, x = run(model)
    assert np.array_equal(out["y"], {"x": x, "w": np.ones((2, 4), np.float32), "a": np.abs(x)}[replacement])


def test_an_output_that_other_nodes_read_is_replaced_for_them_too():
    model = parse("g (float[n,4] x) => (float[n,4] h, float[n,4] y) { h = Relu(x)  y = Neg(h) }")
    node = ir.Node("", "Abs", [value(model, "x")])
    insert_before(model.graph, model.graph[0], node)
    replace_value(model.graph, value(model, "h"), node.outputs[0])
    prune(model)
    out, x = run(model)
    assert np.array_equal(out["h"], np.abs(x))
    assert np.array_equal(out["y"], -np.abs(x))


def test_the_same_output_twice():
    model = parse("g (float[n,4] x) => (float[n,4] y) { h = Relu(x)  y = Neg(h) }")
    model.graph.outputs.append(model.graph.outputs[0])
    replace_value(model.graph, value(model, "y"), value(model, "h"))
    assert [v.name for v in model.graph.outputs] == ["y", "y"]
    check(model)


def test_an_initializer_that_is_an_output():
    model = parse("g (float[n,4] x) => (float[n,4] y) { y = Neg(x) }")
    old = add_initializer(model.graph, "w", np.ones((2, 4)), FLOAT)
    model.graph.outputs.append(old)
    new = add_initializer(model.graph, "w", np.full((2, 4), 3), FLOAT)
    replace_value(model.graph, old, new)
    prune(model)
    out, _ = run(model)
    assert np.array_equal(out["w"], np.full((2, 4), 3))
    assert len(model.graph.initializers) == 1


def test_the_output_of_a_branch():
    model = parse(BRANCHES)
    replace_value(
        model.graph, value(model, "t"), value(model, "h")
    )  # captured: needs an Identity in the branch
    replace_value(model.graph, value(model, "e"), value(model, "x"))
    prune(model)
    out, x = run(model, cond=np.array(True))
    assert np.array_equal(out["y"], 2 * np.maximum(x, 0))
    out, x = run(model, cond=np.array(False))
    assert np.array_equal(out["y"], x + np.maximum(x, 0))


def test_what_cannot_be_replaced():
    model = parse("g (float[n,4] x) => (float[n,4] x, float[n,4] y) { y = Neg(x)  c = Cast<to=10>(x) }")
    value(model, "c").type = ir.TensorType(HALF)
    with pytest.raises(ModelError, match="'y' is FLOAT and cannot be replaced by FLOAT16"):
        replace_value(model.graph, value(model, "y"), value(model, "c"))
    with pytest.raises(ModelError, match="'x' is an input and an output at once"):
        replace_value(model.graph, value(model, "x"), value(model, "y"))


def test_a_shared_weight_stays_for_its_other_users():
    numbers = ", ".join(map(str, range(16)))
    body = "a = MatMul(x, w)  y = Add(a, w)"
    model = parse(f"g (float[4,4] x) => (float[4,4] y) <float[4,4] w = {{{numbers}}}> {{ {body} }}")
    w = model.graph.initializers["w"]
    twin = model.clone()
    new = add_initializer(model.graph, "w", 2 * w.const_value.numpy(), FLOAT)
    model.graph[0].replace_input_with(1, new)
    check(model, full=True)
    assert [v.name for v in model.graph[1].inputs] == ["a", "w"]
    assert twin.graph.initializers["w"].const_value is w.const_value
    assert list(twin.graph.initializers) == ["w"]


def test_a_clone_is_independent():
    model = parse(BRANCHES)
    before = model.to_bytes()
    twin = model.clone()
    twin.graph.inputs[0].dtype = HALF  # onnx_ir changes the type object in place
    node = ir.Node("", "Abs", [value(twin, "x")])
    insert_before(twin.graph, twin.graph[0], node)
    replace_value(twin.graph, value(twin, "h"), node.outputs[0])
    prune(twin)
    assert model.to_bytes() == before
    assert twin.to_bytes() != before


def test_a_value_like_another_shares_nothing_with_it():
    model = parse("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    made = like(value(model, "y"))
    made.dtype, made.shape[1] = HALF, 7
    assert (value(model, "y").dtype, value(model, "y").shape[1], made.name) == (FLOAT, 4, None)
