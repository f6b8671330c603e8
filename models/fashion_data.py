# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST (MIT): all of Debian's dataset-fashion-mnist, or the sample in the checkout."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models import recipe
from models.fetch import fetch_debian

SIDE, PIXELS, CLASSES = 28, 784, 10
SAMPLE = Path(__file__).parent / "data" / "fashion_sample.npz"
CALIBRATION_IMAGES, SAMPLE_EVALUATION_IMAGES = 4000, 2000
_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_DIGESTS = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


@dataclass(frozen=True)
class Images:
    """Images as uint8 [n, 784] and their classes as uint8 [n]."""

    pixels: np.ndarray
    labels: np.ndarray

    def inputs(self) -> np.ndarray:
        """What the model reads: float32 [n, 784] in [0, 1]."""
        return self.pixels.astype(np.float32) / np.float32(255)

    def squares(self) -> np.ndarray:
        """The same as images: float32 [n, 1, 28, 28]."""
        side = math.isqrt(self.pixels.shape[1])
        return self.inputs().reshape(-1, 1, side, side)

    def sample(self, count: int, seed: int) -> Images:
        """`count` images drawn without replacement."""
        rows = np.sort(np.random.default_rng(seed).choice(len(self.pixels), count, replace=False))
        return Images(self.pixels[rows], self.labels[rows])

    def split(self, count: int, seed: int) -> tuple[Images, Images]:
        """All but the images that `sample` draws, and those."""
        drawn = np.zeros(len(self.pixels), bool)
        drawn[np.random.default_rng(seed).choice(len(drawn), count, replace=False)] = True
        return Images(self.pixels[~drawn], self.labels[~drawn]), Images(
            self.pixels[drawn], self.labels[drawn]
        )


def full() -> tuple[Images, Images]:
    """The 60,000 training and 10,000 test images."""
    folder = fetch_debian("dataset-fashion-mnist", _FOLDER, _DIGESTS)
    train, test = (
        Images(_idx(folder / f"{part}-images-idx3-ubyte.gz"), _idx(folder / f"{part}-labels-idx1-ubyte.gz"))
        for part in ("train", "t10k")
    )
    return train, test


def committed() -> tuple[Images, Images]:
    """The committed sample: training images to calibrate on and test images to evaluate on."""
    arrays = recipe.read_npz(SAMPLE)
    calibration, evaluation = (
        Images(arrays[f"{part}_pixels"], arrays[f"{part}_labels"]) for part in ("calibration", "evaluation")
    )
    return calibration, evaluation


def commit_sample(calibration: Images, evaluation: Images) -> None:
    """Writes the sample that `committed` reads."""
    arrays = {
        "calibration_pixels": calibration.pixels,
        "calibration_labels": calibration.labels,
        "evaluation_pixels": evaluation.pixels,
        "evaluation_labels": evaluation.labels,
    }
    recipe.write_npz(SAMPLE, arrays)


def _idx(path: Path) -> np.ndarray:
    """Reads an idx file: two zero bytes, type 8 (bytes), the dimensions, their big-endian sizes, the data."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", dimensions, offset=4)
    flat = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    return flat.reshape(int(shape[0]), -1) if dimensions > 1 else flat
