# SPDX-License-Identifier: Apache-2.0
"""A Fashion-MNIST classifier in the manner of VGG with BatchNorm, trained here: .925 on the test images.

Conv3x3-BatchNorm-ReLU with 32, 64, 128 and 128 channels, a MaxPool after each but the third, then a dense head
1152-512-256-10. Exported by torch at opset 17; each BatchNormalization stays a node of its own. Takes the
whole data set (Debian's dataset-fashion-mnist, MIT), `pip install torch` and some four minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from models import fashion, fashion_data, recipe

CHANNELS = (32, 0, 64, 0, 128, 128, 0)  # 0 is a MaxPool, `fashion_networks.POOL`
HEAD = (512, 256)
EPOCHS, LR = 3, 3e-3


def build(args: argparse.Namespace) -> None:
    """Writes the model and its data, trained now or from the cache."""
    recipe.require("torch", install="torch")
    from models import fashion_networks, fashion_training

    train, test = fashion_data.full()
    calibration = fashion.drawn(train, args.calibration, args.seed)
    how = fashion_training.Recipe(epochs=EPOCHS, lr=LR)
    network = fashion_training.trained(
        "fashion_vgg", lambda: fashion_networks.vgg(CHANNELS, HEAD), train, how, args.seed
    )
    fashion.export(network, args.output / recipe.MODEL)
    fashion.write_data(args.output, calibration, test, square=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds or measures; returns the exit status."""
    parser = fashion.arguments("fashion_vgg", __doc__)
    return recipe.run(parser.parse_args(argv), build, fashion.measure)


if __name__ == "__main__":
    raise SystemExit(main())
