# SPDX-License-Identifier: Apache-2.0
"""Saving: at once or not at all, over the source too, without holding the weights."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model, edit, files, record, saving
from onnxcollapse.model import weights as reading


def run(path, rows=2):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((rows, 32), np.float32)})[0]


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(mlp, written):
    return written(mlp)


@pytest.mark.parametrize("external", [False, True])
def test_two_saves_are_the_same_bytes(path, tmp_path, external):
    for name, model in (("a", Model.load(path)), ("b", Model.load(path).clone())):
        (tmp_path / name).mkdir()
        model.save(tmp_path / name / "m.onnx", external=external)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    for name in listing(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("external", [False, True])
def test_onnx_and_the_runtime_read_what_is_written(path, tmp_path, external):
    expected = run(path)
    Model.load(path).save(tmp_path / "out.onnx", external=external)
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    assert np.array_equal(run(tmp_path / "out.onnx"), expected)


@pytest.mark.parametrize("external", [False, True])
def test_over_its_own_source(path, mlp, external):
    model, other = Model.load(path), Model.load(path)
    for _ in range(2):  # the second time the source of the bytes has no name any more
        model.graph.initializers["w"].doc_string = "edited"
        model.save(path, external=external)
    assert listing(path.parent) == (["model.onnx", "model.onnx.data"] if external else ["model.onnx"])
    for loaded in (model, other, Model.load(path)):
        for tensor in mlp.graph.initializer:
            assert np.array_equal(
                reading.array(loaded.graph.initializers[tensor.name]), numpy_helper.to_array(tensor)
            )


def test_over_its_own_external_data(path, mlp, tmp_path):
    Model.load(path).save(path, external=True)
    model = Model.load(path)
    assert model.external
    w = model.graph.initializers["w"]
    kept = edit.add_initializer(model.graph, "w", 2 * reading.array(w), ir.DataType.FLOAT)
    edit.replace_value(model.graph, w, kept)
    edit.prune(model)
    expected = numpy_helper.to_array(mlp.graph.initializer[0])
    for _ in range(2):
        model.save(path)
        assert np.array_equal(reading.array(Model.load(path).graph.initializers["w_1"]), 2 * expected)
    assert np.array_equal(reading.array(w), expected)  # still readable from the file that is gone


def test_external_stays_external_and_inline_inline(path, tmp_path):
    model = Model.load(path)
    model.save(tmp_path / "i.onnx")
    model.save(tmp_path / "e.onnx", external=True)
    Model.load(tmp_path / "e.onnx").save(tmp_path / "f.onnx")
    assert {"e.onnx.data", "f.onnx.data"} <= set(listing(tmp_path))
    assert "i.onnx.data" not in listing(tmp_path)


def test_a_model_beyond_the_limit_goes_external(path, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "LIMIT", 50_000)
    model = Model.load(path)
    model.save(tmp_path / "out.onnx")
    assert "out.onnx.data" in listing(tmp_path)
    with pytest.raises(ModelError, match="save it with external data"):
        model.save(tmp_path / "other.onnx", external=False)
    with pytest.raises(ModelError, match="save it instead"):
        model.to_bytes()
    assert "other.onnx" not in listing(tmp_path)


def test_no_orphan_sidecar_that_we_wrote(path, tmp_path):
    target = tmp_path / "out.onnx"
    Model.load(path).save(target, external=True)
    Model.load(path).save(target)
    assert listing(tmp_path) == ["model.onnx", "out.onnx"]


def test_sidecars_of_others_are_left_alone(path, tmp_path):
    (tmp_path / "out.onnx.data").write_bytes(b"somebody else's")
    Model.load(path).save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").read_bytes() == b"somebody else's"


def test_offsets_are_aligned_and_within_the_sidecar(path, tmp_path):
    Model.load(path).save(tmp_path / "out.onnx", external=True)
    proto = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    size = (tmp_path / "out.onnx.data").stat().st_size
    for tensor in proto.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "out.onnx.data"
        assert int(entries["offset"]) % (4096 if int(entries["length"]) >= 4096 else 64) == 0
        assert int(entries["offset"]) + int(entries["length"]) <= size


def test_what_is_stored_once_stays_stored_once(proto, written, tmp_path):
    (tmp_path / "w.bin").write_bytes(np.ones((32, 32), np.float32).tobytes())
    tensors = []
    for name in ("v", "w"):
        tensor = TensorProto(name=name, data_type=1, dims=[32, 32], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="w.bin")
        tensors.append(tensor)
    nodes = [helper.make_node("MatMul", ["x", "v"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    Model.load(written(proto(nodes, tensors))).save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size == 4096 + 4096


def test_a_folder_goes_out_as_a_folder(mlp, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "decoder.onnx").write_bytes(mlp.SerializeToString())
    (source / "config.json").write_text(json.dumps({"a": 1}))
    (source / "calib.npz").write_bytes(b"data")
    model = Model.load(source)
    model.save(tmp_path / "new" / "out")
    assert listing(tmp_path / "new" / "out") == ["config.json", "decoder.onnx"]
    assert json.loads((tmp_path / "new" / "out" / "config.json").read_text()) == {"a": 1}
    model.save(source)  # onto itself
    assert listing(source) == ["calib.npz", "config.json", "decoder.onnx"]
    model.save(tmp_path / "single.onnx")
    assert (tmp_path / "single.onnx").is_file()
    Model.load(source / "decoder.onnx").save(tmp_path / "new")
    (source / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config.json has gone"):
        model.save(tmp_path / "newer" / "out")
    assert not (tmp_path / "newer").exists()
    assert (tmp_path / "new" / "decoder.onnx").is_file()


@pytest.fixture
def before(path, tmp_path):
    """A target that holds an older external model, and what it holds."""
    target = tmp_path / "out" / "out.onnx"
    target.parent.mkdir()
    model = Model.load(path)
    record(model, "note", "older")
    model.save(target, external=True)
    return target, {p.name: p.read_bytes() for p in target.parent.iterdir()}


def unchanged(before):
    target, contents = before
    return {p.name: p.read_bytes() for p in target.parent.iterdir()} == contents


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_full_disk_leaves_everything_as_it_was(path, before, monkeypatch, external, after):
    model = Model.load(path)
    written = []

    def fsync(descriptor):
        written.append(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def chunks(tensor):
        for index, chunk in enumerate(reading.chunks(tensor)):
            if index + len(written) >= after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(chunk)
            yield chunk

    monkeypatch.setattr(saving, "chunks", chunks)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ModelError, match=r"out.onnx: No space left on device; free some space") as caught:
        model.save(before[0], external=external)
    assert "\n" not in str(caught.value)
    assert unchanged(before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_full(path, before, monkeypatch):
    monkeypatch.setattr(files.tempfile, "mkdtemp", _folder_that_leads_to_a_full_device(before[0].parent))
    with pytest.raises(ModelError, match="No space left on device"):
        Model.load(path).save(before[0])
    assert unchanged(before)


def _folder_that_leads_to_a_full_device(parent):
    def mkdtemp(**_):
        folder = parent / ".onnxcollapse-test"
        folder.mkdir()
        (folder / "out.onnx").symlink_to("/dev/full")
        return str(folder)

    return mkdtemp


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_replace_puts_back_what_was_replaced(path, before, monkeypatch, failing):
    calls = []
    real = files.Path.replace

    def replace(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(files.Path, "replace", replace)
    with pytest.raises(ModelError, match="Input/output error"):
        Model.load(path).save(before[0], external=True)
    assert unchanged(before)


def test_an_interrupt_leaves_no_temporary_folder(path, before, monkeypatch):
    def chunks(tensor):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "chunks", chunks)
    with pytest.raises(KeyboardInterrupt):
        Model.load(path).save(before[0])
    assert unchanged(before)


def test_folders_that_cannot_be_written(path, tmp_path, monkeypatch):
    model = Model.load(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="choose a folder, not a file"):
        model.save(tmp_path / "file" / "out.onnx")
    with pytest.raises(ModelError, match="create the folder first"):
        model.save(tmp_path / "none" / "out.onnx")
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.setattr(files.tempfile, "mkdtemp", _denied)
    with pytest.raises(ModelError, match="Permission denied; choose a folder that you may write to"):
        model.save(tmp_path / "out.onnx")


def _denied(**_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_files_get_the_usual_permissions(path, tmp_path):
    (tmp_path / "plain").touch()
    Model.load(path).save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_replaced_and_what_it_leads_to_is_kept(path, tmp_path):
    blob = path.rename(tmp_path / "blob")
    path.symlink_to(blob)
    content = blob.read_bytes()
    model = Model.load(path)
    record(model, "note", "new")
    model.save(path)
    assert not path.is_symlink()
    assert blob.read_bytes() == content


def test_provenance_is_saved(path, tmp_path):
    model = Model.load(path)
    record(model, "passes", "tie-weights")
    model.save(tmp_path / "out.onnx")
    [entry] = onnx.load(tmp_path / "out.onnx").metadata_props
    assert (entry.key, entry.value) == ("onnxcollapse.passes", "tie-weights")


def test_opset_and_ir_version_stay(proto, written, tmp_path):
    for opset, version in ((9, 4), (13, 7), (23, 11)):
        node = helper.make_node("Relu", ["x"], ["y"])
        made = proto([node], opset_imports=[helper.make_opsetid("ai.onnx", opset)], ir_version=version)
        Model.load(written(made)).save(tmp_path / "out.onnx")
        saved = onnx.load(tmp_path / "out.onnx")
        assert (saved.opset_import[0].domain, saved.opset_import[0].version) == ("ai.onnx", opset)
        assert saved.ir_version == version


def test_external_data_in_branches_and_functions_runs(tmp_path, written, weight):
    constant = helper.make_node("Constant", [], ["c"], value=weight((32, 32)))
    product = helper.make_node("MatMul", ["a", "c"], ["r"])
    opset = helper.make_opsetid("", 17)
    function = helper.make_function("my", "Dense", ["a"], ["r"], [constant, product], [opset])

    def branch(name, seed):
        output = helper.make_tensor_value_info(f"r{name}", TensorProto.FLOAT, None)
        node = helper.make_node("MatMul", ["h", f"w{name}"], [f"r{name}"])
        return helper.make_graph([node], name, [], [output], [weight((32, 32), f"w{name}", seed)])

    choice = helper.make_node("If", ["cond"], ["y"], then_branch=branch("t", 1), else_branch=branch("e", 2))
    graph = helper.make_graph(
        [helper.make_node("Dense", ["x"], ["h"], domain="my"), choice], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 32])],
        [numpy_helper.from_array(np.bool_(True), "cond")],
    )  # fmt: skip
    opsets = [opset, helper.make_opsetid("my", 1)]
    made = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    path = written(made)
    Model.load(path).save(tmp_path / "out.onnx", external=True)
    assert np.array_equal(run(tmp_path / "out.onnx"), run(path))


def test_a_session_gets_the_weights_in_memory(path):
    skeleton = Model.load(path).skeleton()
    assert set(skeleton.weights) == {"w", "b", "v"}
    assert skeleton.proto.ByteSize() < 2000
    options = onnxruntime.SessionOptions()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(reading.array(t)) for t in skeleton.weights.values()]
    options.add_external_initializers(list(skeleton.weights), values)
    session = onnxruntime.InferenceSession(skeleton.proto.SerializeToString(), options)
    assert np.array_equal(session.run(None, {"x": np.ones((2, 32), np.float32)})[0], run(path))


def test_constants_become_initializers_for_a_session(proto, written, weight):
    nodes = [
        helper.make_node("Constant", [], ["w"], value=weight((32, 32))),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    model = Model.load(written(proto(nodes)))
    skeleton = model.skeleton()
    assert list(skeleton.weights) == ["w"]
    assert [node.op_type for node in skeleton.proto.graph.node] == ["MatMul"]
    assert [node.op_type for node in model.graph] == ["Constant", "MatMul"]
