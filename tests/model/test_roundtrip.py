# SPDX-License-Identifier: Apache-2.0
"""A model that was loaded and saved again is the same model, whatever it contains."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxcollapse.model import Model
from onnxcollapse.model.edit import check

FLOAT = TensorProto.FLOAT
info = helper.make_tensor_value_info
node = helper.make_node
opset = helper.make_opsetid
MS = "com.microsoft"


DATA_TYPES = [
    *(np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.bool_, np.float16),
    *(np.float64, np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    *(ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn),
]


def tensor(shape, name="", seed=0):
    return numpy_helper.from_array(
        np.random.default_rng(seed).standard_normal(shape).astype(np.float32), name
    )


def model(nodes, initializers=(), inputs=None, outputs=None, *, opsets=None, version=10, **options):
    inputs = inputs if inputs is not None else [info("x", FLOAT, ["b", 32])]
    outputs = outputs or [info("y", FLOAT, ["b", 32])]
    graph = helper.make_graph(nodes, "main", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=opsets or [opset("", 17)], ir_version=version, **options)


def entries(message, **pairs):
    for key, value in pairs.items():
        message.metadata_props.add(key=key, value=value)


def everything_named():
    weight = tensor((32, 32), "w")
    small = tensor((2, 2), "small")
    for t in (weight, small):
        t.doc_string = "a weight"
        entries(t, layer="3", kind="dense")
    matmul = node("MatMul", ["x", "w"], ["h"], name="n0", doc_string="a product")
    entries(matmul, namespace="block.0")
    made = model(
        [matmul, node("Relu", ["h"], ["y"])],
        [weight, small],
        producer_name="p",
        producer_version="1",
        domain="org",
        model_version=7,
        doc_string="a model",
    )
    hidden = info("h", FLOAT, ["b", 32], doc_string="hidden")
    entries(hidden, key="value")
    made.graph.value_info.append(hidden)
    made.graph.value_info.append(info("w", FLOAT, [32, 32]))
    made.graph.doc_string = "a graph"
    made.graph.input[0].doc_string = "an input"
    entries(made.graph, scope="all")
    entries(made, author="somebody", licence="free")
    return made


def overridable_input():
    return model(
        [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "bias"], ["y"])],
        [tensor((32, 32), "w"), tensor((32,), "bias")],
        [info("x", FLOAT, ["b", 32]), info("w", FLOAT, [32, 32]), info("bias", FLOAT, [32])],
    )


def functions_with_overloads():
    made = model(
        [
            node("Scale", ["x"], ["h"], domain="my", overload="a"),
            node("Scale", ["h"], ["y"], domain="my", overload="b"),
        ],
        opsets=[opset("", 17), opset("my", 1)],
    )
    for overload in ("a", "b"):
        reference = node("LeakyRelu", ["p"], ["out"])
        reference.attribute.add(name="alpha", ref_attr_name="slope", type=AttributeProto.FLOAT)
        function = helper.make_function(
            "my",
            "Scale",
            ["inp"],
            ["out"],
            [
                node("Constant", [], ["w"], value=tensor((32, 32))),
                node("MatMul", ["inp", "w"], ["p"]),
                reference,
            ],
            [opset("", 17)],
            attributes=["free"],
            attribute_protos=[helper.make_attribute("slope", 0.5)],
            overload=overload,
            value_info=[info("p", FLOAT, ["b", 32])],
            doc_string="a function",
        )
        entries(function, origin="script")
        made.functions.append(function)
    return made


def every_data_type():
    random = np.random.default_rng(0)
    initializers = []
    for dtype in DATA_TYPES:
        for size in (3, 4099):
            array = random.integers(0, 2, size).astype(dtype)
            initializers.append(numpy_helper.from_array(array, f"{np.dtype(dtype).name}_{size}"))
    texts = numpy_helper.from_array(
        np.array([b"a", b"", b"\xff\x00b\x00", "ä".encode()] * 400, object), "texts"
    )
    return model([node("Relu", ["x"], ["y"])], [*initializers, texts], version=11, opsets=[opset("", 23)])


def typed_fields():
    def typed(name, kind, numbers, **fields):
        return TensorProto(name=name, data_type=kind, dims=[len(numbers)], **fields)

    floats = [0.5 * i for i in range(600)]
    return model(
        [node("Relu", ["x"], ["y"])],
        [
            typed("f", TensorProto.FLOAT, floats, float_data=floats),
            typed("d", TensorProto.DOUBLE, floats, double_data=floats),
            typed("h", TensorProto.FLOAT16, range(900), int32_data=range(900)),
            typed("i", TensorProto.INT64, range(900), int64_data=range(900)),
            typed("u", TensorProto.UINT32, range(900), uint64_data=range(900)),
            TensorProto(name="z", data_type=TensorProto.COMPLEX64, dims=[300], float_data=floats),
            TensorProto(name="empty", data_type=TensorProto.FLOAT, dims=[0, 4]),
        ],
    )


def sparse():
    def matrix(name):
        values = numpy_helper.from_array(np.arange(1, 401, dtype=np.float32), name)
        indices = numpy_helper.from_array(np.arange(400, dtype=np.int64) * 2, "indices")
        return helper.make_sparse_tensor(values, indices, [32, 32])

    made = model(
        [
            node("MatMul", ["x", "s"], ["h"]),
            node("Constant", [], ["c"], sparse_value=matrix("")),
            node("MatMul", ["h", "c"], ["y"]),
        ]
    )
    made.graph.sparse_initializer.append(matrix("s"))
    several = made.graph.node[0].attribute.add(name="several", type=AttributeProto.SPARSE_TENSORS)
    several.sparse_tensors.extend([matrix("p"), matrix("q")])
    return made


def subgraphs():
    def branch(seed):
        return helper.make_graph(
            [
                node("Constant", [], ["c"], value=tensor((32, 32), seed=seed)),
                node("MatMul", ["h", "c"], ["p"]),  # h is captured
                node("Add", ["p", "bias"], ["r"]),
            ],
            "branch",
            [],
            [info("r", FLOAT, ["b", 32])],
            [tensor((512,), "unused", seed), tensor((32,), "bias", seed)],
            value_info=[info("p", FLOAT, ["b", 32])],
        )

    body = helper.make_graph(
        [node("MatMul", ["state", "w"], ["next"]), node("Identity", ["going"], ["still"])],
        "body",
        [info("i", TensorProto.INT64, []), info("going", TensorProto.BOOL, []), info("state", FLOAT, None)],
        [info("still", TensorProto.BOOL, []), info("next", FLOAT, None)],
    )
    return model(
        [
            node("MatMul", ["x", "w"], ["h"]),
            node("If", ["cond"], ["picked"], then_branch=branch(1), else_branch=branch(2)),
            node("Loop", ["trips", "", "picked"], ["y"], body=body),
        ],
        [tensor((32, 32), "w"), numpy_helper.from_array(np.int64(3), "trips")],
        [info("x", FLOAT, ["b", 32]), info("cond", TensorProto.BOOL, [])],
    )


def outputs_of_all_kinds():
    return model(
        [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])],
        [tensor((32, 32), "w")],
        outputs=[info("y", FLOAT, ["b", 32]), info("h", FLOAT, ["b", 32]), info("w", FLOAT, [32, 32]),
                 info("x", FLOAT, ["b", 32])],
    )  # fmt: skip


def constant_forms():
    return model(
        [
            node("Constant", [], ["a"], value_float=1.5),
            node("Constant", [], ["b"], value_floats=[1.0, 2.0]),
            node("Constant", [], ["c"], value_int=3),
            node("Constant", [], ["d"], value_ints=[4, 5]),
            node("Constant", [], ["e"], value_string="text"),
            node("Constant", [], ["f"], value_strings=["one", "two"]),
            node("Constant", [], ["w"], value=tensor((32, 32), "inner")),
            node("ConstantOfShape", ["d"], ["g"], value=numpy_helper.from_array(np.array([7], np.int64))),
            node("MatMul", ["x", "w"], ["y"]),
        ]
    )


def contrib():
    return model(
        [
            node(
                "SkipLayerNormalization",
                ["x", "x", "g"],
                ["y", "", "", "sum"],
                domain="com.microsoft",
                epsilon=1e-5,
            ),
            node(
                "MatMulNBits",
                ["y", "q", "scales"],
                ["z"],
                domain="com.microsoft",
                K=32,
                N=64,
                bits=4,
                block_size=32,
            ),
        ],
        [
            tensor((32,), "g"),
            numpy_helper.from_array(np.ones((64, 1, 16), np.uint8), "q"),
            tensor((64,), "scales"),
        ],
        outputs=[info("z", FLOAT, ["b", 64]), info("sum", FLOAT, ["b", 32])],
        opsets=[opset("ai.onnx", 17), opset("com.microsoft", 1)],
    )


def quantization_annotations():
    made = outputs_of_all_kinds()
    made.graph.initializer.extend([tensor((1,), "scale"), tensor((1,), "zero")])
    for name in ("x", "w", "h", "y"):
        annotation = made.graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
        annotation.quant_parameter_tensor_names.add(key="ZERO_POINT_TENSOR", value="zero")
    return made


def training_info():
    made = overridable_input()
    training = made.training_info.add()
    update = node("Add", ["w", "step"], ["w_new"])
    output = info("w_new", FLOAT, [32, 32])
    training.algorithm.CopyFrom(helper.make_graph([update], "sgd", [], [output], [tensor((32, 32), "step")]))
    training.update_binding.add(key="w", value="w_new")
    return made


def types_of_all_kinds():
    mapping = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(FLOAT, []))
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, ["b", None]))
    made = model(
        [
            node("ZipMap", ["x"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=list(range(32))),
            node("Identity", ["maps"], ["maps2"]),
            node("SequenceConstruct", ["x", "x"], ["seq"]),
            node("Optional", ["x"], ["opt"]),
            node("Custom", ["u"], ["v"], domain="my"),
            node("Identity", ["maps2"], ["maps3"]),
        ],
        inputs=[info("x", FLOAT, ["b", 32]), info("u", FLOAT, None)],
        outputs=[
            helper.make_value_info("maps3", helper.make_sequence_type_proto(mapping)),
            helper.make_value_info("seq", sequence),
            helper.make_value_info("opt", helper.make_optional_type_proto(sequence)),
            info("v", FLOAT, None),
        ],
        opsets=[opset("", 17), opset("ai.onnx.ml", 3), opset("my", 1)],
    )
    made.graph.value_info.append(helper.make_value_info("maps2", helper.make_sequence_type_proto(mapping)))
    made.graph.input[0].type.denotation = "IMAGE"
    made.graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    made.graph.output[3].type.tensor_type.ClearField("shape")
    return made


def attribute_kinds():
    inner = helper.make_graph([node("Relu", ["x"], ["r"])], "g", [], [info("r", FLOAT, None)])
    custom = node("Custom", ["x", ""], ["y", ""], domain="my", name="n")
    custom.attribute.extend(
        [
            helper.make_attribute("ts", [tensor((2, 2)), tensor((32, 32))]),
            helper.make_attribute("gs", [inner]),
            helper.make_attribute("ss", ["a", "b"]),
            helper.make_attribute("tp", helper.make_tensor_type_proto(FLOAT, [2])),
            AttributeProto(name="none", type=AttributeProto.INTS),
            AttributeProto(name="said", type=AttributeProto.FLOAT, f=0.0, doc_string="why"),
        ]
    )  # fmt: skip
    return model([custom], opsets=[opset("", 17), opset("my", 1)])


def devices():
    made = overridable_input()
    made.ir_version = 11
    made.configuration.add(name="two", num_devices=2)
    placed = made.graph.node[0].device_configurations.add(configuration_id="two", pipeline_stage=1)
    placed.sharding_spec.add(tensor_name="x", device=[0, 1])
    return made


ZOO = [
    *(everything_named, overridable_input, functions_with_overloads, every_data_type, typed_fields, sparse),
    *(subgraphs, outputs_of_all_kinds, constant_forms, contrib, quantization_annotations, training_info),
    *(types_of_all_kinds, attribute_kinds, devices),
]


@pytest.mark.parametrize("build", ZOO)
def test_saved_again_it_is_the_same_model(build, written, assert_same, tmp_path):
    made = build()
    loaded = Model.load(written(made))
    check(loaded)
    for again, external in ((loaded, False), (loaded, True), (loaded.clone().clone(), False)):
        again.save(tmp_path / "out.onnx", external=external)
        assert_same(onnx.load(tmp_path / "out.onnx"), made)
    assert_same(onnx.ModelProto.FromString(loaded.to_bytes()), made)


@pytest.mark.parametrize("build", ZOO)
def test_weights_stay_in_the_file(build, written):
    loaded = Model.load(written(build()))
    held = [t for t in _tensors(loaded) if t.dtype.name != "STRING" and t.nbytes >= 2048]
    elsewhere = {"i", "u", "h", "z"}  # not encoded as raw_data would be
    assert all(type(t).__name__ == "FileTensor" for t in held if t.name not in elsewhere)


def _tensors(loaded):
    from onnxcollapse.model.walk import tensors

    return tensors(loaded.ir)


def test_external_data_of_all_places_comes_back(written, assert_same, tmp_path):
    for build in ZOO:
        made = build()
        Model.load(written(made)).save(tmp_path / "e.onnx", external=True)
        again = Model.load(tmp_path / "e.onnx")
        again.save(tmp_path / "i.onnx", external=False)
        assert_same(onnx.load(tmp_path / "i.onnx"), made, build.__name__)


def test_attributes_without_a_type_get_the_one_they_mean(written):
    made = model(
        [node("LeakyRelu", ["x"], ["h"], alpha=0.25), node("Transpose", ["h"], ["y"], perm=[0, 1])], version=3
    )
    for each in made.graph.node:
        each.attribute[0].ClearField("type")
    loaded = Model.load(written(made))
    first, second = loaded.graph
    assert first.attributes["alpha"].as_float() == 0.25
    assert second.attributes["perm"].as_ints() == (0, 1)


def test_bytes_of_a_plain_model_are_kept(written, mlp):
    path = written(mlp)
    assert Model.load(path).to_bytes() == path.read_bytes()
