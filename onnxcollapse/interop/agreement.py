# SPDX-License-Identifier: Apache-2.0
"""Whether an exported model computes what its source does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir

from onnxcollapse.calibration.filling import complete
from onnxcollapse.calibration.sessions import open_session
from onnxcollapse.errors import OnnxCollapseError
from onnxcollapse.interop.foreign import first_line
from onnxcollapse.model import Model, Signature, walk

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """One run of the model.

    Attributes:
        feeds: Arrays by input name; masks, positions and empty caches are filled in.
        expected: What the source computes, by output name.
        carried: Outputs of the run before that are fed again, by input name.
    """

    feeds: Arrays
    expected: Arrays
    carried: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """How far an output is from the source's: the worst of all runs.

    Attributes:
        max_abs: Largest absolute difference.
        rel_l2: L2 norm of the difference, relative to that of the source's output.
    """

    max_abs: float
    rel_l2: float


@dataclass(frozen=True)
class Agreement:
    """What a check found.

    Attributes:
        outputs: The difference of each output that was compared.
        problem: Why the model is not what its source is; None when it is.
    """

    outputs: dict[str, Difference]
    problem: str | None = None


def check(model: Model, runs: Iterable[Run], tolerance: float, provider: str = "auto") -> Agreement:
    """Runs a model on what its source ran on.

    What is in bf16, for which ONNX Runtime has few kernels, is computed in fp32 with the weights rounded to bf16; that
    its types fit is then checked by the rules of ONNX.

    Args:
        model: The model.
        runs: What the source computed.
        tolerance: Largest relative L2 distance of any output.
        provider: Where it runs.
    """
    found: dict[str, Difference] = {}
    computed: Arrays = {}
    wide = _widened(model)
    if wide is not model and (problem := _invalid(model)) is not None:
        return Agreement(found, problem)
    with contextlib.ExitStack() as stack:
        session = None
        for run in runs:
            try:
                session = session or stack.enter_context(open_session(wide, provider=provider))
                computed = session.run(_feeds(run, computed, wide.signature()))
            except OnnxCollapseError as error:
                return Agreement(found, str(error))
            for name, expected in run.expected.items():
                if (problem := _misfit(name, computed, expected)) is not None:
                    return Agreement(found, problem)
                found[name] = _worse(found.get(name), difference(computed[name], expected))
    return Agreement(found, _beyond(found, tolerance))


def difference(computed: np.ndarray, expected: np.ndarray) -> Difference:
    """How far an array is from the expected one of the same shape; what is equal in both, NaN too, is no difference."""
    a, b = computed.astype(np.float64), expected.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        distances = np.where(same, 0.0, np.abs(a - b))
    norm, size = np.linalg.norm(distances), np.linalg.norm(b[np.isfinite(b)])
    relative = 0.0 if norm == 0 else (norm / size if size else math.inf)
    return Difference(float(distances.max(initial=0.0)), float(relative))


def _feeds(run: Run, before: Arrays, signature: Signature) -> Arrays:
    """All inputs of a run, floats in the types that the model takes."""
    given = {**run.feeds, **{name: before[output] for name, output in run.carried.items()}}
    feeds = complete(given, signature)
    for spec in signature.inputs:
        array = feeds[spec.name]
        if spec.dtype is not None and spec.dtype.is_floating_point() and array.dtype.kind == "f":
            feeds[spec.name] = array.astype(spec.dtype.numpy())
    return feeds


def _misfit(name: str, computed: Arrays, expected: np.ndarray) -> str | None:
    if name not in computed:
        return f"output {name!r} of the source is not among the export's ({', '.join(computed)})"
    if computed[name].shape != expected.shape:
        shapes = f"{list(computed[name].shape)}, the source's is {list(expected.shape)}"
        return f"output {name!r} has the shape {shapes}"
    return None


def _worse(a: Difference | None, b: Difference) -> Difference:
    if a is None:
        return b
    worst = [float(np.maximum(*pair)) for pair in ((a.max_abs, b.max_abs), (a.rel_l2, b.rel_l2))]  # NaN stays
    return Difference(*worst)


def _beyond(found: Mapping[str, Difference], tolerance: float) -> str | None:
    if not found:
        return "no output could be compared"
    name, worst = max(found.items(), key=lambda item: _order(item[1].rel_l2))
    if worst.rel_l2 <= tolerance:
        return None
    return (
        f"output {name!r} differs from the source's by {worst.rel_l2:.3g} rel-l2 (largest difference "
        f"{worst.max_abs:.3g}, tolerance {tolerance:g})"
    )


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _widened(model: Model) -> Model:
    """The model itself, or a copy in fp32 of one that has tensors in bf16."""
    if not any(_is_narrow(value.dtype) for graph in walk.graphs(model.ir) for value in walk.values(graph)):
        return model
    wide = model.clone()
    walk.map_tensors(wide.ir, _widened_tensor)
    for graph in walk.graphs(wide.ir):
        for value in walk.values(graph):
            if _is_narrow(value.dtype):
                value.dtype = ir.DataType.FLOAT
        for node in graph:
            for name in ("to", "dtype"):
                held = node.attributes.get(name)
                if held is not None and not held.is_ref() and held.value == ir.DataType.BFLOAT16:
                    node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    return wide


def _invalid(model: Model) -> str | None:
    """Why the graph breaks the rules of ONNX; None when it does not."""
    try:
        onnx.shape_inference.infer_shapes(model.skeleton().proto, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        return f"the model is not valid ONNX: {first_line(error)}"
    return None


def _widened_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not _is_narrow(tensor.dtype):
        return tensor
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _is_narrow(dtype: ir.DataType | None) -> bool:
    return dtype is ir.DataType.BFLOAT16
