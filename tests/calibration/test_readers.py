# SPDX-License-Identifier: Apache-2.0
"""Every form that DATA may have, and what is wrong with those that cannot be read."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import pytest

from onnxcollapse.calibration import open_data, open_session
from onnxcollapse.errors import DataError

X = np.arange(800, dtype=np.float32).reshape(40, 20)


def column(data, part="all"):
    return np.concatenate([batch["x"][:, 0] for batch in data.batches(part)])


def test_npz(mlp, tmp_path):
    np.savez_compressed(tmp_path / "calib.npz", x=X)
    data = open_data(str(tmp_path / "calib.npz"), mlp())
    np.testing.assert_array_equal(column(data), X[:, 0])
    assert data.source.endswith("calib.npz")
    assert data.evidence


def test_folder_of_npz_in_natural_order(mlp, tmp_path):
    for index in range(12):
        np.savez(tmp_path / f"part{index}.npz", x=X[3 * index : 3 * index + 3])
    data = open_data(str(tmp_path), mlp(), batch_size=8)
    np.testing.assert_array_equal(column(data), X[:36, 0])
    assert [len(batch["x"]) for batch in data.batches("all")] == [8, 8, 8, 8, 4]  # across files
    assert data.count("fit") == 27


def test_files_of_different_lengths_are_not_joined(encoder, tmp_path):
    for length in (4, 9):
        np.savez(tmp_path / f"{length}.npz", input_ids=np.ones((3, length), np.int64))
    shapes = [b["input_ids"].shape for b in open_data(str(tmp_path), encoder()).batches("all")]
    assert shapes == [(3, 4), (3, 9)]


def test_onnx_test_sets(build, tmp_path):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,20] x, float[N,20] other) => (float[N,20] y) { y = Add(x, other) }"""
    )
    for index in range(11):
        folder = tmp_path / f"test_data_set_{index}"
        folder.mkdir()
        tensors = [onnx.numpy_helper.from_array(X[index : index + 1] + add, "") for add in (0, 1)]
        for place, tensor in enumerate(tensors):
            (folder / f"input_{place}.pb").write_bytes(tensor.SerializeToString())
        (folder / "output_0.pb").write_bytes(b"")
    data = open_data(str(tmp_path), model)
    np.testing.assert_array_equal(column(data), X[:11, 0])
    assert [batch["other"][0, 0] - batch["x"][0, 0] for batch in data.batches("all")] == [1] * 11
    assert data.count("heldout") == 3
    single = open_data(str(tmp_path / "test_data_set_3"), model)
    assert single.count("all") == 1
    tensor = onnx.numpy_helper.from_array(X[:1], "other")  # names win over places
    (tmp_path / "test_data_set_3" / "input_0.pb").write_bytes(tensor.SerializeToString())
    tensor = onnx.numpy_helper.from_array(X[1:2], "x")
    (tmp_path / "test_data_set_3" / "input_1.pb").write_bytes(tensor.SerializeToString())
    np.testing.assert_array_equal(column(open_data(str(tmp_path / "test_data_set_3"), model)), [20])


READERS = """
import numpy as np
class Reader:
    def __init__(self): self.left = 6
    def get_next(self):
        self.left -= 1
        return {"x": np.full((2, 20), self.left, np.float32)} if self.left >= 0 else None
def factory(): return Reader()
instance = Reader()
class One(Reader):
    def get_next(self):
        self.left -= 6
        return {"x": np.arange(100, dtype=np.float32).reshape(5, 20)} if self.left == 0 else None
class Broken(Reader):
    def get_next(self): raise RuntimeError("disk on fire")
class Strange(Reader):
    def get_next(self): return [1]
class Empty(Reader):
    def get_next(self): return None
class Needy(Reader):
    def __init__(self, path): pass
nothing = 3
class Outer:
    Inner = Reader
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_readers.py").write_text(READERS)
    monkeypatch.chdir(tmp_path)
    yield "my_readers"
    sys.modules.pop("my_readers", None)


@pytest.mark.parametrize("name", ["Reader", "factory", "instance", "Outer.Inner"])
def test_calibration_data_readers(mlp, module, name):
    data = open_data(f"{module}:{name}", mlp())
    assert data.samples == 12
    assert [batch["x"].shape for batch in data.batches("all")] == [(2, 20)] * 6  # as the reader made them
    np.testing.assert_array_equal(column(data), np.repeat([5.0, 4, 3, 2, 1, 0], 2))
    assert data.count("heldout") == 4
    np.testing.assert_array_equal(column(data), column(data))  # it is asked only once
    assert str(module) not in sys.path


def test_the_one_batch_of_a_reader_is_split_by_rows(mlp, module):
    data = open_data(f"{module}:One", mlp())
    assert (data.count("fit"), data.count("heldout")) == (4, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Broken", "get_next\\(\\) fails with RuntimeError: disk on fire"),
        ("Strange", "gave a list; return a dict"),
        ("Empty", "gave no batch"),
        ("Needy", "calling it fails with TypeError"),
        ("nothing", "calling it fails with TypeError"),
        ("missing", "has no 'missing'"),
    ],
)
def test_readers_that_do_not_work(mlp, module, name, message):
    with pytest.raises(DataError, match=message):
        open_data(f"{module}:{name}", mlp())


def test_a_module_that_does_not_exist(mlp):
    with pytest.raises(DataError, match=r"importing 'no\.such\.module' fails with ModuleNotFoundError"):
        open_data("no.such.module:Reader", mlp())


def test_random_numbers_are_no_evidence(mlp):
    data = open_data("random:50", mlp(), seed=1)
    assert not data.evidence
    assert data.samples == 50
    x = np.concatenate([batch["x"] for batch in data.batches("all")])
    assert abs(x.mean()) < 0.1
    assert 0.9 < x.std() < 1.1
    np.testing.assert_array_equal(column(open_data("random:50", mlp(), seed=1)), column(data))
    assert not np.array_equal(column(open_data("random:50", mlp(), seed=2)), column(data))


def test_random_ids_fit_the_embedding(encoder):
    batch = next(open_data("random:40", encoder()).batches("all"))
    ids = batch["input_ids"]
    assert ids.shape == (32, 16)
    assert ids.min() >= 0
    assert 25 < ids.max() < 50  # the table has 50 rows
    assert (batch["attention_mask"] == 1).all()


def test_random_inputs_without_a_shared_batch_axis(build):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        vad (float[B,S] x, float[2,B,3] state, int64 rate, bool[B] on) => (float[B,S] y, float[2,B,3] new) {
            y = Relu(x)  new = Relu(state)
        }"""
    )
    data = open_data("random:5", model)
    shapes = {"x": (1, 512), "state": (2, 1, 3), "rate": (), "on": (1,)}
    assert data.shapes() == shapes
    assert data.samples == 5
    with open_session(model, provider="cpu") as session:
        assert session.run(next(data.batches("fit")))["y"].shape == (1, 512)


def test_random_images_and_fixed_batches(build):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4,3,H,W] x) => (float[4,3,1,1] y) { y = GlobalAveragePool(x) }"""
    )
    assert open_data("random:8", model).shapes() == {"x": (4, 3, 64, 64)}
    with pytest.raises(DataError, match="no full batch of 4"):
        open_data("random:3", model)


@pytest.mark.parametrize("spec", ["random:", "random:0", "random:-3", "random:many"])
def test_random_counts_that_are_none(mlp, spec):
    with pytest.raises(DataError, match="no number of samples"):
        open_data(spec, mlp())


@pytest.mark.parametrize(
    "spec", ["nowhere.npz", "nowhere", "text:nowhere.txt", "images:nowhere", "text:", ""]
)
def test_paths_that_do_not_exist(mlp, spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"does not exist; give an \.npz") as caught:
        open_data(spec, mlp())
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(mlp, tmp_path):
    (tmp_path / "text.npz").write_text("this is no archive")
    np.save(tmp_path / "single.npy", X)
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], object))
    np.savez(tmp_path / "whole.npz", x=X)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-100])
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "none.npz")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "text.npz": "is no .npz file, or a damaged one",
        "cut.npz": "is no .npz file, or a damaged one",
        "empty.npz": "is no .npz file, or a damaged one",
        "single.npy": "is a single array, not an .npz",
        "objects.npz": "array 'x' holds Python objects, never loaded",
        "none.npz": "input 'x' is missing",
        "folder": "neither .npz files nor test_data_set_",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            open_data(str(tmp_path / name), mlp())
        assert "\n" not in str(caught.value)


def test_a_bad_file_in_a_folder_is_named(mlp, tmp_path):
    np.savez(tmp_path / "a.npz", x=X)
    np.savez(tmp_path / "b.npz", x=X[:, :3])
    with pytest.raises(DataError, match=r"b\.npz: axis 1 of input 'x' is 3"):
        open_data(str(tmp_path), mlp())


def test_damaged_test_sets(mlp, tmp_path):
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    (folder / "input_0.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match=r"input_0\.pb: is no readable TensorProto"):
        open_data(str(tmp_path), mlp())
    for place in (0, 1):
        onnx.save_tensor(onnx.numpy_helper.from_array(X), str(folder / f"input_{place}.pb"))
    with pytest.raises(DataError, match="only 1 inputs"):
        open_data(str(tmp_path), mlp())


def make_tokenizer(folder, pad=None):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "the": 4, "quick": 5, "fox": 6}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"pad_token_id": 0, "max_position_embeddings": 10}))


def test_text_is_cut_into_windows(encoder, tmp_path):
    make_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("the quick fox " * 8)
    model = encoder()
    model.path = tmp_path / "model.onnx"
    data = open_data(f"text:{tmp_path / 'text.txt'}", model)
    [batch] = data.batches("all")
    assert batch["input_ids"].tolist() == [
        [2, 4, 5, 6, 4, 5, 6, 4, 5, 3],
        [2, 6, 4, 5, 6, 4, 5, 6, 4, 3],
        [2, 5, 6, 4, 5, 6, 4, 5, 6, 3],
    ]
    (tmp_path / "text.txt").write_text("the quick fox " * 3)
    model.path = tmp_path / "onnx" / "model.onnx"  # as optimum lays a folder out
    [batch] = open_data(f"text:{tmp_path / 'text.txt'}", model).batches("all")
    assert batch["input_ids"][1].tolist() == [2, 6, 3, 0, 0, 0, 0, 0, 0, 0]
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_a_fixed_sequence_length_is_the_window(build, tmp_path):
    make_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("the quick fox " * 8)
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int32[N,6] input_ids) => (int32[N,6] y) { y = Identity(input_ids) }"""
    )
    model.path = tmp_path / "model.onnx"
    batch = next(open_data(f"text:{tmp_path / 'text.txt'}", model).batches("all"))
    assert batch["input_ids"].shape == (6, 6)
    assert batch["input_ids"].dtype == np.int32


def test_text_that_cannot_be_used(encoder, mlp, tmp_path, monkeypatch):
    model, path = encoder(), tmp_path / "text.txt"
    path.write_text("the fox")
    with pytest.raises(DataError, match="model has no input 'input_ids'"):
        open_data(f"text:{path}", mlp())
    for model.path in (None, tmp_path / "model.onnx"):
        with pytest.raises(DataError, match=r"needs tokenizer\.json beside the model"):
            open_data(f"text:{path}", model)
    make_tokenizer(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        open_data(f"text:{path}", model)
    path.write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        open_data(f"text:{path}", model)
    path.write_text("the fox")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install onnxcollapse\[text\]"):
        open_data(f"text:{path}", model)
    monkeypatch.undo()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="no readable tokenizer"):
        open_data(f"text:{path}", model)
    (tmp_path / "config.json").write_text("{")
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="no readable JSON"):
        open_data(f"text:{path}", model)
