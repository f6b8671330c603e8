# SPDX-License-Identifier: Apache-2.0
"""What the Fashion-MNIST recipes share: arguments, data files, the export of torch networks, accuracy."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import recipe
from models.fashion_data import CALIBRATION_IMAGES, SIDE, Images

if TYPE_CHECKING:
    from torch import nn

INPUT, OUTPUT, LABELS = "pixels", "logits", "labels.npz"
OPSET = 17
CACHED = """
Trained networks are kept in the cache (ONNXCOLLAPSE_CACHE) under a key made of the options, the way of
training, the data and the training code, so that building the same network again doesn't train it again."""


def arguments(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The arguments of a Fashion-MNIST recipe."""
    parser = recipe.arguments(name, f"{doc}{CACHED}")
    text = "training images to calibrate on (default %(default)s)"
    parser.add_argument("--calibration", type=int, default=CALIBRATION_IMAGES, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def write_data(folder: Path, calibration: Images, evaluation: Images, *, square: bool) -> None:
    """Writes calib.npz, eval.npz and the labels of the latter.

    Args:
        folder: the recipe's output folder.
        calibration: training images.
        evaluation: test images.
        square: whether the model reads [n, 1, 28, 28] rather than [n, 784].
    """
    for name, images in ((recipe.CALIBRATION, calibration), (recipe.EVALUATION, evaluation)):
        recipe.write_npz(folder / name, {INPUT: images.squares() if square else images.inputs()})
    recipe.write_npz(folder / LABELS, {"labels": evaluation.labels.astype(np.int64)})


def drawn(images: Images, count: int, seed: int) -> Images:
    """`count` of the images to calibrate on.

    Raises:
        RecipeError: there are fewer.
    """
    available = len(images.pixels)
    if not 0 < count <= available:
        raise recipe.RecipeError(f"--calibration {count}: give a number of images from 1 to {available}")
    return images.sample(count, seed)


def export(network: nn.Module, target: Path, side: int = SIDE) -> None:
    """Writes a torch network that reads images [batch, 1, side, side] as ONNX with a dynamic batch.

    BatchNormalization stays a node of its own: folding it away is what is to be shown.
    """
    import torch

    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "opset_version": OPSET}
    names["dynamic_axes"] = {name: {0: "batch"} for name in (INPUT, OUTPUT)}
    example = torch.zeros(2, 1, side, side)
    with recipe.replacing(target) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is deprecated, and says so for each export
        torch.onnx.export(
            network.eval(),
            (example,),
            str(temporary),
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            **names,
        )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The accuracy of a model on the evaluation images."""
    feeds = recipe.read_npz(args.output / recipe.EVALUATION)
    labels = recipe.read_npz(args.output / LABELS)["labels"]
    session = recipe.open_session(args.measure)
    output = session.get_outputs()[0].name
    right = sum(
        int((logits.argmax(1) == labels[rows]).sum())
        for logits, rows in recipe.outputs_in_batches(session, feeds, output, batch=500)
    )
    return {"measure": "accuracy", "value": right / len(labels), "samples": len(labels)}
