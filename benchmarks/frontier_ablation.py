# SPDX-License-Identifier: Apache-2.0
"""narrow-ffn with one of its parts taken away, so that a benchmark can tell what each part is worth.

The pass is registered as any third party's is: by the metadata of a distribution on the path, which `registered`
writes. Nothing of it is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

from onnxcollapse.passes.narrow_ffn import Channels, NarrowFfn
from onnxcollapse.passes.narrowing_criteria import Choice, Fitted

from onnxcollapse.calibration.leastsquares import relative_error
from onnxcollapse.calibration.statistics import Statistics
from onnxcollapse.model import Model
from onnxcollapse.rewriting import Proposal
from onnxcollapse.structure import HiddenLayer, hidden_layers

_CHECKOUT = Path(__file__).parents[1]
_ENTRY = "[onnxcollapse.passes]\nnarrow-ffn-ablated = benchmarks.frontier_ablation:AblatedNarrowFfn\n"


@dataclass(frozen=True)
class AblatedNarrowFfn(NarrowFfn):
    """narrow-ffn without one of its parts.

    Attributes:
        share: Every layer is offered this share of its channels and no other; 0 offers all widths.
        fitted: Whether the weights that remain are fitted; else they stay, and only the choice is the residual's.
        again: Whether each layer is fitted again to what the rewritten model before it gives.
        path: Linear paths offered beside the channels: ``any``, or ``full`` rank only.
    """

    name: ClassVar[str] = "narrow-ffn-ablated"
    share: float = 0.0
    fitted: bool = True
    again: bool = True
    path: Literal["any", "full"] = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.share < 1.0:
            raise ValueError(f"share {self.share} must lie in [0, 1)")

    def refit(self, site: Channels, proposal: Proposal, statistics: Statistics) -> Proposal | None:
        """Fits again, or leaves the proposal as the original model's features gave it."""
        return super().refit(site, proposal, statistics) if self.again else None

    def _counts(self, layer: HiddenLayer) -> list[int]:
        return super()._counts(layer) if not self.share else [uniform(layer.width, self.share, self.align)]

    def _curve(self, site: Channels, statistics: Statistics, only: Choice | None) -> list[Fitted]:
        found = super()._curve(site, statistics, only)
        if self.path == "full":
            found = [item for item in found if item.choice.path != "low"]
        if self.fitted:
            return found
        return [self._kept(site, statistics, item) for item in found if item.choice.path == "none"]

    def _kept(self, site: Channels, statistics: Statistics, item: Fitted) -> Fitted:
        """The same channels with the weights that they had."""
        layer, with_input = site.layer, self._with_input(site)
        if self._gram(site, with_input) not in statistics:
            with_input = not with_input  # as in narrow-ffn
        heldout, place = statistics.heldout(self._gram(site, with_input)), 2 if with_input else 1
        rows = layer.matrix().reshape(layer.width, layer.group, -1)[item.keep].reshape(-1, layer.d_out)
        columns = heldout.columns(place).reshape(layer.width, -1)[item.keep].ravel()
        error = relative_error(heldout, columns, place + 1, rows, layer.offset())
        kept = {"matrix": rows, "offset": layer.offset(), "error": error}
        return dataclasses.replace(item, **kept, detail="weights as they were")


def uniform(width: int, share: float, align: int = 8) -> int:
    """The multiple of `align` next below a share of a width; of 1 where the layer is narrow, as in narrow-ffn."""
    align = align if width >= 8 * align else 1
    return max(int(width * share + 1e-6) // align, 1) * align


def ffn_params(model: Model) -> int:
    """How many parameters leave when all hidden channels do; weights between two hidden layers count twice."""
    return sum(layer.width * (_taps(layer) + layer.group * layer.d_out) for layer in _layers(model))


def uniform_share(model: Model, total: int, target: float) -> float:
    """The largest share of all hidden widths at which at most `target` of `total` parameters are left."""
    layers = _layers(model)
    made = {source.output.name: layer for layer in layers for source in layer.sources}
    read = {layer.consumer.output.name: layer for layer in layers}
    operators = {o.output.name: o for layer in layers for o in (*layer.sources, layer.consumer)}

    def saved(share: float) -> float:
        found = 0.0
        for name, operator in operators.items():
            rows, columns = operator.fan_in, operator.out_features
            bias = columns if operator.bias is not None else 0
            left = columns if name not in made else uniform(columns, share)
            below = read.get(name)
            kept = 1.0 if below is None else uniform(below.width, share) / below.width
            found += rows * columns - rows * kept * left + bias * (1 - left / columns)
        return found

    shares = [step / 1000 for step in range(999, 0, -1)]
    return next((share for share in shares if total - saved(share) <= target * total), shares[-1])


def _layers(model: Model) -> Sequence[HiddenLayer]:
    return list(hidden_layers(model.graph, model.ir.functions.values())[0])


def _taps(layer: HiddenLayer) -> int:
    return sum(source.fan_in + (source.bias is not None) for source in layer.sources)


@contextmanager
def registered() -> Iterator[str]:
    """A PYTHONPATH under which `onnxcollapse` finds the pass."""
    with TemporaryDirectory(prefix="frontier-") as folder:
        metadata = Path(folder) / "onnxcollapse_frontier-0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxcollapse-frontier\nVersion: 0\n")
        (metadata / "entry_points.txt").write_text(_ENTRY)
        yield f"{folder}:{_CHECKOUT}"
