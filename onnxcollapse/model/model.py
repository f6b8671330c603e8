# SPDX-License-Identifier: Apache-2.0
"""The container: a graph whose weights stay in their files, its folder, its companions and its signature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx_ir
import onnx_ir as ir

from onnxcollapse.model import carry, companions, files, loading, saving
from onnxcollapse.model.skeleton import Imprint, Skeleton, clone, for_session, imprint

Kind = Literal["tensor", "sparse", "sequence", "optional", "other"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of an input or output.

    Attributes:
        name: Its name.
        dtype: The element type; None when the model does not say.
        shape: A size, a symbol's name or None (unknown) for each axis; None when the rank is unknown.
        kind: What it is; only "tensor" can be fed as one array.
    """

    name: str
    dtype: ir.DataType | None
    shape: tuple[int | str | None, ...] | None
    kind: Kind = "tensor"


@dataclass(frozen=True)
class Signature:
    """Inputs that must be given, outputs, and inputs with a default (`overridable`), in the model's order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    overridable: tuple[TensorSpec, ...] = ()


@dataclass(eq=False)
class Model:
    """An ONNX model.

    Attributes:
        ir: The graph. It is swapped as a whole, on roll-back too, so values are never kept across transactions.
        path: The .onnx file that it came from.
        external: Whether its weights lay in external data.
        companions: Files that go where it goes (config.json, tokenizer files, ...); only for models from a
        folder.
        folder: Whether it was loaded as a folder, and so is saved as one.
        layers_before: Layers that the model it was made from has; 0 when none is gone.
        layers_left: Which of them are left, in order: config files say so when it is saved.
        followers: Graphs of the same layers, with tensors of the same names: every rewrite is applied to them as well.
    """

    ir: onnx_ir.Model
    path: Path | None = None
    external: bool = False
    companions: tuple[Path, ...] = ()
    folder: bool = False
    layers_before: int = 0
    layers_left: tuple[int, ...] = ()
    followers: tuple[Model, ...] = ()

    @property
    def graph(self) -> onnx_ir.Graph:
        """The main graph."""
        return self.ir.graph

    @classmethod
    def load(cls, source: str | Path) -> Model:
        """Load an .onnx file, or the one in a folder; weights stay where they are.

        Raises:
            ModelError: There is no such model, it is damaged, or its external data is missing or elsewhere.
        """
        source = Path(source)
        path = files.find_model(source)
        loaded = loading.load(path)
        beside: tuple[Path, ...] = ()
        if source.is_dir():
            beside = files.find_companions(path.absolute(), loaded.weight_files, _encoder_of(path.absolute()))
        return cls(loaded.model, path, loaded.external, beside, source.is_dir())

    def save(self, target: str | Path, *, external: bool | None = None) -> None:
        """Write the model at once or not at all; it stays usable, even when its own source is replaced.

        Args:
            target: An .onnx file. A folder, if it exists as one or the model came from one: then the file
                keeps its name and the companions are copied along.
            external: Put the weights into `<file>.data`. None: as loaded, and when they exceed 2 GB.

        Raises:
            ModelError: It cannot be written; what was there before is untouched.
        """
        target = Path(target)
        if external is None and self.external:
            external = True
        if not self._means_folder(target):
            saving.save(self.ir, target, external=external)
            return
        name = self.path.name if self.path else "model.onnx"
        with files.existing(target):
            saving.save(
                self.ir, target / name, external=external, companions=self.companions, edit=self._followed
            )
        if any(companion.parent == target.absolute() for companion in self.companions):
            self.layers_before, self.layers_left = 0, ()  # the companions that it goes by have followed

    def _followed(self, companion: Path) -> str | None:
        """New text of a config file when layers are gone, else None."""
        if not self.layers_before:
            return None
        looks_at_encoder = any("encoder" in (value.name or "") for value in self.graph.inputs)
        return companions.follow(
            companion, self.layers_before, self.layers_left, decoder_of_two=looks_at_encoder
        )

    def _means_folder(self, target: Path) -> bool:
        return target.is_dir() or (self.folder and target.suffix != ".onnx")

    def clone(self) -> Model:
        """A copy of the graph, and of those that follow it, that shares the weights."""
        return replace(self, ir=clone(self.ir), followers=tuple(other.clone() for other in self.followers))

    def alone(self) -> Model:
        """The same graph without those that follow it, for copies that are only measured."""
        return replace(self, followers=())

    def become(self, other: Model) -> None:
        """Take over another's graph, and those that follow it."""
        self.ir, self.followers = other.ir, other.followers

    def to_bytes(self) -> bytes:
        """The whole model with its weights inside; raises ModelError above 2 GB."""
        return saving.to_bytes(self.ir)

    def skeleton(self) -> Skeleton:
        """The model for an ONNX Runtime session that gets the big weights in memory."""
        return for_session(self.ir)

    def imprint(self) -> Imprint:
        """What tells it from models that compute something else."""
        return imprint(self.ir)

    def signature(self) -> Signature:
        """Inputs and outputs as a caller sees them."""
        graph = self.graph
        return Signature(
            inputs=tuple(_spec(v) for v in graph.inputs if not v.is_initializer()),
            outputs=tuple(_spec(v) for v in graph.outputs),
            overridable=tuple(_spec(v) for v in graph.inputs if v.is_initializer()),
        )


def _encoder_of(path: Path) -> list[Path]:
    """The files of the encoder beside a merged decoder, its external data with it."""
    encoder = path.with_name(files.ENCODER)
    if path.name != files.MERGED or not encoder.is_file():
        return []
    return [encoder, *sorted(loading.load(encoder).weight_files)]


def _spec(value: ir.Value) -> TensorSpec:
    shape = None
    if value.shape is not None:
        shape = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    return TensorSpec(value.name or "", value.dtype, shape, _kind(value))


def _kind(value: ir.Value) -> Kind:
    if carry.type_name(value) is not None:
        return "other"
    kinds: dict[type, Kind] = {
        ir.SparseTensorType: "sparse",
        ir.SequenceType: "sequence",
        ir.OptionalType: "optional",
    }
    return kinds.get(type(value.type), "tensor")
