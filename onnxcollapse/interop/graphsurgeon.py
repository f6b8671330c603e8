# SPDX-License-Identifier: Apache-2.0
"""The boundary to onnx-graphsurgeon: a surgeon's script runs as a pass.

The skeleton crosses over without the weights, which the script still reads through `Constant.values`; what comes
back gets its weights, and by name what graphsurgeon drops on a round trip: metadata, doc strings, function
overloads, overridable inputs, and attributes of types that it does not know.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from onnxcollapse.calibration.statistics import Statistics
from onnxcollapse.errors import ModelError, OnnxCollapseError, OptionError
from onnxcollapse.model import Model
from onnxcollapse.rewriting import Decline, GraphSite, Pass, Proposal


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

    def __post_init__(self) -> None:
        if not Path(self.script).is_file():
            raise ValueError(f"script '{self.script}' does not exist; give script=FILE.py")

    @property
    def exact(self) -> bool:
        """As the user promises."""
        return self.keeps_function

    def sites(self, model: Model) -> Iterator[GraphSite | Decline]:
        """Offers the whole graph; fails early when the script has no such function."""
        _load(self.script, self.function)
        yield GraphSite()

    def propose(self, site: GraphSite, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Proposes to run the script; what it does is known only once it has run."""
        yield Proposal(site.name, detail=f"edited by {Path(self.script).name}:{self.function}")

    def rewrite(self, model: Model, site: GraphSite, proposal: Proposal) -> None:
        """Takes the graph over, lets the script edit it, and brings it back.

        Raises:
            ModelError: graphsurgeon cannot hold the model.
            OptionError: The script fails or leaves something that is no graph.
        """
        import onnx_graphsurgeon as gs

        from onnxcollapse.interop.passage import Passage

        edit = _load(self.script, self.function)
        try:
            passage = Passage(model.ir)
        except Exception as error:
            raise ModelError(f"graphsurgeon cannot take the model over: {_what(error)}") from error
        try:
            with _importable(self.script):
                edited = edit(passage.graph)
        except (Exception, SystemExit) as error:
            raise OptionError(
                f"graphsurgeon script '{self.script}': {self.function} fails with {_what(error)}"
            ) from error
        if not isinstance(edited, gs.Graph | None):
            raise OptionError(
                f"graphsurgeon script '{self.script}': {self.function} returns a {type(edited).__name__}; "
                "return a gs.Graph, or nothing after editing the one given"
            )
        try:
            model.ir = passage.back(passage.graph if edited is None else edited)
        except Exception as error:
            raise OptionError(
                f"graphsurgeon script '{self.script}' leaves a broken graph: {_what(error)}"
            ) from error


def _what(error: BaseException) -> str:
    """What went wrong, and of which kind it is where it is not one of ours, which speak for themselves."""
    return str(error) if isinstance(error, OnnxCollapseError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _importable(script: str) -> Iterator[None]:
    """Lets a script import what lies beside it, as if Python had been started with it."""
    folder = str(Path(script).resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _load(script: str, function: str) -> Callable[[Any], Any]:
    """Imports the script's function.

    Raises:
        OptionError: No such file or function, or the file cannot be imported.
    """
    path = Path(script)
    name = f"onnxcollapse_script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OptionError(f"graphsurgeon script '{script}' is no Python file; give script=FILE.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        with _importable(script):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise OptionError(f"graphsurgeon script '{script}' cannot be imported: {_what(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise OptionError(f"graphsurgeon script '{script}' has no function '{function}'; give function=NAME")
    return found  # type: ignore[no-any-return]
