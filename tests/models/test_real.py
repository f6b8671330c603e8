# SPDX-License-Identifier: Apache-2.0
"""The recipes that download, built for real and measured."""

import argparse

import numpy as np
import onnx
import pytest

from models import encoder, minilm_l3, minilm_l6, recipe, smollm2, zoo
from models.fetch import FetchError

pytestmark = pytest.mark.slow


def built(module, folder, **options):
    defaults = {"output": folder, "text": "pydoc", "source": False}
    try:
        module.build(argparse.Namespace(**(defaults | options)))
    except FetchError as error:
        pytest.skip(str(error))
    return folder


def quality(module, folder, **options):
    return module.measure(argparse.Namespace(output=folder, measure=folder / recipe.MODEL, **options))


@pytest.fixture(scope="module")
def l3(tmp_path_factory):
    pytest.importorskip("tokenizers")
    return built(minilm_l3, tmp_path_factory.mktemp("l3"))


def test_minilm_l3_is_its_own_reference(l3):
    assert quality(encoder, l3) == {
        "measure": "similarity-spearman",
        "value": pytest.approx(1, abs=1e-9),
        "samples": 256,
    }
    calibration, evaluation = recipe.read_npz(l3 / "calib.npz"), recipe.read_npz(l3 / "eval.npz")
    assert calibration["input_ids"].shape == (512, 128)
    assert not {row.tobytes() for row in calibration["input_ids"]} & {
        row.tobytes() for row in evaluation["input_ids"]
    }


def test_noise_in_a_weight_lowers_the_measure(l3, tmp_path):
    model = onnx.load(l3 / recipe.MODEL)
    weight = max(model.graph.initializer, key=lambda one: 0 if 30522 in one.dims else len(one.raw_data))
    array = onnx.numpy_helper.to_array(weight)
    noise = np.random.default_rng(0).normal(scale=2 * array.std(), size=array.shape).astype(array.dtype)
    weight.CopyFrom(onnx.numpy_helper.from_array(array + noise, weight.name))
    onnx.save(model, tmp_path / "noisy.onnx")
    found = encoder.measure(argparse.Namespace(output=l3, measure=tmp_path / "noisy.onnx"))
    assert 0 < found["value"] < 0.99


@pytest.mark.parametrize(
    ("options", "floor"),
    [
        ({"opset": 17, "exporter": "torchscript", "dtype": "fp32"}, 1 - 1e-9),
        ({"opset": 18, "exporter": "dynamo", "dtype": "fp32"}, 1 - 1e-9),
        ({"opset": 13, "exporter": "torchscript", "dtype": "fp16"}, 1 - 1e-9),
    ],
)
def test_minilm_l6_exports(options, floor, tmp_path):
    for package in ("torch", "transformers", "tokenizers", "onnxscript"):
        pytest.importorskip(package)
    folder = built(minilm_l6, tmp_path, **options)
    model = onnx.load(folder / recipe.MODEL)
    assert [one.version for one in model.opset_import if one.domain == ""] == [options["opset"]]
    kinds = {one.data_type for one in model.graph.initializer if len(one.dims) == 2}
    assert kinds >= {onnx.TensorProto.FLOAT16 if options["dtype"] == "fp16" else onnx.TensorProto.FLOAT}
    assert quality(encoder, folder)["value"] >= floor


def test_smollm2_is_a_folder_with_a_cache(tmp_path):
    for package in ("torch", "transformers", "gguf", "accelerate", "optimum.exporters.onnx"):
        pytest.importorskip(package)
    folder = built(smollm2, tmp_path, opset=18, untied=False, windows=64)
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert recipe.read_npz(folder / "calib.npz")["input_ids"].shape == (64, 256)
    found = quality(smollm2, folder, generate=24)
    assert 15 < found["value"] < 22
    assert len(found["generated"]) == 24
    feeds = recipe.read_npz(folder / "eval.npz")
    session = recipe.open_session(folder / recipe.MODEL)
    window = np.concatenate([feeds["input_ids"][0, :32], found["generated"][:-1]])
    (logits,) = session.run(["logits"], smollm2._feeds(session, window, 0) | smollm2._empty_cache(session))
    assert logits[0, 31:].argmax(-1).tolist() == found["generated"]


def test_the_zoo_is_complete_and_loads(tmp_path):
    folder = built(zoo, tmp_path)
    files = sorted(folder.rglob("*.onnx"))
    by_package = {
        name: sum(file.is_relative_to(folder / name) for file in files) for name in ("speechmos", "onnx")
    }
    assert by_package == {"speechmos": 9, "onnx": 9}
    assert len(files) == 28
    for file in files:
        assert onnx.load(file).graph.node
