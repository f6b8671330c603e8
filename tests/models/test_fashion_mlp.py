# SPDX-License-Identifier: Apache-2.0
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from models import fashion, fashion_data, fashion_mlp, recipe

ACCURACY = 0.8945  # as models/data/README.md records it


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fashion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)  # the committed weights must do without
        assert fashion_mlp.main(["-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def initializers(built):
    return {one.name: numpy_helper.to_array(one) for one in onnx.load(built / recipe.MODEL).graph.initializer}


def test_the_committed_model_is_valid_and_dynamic(built):
    model = onnx.load(built / recipe.MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Gemm", "PRelu"] * 6 + ["Gemm"]
    for value, width in ((model.graph.input[0], 784), (model.graph.output[0], 10)):
        batch, features = value.type.tensor_type.shape.dim
        assert (batch.dim_param, features.dim_value) == ("batch", width)


def test_the_accuracy_is_the_recorded_one(built, capsys):
    assert fashion_mlp.main(["-o", str(built), "--measure", str(built / recipe.MODEL)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measure"] == "accuracy"
    assert found["samples"] == 2000
    assert found["value"] == pytest.approx(ACCURACY, abs=1.01 / 2000)  # one image may lie on the fence


def test_the_last_activations_are_nearly_the_identity(initializers):
    alphas = np.array([initializers[f"layers.{index}.alpha"][0] for index in range(6)])
    assert (np.abs(1 - alphas[list(fashion_mlp.COLLAPSE)]) < 0.005).all()
    assert (np.abs(1 - alphas[:2]) > 0.5).all()


def test_the_weights_are_fp16_numbers(initializers):
    for index in range(7):
        weight = initializers[f"layers.{index}.weight"]
        assert weight.dtype == np.float32
        assert weight.shape == (fashion_mlp.WIDTHS[index + 1], fashion_mlp.WIDTHS[index])
        np.testing.assert_array_equal(weight, weight.astype(np.float16))


def test_calibration_and_evaluation_share_no_image(built):
    calibration = recipe.read_npz(built / recipe.CALIBRATION)
    evaluation = recipe.read_npz(built / recipe.EVALUATION)
    assert list(calibration) == list(evaluation) == ["pixels"]
    left, right = ({row.tobytes() for row in arrays["pixels"]} for arrays in (calibration, evaluation))
    assert len(left) > 3900
    assert len(right) > 1900
    assert not left & right


def test_the_inputs_are_in_the_unit_interval(built):
    pixels = recipe.read_npz(built / recipe.CALIBRATION)["pixels"]
    assert pixels.dtype == np.float32
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_two_builds_give_the_same_bytes(built, tmp_path):
    fashion_mlp.main(["-o", str(tmp_path)])
    for name in (recipe.MODEL, recipe.CALIBRATION, recipe.EVALUATION, fashion.LABELS):
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes()


def test_the_committed_files_stay_small_and_their_licence_is_there():
    folder = fashion_data.SAMPLE.parent
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    assert "Permission is hereby granted, free of charge" in (folder / "README.md").read_text()


@pytest.mark.parametrize("alphas", [None, [0.25]])
def test_the_onnx_model_computes_the_network(alphas, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mlp, "WIDTHS", (4, 3, 2))
    rng = np.random.default_rng(0)
    layers = [
        (rng.normal(size=shape).astype(np.float16), rng.normal(size=shape[:1])) for shape in ((3, 4), (2, 3))
    ]
    onnx.save(fashion_mlp.to_onnx(layers, alphas), tmp_path / "model.onnx")
    x = rng.normal(size=(5, 4)).astype(np.float32)
    (found,) = recipe.open_session(tmp_path / "model.onnx").run(None, {"pixels": x})
    z = x @ layers[0][0].T + layers[0][1]
    slope = 0.0 if alphas is None else alphas[0]
    assert (z < 0).any()
    expected = np.where(z > 0, z, slope * z) @ layers[1][0].T.astype(np.float64) + layers[1][1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_relu_without_torch_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "find_spec", lambda package: None)
    assert fashion_mlp.main(["-o", str(tmp_path), "--activation", "relu"]) == 2
    assert capsys.readouterr().err.endswith("error: this recipe needs torch: pip install torch\n")


def test_idx_files_are_read(tmp_path):
    import gzip

    path = Path(tmp_path / "images.gz")
    header = bytes([0, 0, 8, 3]) + (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + (3).to_bytes(4, "big")
    path.write_bytes(gzip.compress(header + bytes([1, 2, 3, 4, 5, 255])))
    np.testing.assert_array_equal(fashion_data._idx(path), [[1, 2, 3], [4, 5, 255]])
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + (2).to_bytes(4, "big") + bytes([7, 9])))
    np.testing.assert_array_equal(fashion_data._idx(path), [7, 9])
