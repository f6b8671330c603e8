# SPDX-License-Identifier: Apache-2.0
"""All or nothing: an edit of a model that is undone unless it is committed."""

from __future__ import annotations

import types
from collections.abc import Mapping

from onnxcollapse.model import Model, edit, flops, size
from onnxcollapse.rewriting.proposal import Saving


class Transaction:
    """Restores a model on leaving the ``with`` block, unless `commit` was called.

    Weights are immutable and shared, so the snapshot is a copy of the graph's skeleton only. Objects read from
    the graph inside the block (sites, values) do not survive a roll-back.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._snapshot = model.clone()
        self._committed = False

    def __enter__(self) -> Transaction:
        return self

    def commit(self) -> None:
        """Keeps the edits.

        Raises:
            ModelError: The graph is no valid graph any more; it is rolled back.
        """
        edit.finish(self._model)
        self._committed = True

    def undo(self) -> None:
        """Rolls back at the end of the block even after a commit."""
        self._committed = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if not self._committed:
            self._model.become(self._snapshot)


def extent(model: Model, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Saving:
    """Measures all that can be saved; FLOPs at the given input shapes, with dynamic dimensions 1 otherwise."""
    whole = size(model)
    if shapes is not None:  # of more than this model's inputs: a removed layer has taken its caches along
        names = {value.name for value in model.graph.inputs}
        shapes = {name: shape for name, shape in shapes.items() if name in names}
    return Saving(whole.params, whole.bytes, flops(model, shapes=shapes), whole.nodes)
