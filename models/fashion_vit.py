# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer for Fashion-MNIST, trained here: at depth 6 .886 on the test images.

Pre-norm layers of width 64 with heads of 16, erf-GELU and four times the width in the MLP, on 16 patches of 7 x 7; the
classes are read off the patches' mean. Exported by torch at opset 17. Takes the whole data set (Debian's
dataset-fashion-mnist, MIT), `pip install torch` and, at depth 6, some five minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from models import fashion, fashion_data, recipe

EPOCHS, LR = 8, 2e-3


def build(args: argparse.Namespace) -> None:
    """Writes the model and its data, trained now or from the cache.

    Raises:
        RecipeError: the width is no multiple of the heads'.
    """
    recipe.require("torch", install="torch")
    from models import fashion_networks, fashion_training

    if args.width % fashion_networks.HEAD_WIDTH:
        raise recipe.RecipeError(f"--width {args.width}: give a multiple of {fashion_networks.HEAD_WIDTH}")
    train, test = fashion_data.full()
    calibration = fashion.drawn(train, args.calibration, args.seed)
    network = fashion_training.trained(
        f"fashion_vit{args.depth}",
        lambda: fashion_networks.VisionTransformer(args.depth, args.width, args.patch),
        train,
        fashion_training.Recipe(epochs=EPOCHS, lr=LR),
        args.seed,
    )
    fashion.export(network, args.output / recipe.MODEL)
    fashion.write_data(args.output, calibration, test, square=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds or measures; returns the exit status."""
    parser = fashion.arguments("fashion_vit", __doc__)
    parser.add_argument("--depth", type=int, default=6, help="layers (default %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="of the residual stream (default %(default)s)")
    text = "height and width of the patches (default %(default)s; with 4 it takes four times as long)"
    parser.add_argument("--patch", type=int, choices=(4, 7), default=7, help=text)
    return recipe.run(parser.parse_args(argv), build, fashion.measure)


if __name__ == "__main__":
    raise SystemExit(main())
