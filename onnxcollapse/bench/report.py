# SPDX-License-Identifier: Apache-2.0
"""What a bench has found; seconds and bytes throughout."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from onnxcollapse.bench.footprint import Footprint
from onnxcollapse.bench.ratio import Ratio

Phase = Literal["run", "prefill", "decode"]


@dataclass(frozen=True)
class Subject:
    """A model that was timed.

    Attributes:
        model: As it was given.
        provider: ONNX Runtime's name of what it really ran on.
        file_bytes: Of the .onnx file and the files its weights lie in.
        footprint: What it takes to be ready; None where that was not measured.
    """

    model: str
    provider: str
    file_bytes: int
    footprint: Footprint | None


@dataclass(frozen=True)
class Latency:
    """How long one phase of one model takes on feeds of one size.

    Attributes:
        number: The model's place among those given, from 0.
        model: As it was given.
        phase: "run" for a whole model; of a decoder with a KV cache "prefill", the run over the prompt, and "decode",
            one step, which gives each sample a token.
        batch: Samples.
        sequence: Tokens of each, those of the prompt in the case of "decode"; None where there is no sequence.
        p50: Seconds that half of the calls stay under.
        p90: Seconds that 90 % do.
        p99: Seconds that 99 % do.
        calls: Calls that were timed.
        rounds: Rounds that they were timed in.
        ratio: Its time over that of the first model that has this phase; None for that one.
        trtexec: Median seconds on the GPU by trtexec; None where that was not asked for.
    """

    number: int
    model: str
    phase: Phase
    batch: int
    sequence: int | None
    p50: float
    p90: float
    p99: float
    calls: int
    rounds: int
    ratio: Ratio | None = None
    trtexec: float | None = None

    @property
    def samples_per_second(self) -> float | None:
        """Samples in a second at the median time; None for a phase that does not end with a sample."""
        return None if self.phase == "decode" else self.batch / max(self.p50, 1e-12)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens in a second at the median time: read, or made in the case of "decode"."""
        tokens = 1 if self.phase == "decode" else self.sequence
        return None if tokens is None else self.batch * tokens / max(self.p50, 1e-12)


@dataclass(frozen=True)
class BenchReport:
    """Everything a bench has found.

    Attributes:
        subjects: The models, as given.
        latencies: By batch, sequence, phase and model.
        settings: What was asked for.
    """

    subjects: tuple[Subject, ...]
    latencies: tuple[Latency, ...]
    settings: dict[str, Any]

    @property
    def provider(self) -> str:
        """What the models ran on; several where they differ."""
        return ", ".join(dict.fromkeys(subject.provider for subject in self.subjects))

    def to_dict(self) -> dict[str, Any]:
        """Plain types: `provider`, `settings`, `models` and `results`."""
        return {
            "provider": self.provider,
            "settings": self.settings,
            "models": [_subject(subject) for subject in self.subjects],
            "results": [row(latency) for latency in self.latencies],
        }


def row(latency: Latency) -> dict[str, Any]:
    """A latency as one flat row."""
    found = asdict(latency)
    bounds = found.pop("ratio") or {"value": None, "low": None, "high": None}
    trtexec = found.pop("trtexec")
    return {
        **found,
        "samples_per_second": latency.samples_per_second,
        "tokens_per_second": latency.tokens_per_second,
        "ratio": bounds["value"],
        "ratio_low": bounds["low"],
        "ratio_high": bounds["high"],
        "trtexec": trtexec,
    }


def _subject(subject: Subject) -> dict[str, Any]:
    found = asdict(subject)
    footprint = found.pop("footprint") or dict.fromkeys(Footprint.__dataclass_fields__)
    return {**found, **footprint}
