# SPDX-License-Identifier: Apache-2.0
"""images:DIR: pictures prepared as the preprocessor_config.json beside the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.data import Chunk
from onnxcollapse.calibration.signature import data_signature
from onnxcollapse.calibration.text import load_json, model_folder
from onnxcollapse.errors import DataError
from onnxcollapse.model.model import Model, TensorSpec

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
CHUNK = 32
BILINEAR = 2  # of Pillow's resampling filters, which the files number alike


def read(folder: Path, model: Model) -> list[Chunk]:
    """Finds the pictures of a folder and its subfolders, in order of their paths.

    Args:
        folder: The folder.
        model: Has one image input [N, C, H, W] and a preprocessor_config.json in its folder or the one above.

    Returns:
        Chunks of pictures, decoded when they are used.

    Raises:
        DataError: Pillow is not installed, or pictures, configuration or image input are missing.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError("images: needs Pillow; `pip install onnxcollapse[images]`") from error
    spec = _image_input(model)
    config = load_json(model_folder(model, "preprocessor_config.json", "images") / "preprocessor_config.json")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(
            f"images:{folder}: holds no pictures ({', '.join(sorted(SUFFIXES))}); give another folder"
        )
    groups = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    return [Chunk(group[0].name, partial(_load, group, config, spec), rows=len(group)) for group in groups]


def prepare(path: Path, config: Mapping[str, Any], channels: int = 3) -> np.ndarray:
    """One picture as float32 [C, H, W]: resized, cropped, rescaled and normalised, each as configured."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: is no readable picture ({error}); remove it") from error
    if config.get("do_resize", True) and "size" in config:
        picture = picture.resize(_resized(picture.size, config["size"]), config.get("resample", BILINEAR))
    pixels = np.atleast_3d(np.asarray(picture, np.float32))
    if config.get("do_center_crop") and "crop_size" in config:
        pixels = _centre_crop(pixels, *_height_width(config["crop_size"]))
    if config.get("do_rescale", True):
        pixels = pixels * np.float32(config.get("rescale_factor", 1 / 255))
    if config.get("do_normalize", True) and "image_mean" in config:
        pixels = (pixels - np.float32(config["image_mean"])) / np.float32(config.get("image_std", 1.0))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)


def _image_input(model: Model) -> TensorSpec:
    inputs = data_signature(model).inputs
    images = [spec for spec in inputs if spec.shape is not None and len(spec.shape) == 4]
    named = [spec for spec in images if spec.name == "pixel_values"] or images
    if len(named) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise DataError(
            f"images: the model has no single [N, C, H, W] input ({names}); give its inputs as .npz"
        )
    return named[0]


def _load(paths: Sequence[Path], config: Mapping[str, Any], spec: TensorSpec) -> dict[str, np.ndarray]:
    channels = 1 if spec.shape is not None and spec.shape[1] == 1 else 3
    pictures = [prepare(path, config, channels) for path in paths]
    odd = [path for path, picture in zip(paths, pictures, strict=True) if picture.shape != pictures[0].shape]
    if odd:
        raise DataError(
            f"{odd[0]}: has another size than {paths[0].name} once prepared; set size in the config"
        )
    return {spec.name: np.stack(pictures).astype((spec.dtype or ir.DataType.FLOAT).numpy())}


def _resized(size: tuple[int, int], wanted: object) -> tuple[int, int]:
    """(width, height) for a size given as a number, {height, width} or {shortest_edge}."""
    width, height = size
    edge = wanted.get("shortest_edge") if isinstance(wanted, Mapping) else None
    if edge is None:
        rows, columns = _height_width(wanted)
        return columns, rows
    short = min(width, height)
    return width * edge // short, height * edge // short


def _height_width(size: object) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    raise DataError(f"preprocessor_config.json: size {size!r} is not understood; give height and width")


def _centre_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crops [H, W, C] around its centre; what lies outside the picture is black."""
    missing = [max(want - got, 0) for want, got in zip((height, width), pixels.shape, strict=False)]
    if any(missing):
        pixels = np.pad(pixels, [(m // 2, m - m // 2) for m in missing] + [(0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
