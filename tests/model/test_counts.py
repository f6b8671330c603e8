# SPDX-License-Identifier: Apache-2.0
"""Parameters, bytes and FLOPs against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, Size, flops, size

FLOAT = TensorProto.FLOAT


def load(text, domains="", functions="", opset=17):
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "my" : 1, "com.microsoft" : 1{domains}]>'
    return Model(ir.from_proto(onnx.parser.parse_model(f"{header}\n{text}\n{functions}")))


def one(node, weights=None, inputs=None, opset=17, outputs=1, kind=FLOAT):
    """A model of one node; `weights` are shapes of initializers, `inputs` shapes of float inputs."""
    infos = [helper.make_tensor_value_info(k, FLOAT, v) for k, v in (inputs or {}).items()]
    kinds = {"int8": np.int8, "uint8": np.uint8}
    tensors = []
    for name, shape in (weights or {}).items():
        dtype = kinds.get(name.split("_")[-1], np.float32)
        tensors.append(numpy_helper.from_array(np.zeros(shape, dtype), name))
    made = [helper.make_tensor_value_info(f"y{i}" if i else "y", kind, None) for i in range(outputs)]
    graph = helper.make_graph([node], "g", infos, made, tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return Model(ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10)))


def test_size_counts_each_stored_tensor_once():
    shared = ir.tensor(np.ones((4, 5), np.float32), name="shared")
    model = load("""
        g (float[n,4] x) => (float[n,4] y) <float[4] w = {1,2,3,4}, int64[2] k = {1,2}, int8[3] q = {1,2,3}> {
            c = Constant<value = float[2] {1, 2}>()
            f = Constant<value_floats = [1.0, 2.0, 3.0]>()
            i = Constant<value_ints = [1, 2]>()
            y = my.F(x)
        }
    """, functions="""<domain: "my", opset_import: ["" : 17]> F (p) => (r) {
        k = Constant<value = float[7] {1,2,3,4,5,6,7}>()  r = Mul(p, p) }""")  # fmt: skip
    for name in ("a", "b"):
        value = ir.Value(name=name, const_value=shared, type=ir.TensorType(shared.dtype), shape=shared.shape)
        model.graph.initializers.add(value)
    assert size(model) == Size(
        params=20 + 4 + 3 + 2 + 3 + 7,
        bytes=80 + 16 + 2 * 8 + 3 + 8 + 12 + 16 + 28,
        nodes=4 + 2,
    )


def test_size_of_quantised_and_other_types():
    tensors = {
        "i4": ir.tensor(np.zeros(5, np.int8), ir.DataType.INT4),
        "u8": ir.tensor(np.zeros(5, np.uint8)),
        "half": ir.tensor(np.zeros(5, np.float16)),
        "mask": ir.tensor(np.zeros(5, np.bool_)),
        "i32": ir.tensor(np.zeros(5, np.int32)),
        "texts": ir.StringTensor(np.array([b"ab", b"c"], object)),
    }
    model = load("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    for name, tensor in tensors.items():
        model.graph.initializers.add(ir.Value(name=name, const_value=tensor))
    assert size(model) == Size(params=15, bytes=3 + 5 + 10 + 5 + 20 + 3, nodes=1)


def test_tensors_that_share_a_range_of_a_file_count_once(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(4096))
    tensors = []
    for name in ("v", "w"):
        tensor = TensorProto(name=name, data_type=1, dims=[32, 32], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="w.bin")
        tensors.append(tensor)
    infos = [helper.make_tensor_value_info(name, FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", infos[:1], infos[1:], tensors)
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    assert size(Model.load(tmp_path / "m.onnx")) == Size(params=1024, bytes=4096, nodes=1)


node = helper.make_node
MS = "com.microsoft"
CASES = {
    "matmul": (one(node("MatMul", ["x", "w"], ["y"]), {"w": (5, 7)}, {"x": [2, 3, 5]}), 2 * 6 * 35),
    "matmul, weight left": (
        one(node("MatMul", ["w", "x"], ["y"]), {"w": (5, 7)}, {"x": [2, 7, 3]}),
        2 * 2 * 5 * 7 * 3,
    ),
    "matmul, batched": (
        one(node("MatMul", ["a", "b"], ["y"]), {}, {"a": [2, 1, 3, 5], "b": [4, 5, 6]}),
        2 * 8 * 3 * 5 * 6,
    ),
    "matmul, vectors": (one(node("MatMul", ["a", "b"], ["y"]), {}, {"a": [5], "b": [5, 6]}), 2 * 30),
    "gemm": (
        one(
            node("Gemm", ["x", "w", "b"], ["y"], transB=1, transA=1), {"w": (7, 5), "b": (7,)}, {"x": [5, 3]}
        ),
        2 * 3 * 35,
    ),
    "conv": (
        one(
            node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1]),
            {"w": (8, 3, 3, 3)},
            {"x": [2, 3, 16, 16]},
        ),
        2 * 2 * 8 * 8 * 8 * 27,
    ),
    "conv, grouped": (
        one(node("Conv", ["x", "w"], ["y"], group=8), {"w": (8, 1, 3)}, {"x": [1, 8, 12]}),
        2 * 8 * 10 * 3,
    ),
    "conv transposed": (
        one(node("ConvTranspose", ["x", "w"], ["y"], strides=[2]), {"w": (4, 6, 3)}, {"x": [2, 4, 10]}),
        2 * 2 * 4 * 10 * 6 * 3,
    ),
    "lstm": (
        one(
            node("LSTM", ["x", "w", "r"], ["y"], hidden_size=6, direction="bidirectional"),
            {"w": (2, 24, 5), "r": (2, 24, 6)},
            {"x": [7, 3, 5]},
        ),
        2 * 21 * 2 * 24 * 11,
    ),
    "gru": (
        one(
            node("GRU", ["x", "w", "r"], ["y"], hidden_size=6),
            {"w": (1, 18, 5), "r": (1, 18, 6)},
            {"x": [7, 3, 5]},
        ),
        2 * 21 * 18 * 11,
    ),
    "einsum": (
        one(
            node("Einsum", ["a", "b"], ["y"], equation="bhid, bhjd -> bhij"),
            {},
            {"a": [2, 3, 4, 5], "b": [2, 3, 6, 5]},
        ),
        2 * 2 * 3 * 4 * 6 * 5,
    ),
    "einsum, dots": (
        one(node("Einsum", ["a", "b"], ["y"], equation="...ij,jk"), {}, {"a": [2, 3, 4, 5], "b": [5, 6]}),
        2 * 2 * 3 * 4 * 5 * 6,
    ),
    "einsum of one": (one(node("Einsum", ["a"], ["y"], equation="ij->ji"), {}, {"a": [2, 3]}), 0),
    "matmul integer": (
        one(node("MatMulInteger", ["a_uint8", "b_int8"], ["y"]), {"a_uint8": (3, 5), "b_int8": (5, 7)}),
        2 * 3 * 35,
    ),
    "qlinear matmul": (
        one(
            node(
                "QLinearMatMul", ["a_uint8", "s", "z_uint8", "b_uint8", "s", "z_uint8", "s", "z_uint8"], ["y"]
            ),
            {"a_uint8": (3, 5), "b_uint8": (5, 7), "s": (), "z_uint8": ()},
        ),
        2 * 3 * 35,
    ),
    "qlinear conv": (
        one(
            node(
                "QLinearConv", ["x_uint8", "s", "z_uint8", "w_uint8", "s", "z_uint8", "s", "z_uint8"], ["y"]
            ),
            {"x_uint8": (1, 3, 8), "w_uint8": (4, 3, 3), "s": (), "z_uint8": ()},
            kind=TensorProto.UINT8,
        ),
        2 * 4 * 6 * 9,
    ),
    "attention": (
        one(
            node("Attention", ["q", "k", "v"], ["y"]),
            {},
            {"q": [2, 8, 5, 16], "k": [2, 4, 7, 16], "v": [2, 4, 7, 32]},
            23,
        ),
        2 * 2 * 8 * 5 * 7 * (16 + 32),
    ),
    "attention of rank 3": (
        one(
            node("Attention", ["q", "k", "v"], ["y"], q_num_heads=8, kv_num_heads=4),
            {},
            {"q": [2, 5, 128], "k": [2, 7, 64], "v": [2, 7, 128]},
            23,
        ),
        2 * 2 * 8 * 5 * 7 * (16 + 32),
    ),
    "attention with a past": (
        one(
            node("Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "y1", "y2"]),
            {},
            {"q": [1, 2, 1, 4], "k": [1, 2, 1, 4], "v": [1, 2, 1, 4], "pk": [1, 2, 9, 4], "pv": [1, 2, 9, 4]},
            23,
            3,
        ),
        2 * 2 * 10 * 8,
    ),
    "fused attention": (
        one(
            node("Attention", ["x", "w", "b"], ["y"], domain=MS, num_heads=4),
            {"w": (16, 48), "b": (48,)},
            {"x": [2, 5, 16]},
        ),
        2 * 2 * 5 * 16 * 48 + 2 * 2 * 5 * 5 * 32,
    ),
    "multi-head attention": (
        one(
            node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain=MS, num_heads=4),
            {},
            {"q": [2, 5, 16], "k": [2, 7, 16], "v": [2, 7, 16]},
        ),
        2 * 2 * 5 * 7 * 32,
    ),
    "grouped-query attention": (
        one(
            node(
                "GroupQueryAttention",
                ["q", "k", "v", "pk", "pv"],
                ["y"],
                domain=MS,
                num_heads=8,
                kv_num_heads=2,
            ),
            {},
            {"q": [1, 3, 64], "k": [1, 3, 16], "v": [1, 3, 16], "pk": [1, 2, 7, 8], "pv": [1, 2, 7, 8]},
        ),
        2 * 3 * 10 * 128,
    ),
    "packed grouped-query attention": (
        one(
            node("GroupQueryAttention", ["q"], ["y"], domain=MS, num_heads=8, kv_num_heads=2),
            {},
            {"q": [1, 3, 96]},
        ),
        2 * 3 * 3 * 128,
    ),
    "matmul of 4 bits": (
        one(
            node("MatMulNBits", ["x", "q_uint8", "s"], ["y"], domain=MS, K=32, N=64, bits=4, block_size=32),
            {"q_uint8": (64, 1, 16), "s": (64,)},
            {"x": [2, 3, 32]},
        ),
        2 * 6 * 32 * 64,
    ),
    "fused matmul": (
        one(node("FusedMatMul", ["x", "w"], ["y"], domain=MS, transB=1), {"w": (7, 5)}, {"x": [3, 5]}),
        2 * 3 * 35,
    ),
    "elementwise": (one(node("Mul", ["x", "x"], ["y"]), {}, {"x": [100, 100]}), 0),
    "unknown": (one(node("Frobnicate", ["x"], ["y"], domain=MS), {}, {"x": [100, 100]}), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_flops_of_one_node(name):
    model, expected = CASES[name]
    assert flops(model) == expected


MLP = """
    g (float[n,s,4] x, float[n,4] z) => (float[n,s,6] y, float[n,3] u) {
        a = Constant<value = float[4,6] {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}>()
        b = Constant<value = float[4,3] {1,1,1,1,1,1,1,1,1,1,1,1}>()
        y = MatMul(x, a)
        u = MatMul(z, b)
    }
"""


def test_dynamic_axes():
    model = load(MLP)
    before = model.to_bytes()
    assert flops(model) == 2 * 24 + 2 * 12
    assert flops(model, {"n": 3, "s": 5}) == 2 * 15 * 24 + 2 * 3 * 12
    assert flops(model, shapes={"x": (3, 5, 4)}) == 2 * 15 * 24 + 2 * 3 * 12  # n is known from x
    assert flops(model, {"s": 9}, {"x": (3, 5, 4), "z": (2, 4)}) == 2 * 15 * 24 + 2 * 2 * 12
    assert model.to_bytes() == before


def test_shapes_that_do_not_fit():
    with pytest.raises(ModelError, match=r"no input 'q'.*'x', 'z'"):
        flops(load(MLP), shapes={"q": (1,)})
    with pytest.raises(ModelError, match="'x' has rank 3"):
        flops(load(MLP), shapes={"x": (1, 4)})


def test_shapes_go_through_reshapes_of_the_shape():
    model = load(
        """
        g (float[n,s,4] x) => (float[n,s,2] y) {
            w = Constant<value = float[2,2] {1,2,3,4}>()
            s = Shape(x)
            lead = Slice(s, zero, two)
            tail = Constant<value_ints = [2, 2]>()
            to = Concat<axis=0>(lead, tail)
            h = Reshape(x, to)
            y = MatMul(h, w)
        }
    """.replace(
            "{\n            w =",
            "{\n zero = Constant<value_ints = [0]>()\n two = Constant<value_ints = [2]>()\n w =",
            1,
        )
    )
    assert flops(model, shapes={"x": (3, 5, 4)}) == 2 * 3 * 5 * 2 * 4


def test_stale_shapes_do_not_matter():
    model = load(MLP)
    for value in model.graph[2].outputs:
        value.shape = ir.Shape([7, 7, 7])
    assert flops(model, shapes={"x": (3, 5, 4)}) == 2 * 15 * 24 + 2 * 3 * 12


def test_the_larger_branch_and_each_body_once():
    def branch(name, n):
        products = " ".join(f"m{n}{i} = MatMul(x, x)" for i in range(n))
        return f"{name}_branch = {name} () => (float[2,2] o{n}) {{ {products} o{n} = Identity(m{n}0) }}"

    choice = f"y = If(c) < {branch('then', 1)}, {branch('else', 3)} >"
    model = load(f"g (float[2,2] x, bool c) => (float[2,2] y) {{ {choice} }}")
    assert flops(model) == 3 * 16


def test_a_function_counts_for_each_call():
    model = load(
        "g (float[n,2] x) => (float[n,2] y) { h = my.F(x)  y = my.F(h) }",
        functions="""<domain: "my", opset_import: ["" : 17]> F (p) => (r) {
            w = Constant<value = float[2,2] {1,2,3,4}>()  r = MatMul(p, w) }""",
    )
    assert flops(model, {"n": 5}) == 2 * (2 * 5 * 4)


def test_without_inference_a_product_is_one_row():
    model = load("""
        g (float[n,2] x) => (float[n,3] y) {
            w = Constant<value = float[2,3] {1,2,3,4,5,6}>()
            h = my.Unknown(x)
            y = MatMul(h, w)
        }
    """)
    assert flops(model, {"n": 100}) == 2 * 6


def test_no_negative_counts():
    model = one(node("Conv", ["x", "w"], ["y"]), {"w": (4, 3, 5, 5)}, {"x": ["n", 3, "h", "w"]})
    assert flops(model) >= 0


def test_weights_are_not_read(mlp, written):
    model = Model.load(written(mlp))
    for value in model.graph.initializers.values():
        value.const_value.source.read = None
    assert flops(model, {"b": 3}) == 2 * 2 * 3 * 32 * 512
    assert size(model).params == 2 * 32 * 512 + 512
