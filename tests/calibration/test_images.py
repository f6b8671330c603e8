# SPDX-License-Identifier: Apache-2.0
"""Reading images as calibration data."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from onnxcollapse.calibration import open_data
from onnxcollapse.errors import DataError

IMAGE_MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,8,8] pixel_values) => (float[N,3,1,1] y) { y = GlobalAveragePool(pixel_values) }"""

CONFIG = {
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "resample": 0,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.25, 0.0],
    "image_std": [0.5, 0.25, 1.0],
}


def make_images(folder, count=3, size=(16, 16)):
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(exist_ok=True)
    for index in range(count):
        image.new("RGB", size, (255, 51 * index, 0)).save(folder / f"{index}.png")


def test_images_are_prepared_as_configured(build, tmp_path):
    make_images(tmp_path / "pictures", 40)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIG))
    model = build(IMAGE_MODEL)
    model.path = tmp_path / "model.onnx"
    make_images(tmp_path / "pictures", 5)
    data = open_data(f"images:{tmp_path / 'pictures'}", model)
    assert data.samples == 40
    pixels = np.concatenate([batch["pixel_values"] for batch in data.batches("all")])
    assert pixels.shape == (40, 3, 8, 8)
    np.testing.assert_allclose(pixels[:, 0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(pixels[0, 1], -1.0, rtol=1e-6)
    np.testing.assert_allclose(pixels[:, 2], 0.0, atol=1e-6)
    assert data.count("heldout") == 10


def test_shortest_edge_and_centre_crop(tmp_path):
    from onnxcollapse.calibration.images import prepare

    image = pytest.importorskip("PIL.Image")
    striped = np.zeros((20, 40, 3), np.uint8)
    striped[:, 15:25] = 255
    image.fromarray(striped).save(tmp_path / "striped.png")
    config = {"size": {"shortest_edge": 10}, "resample": 0, "do_center_crop": True, "crop_size": 6}
    cropped = prepare(tmp_path / "striped.png", config)
    assert cropped.shape == (3, 6, 6)
    np.testing.assert_allclose(cropped[0, 0], [1, 1, 1, 1, 1, 0], atol=1e-6)
    wide = prepare(
        tmp_path / "striped.png", {"do_center_crop": True, "crop_size": {"height": 30, "width": 4}}
    )
    assert wide.shape == (3, 30, 4)
    assert (wide[:, :5] == 0).all()


def test_images_that_cannot_be_used(build, mlp, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    make_images(pictures)
    model = build(IMAGE_MODEL)
    with pytest.raises(DataError, match=r"no single \[N, C, H, W\] input"):
        open_data(f"images:{pictures}", mlp())
    model.path = tmp_path / "model.onnx"
    with pytest.raises(DataError, match=r"needs preprocessor_config\.json"):
        open_data(f"images:{pictures}", model)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(CONFIG | {"size": {"height": 9, "width": 9}})
    )
    with pytest.raises(DataError, match="axis 2 of input 'pixel_values' is 9, the model wants 8"):
        open_data(f"images:{pictures}", model)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIG | {"size": {"longest": 9}}))
    with pytest.raises(DataError, match="is not understood"):
        open_data(f"images:{pictures}", model)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_resize": False}))
    make_images(pictures, 1, size=(8, 4))
    with pytest.raises(DataError, match="has another size"):
        open_data(f"images:{pictures}", model)
    (pictures / "0.png").write_text("no picture")
    with pytest.raises(DataError, match=r"0\.png: is no readable picture"):
        open_data(f"images:{pictures}", model)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        open_data(f"images:{tmp_path / 'nothing'}", model)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install onnxcollapse\[images\]"):
        open_data(f"images:{pictures}", model)
