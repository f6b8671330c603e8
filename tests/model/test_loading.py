# SPDX-License-Identifier: Apache-2.0
"""What is loaded, what is refused, and that refusing says why in one line."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, Signature, TensorSpec
from onnxcollapse.model import weights as reading
from onnxcollapse.model.edit import check


def refused(path, *words):
    with pytest.raises(ModelError) as caught:
        Model.load(path)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


def _open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def external(name, shape, location, offset=None, length=None):
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.fixture
def outside(proto, written, tmp_path):
    """Writes a model whose one weight lies in `location`, and returns its path and the weight."""

    def build(location, *, offset=4096, length=32 * 32 * 4, file="w.bin"):
        array = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
        if file:
            (tmp_path / file).write_bytes(bytes(4096) + array.tobytes())
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        return written(proto([node], [external("w", [32, 32], location, offset, length)])), array

    return build


def test_weights_are_read_from_the_model_file(mlp, written):
    model = Model.load(written(mlp))
    for tensor in mlp.graph.initializer:
        value = model.graph.initializers[tensor.name]
        assert np.array_equal(reading.array(value), numpy_helper.to_array(tensor))
        assert not reading.array(value).flags.writeable
    assert not model.external
    check(model, full=True)


def test_hard_and_symbolic_links_to_the_model_are_followed(mlp, written, tmp_path):
    path = written(mlp)
    (tmp_path / "hub").mkdir()
    os.link(path, tmp_path / "hub" / "hard.onnx")
    (tmp_path / "hub" / "soft.onnx").symlink_to(path)
    for name in ("hard.onnx", "soft.onnx"):
        model = Model.load(tmp_path / "hub" / name)
        assert np.array_equal(
            reading.array(model.graph.initializers["w"]), numpy_helper.to_array(mlp.graph.initializer[0])
        )


def test_relative_paths_hold_when_the_working_folder_changes(mlp, written, tmp_path, monkeypatch):
    written(mlp)
    monkeypatch.chdir(tmp_path)
    model = Model.load("model.onnx")
    monkeypatch.chdir("/")
    assert model.to_bytes() == mlp.SerializeToString()


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"hello, world", b"{}", b"PK\x03\x04" + bytes(99), bytes(5000)]
)
def test_files_that_are_no_models(content, written):
    refused(written(content))


def test_foreign_formats_are_named(written):
    refused(written(b'{"model_type": "bert"}'), "text file")
    refused(written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS")
    refused(written(b"PK\x03\x04" + bytes(99)), "zip archive")
    refused(written(b""), "empty")


def test_a_model_without_graph_or_opset(mlp, written):
    refused(written(onnx.ModelProto(ir_version=8, producer_name="x" * 2000)), "no graph")
    mlp.ClearField("opset_import")
    refused(written(mlp), "opset")


def test_missing_files_and_folders(tmp_path):
    refused(tmp_path / "none.onnx", "none.onnx", "does not exist")
    refused(tmp_path, "no .onnx file")


def test_truncated_anywhere_is_refused_or_whole(mlp, written, tmp_path):
    data = mlp.SerializeToString()
    random.seed(0)
    cuts = {*range(400), *random.sample(range(len(data)), 300), len(data) - 1}
    path = tmp_path / "cut.onnx"
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        try:
            Model.load(path).to_bytes()
        except ModelError as error:
            assert "\n" not in str(error)
        else:
            pytest.fail(f"cut at {cut} of {len(data)} loads")


def test_damaged_anywhere_is_refused_or_loads(mlp, tmp_path):
    data = mlp.SerializeToString()
    path = tmp_path / "damaged.onnx"
    heads = [i for i in range(len(data)) if i < 300 or i > len(data) - 300]  # the rest is weights
    generator = random.Random(1)  # noqa: S311
    for index in heads:
        flipped = bytearray(data)
        flipped[index] = generator.randrange(256)
        path.write_bytes(flipped)
        try:
            Model.load(path).to_bytes()
        except ModelError as error:
            assert "\n" not in str(error)


def test_nesting_deeper_than_protobuf_allows(tmp_path):
    from onnxcollapse.model.wire import encode_varint

    data = bytes(2000)
    for _ in range(150):  # graph -> node -> attribute -> graph ...
        for tag in (0x32, 0x2A, 0x0A):
            data = bytes([tag]) + encode_varint(len(data)) + data
    path = tmp_path / "deep.onnx"
    path.write_bytes(b"\x3a" + encode_varint(len(data)) + data)
    refused(path)


def test_a_weight_whose_bytes_do_not_fit_its_shape(mlp, written):
    mlp.graph.initializer[0].dims[0] = 31
    refused(written(mlp), "'w'", "65536", "63488")
    mlp.graph.initializer[0].dims[0] = 32
    mlp.graph.initializer.append(TensorProto(name="odd", data_type=1, dims=[3], raw_data=b"12"))
    refused(written(mlp), "'odd'")


def test_external_data_beside_the_model(outside):
    path, array = outside("w.bin")
    model = Model.load(path)
    assert model.external
    assert np.array_equal(reading.array(model.graph.initializers["w"]), array)


def test_external_data_in_a_folder_below(outside, tmp_path):
    (tmp_path / "sub").mkdir()
    path, array = outside("sub/w.bin", length=None, file="sub/w.bin")
    assert np.array_equal(reading.array(Model.load(path).graph.initializers["w"]), array)


def test_external_data_without_offset_and_length(proto, written, tmp_path):
    array = np.ones((32, 32), np.float32)
    (tmp_path / "all.bin").write_bytes(array.tobytes())
    made = proto([helper.make_node("MatMul", ["x", "w"], ["y"])], [external("w", [32, 32], "all.bin")])
    assert np.array_equal(reading.array(Model.load(written(made)).graph.initializers["w"]), array)


def test_external_data_outside_the_folder(outside, tmp_path):
    (tmp_path / "in").mkdir()
    for location in ("../w.bin", str(tmp_path / "w.bin"), "sub/../../w.bin", ""):
        path, _ = outside(location)
        path = shutil.move(path, tmp_path / "in" / "model.onnx")
        refused(path, "'w'", repr(location), "outside the model's folder", "move the file")
    (tmp_path / "in" / "link.bin").symlink_to(tmp_path / "w.bin")
    path, _ = outside("link.bin")
    refused(shutil.move(path, tmp_path / "in" / "model.onnx"), "'link.bin'", "outside")


def test_a_hub_cache_of_links_into_one_folder_of_blobs(outside, tmp_path):
    path, array = outside("data.bin")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    shutil.move(path, tmp_path / "blobs" / "0123")
    shutil.move(tmp_path / "w.bin", tmp_path / "blobs" / "4567")
    (tmp_path / "snapshot" / "model.onnx").symlink_to("../blobs/0123")
    (tmp_path / "snapshot" / "data.bin").symlink_to("../blobs/4567")
    model = Model.load(tmp_path / "snapshot")
    assert np.array_equal(reading.array(model.graph.initializers["w"]), array)


def test_external_data_that_is_missing_or_short_is_found_on_loading(outside, tmp_path):
    path, _ = outside("gone.bin")
    refused(path, "'w'", "'gone.bin'", "is missing", "put the file beside the model")
    path, _ = outside("w.bin", offset=4100)
    refused(path, "'w'", "'w.bin'", "ends at byte 8196", "has 8192")
    path, _ = outside("w.bin", length=100)
    refused(path, "'w'", "100 bytes", "4096")
    path, _ = outside("w.bin", offset=-4)
    refused(path, "-4")
    (tmp_path / "w.bin").unlink()
    (tmp_path / "w.bin").mkdir()
    refused(outside("w.bin", file="")[0], "'w'")


def test_external_constant_in_a_branch(proto, written, tmp_path):
    array = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    (tmp_path / "w.bin").write_bytes(array.tobytes())

    def branch(name):
        constant = helper.make_node(
            "Constant", [], [f"c{name}"], value=external("", [32, 32], "w.bin", 0, 4096)
        )
        output = helper.make_tensor_value_info(f"r{name}", TensorProto.FLOAT, None)
        product = helper.make_node("MatMul", ["x", f"c{name}"], [f"r{name}"])
        return helper.make_graph([constant, product], name, [], [output])

    node = helper.make_node("If", ["cond"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    made = proto([node], [numpy_helper.from_array(np.bool_(True), "cond")])
    model = Model.load(written(made))
    [held] = model.graph
    constant = held.attributes["then_branch"].as_graph().node(0)
    assert np.array_equal(constant.attributes["value"].as_tensor().numpy(), array)
    (tmp_path / "w.bin").unlink()
    refused(tmp_path / "model.onnx", "'w.bin'")


def test_small_external_tensors_are_read_at_once(proto, written, tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(8) + np.arange(32, dtype=np.float32).tobytes())
    tensor = external("w", [32], "w.bin", 8, 128)
    tensor.doc_string = "small"
    tensor.metadata_props.add(key="k", value="v")
    model = Model.load(written(proto([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])))
    (tmp_path / "w.bin").unlink()
    assert model.external
    model.save(tmp_path / "out.onnx")
    [saved] = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert numpy_helper.to_array(saved).tolist() == list(range(32))
    assert (saved.name, saved.doc_string) == ("w", "small")
    assert [(entry.key, entry.value) for entry in saved.metadata_props] == [("k", "v")]
    assert not (tmp_path / "out.onnx.data").exists()


def test_many_weight_files_do_not_use_up_descriptors(proto, written, tmp_path):
    tensors = []
    for index in range(300):
        (tmp_path / f"w{index}").write_bytes(np.full(512, index, np.float32).tobytes())
        tensors.append(external(f"w{index}", [512], f"w{index}"))
    before = _open_files()
    model = Model.load(written(proto([helper.make_node("Relu", ["x"], ["y"])], tensors)))
    assert _open_files() - before < 200
    assert [reading.array(v)[0] for v in model.graph.initializers.values()] == list(range(300))
    tensor = model.graph.initializers["w299"].const_value
    assert next(reading.chunks(tensor)) == np.full(512, 299, np.float32).tobytes()
    (tmp_path / "w299").write_bytes(bytes(4096))
    with pytest.raises(ModelError, match="has changed since it was loaded"):
        list(reading.chunks(tensor))


def test_folders(mlp, written, tmp_path):
    written(mlp, "decoder.onnx")
    assert Model.load(tmp_path).path == tmp_path / "decoder.onnx"
    written(mlp, "encoder.onnx")
    refused(tmp_path, "decoder.onnx, encoder.onnx")
    written(mlp, "model.onnx")
    for name in ("config.json", "tokenizer.json", "vocab.txt", "model.safetensors", "calib.npz", ".hidden",
                 "old.onnx.data", "old.onnx_data"):  # fmt: skip
        (tmp_path / name).write_text("{}")
    (tmp_path / "sub").mkdir()
    model = Model.load(tmp_path)
    assert model.path == tmp_path / "model.onnx"
    assert [path.name for path in model.companions] == ["config.json", "tokenizer.json", "vocab.txt"]
    assert Model.load(tmp_path / "model.onnx").companions == ()


def test_weight_files_are_no_companions(outside, tmp_path, monkeypatch):
    outside("weights.v1", file="weights.v1")
    (tmp_path / "config.json").write_text("{}")
    assert [path.name for path in Model.load(tmp_path).companions] == ["config.json"]
    monkeypatch.chdir(tmp_path.parent)
    assert Model.load(tmp_path.name).companions == (tmp_path / "config.json",)


def test_signature(proto, written):
    made = proto(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [numpy_helper.from_array(np.ones(32, np.float32), "w")],
        inputs=[("x", ["b", None, 32]), ("w", [32]), ("any", None)],
        outputs=[("y", ["b", "s", 32])],
    )
    assert Model.load(written(made)).signature() == Signature(
        inputs=(
            TensorSpec("x", ir.DataType.FLOAT, ("b", None, 32)),
            TensorSpec("any", ir.DataType.FLOAT, None),
        ),
        outputs=(TensorSpec("y", ir.DataType.FLOAT, ("b", "s", 32)),),
        overridable=(TensorSpec("w", ir.DataType.FLOAT, (32,)),),
    )


def test_signature_of_other_kinds(proto, written):
    made = proto(
        [helper.make_node("SequenceConstruct", ["x"], ["s"]), helper.make_node("Relu", ["x"], ["y"])]
    )
    made.graph.output.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None))
    assert [spec.kind for spec in Model.load(written(made)).signature().outputs] == ["tensor", "sequence"]


def test_nodes_out_of_order_are_sorted(mlp, written):
    nodes = list(mlp.graph.node)
    del mlp.graph.node[:]
    mlp.graph.node.extend([nodes[2], nodes[3], nodes[0], nodes[1]])
    model = Model.load(written(mlp))
    assert [node.name for node in model.graph] == ["up", "bias", "act", "down"]


def test_graphs_that_are_damaged(mlp, written, proto):
    mlp.graph.node[0].input[0] = "nothing"
    refused(written(mlp), "'up'", "'nothing'", "which nothing makes")
    mlp.graph.node[0].input[0] = "r"
    refused(written(mlp), "cycle")
    mlp.graph.node[0].input[0] = "x"
    mlp.graph.output[0].name = "nowhere"
    refused(written(mlp), "'nowhere'")
    mlp.graph.output[0].name = "y"
    mlp.graph.node[0].output[0] = "hb"
    refused(written(mlp), "'hb'")


def test_names_that_are_defined_twice(mlp, written):
    mlp.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "b"))
    refused(written(mlp), "'b' is defined 2 times")
    del mlp.graph.initializer[-1]
    for _ in range(2):
        relu = helper.make_node("Relu", ["p"], ["q"])
        mlp.functions.append(
            helper.make_function("my", "F", ["p"], ["q"], [relu], [helper.make_opsetid("", 17)])
        )
    refused(written(mlp), "'my::F:' is defined 2 times")


def test_a_branch_that_returns_an_outer_tensor(proto, written):
    def branch():
        return helper.make_graph([], "b", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)])

    node = helper.make_node("If", ["cond"], ["y"], then_branch=branch(), else_branch=branch())
    made = proto([node], [numpy_helper.from_array(np.bool_(True), "cond")])
    refused(written(made), "'x'", "add an Identity")
