# SPDX-License-Identifier: Apache-2.0
"""Size against error: the smaller models for several targets, from one gathering of statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnxcollapse.calibration import Dataset
from onnxcollapse.model import Model
from onnxcollapse.rewriting.budget import Budget, Target
from onnxcollapse.rewriting.opening import Opening
from onnxcollapse.rewriting.passes import Pass
from onnxcollapse.rewriting.pipeline import Result, optimize
from onnxcollapse.rewriting.progress import Progress


def frontier(
    model: Model,
    data: Dataset | None,
    targets: Sequence[Target],
    *,
    error: float | None = None,
    metric: str = "rel-l2",
    passes: Sequence[Pass] | None = None,
    provider: str = "auto",
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Optimizes a model for each target; the exact stage, statistics and first prices are computed once a measure.

    Each result is what `optimize` gives for its target alone. It is made when it is asked for, so that one model at a
    time has to be held.

    Args:
        model: Left as it is.
        data: Calibration data; without it only exact rewrites run.
        targets: What is wanted, in the order of the results.
        error: Largest error accepted at the outputs; None for no cap.
        metric: Of that error, see `Budget`.
        passes: See `optimize`, as the rest.
        provider: Where everything runs.
        seed: Recorded.
        memory: Bytes of resident memory to stay under.
        progress: Told how far the work is.

    Yields:
        A result for each target, whether the target was met or not.

    Raises:
        OnnxCollapseError: The model, data, metric or provider cannot be used.
    """
    openings: dict[str, Opening] = {}
    for target in targets:
        yield optimize(
            model,
            data,
            budget=Budget(error, metric, target),
            passes=passes,
            provider=provider,
            seed=seed,
            memory=memory,
            progress=progress,
            opening=openings.setdefault(target.measure, Opening()),
        )
