# SPDX-License-Identifier: Apache-2.0
"""A Fashion-MNIST classifier, 784-1024-1024-512-512-256-256-10, trained here.

`--activation prelu` was trained under the LayerCollapse regularizer (arXiv 2311.17943) until its last four
PReLUs were nearly the identity. Its weights and a sample of the data lie in the checkout, so that nothing
is downloaded and numpy, onnx and onnxruntime suffice. `--activation relu` is a plain network; it, and
`--train`, take the whole data set (Debian's dataset-fashion-mnist, MIT) and `pip install torch`, and some
two minutes.

`--activation relu --widths 512,512,512,512,512` is a ReLU MLP with five equal layers: .891 on the test images.

`--activation relu --published` has the layers and the training of the Fashion-MNIST network in the code
published with linearity-based compression (arXiv 2506.21146). The layers are the default ones; the training
is SGD with momentum on a cross-entropy that is given probabilities, in batches of 32, for at most 20 epochs,
with 10,000 training images kept back to stop by; `--calibration 10000` calibrates on these, as that code
does. The softmax at its end is left out of the ONNX file. Trained so, seed 0 stops after 15 epochs at .665
on the test images: three classes are never predicted. For those layers trained well leave out `--published`.
The networks for tables in the same code have the hidden layers 64,128,128,256,256.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models import fashion, fashion_data, recipe
from models.fashion_data import Images

WIDTHS = (fashion_data.PIXELS, 1024, 1024, 512, 512, 256, 256, fashion_data.CLASSES)
COLLAPSE = (2, 3, 4, 5)
WEIGHTS = Path(__file__).parent / "data" / "fashion_prelu.npz"
_IR_VERSION = 8

Layers = list[tuple[np.ndarray, np.ndarray]]


def build(args: argparse.Namespace) -> None:
    """Writes the model and its data, trained now or from the checkout or the cache.

    Raises:
        RecipeError: options don't go together, or there are fewer images to calibrate on than asked for.
    """
    if args.activation == "prelu" and (args.widths or args.published):
        raise recipe.RecipeError("--widths and --published are for ReLU networks: add --activation relu")
    if args.train or args.commit or args.activation == "relu":
        layers, alphas, calibration, evaluation = _trained(args)
        if args.commit:
            _commit(layers, alphas, calibration, evaluation, args.seed)
    else:
        layers, alphas = _committed()
        calibration, evaluation = fashion_data.committed()
        if args.calibration != len(calibration.pixels):
            calibration = fashion.drawn(calibration, args.calibration, args.seed)
    with recipe.replacing(args.output / recipe.MODEL) as temporary:
        onnx.save(to_onnx(layers, alphas), temporary)
    fashion.write_data(args.output, calibration, evaluation, square=False)


def to_onnx(layers: Layers, alphas: Sequence[float] | None) -> onnx.ModelProto:
    """The network as ONNX: Gemm, PRelu (Relu without alphas), ..., Gemm, with a dynamic batch.

    Args:
        layers: weight [out, in] and bias [out] of each layer; stored as fp32.
        alphas: the PReLUs' slopes.
    """
    nodes, initializers, value = [], [], fashion.INPUT
    for index, (weight, bias) in enumerate(layers):
        prefix, last = f"layers.{index}", index == len(layers) - 1
        initializers += [_fp32(weight, f"{prefix}.weight"), _fp32(bias, f"{prefix}.bias")]
        names = [value, f"{prefix}.weight", f"{prefix}.bias"]
        value = fashion.OUTPUT if last else f"{prefix}.z"
        nodes.append(helper.make_node("Gemm", names, [value], f"{prefix}.gemm", transB=1))
        if last:
            continue
        names, value = [value], f"{prefix}.a"
        if alphas is not None:
            initializers.append(_fp32(np.array(alphas[index : index + 1]), f"{prefix}.alpha"))
            names.append(f"{prefix}.alpha")
        op = "Relu" if alphas is None else "PRelu"
        nodes.append(helper.make_node(op, names, [value], f"{prefix}.activation"))
    return _model(nodes, initializers, layers[0][0].shape[1], layers[-1][0].shape[0])


def _model(
    nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto], width_in: int, width_out: int
) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(fashion.INPUT, TensorProto.FLOAT, ["batch", width_in])]
    outputs = [helper.make_tensor_value_info(fashion.OUTPUT, TensorProto.FLOAT, ["batch", width_out])]
    graph = helper.make_graph(nodes, "fashion_mlp", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", fashion.OPSET)]
    model = helper.make_model(
        graph, producer_name="models.fashion_mlp", opset_imports=opsets, ir_version=_IR_VERSION
    )
    onnx.checker.check_model(model)
    return model


def _fp32(array: np.ndarray, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(array.astype(np.float32), name)


def _trained(args: argparse.Namespace) -> tuple[Layers, list[float] | None, Images, Images]:
    """The layers, the slopes, the images to calibrate on and the test images."""
    recipe.require("torch", install="torch")
    from models import fashion_networks, fashion_training

    train, test = fashion_data.full()
    calibration = fashion.drawn(train, args.calibration, args.seed)
    widths = (WIDTHS[0], *(args.widths or WIDTHS[1:-1]), WIDTHS[-1])
    how = fashion_training.PUBLISHED_LINEARITY if args.published else fashion_training.Recipe()
    if args.activation == "prelu":
        how = fashion_training.Recipe(collapse=COLLAPSE)
    if args.activation == "prelu" or args.train:
        network = fashion_training.train(widths, train, how, args.seed)
    else:
        network = fashion_training.trained(
            "fashion_mlp", lambda: fashion_networks.mlp(widths), train, how, args.seed
        )
    layers, alphas = fashion_training.weights(network)
    return layers, alphas, calibration, test


def _commit(
    layers: Layers, alphas: Sequence[float] | None, calibration: Images, evaluation: Images, seed: int
) -> None:
    """Writes the checkout's files; the fp16 weights are the trained model, fp32 is how ONNX holds them."""
    if alphas is None:
        raise recipe.RecipeError("only the PReLU network is kept in the checkout: leave out --commit")
    arrays = {"alphas": np.array(alphas, np.float32)}
    for index, (weight, bias) in enumerate(layers):
        arrays |= {f"weight{index}": weight, f"bias{index}": bias}
    recipe.write_npz(WEIGHTS, arrays)
    fashion_data.commit_sample(calibration, evaluation.sample(fashion_data.SAMPLE_EVALUATION_IMAGES, seed))


def _committed() -> tuple[Layers, list[float]]:
    arrays = recipe.read_npz(WEIGHTS)
    layers = [(arrays[f"weight{index}"], arrays[f"bias{index}"]) for index in range(len(WIDTHS) - 1)]
    return layers, arrays["alphas"].tolist()


def _widths(text: str) -> list[int]:
    widths = [int(part) for part in text.split(",")]  # a ValueError is argparse's to report
    if min(widths) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give positive numbers, as in 512,512")
    return widths


def main(argv: Sequence[str] | None = None) -> int:
    """Builds or measures; returns the exit status."""
    parser = fashion.arguments("fashion_mlp", __doc__)
    parser.add_argument("--activation", choices=("prelu", "relu"), default="prelu")
    parser.add_argument(
        "--widths",
        type=_widths,
        metavar="W,W,...",
        help="widths of the hidden layers, with --activation relu",
    )
    parser.add_argument(
        "--published", action="store_true", help="train as arXiv 2506.21146 does, with --activation relu"
    )
    parser.add_argument("--train", action="store_true", help="train anew on the whole data set")
    parser.add_argument("--commit", action="store_true", help="train anew and renew models/data")
    return recipe.run(parser.parse_args(argv), build, fashion.measure)


if __name__ == "__main__":
    raise SystemExit(main())
