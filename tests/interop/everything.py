# SPDX-License-Identifier: Apache-2.0
"""A model that has everything that onnx-graphsurgeon drops, fails on or writes differently."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def tensor(array, name: str, dtype=np.float32, note: str | None = None) -> TensorProto:
    made = numpy_helper.from_array(np.asarray(array).astype(dtype), name)
    if note is not None:
        made.doc_string = f"doc of {note}"
        made.metadata_props.add(key="tensor", value=note)
    return made


def noted(message, name: str):
    """Gives a node, value, graph, function or model a doc string and metadata."""
    message.doc_string = f"doc of {name}"
    message.metadata_props.add(key="about", value=name)
    message.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=f"at {name}\n  line 3")
    return message


def value(name: str, shape, dtype=FLOAT):
    return noted(helper.make_tensor_value_info(name, dtype, shape), f"value {name}")


def node(kind: str, inputs: list[str], outputs: list[str], name: str = "", **attributes):
    return noted(helper.make_node(kind, inputs, outputs, name, **attributes), f"node {outputs[0]}")


def attribute(name: str, kind: int, **fields) -> AttributeProto:
    made = AttributeProto(name=name, type=kind, doc_string=f"doc of attribute {name}")
    for field, content in fields.items():
        target = getattr(made, field)
        target.extend(content) if isinstance(content, list) else target.CopyFrom(content)
    return made


def sparse(name: str) -> onnx.SparseTensorProto:
    values = tensor([1.5, -2.0], name)
    indices = tensor([1, 6], f"{name}_indices", np.int64)
    return helper.make_sparse_tensor(values, indices, [2, 4])


def function(overload: str, kind: str) -> onnx.FunctionProto:
    body = [node(kind, ["a"], ["h"]), node("Identity", ["h"], ["b"])]
    made = helper.make_function("local", "Act", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    made.overload = overload
    made.value_info.append(value("h", ["n", 32]))
    return noted(made, f"function {overload}")


def branch(name: str, *nodes: onnx.NodeProto, output: str, initializers=()) -> onnx.GraphProto:
    graph = helper.make_graph(list(nodes), name, [], [value(output, ["n", 32])], list(initializers))
    graph.value_info.append(value(nodes[0].output[0], ["n", 32]))
    return noted(graph, f"graph {name}")


def everything() -> onnx.ModelProto:
    """A valid model (as onnx.checker sees it) with one of each."""
    random = np.random.default_rng(0)
    weights = [
        tensor(random.normal(size=(32, 32)), "w_big", note="w_big"),
        tensor(random.normal(size=32), "w_small", note="w_small"),
        tensor(random.normal(size=32), "by_default", note="by_default"),
        tensor(random.normal(size=(32, 32)), "big_default"),
        tensor(random.integers(-8, 8, (64, 64)), "four_bits", ml_dtypes.int4, note="four_bits"),
        tensor(random.integers(-8, 8, (3, 5)), "four_bits_small", ml_dtypes.int4),
        tensor(random.normal(size=(32, 32)), "brain", ml_dtypes.bfloat16, note="brain"),
        tensor(random.normal(size=5), "brain_small", ml_dtypes.bfloat16),
        tensor(random.normal(size=(32, 32)), "eight_bits", ml_dtypes.float8_e4m3fnuz),
        helper.make_tensor("typed", FLOAT, [2, 16], random.normal(size=32).tolist()),  # not in raw_data
        tensor([1, -1], "shape", np.int64),
        helper.make_tensor("texts", TensorProto.STRING, [2], [b"one", b"two"]),
        tensor(random.normal(size=32), "nobody_reads"),
    ]
    custom = node("Custom", ["relu"], ["custom"], "custom", domain="nobody")
    custom.attribute.extend(
        [
            attribute("a_type", AttributeProto.TYPE_PROTO, tp=helper.make_tensor_type_proto(FLOAT, ["n"])),
            attribute("types", AttributeProto.TYPE_PROTOS,
                      type_protos=[helper.make_tensor_type_proto(FLOAT, ["n"])]),
            attribute("tensors", AttributeProto.TENSORS, tensors=[tensor([1.0], "t0"), tensor(np.ones(999), "t1")]),
            attribute("a_sparse", AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse("s")),
            attribute("none", AttributeProto.INTS),
            attribute("no_texts", AttributeProto.STRINGS),
            AttributeProto(name="binary", type=AttributeProto.STRING, s=b"\xff\x00\xfe"),
            AttributeProto(name="text", type=AttributeProto.STRING, s=b"plain"),
            AttributeProto(name="number", type=AttributeProto.INT, i=3, doc_string="doc of number"),
        ]
    )  # fmt: skip
    act_a, act_b = (node("Act", [x], [y], y, domain="local") for x, y in (("scaled", "relu"), ("if", "act")))
    act_a.overload, act_b.overload = "first", "second"
    inner = branch(
        "inner", node("Add", ["captured", "w_small"], ["inner_sum"]), node("Neg", ["inner_sum"], ["inner_out"]),
        output="inner_out",
    )  # fmt: skip
    then = branch(
        "then", node("MatMul", ["custom", "w_big"], ["captured"]),
        node("If", ["flag"], ["then_out"], "inner_if", then_branch=inner, else_branch=branch(
            "inner_else", node("Mul", ["captured", "own"], ["inner_else_out"]), output="inner_else_out",
            initializers=[tensor(np.ones(32), "own")])),
        output="then_out",
    )  # fmt: skip
    otherwise = branch("else", node("Add", ["custom", "by_default"], ["else_out"]), output="else_out")
    nodes = [
        node("MatMul", ["x", "w_big"], ["product"], "product"),
        node("Add", ["product", "by_default"], ["sum"]),
        node("Mul", ["sum", "w_small"], ["weighted"]),
        node("MatMul", ["weighted", "big_default"], ["scaled"], "twice the same name"),
        act_a,
        custom,
        node("If", ["flag"], ["if"], "outer_if", then_branch=then, else_branch=otherwise),
        act_b,
        node("Clip", ["act", "", "high"], ["clipped"], "twice the same name"),
        node("Constant", [], ["high"], "high", value=tensor(6.0, "")),
        node(
            "Constant", [], ["big_constant"], "big", value=tensor(random.normal(size=(32, 32)), "v", note="v")
        ),
        node("Constant", [], ["from_sparse"], "sparse", sparse_value=sparse("")),
        node("MatMul", ["clipped", "big_constant"], ["y"], "last"),
        node("Cast", ["brain"], ["brain_out"], to=FLOAT),
        node("Cast", ["brain_small"], ["brain_small_out"], to=FLOAT),
        node("Cast", ["four_bits"], ["four_out"], to=FLOAT),
        node("Cast", ["four_bits_small"], ["four_small_out"], to=FLOAT),
        node("Cast", ["eight_bits"], ["eight_out"], to=FLOAT),
        node("Reshape", ["typed", "shape"], ["typed_out"]),
        node("Identity", ["texts"], ["texts_out"]),
        node("SequenceConstruct", ["x", "product"], ["sequence"]),
        node("SequenceAt", ["sequence", "place"], ["at"], "at"),
        node("Optional", ["x"], ["optional"]),
    ]
    nodes.insert(0, nodes.pop(9))  # what makes a tensor comes first
    nodes.insert(0, nodes.pop(10))
    outputs = {"y": FLOAT, "brain_out": FLOAT, "four_out": FLOAT, "eight_out": FLOAT, "typed_out": FLOAT, "at": FLOAT,
               "brain_small_out": FLOAT, "four_small_out": FLOAT, "from_sparse": FLOAT,
               "texts_out": TensorProto.STRING}  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "everything",
        [
            value("x", ["n", 32]),
            value("by_default", [32]),
            value("flag", [], TensorProto.BOOL),
            value("big_default", [32, 32]),
            value("place", [], TensorProto.INT64),
        ],
        [
            *(value(name, ["n"] if name == "texts_out" else ["n", None], dtype)
              for name, dtype in outputs.items()),
            noted(helper.make_value_info("sequence", helper.make_sequence_type_proto(
                helper.make_tensor_type_proto(FLOAT, ["n", 32]))), "sequence"),
            noted(helper.make_value_info("optional", helper.make_optional_type_proto(
                helper.make_tensor_type_proto(FLOAT, ["n", 32]))), "optional"),
        ],
        weights,
    )  # fmt: skip
    graph.value_info.extend(value(name, ["n", 32]) for name in ("product", "sum", "relu", "custom", "if"))
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.quantization_annotation.append(
        onnx.TensorAnnotation(
            tensor_name="w_big",
            quant_parameter_tensor_names=[onnx.StringStringEntryProto(key="SCALE_TENSOR", value="w_small")],
        )
    )
    noted(graph, "graph everything")
    model = helper.make_model(
        graph,
        functions=[function("first", "Relu"), function("second", "Sigmoid")],
        opset_imports=[helper.make_opsetid(*item) for item in (("", 21), ("nobody", 3), ("local", 1))],
        ir_version=10,
        producer_name="the producer",
        producer_version="9",
        domain="org.example",
        model_version=7,
    )
    return noted(model, "model")
