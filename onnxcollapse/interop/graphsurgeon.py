# SPDX-License-Identifier: Apache-2.0
"""The boundary to onnx-graphsurgeon: a surgeon's script runs as a pass.

The skeleton crosses over without the weights, which the script still reads through `Constant.values`; what comes
back gets its weights, and by name what graphsurgeon drops on a round trip: metadata, doc strings, function
overloads, overridable inputs, and attributes of types that it does not know.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from onnxcollapse.calibration.statistics import Statistics
from onnxcollapse.errors import OptionError
from onnxcollapse.interop.restore import restore
from onnxcollapse.model import Model, skeleton, walk, weights
from onnxcollapse.rewriting import Decline, GraphSite, Pass, Proposal

logger = logging.getLogger(__name__)

LOCATION = "onnxcollapse.graphsurgeon"


@dataclass(frozen=True)
class GraphSurgeonPass(Pass):
    """Runs a graphsurgeon script: a function that edits the `gs.Graph` it is given or returns another.

    Attributes:
        script: Path of a Python file.
        function: Name of the function in it.
        keeps_function: Whether the script promises to leave the outputs as they are: then it runs without calibration
            data, and where there is some its promise is checked; otherwise its effect is measured against the budget.
    """

    name: ClassVar[str] = "graphsurgeon"
    on_request: ClassVar[bool] = True
    script: str
    function: str = "edit"
    keeps_function: bool = False

    @property
    def exact(self) -> bool:
        """As the user promises."""
        return self.keeps_function

    def sites(self, model: Model) -> Iterator[GraphSite | Decline]:
        """Offers the whole graph; fails early when there is no such script or function."""
        _load(self.script, self.function)
        yield GraphSite()

    def propose(self, site: GraphSite, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Proposes to run the script; what it does is known only once it has run."""
        yield Proposal(site.name, detail=f"edited by {Path(self.script).name}:{self.function}")

    def rewrite(self, model: Model, site: GraphSite, proposal: Proposal) -> None:
        """Takes the graph over, lets the script edit it, and brings it back.

        Raises:
            OptionError: The script fails or leaves something that is no graph.
        """
        edit = _load(self.script, self.function)
        passage = _Passage(model)
        try:
            edited = edit(passage.graph)
        except Exception as error:
            raise OptionError(
                f"graphsurgeon script '{self.script}': {self.function} failed with {type(error).__name__}: {error}"
            ) from error
        try:
            model.ir = passage.back(passage.graph if edited is None else edited)
        except Exception as error:
            raise OptionError(
                f"graphsurgeon script '{self.script}' left a graph that cannot be read back: {error}"
            ) from error


class _Passage:
    """One crossing: over on construction, `back` once the script is done."""

    def __init__(self, model: Model) -> None:
        import onnx_graphsurgeon as gs

        self._gs = gs
        self._original = model.ir
        self._tensors: list[ir.TensorProtocol] = []
        self.graph = gs.import_onnx(skeleton.encode(model.ir, self._detach))
        for constant in _constants(gs, self.graph):
            self._connect(constant)
        self._untouched = gs.export_onnx(self.graph)

    def _detach(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Leaves a numbered placeholder for a big tensor; small ones cross as they are."""
        if not skeleton.is_big(tensor):
            return tensor
        self._tensors.append(tensor)
        return skeleton.reference(tensor, LOCATION, len(self._tensors) - 1)

    def _connect(self, constant: Any) -> None:
        """Lets a placeholder's values be read from where they are mapped."""
        number = _placeholder_number(constant)
        if number is None:
            return
        tensor, values = self._tensors[number], constant._values

        def load() -> np.ndarray:
            return np.array(weights.array(tensor))

        values.load = load

    def back(self, graph: Any) -> ir.Model:
        if not isinstance(graph, self._gs.Graph):
            raise TypeError(f"the function returned a {type(graph).__name__}, not a gs.Graph or None")
        proto = self._gs.export_onnx(graph)
        made = ir.from_proto(proto)
        walk.map_tensors(made, self._reattach)
        restore(self._original, made, before=self._untouched, after=proto)
        return made

    def _reattach(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == LOCATION:
            found = self._tensors[tensor.offset or 0]
            found.name = tensor.name
            return found
        return tensor


def _placeholder_number(constant: Any) -> int | None:
    proto = getattr(constant._values, "tensor", None)
    if not isinstance(proto, onnx.TensorProto) or proto.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in proto.external_data}
    return int(entries["offset"]) if entries.get("location") == LOCATION else None


def _constants(gs: ModuleType, graph: Any) -> Iterator[Any]:
    """Yields the constants of a graph, of its subgraphs and functions, and of its nodes' attributes."""
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            yield tensor
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Constant):
                yield value
            elif isinstance(value, gs.Graph):
                yield from _constants(gs, value)
    for function in getattr(graph, "functions", None) or []:
        if function is not graph:
            yield from _constants(gs, function)


def _load(script: str, function: str) -> Callable[[Any], Any]:
    """Imports the script's function.

    Raises:
        OptionError: No such file or function, or the file cannot be imported.
    """
    path = Path(script)
    if not path.is_file():
        raise OptionError(f"graphsurgeon script '{script}' does not exist; give script=FILE.py")
    spec = importlib.util.spec_from_file_location(f"onnxcollapse_script_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise OptionError(f"graphsurgeon script '{script}' is no Python file; give script=FILE.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise OptionError(f"graphsurgeon script '{script}' cannot be imported: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise OptionError(f"graphsurgeon script '{script}' has no function '{function}'; give function=NAME")
    return found  # type: ignore[no-any-return]
