# SPDX-License-Identifier: Apache-2.0
"""Runs one method of onnxsim 0.8 on one model; executed by the Python of onnxsim's own environment.

    PYTHON rival_onnxsim.py MODEL.onnx CALIB.npz RATIO METHOD OUT.onnx

RATIO is the share that is kept of what the method removes, 1 minus onnxsim's `sparsity`: hidden neurons,
transformer blocks, or single weights. Prints one JSON line; a method that cannot run says why in `error`.
The file imports nothing of onnxcollapse, so that the rival runs among its own dependencies only.

How onnxsim is given its best:
- A calibration file goes in whole, in batches; inputs that it lacks (a KV cache) are empty.
- Local sparsity and the L2 norm are used, onnxsim's defaults. `global_sparsity=True` was tried with Wanda and
  is far worse (a layer of an MLP is cut to a single neuron).
- Where nothing matches in the graph as it is, onnxsim is asked again after its own `simplify` and then on
  the graph as ONNX Runtime's extended optimization leaves it: its documentation names those fused forms
  (BiasGelu, SkipLayerNormalization) as supported; last with the shapes of the residual stream stated, which
  its block pruning asks for and onnx cannot infer there. `prepared` tells which graph was pruned; parameters are
  compared with the original's.
- Initializers that nothing reads any more are removed; its masking leaves the original weights in the file.
- `+finetune` is its closed-form ridge fit; it leaves alone every layer whose inputs and outputs were both cut, so
  in a deep MLP only the last layer gains. Its solver is one scalar thread: a 6-layer encoder of width 384 takes
  about a minute for 4,096 tokens. `+train` is what its documentation names for the layers left out: 1,000 steps of
  Adam on the original's outputs (rate 1e-3, batches of 256). It trains, so it is no training-free method.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Batch = dict[str, np.ndarray]
_FLOATS = (1, 10, 11, 16)  # FLOAT, FLOAT16, DOUBLE and BFLOAT16 of onnx.TensorProto
_TRAIN_BATCH, _TRAIN_RATE = 256, 1e-3
_NORMS = {"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"}
_PROBE_RATIO = 0.1  # low enough that the single block of a small model would go


@dataclass(frozen=True)
class Method:
    """One way that onnxsim prunes.

    Attributes:
        prune: name of the function of onnxsim that prunes.
        removes: what goes: hidden neurons and whole blocks make tensors smaller, weights are only set to zero.
        calibrated: whether the function looks at calibration data.
        recover: what follows: nothing, a closed-form fit, or training.
    """

    prune: str
    removes: Literal["neurons", "blocks", "weights"]
    calibrated: bool = True
    recover: Literal["", "fit", "train"] = ""

    @property
    def shrinks(self) -> bool:
        """Whether tensors get smaller; otherwise they keep their size and hold zeros."""
        return self.removes != "weights"


METHODS = {
    "wanda": Method("apply_structured_wanda_pruning", "neurons"),
    "wanda+finetune": Method("apply_structured_wanda_pruning", "neurons", recover="fit"),
    "wanda+train": Method("apply_structured_wanda_pruning", "neurons", recover="train"),
    "magnitude": Method("apply_structured_pruning", "neurons", calibrated=False),
    "blocks": Method("apply_transformer_block_pruning", "blocks"),
    "magnitude-mask": Method("apply_magnitude_pruning", "weights", calibrated=False),
    "sparsegpt-mask": Method("apply_sparsegpt_pruning", "weights"),
}


class RivalError(Exception):
    """The rival cannot do what was asked; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one method and prints one JSON line; the exit status is 0 also when the rival fails."""
    args = _arguments(argv)
    row: dict[str, Any] = {"method": args.method, "ratio": args.ratio, "error": None}
    try:
        row |= _pruned(args)
    except Exception as error:  # whatever the rival raises is its result
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    print("\n" + json.dumps(row))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help=".npz, arrays by input name, samples on axis 0")
    parser.add_argument("ratio", type=float, help="share that is kept, above 0 and at most 1")
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--batch", type=int, help="samples at once; default 256, or 8 where inputs are integers"
    )
    parser.add_argument("--samples", type=int, help="use the first N samples only")
    args = parser.parse_args(argv)
    if not 0 < args.ratio <= 1:
        parser.error(f"ratio is {args.ratio:g}: it must be above 0 and at most 1")
    return args


def _pruned(args: argparse.Namespace) -> dict[str, Any]:
    import onnx

    method = METHODS[args.method]
    original = onnx.load(str(args.model))
    before, zeros_before = count(original)
    original = without_unused(original)  # else their removal would look like the rival's work
    batches = list(feeds(original, args.calibration, args.batch, args.samples))
    result: dict[str, Any] = {
        "params_before": before,
        "zeros_before": zeros_before,
        "removes": method.removes,
    }
    prepared, graph = _matching(method, original, args.model, batches[:1])
    began = time.perf_counter()
    model = _prune(method, graph, batches, args.ratio)
    if method.recover:
        model = _RECOVERIES[method.recover](graph, model, batches)
    seconds = time.perf_counter() - began
    onnx.save(model, str(args.output))
    after, zeros = count(model)
    return {**result, "params_after": after, "zeros_after": zeros, "prepared": prepared,
            "seconds": round(seconds, 2)}  # fmt: skip


def _matching(method: Method, original: Any, path: Path, batches: list[Batch]) -> tuple[str | None, Any]:
    """The first form of the graph in which the method removes anything, and how it was prepared."""
    for prepared, graph in _graphs(original, path, batches):
        if count(_prune(method, graph, batches, _PROBE_RATIO)) != count(graph):
            return prepared, graph
    raise RivalError(
        f"{method.prune} matches nothing in this graph, nor after simplify or ONNX Runtime's extended optimization "
        "with or without stated shapes"
    )


def count(model: Any) -> tuple[int, int]:
    """The elements of the float initializers, and how many of them are zero."""
    from onnx import numpy_helper

    elements = zeros = 0
    for tensor in model.graph.initializer:
        if tensor.data_type in _FLOATS:
            values = numpy_helper.to_array(tensor)
            elements += values.size
            zeros += int(values.size - np.count_nonzero(values))
    return elements, zeros


def feeds(model: Any, source: Path, batch: int | None, samples: int | None = None) -> Iterator[Batch]:
    """The calibration data by batches; an input that it lacks gets an empty array of its type.

    Args:
        model: the model, for its inputs.
        source: .npz, arrays by input name, samples on axis 0.
        batch: samples at once; None for 256, or 8 where inputs are integers (sequences of token ids).
        samples: the first so many only.

    Raises:
        RivalError: no array of the file is an input of the model.
    """
    from onnx import helper

    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in held]
    with np.load(source, allow_pickle=False) as file:
        arrays = {value.name: file[value.name] for value in inputs if value.name in file.files}
    if not arrays:
        raise RivalError(f"{source} has none of the model's inputs {[value.name for value in inputs]}")
    batch = batch or (8 if any(np.issubdtype(array.dtype, np.integer) for array in arrays.values()) else 256)
    total = min(len(array) for array in arrays.values())
    for start in range(0, min(total, samples or total), batch):
        rows = {name: array[start : start + batch] for name, array in arrays.items()}
        size = len(next(iter(rows.values())))
        for value in inputs:
            if value.name not in rows:
                kind = value.type.tensor_type
                shape = [size, *(d.dim_value for d in kind.shape.dim[1:])]  # 0 where the size is free
                rows[value.name] = np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind.elem_type))
        yield rows


def _graphs(original: Any, path: Path, batches: list[Batch]) -> Iterator[tuple[str | None, Any]]:
    """The graph as it is, then in the forms that onnxsim documents it recognizes."""
    import onnxsim

    yield None, original
    simplified, _ = onnxsim.simplify(original)
    yield "simplify", simplified
    optimized = _optimized(path)
    yield "onnxruntime extended", optimized
    yield "onnxruntime extended, shapes stated", with_shapes(optimized, batches[0])


def _optimized(path: Path) -> Any:
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "optimized.onnx")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = target
        options.log_severity_level = 3
        # Folding would untie a transposed embedding from the output layer and so add a copy of it.
        onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
        return onnx.load(target)


def with_shapes(model: Any, batch: Batch) -> Any:
    """The model with the shapes of its residual stream stated, which onnx cannot infer through fused norms.

    Args:
        model: the model; its first input is [batch, sequence].
        batch: inputs to run it on once.

    Returns:
        A copy in which every float tensor [batch, sequence, width] that an Add or a norm gives has its shape.
    """
    import onnx
    import onnxruntime
    from onnx import helper

    stated, probed = onnx.ModelProto(), onnx.ModelProto()
    stated.CopyFrom(model)
    probed.CopyFrom(model)
    first = model.graph.input[0]
    free = [dim.dim_param or dim.dim_value for dim in first.type.tensor_type.shape.dim]
    known = {value.name for value in (*model.graph.output, *model.graph.value_info)}
    makers = [node for node in model.graph.node if node.op_type == "Add" or node.op_type in _NORMS]
    names = [name for node in makers for name in node.output[:1] if name not in known]
    probed.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    sample = {name: array[:1] for name, array in batch.items()}
    leading = sample[first.name].shape
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        probed.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    for name, value in zip(names, session.run(names, sample) if names else (), strict=True):
        if value.dtype == np.float32 and value.ndim == 3 and value.shape[:2] == leading:
            stated.graph.value_info.append(helper.make_tensor_value_info(name, 1, [*free, value.shape[2]]))
    return stated


def _prune(method: Method, model: Any, batches: list[Batch], ratio: float) -> Any:
    import onnxsim

    data: dict[str, Any] = {"calibration_data": batches} if method.calibrated else {}
    return without_unused(getattr(onnxsim, method.prune)(model, sparsity=1 - ratio, **data))


def without_unused(model: Any) -> Any:
    """The model, its initializers that nothing reads removed: masking leaves the unmasked weights behind."""
    read = {value.name for value in model.graph.output} | set(_read(model.graph))
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _read(graph: Any) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _read(inner)


def _fit(original: Any, pruned: Any, batches: list[Batch]) -> Any:
    import onnxsim

    return onnxsim.apply_pruning_finetune(original, pruned, calibration_data=batches)


def _train(original: Any, pruned: Any, batches: list[Batch]) -> Any:
    import onnxsim

    options: dict[str, Any] = {
        "calibration_data": batches,
        "batch_size": _TRAIN_BATCH,
        "learning_rate": _TRAIN_RATE,
    }
    graph = original.graph
    if len(batches[0]) == 1 and len(graph.output) == 1 and graph.input[0].type.tensor_type.elem_type == 1:
        # Every layer between the model's ends was cut, so the one block with the same ends is the whole model.
        return onnxsim.apply_block_finetune(
            original, pruned, graph.input[0].name, graph.output[0].name, **options
        )
    model, blocks = onnxsim.apply_block_finetune_all_blocks(original, pruned, **options)
    if not blocks:
        raise RivalError("apply_block_finetune_all_blocks finds no block to train in this graph")
    return model


_RECOVERIES: dict[str, Callable[[Any, Any, list[Batch]], Any]] = {"fit": _fit, "train": _train}

if __name__ == "__main__":
    sys.exit(main())
