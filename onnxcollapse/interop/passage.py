# SPDX-License-Identifier: Apache-2.0
"""One crossing of a model over to onnx-graphsurgeon and back, without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from onnxcollapse.errors import ModelError
from onnxcollapse.interop.restore import restore
from onnxcollapse.model import Model, carry, checks, edit, loading, scratch, skeleton, walk, weights

LOCATION = "onnxcollapse.graphsurgeon"


class Passage:
    """Takes a model over on construction and back with `back`.

    Big weights cross as references; a script that reads one gets an array from where it is mapped, and those that
    no script has changed come back as the very tensors that they were.

    Attributes:
        graph: The graph for the script.

    Raises:
        Exception: Whatever graphsurgeon raises for a model that it cannot hold.
    """

    def __init__(self, model: ir.Model) -> None:
        self._tensors: list[ir.TensorProtocol] = []
        self._read: dict[int, tuple[np.ndarray, Weight]] = {}
        self.without_weights = False
        self._original = skeleton.encode(model, self._detach)
        with _quiet():
            self.graph = gs.import_onnx(_digestible(self._original))
            for constant in _constants(self.graph):
                if isinstance(constant._values, LazyValues) and not isinstance(
                    constant._values, SparseValues
                ):
                    constant._values = Weight(self, constant._values.tensor)
            self._before = self._export(self.graph)

    def back(self, graph: gs.Graph) -> ir.Model:
        """Brings an edited graph back.

        Raises:
            ModelError: It has a cycle, reads or returns what nothing makes, or returns nothing.
            Exception: Whatever graphsurgeon raises for a graph that it cannot export.
        """
        with _quiet():
            for constant in _constants(graph):
                if isinstance(constant._values, np.ndarray) and constant._export_dtype is None:
                    constant._values = self._stored(constant.name, constant._values)
            after = self._export(graph)
        if not after.graph.output:
            raise ModelError("the graph has no outputs; leave at least one")
        changed = _changed(self._before.graph, after.graph)
        restore(self._original, self._before, after)
        made = loading.from_proto(after)
        walk.map_tensors(made, self._attach)
        checks.settle(made)
        _correct_shapes(made, changed)
        return made

    def held(self, proto: onnx.TensorProto) -> ir.TensorProtocol | None:
        """The tensor that a reference stands for."""
        if proto.data_location != onnx.TensorProto.EXTERNAL:
            return None
        entries = {entry.key: entry.value for entry in proto.external_data}
        return self._tensors[int(entries.get("offset", 0))] if entries.get("location") == LOCATION else None

    def remember(self, array: np.ndarray, weight: Weight) -> None:
        """Notes what a script has read, so that it can come back as it was."""
        self._read[id(array)] = (array, weight)

    def _export(self, graph: gs.Graph) -> onnx.ModelProto:
        self.without_weights = True
        try:
            return gs.export_onnx(graph, do_type_check=False)
        finally:
            self.without_weights = False

    def _detach(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Leaves a numbered reference for a big tensor; small ones cross as they are."""
        if not skeleton.is_big(tensor):
            return tensor
        self._tensors.append(tensor)
        return skeleton.reference(tensor, LOCATION, len(self._tensors) - 1)

    def _attach(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not isinstance(tensor, ir.ExternalTensor) or str(tensor.location) != LOCATION:
            return tensor
        found = self._tensors[tensor.offset or 0]
        if (found.doc_string or "") != (tensor.doc_string or ""):  # a new tensor in an old one's place
            found.doc_string = tensor.doc_string
        if found.metadata_props != tensor.metadata_props:
            found.metadata_props.update(tensor.metadata_props)
        return found

    def _stored(self, name: str, array: np.ndarray) -> Weight:
        """What holds an array that a script has read, changed or made."""
        _, weight = self._read.get(id(array), (None, None))
        if weight is not None and _same_bits(weight.array(), array):
            return weight
        if array.dtype.kind in "OSU":
            return Weight(self, onnx.numpy_helper.from_array(array, name))
        array = np.array(array, order="C")
        tensor = scratch.hold(array, ir.DataType.from_numpy(array.dtype), name)
        return Weight(self, ir.to_proto(self._detach(tensor)))


class Weight(LazyValues):
    """The values of a constant: a small tensor itself, or a reference to a big one.

    Args:
        passage: The crossing that the reference belongs to.
        proto: Either of the two.
    """

    def __init__(self, passage: Passage, proto: onnx.TensorProto) -> None:
        self._passage, self._proto = passage, proto
        super().__init__(proto)

    @property
    def tensor(self) -> onnx.TensorProto:
        """What an export writes: a reference when we export, else, as in constant folding, the tensor itself."""
        copy = onnx.TensorProto()
        copy.CopyFrom(self._proto)
        held = self._passage.held(self._proto)
        if held is None or self._passage.without_weights:
            return copy
        for field in ("external_data", "data_location"):
            copy.ClearField(field)
        copy.raw_data = held.tobytes()
        return copy

    @tensor.setter
    def tensor(self, proto: onnx.TensorProto) -> None:
        """Does nothing: the base class sets what it was made with."""

    def array(self) -> np.ndarray:
        """The values as they are stored."""
        held = self._passage.held(self._proto)
        return onnx.numpy_helper.to_array(self._proto) if held is None else weights.array(held)

    def load(self) -> np.ndarray:
        """The values for a script to read and to change."""
        array = np.array(self.array())
        self._passage.remember(array, self)
        return array


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind == "O":
        return a.tolist() == b.tolist()
    flat_a, flat_b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return np.array_equal(flat_a, flat_b)


def _changed(before: onnx.GraphProto, after: onnx.GraphProto) -> set[str]:
    """Names of the tensors that are other ones, or made in another way, than before."""
    known = {item.SerializeToString() for item in (*before.node, *before.initializer, *before.input)}
    sources = [
        item.name for item in (*after.initializer, *after.input) if item.SerializeToString() not in known
    ]
    made = [node.output for node in after.node if node.SerializeToString() not in known]
    return {*sources, *(name for outputs in made for name in outputs)}


def _correct_shapes(model: ir.Model, changed: set[str]) -> None:
    """Infers the shapes behind what has changed again where those declared contradict them.

    A script that narrows a weight need not know of the shapes that the model declares; runtimes refuse stale ones.
    """
    reached = set(changed)
    for node in model.graph:
        inner = [item for graph in walk.subgraphs(node) for held in walk.nested(graph) for item in held]
        read = {value.name for item in (node, *inner) for value in item.inputs if value is not None}
        if read & reached:
            reached.update(value.name or "" for value in node.outputs)
    trial = Model(model).clone()
    values = [value for node in trial.graph for value in node.outputs if value.name in reached]
    edit.refresh_shapes(trial, values)
    inferred = {value.name: value.shape for value in values}
    for node in model.graph:
        for value in node.outputs:
            new = inferred.get(value.name)
            if new is not None and value.shape is not None and _contradict(value.shape, new):
                value.shape = new.copy()


def _contradict(a: ir.Shape, b: ir.Shape) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) != len(b) or any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in pairs)


def _digestible(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without what graphsurgeon fails on: types that are no tensors, empty lists, texts that are not UTF-8."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for graph in carry.proto_graphs(copy):
        infos = [*graph.value_info]
        if isinstance(graph, onnx.GraphProto):
            infos += [*graph.input, *graph.output]
        for info in infos:
            if info.type.WhichOneof("value") != "tensor_type":
                info.ClearField("type")
        for node in graph.node:
            kept = [attribute for attribute in node.attribute if _is_digestible(attribute)]
            if len(kept) < len(node.attribute):
                node.ClearField("attribute")
                node.attribute.extend(kept)
    return copy


def _is_digestible(attribute: onnx.AttributeProto) -> bool:
    kinds = onnx.AttributeProto
    if attribute.ref_attr_name:
        return True
    texts = [attribute.s] if attribute.type == kinds.STRING else attribute.strings
    try:
        for text in texts:
            text.decode()
    except UnicodeDecodeError:
        return False
    lists = {kinds.INTS: attribute.ints, kinds.FLOATS: attribute.floats, kinds.STRINGS: attribute.strings}
    return len(lists.get(attribute.type, (None,))) > 0


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Yields the constants of a graph, of its functions, and of the subgraphs and attributes of their nodes."""
    for root in [graph, *graph.functions]:
        yield from _nested_constants(root)


def _nested_constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            yield tensor
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Constant):
                yield value
            elif isinstance(value, gs.Graph):
                yield from _nested_constants(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps graphsurgeon from warning of losses that are made good."""
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        yield
