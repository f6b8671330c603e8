# SPDX-License-Identifier: Apache-2.0
"""A Fashion-MNIST classifier, 784-1024-1024-512-512-256-256-10, trained here.

`--activation prelu` was trained under the LayerCollapse regularizer (arXiv 2311.17943) until its last four
PReLUs were nearly the identity. Its weights and a sample of the data lie in the checkout, so that nothing
is downloaded and numpy, onnx and onnxruntime suffice. `--activation relu` is a plain network; it, and
`--train`, take the whole data set (Debian's dataset-fashion-mnist, MIT) and `pip install torch`, and some
two minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models import fashion_data, recipe
from models.fashion_data import Images

WIDTHS = (fashion_data.PIXELS, 1024, 1024, 512, 512, 256, 256, fashion_data.CLASSES)
COLLAPSE = (2, 3, 4, 5)
WEIGHTS = Path(__file__).parent / "data" / "fashion_prelu.npz"
INPUT, OUTPUT, LABELS = "pixels", "logits", "labels.npz"
_OPSET, _IR_VERSION = 17, 8

Layers = list[tuple[np.ndarray, np.ndarray]]


def build(args: argparse.Namespace) -> None:
    """Writes the model and its data, trained now or from the checkout."""
    if args.train or args.commit or args.activation == "relu":
        layers, alphas, calibration, evaluation = _trained(args.activation, args.seed)
        if args.commit:
            _commit(layers, alphas, calibration, evaluation, args.seed)
    else:
        layers, alphas = _committed()
        calibration, evaluation = fashion_data.committed()
    with recipe.replacing(args.output / recipe.MODEL) as temporary:
        onnx.save(to_onnx(layers, alphas), temporary)
    recipe.write_npz(args.output / recipe.CALIBRATION, {INPUT: calibration.inputs()})
    recipe.write_npz(args.output / recipe.EVALUATION, {INPUT: evaluation.inputs()})
    recipe.write_npz(args.output / LABELS, {"labels": evaluation.labels.astype(np.int64)})


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


def to_onnx(layers: Layers, alphas: Sequence[float] | None) -> onnx.ModelProto:
    """The network as ONNX: Gemm, PRelu (Relu without alphas), ..., Gemm, with a dynamic batch.

    Args:
        layers: weight [out, in] and bias [out] of each layer; stored as fp32.
        alphas: the PReLUs' slopes.
    """
    nodes, initializers, value = [], [], INPUT
    for index, (weight, bias) in enumerate(layers):
        prefix, last = f"layers.{index}", index == len(layers) - 1
        initializers += [_fp32(weight, f"{prefix}.weight"), _fp32(bias, f"{prefix}.bias")]
        names = [value, f"{prefix}.weight", f"{prefix}.bias"]
        value = OUTPUT if last else f"{prefix}.z"
        nodes.append(helper.make_node("Gemm", names, [value], f"{prefix}.gemm", transB=1))
        if last:
            continue
        names, value = [value], f"{prefix}.a"
        if alphas is not None:
            initializers.append(_fp32(np.array(alphas[index : index + 1]), f"{prefix}.alpha"))
            names.append(f"{prefix}.alpha")
        op = "Relu" if alphas is None else "PRelu"
        nodes.append(helper.make_node(op, names, [value], f"{prefix}.activation"))
    return _model(nodes, initializers)


def _model(nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto]) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", WIDTHS[0]])]
    outputs = [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", WIDTHS[-1]])]
    graph = helper.make_graph(nodes, "fashion_mlp", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(
        graph, producer_name="models.fashion_mlp", opset_imports=opsets, ir_version=_IR_VERSION
    )
    onnx.checker.check_model(model)
    return model


def _fp32(array: np.ndarray, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(array.astype(np.float32), name)


def _trained(activation: str, seed: int) -> tuple[Layers, list[float] | None, Images, Images]:
    recipe.require("torch", install="torch")
    from models import fashion_training

    train, test = fashion_data.full()
    how = fashion_training.Recipe(collapse=COLLAPSE if activation == "prelu" else ())
    network = fashion_training.train(WIDTHS, train, how, seed)
    layers, alphas = fashion_training.weights(network)
    return layers, alphas, train.sample(fashion_data.CALIBRATION_IMAGES, seed), test


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


def main(argv: Sequence[str] | None = None) -> int:
    """Builds or measures; returns the exit status."""
    parser = recipe.arguments("fashion_mlp", __doc__)
    parser.add_argument("--activation", choices=("prelu", "relu"), default="prelu")
    parser.add_argument("--train", action="store_true", help="train anew on the whole data set")
    parser.add_argument("--commit", action="store_true", help="train anew and renew models/data")
    parser.add_argument("--seed", type=int, default=0)
    return recipe.run(parser.parse_args(argv), build, measure)


if __name__ == "__main__":
    raise SystemExit(main())
