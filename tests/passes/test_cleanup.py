# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnxcollapse.passes.cleanup import Cleanup

from onnxcollapse import Model, optimize
from tests.support import file_bytes, mlp, outputs


def clean(text: str) -> tuple[Model, Model]:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    onnx.checker.check_model(proto)
    model = Model(ir.from_proto(proto))
    return model, optimize(model, passes=[Cleanup()]).model


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_identities_dead_nodes_and_duplicates_go():
    before, after = clean("""net (float[n] x) => (float[n] y) {
        a = Identity(x)  b = Relu(a)  c = Relu(x)  dead = Neg(x)  y = Add(b, c) }""")
    assert ops(after) == ["Relu", "Add"]
    x = np.array([-1, 2], np.float32)
    np.testing.assert_array_equal(outputs(after, x=x)["y"], outputs(before, x=x)["y"])


def test_an_output_keeps_its_name_when_an_identity_made_it():
    before, after = clean("net (float[n] x) => (float[n] y) { a = Relu(x) y = Identity(a) }")
    assert ops(after) == ["Relu"]
    assert after.signature() == before.signature()


def test_identities_between_inputs_outputs_and_initializers_stay():
    for text in (
        "net (float[n] x) => (float[n] y) { y = Identity(x) }",
        "net (float[n] x) => (float[n] x2, float[n] y) { x2 = Relu(x) y = Identity(x2) }",
        "net (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Identity(w) }",
    ):
        before, after = clean(text)
        assert "Identity" in ops(after), text
        assert after.signature() == before.signature()


def test_a_branch_that_hands_an_outer_tensor_on_keeps_its_identity():
    before, after = clean("""net (float[n] x, bool p) => (float[n] y) {
        a = Relu(x)
        y = If (p) <then_branch = yes () => (float[n] u) { u = Identity(a) },
                    else_branch = no () => (float[n] v) { v = Neg(a) }> }""")
    for p in (True, False):
        feeds = {"x": np.array([-1, 2], np.float32), "p": np.array(p)}
        np.testing.assert_array_equal(outputs(after, **feeds)["y"], outputs(before, **feeds)["y"])


def test_an_input_does_not_take_over_the_shape_of_what_copies_it():
    before, after = clean(
        "net (float[n] x) => (float[n] y) <float[2] w = {1, 2}> { a = Identity(x) y = Add(a, w) }"
    )
    assert after.signature() == before.signature()


def test_random_operators_are_not_merged():
    _, after = clean("""net (float[4] x) => (float[4] y) {
        a = RandomNormalLike(x) b = RandomNormalLike(x) y = Sub(a, b) }""")
    assert ops(after).count("RandomNormalLike") == 2
    _, after = clean("net (float[4] x) => (float[4] y) { a = Bernoulli(x) b = Bernoulli(x) y = Sub(a, b) }")
    assert ops(after).count("Bernoulli") == 2


def test_a_clean_model_is_left_byte_identical_and_the_journal_is_empty(tmp_path):
    model = mlp([4, 8, 4])
    result = optimize(model, passes=[Cleanup()])
    assert not list(result.journal)
    assert file_bytes(result.model, tmp_path) == file_bytes(model, tmp_path)


def test_the_journal_says_how_much_went():
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> net (float[n] x) => (float[n] y) { a = Identity(x) y = Relu(a) }'
    )
    [entry] = optimize(Model(ir.from_proto(proto)), passes=[Cleanup()]).journal.of("kept")
    assert (entry.saving.nodes, entry.site) == (1, "graph")


def test_an_output_merged_with_a_duplicate_keeps_its_declaration():
    before, after = clean("""net (float[n, 8] x) => (float[n, 8] b, float[n, 8] y)
        <float[q, 8] a>
        { a = Relu(x) c = Neg(a) b = Relu(x) y = Add(c, b) }""")
    assert [node.op_type for node in after.graph].count("Relu") == 1
    assert after.signature() == before.signature()


def test_operators_that_take_a_type_are_no_obstacle():
    proto = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 18]>
        net (float[2] x) => (float[2] y) { a = Identity(x) y = Relu(a) }""")
    kind = onnx.helper.make_tensor_type_proto(1, [2])
    for name in "pq":
        proto.graph.node.append(onnx.helper.make_node("Optional", [], [f"{name}0"], type=kind))
        proto.graph.node.append(onnx.helper.make_node("OptionalHasElement", [f"{name}0"], [name]))
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []))
    result = optimize(Model(ir.from_proto(proto)), passes=[Cleanup()])
    assert "Identity" not in [node.op_type for node in result.model.graph]


def test_what_only_an_identity_read_goes_with_it():
    before, after = clean("""net (float[2] x) => (float[2] y)
        { a = Relu(x) b = Neg(a) c = Identity(b) y = Relu(a) }""")
    assert [node.op_type for node in after.graph] == ["Relu", "Relu"]
    model = optimize(before, passes=[Cleanup()])
    assert [entry.outcome for entry in model.journal] == ["kept"]
