# SPDX-License-Identifier: Apache-2.0
"""Times whole models against each other, as a deployment opens them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from onnxcollapse.bench import trtexec as trt
from onnxcollapse.bench.decoding import Steps, caches
from onnxcollapse.bench.footprint import Footprint, file_bytes, measure
from onnxcollapse.bench.inputs import Case, Sizes, explained, make
from onnxcollapse.bench.ratio import ratio
from onnxcollapse.bench.report import BenchReport, Latency, Phase, Subject
from onnxcollapse.bench.timing import Timing, interleaved
from onnxcollapse.calibration import providers
from onnxcollapse.calibration.sessions import Session, open_file
from onnxcollapse.errors import ModelError, OptionError, ProviderError
from onnxcollapse.model.model import Model

LIMIT = 120.0
"""Seconds that the runs of one case should not exceed; decoding takes what rounds and tokens ask for."""

LEAST_TURN = 0.1
"""Seconds that a turn should last: longer than the slices of time of a scheduler."""

LONG_OPENING = 10.0
"""Seconds: where opening all sessions takes longer, as with engines that TensorRT builds, it is done once."""

_PHASES: tuple[tuple[Phase, ...], ...] = (("run", "prefill"), ("decode",))
"""Those of one kind are compared."""


@dataclass(frozen=True)
class Settings:
    """How models are timed.

    Attributes:
        provider: See open_session.
        threads: Threads that share one operator; None for what ONNX Runtime chooses.
        rounds: Turns of each model in all.
        openings: How often sessions are opened anew, for as many of the rounds each.
        warmup: Untimed calls of each before.
        repeats: Calls in a turn; there are more where a turn would not last 0.1 s.
        tokens: Steps of decoding in a turn.
        seed: Of drawn inputs and of the bootstrap.
        cuda_graph: Run CUDA graphs.
        footprint: Measure memory and the time to open a session, in a process for each model.
        trtexec: Have TensorRT's trtexec time them as well.
    """

    provider: str = "auto"
    threads: int | None = None
    rounds: int = 20
    openings: int = 5
    warmup: int = 3
    repeats: int = 5
    tokens: int = 32
    seed: int = 0
    cuda_graph: bool = False
    footprint: bool = True
    trtexec: bool = False


@dataclass
class _Entry:
    """One of the models, with what is known of it and opened for it."""

    number: int
    name: str
    path: Path
    model: Model
    cases: list[Case]
    pairs: dict[str, str] | None
    footprint: Footprint | None = None
    trtexec: list[float | None] = field(default_factory=list)
    provider: str = ""
    timings: dict[tuple[int, Phase], list[Timing]] = field(default_factory=dict)

    @property
    def whole(self) -> Phase:
        """What a whole run is."""
        return "prefill" if self.pairs else "run"


def bench(
    models: Sequence[str | Path],
    sweep: Sequence[Sizes] = (Sizes(),),
    data: str | Mapping[str, np.ndarray] | None = None,
    settings: Settings = Settings(),
) -> BenchReport:
    """Times models in turns, each on the same feeds.

    Args:
        models: Files, or folders that hold one. Ratios are to the first.
        sweep: What free dimensions become, one case after the other.
        data: Samples to run on; see inputs.make.
        settings: How they are timed.

    Raises:
        ModelError: A model cannot be read, opened or run.
        OptionError: A size does not fit a model or its data, or trtexec is missing.
        ProviderError: The provider is unknown, or has no CUDA graphs where they are asked for.
        DataError: The data cannot be read or does not fit.
    """
    if not models:
        raise OptionError("there is no model to time; give at least one")
    provider = _provider(settings)
    tool = trt.find() if settings.trtexec else None
    entries = [_entry(number, str(name), sweep, data, settings.seed) for number, name in enumerate(models)]
    _check_alike(entries, settings)
    for entry in entries:
        if settings.footprint:
            entry.footprint = measure(entry.path, entry.cases[0].feeds, settings.provider, settings.threads)
        entry.trtexec = [
            None if tool is None else trt.seconds(tool, entry.path, entry.model, case.feeds)
            for case in entry.cases
        ]
    openings = _time(entries, len(sweep), provider, settings)
    latencies = [
        latency
        for place in range(len(sweep))
        for phases in _PHASES
        for latency in _latencies(entries, place, phases, settings.seed)
    ]
    subjects = [
        Subject(entry.name, entry.provider, file_bytes(entry.model), entry.footprint) for entry in entries
    ]
    return BenchReport(tuple(subjects), tuple(latencies), {**asdict(settings), "openings": openings})


def _provider(settings: Settings) -> str:
    """What to open sessions with."""
    if not settings.cuda_graph:
        providers.chain(settings.provider)  # an unknown one is an error before any work
        return settings.provider
    name = providers.parse(settings.provider).name
    ran = providers.CUDA if name == "auto" else name
    if ran != providers.CUDA or not providers.works(ran):
        here = providers.CPU if ran == providers.CUDA else ran
        raise ProviderError(
            f"--cuda-graph: what runs is {here}, and only {providers.CUDA} has them; leave --cuda-graph out, or give "
            "--provider cuda where it works"
        )
    return f"{'cuda' if name == 'auto' else settings.provider},enable_cuda_graph=1"


def _entry(
    number: int, name: str, sweep: Sequence[Sizes], data: str | Mapping[str, np.ndarray] | None, seed: int
) -> _Entry:
    model = Model.load(name)
    if model.path is None:
        raise ModelError(f"{name} is no file; save it first")
    return _Entry(
        number, name, model.path, model, [make(model, sizes, data, seed) for sizes in sweep], caches(model)
    )


def _check_alike(entries: Sequence[_Entry], settings: Settings) -> None:
    """Ratios are of models that do as much."""
    first = entries[0]
    for entry in entries:
        if settings.cuda_graph and entry.pairs:
            raise OptionError(
                f"--cuda-graph: {entry.name} has a KV cache, which grows from step to step, and a graph has fixed "
                "shapes; leave it out"
            )
        for case, other in zip(entry.cases, first.cases, strict=True):
            if (case.batch, case.sequence) != (other.batch, other.sequence):
                raise OptionError(
                    f"{entry.name} runs {_text(case)} and {first.name} {_text(other)}; give models or sizes that are "
                    "alike"
                )


def _text(case: Case) -> str:
    return f"{case.batch} samples" + ("" if case.sequence is None else f" of {case.sequence} tokens")


def _time(entries: Sequence[_Entry], cases: int, provider: str, settings: Settings) -> int:
    """Times all cases, with new sessions several times; returns how often they were opened."""
    openings = min(settings.openings, settings.rounds)
    rounds, opened = -(-settings.rounds // openings), 0
    # A graph has one size, and fixing it leaves no computation of shapes, which would run on the CPU.
    together = [[place] for place in range(cases)] if settings.cuda_graph else [list(range(cases))]
    while opened < openings:
        order = entries if opened % 2 == 0 else entries[::-1]  # neither place is always the same one's
        for places in together:
            began = time.perf_counter()
            with contextlib.ExitStack() as stack:
                sessions = []
                for entry in order:
                    sizes = entry.cases[places[0]].symbols if settings.cuda_graph else {}
                    session = stack.enter_context(open_file(entry.path, provider, settings.threads, sizes))
                    sessions.append((entry, session))
                    entry.provider = session.provider.obtained
                # The first sizes decide for all, or those before them would have had too few rounds.
                first = opened == 0 and places is together[0]
                if first and time.perf_counter() - began > LONG_OPENING:
                    openings, rounds = 1, settings.rounds
                part = replace(settings, rounds=rounds, openings=openings)
                for place in places:
                    _time_runs(sessions, place, part)
                    _time_decoding([(entry, it) for entry, it in sessions if entry.pairs], place, part)
        opened += 1
    return openings


def _time_runs(sessions: Sequence[tuple[_Entry, Session]], place: int, settings: Settings) -> None:
    """Whole runs; those of a decoder are its prefill."""
    calls = []
    for entry, session in sessions:
        case = entry.cases[place]
        with explained(entry.name, case.feeds):
            call = (session.captured if settings.cuda_graph else session.prepared)(case.feeds)
            call()
        calls.append(call)
    timings = interleaved(
        calls,
        rounds=settings.rounds,
        warmup=settings.warmup,
        repeats=settings.repeats,
        min_seconds=LEAST_TURN,
        limit=LIMIT / settings.openings,
    )
    for (entry, _), timing in zip(sessions, timings, strict=True):
        entry.timings.setdefault((place, entry.whole), []).append(timing)


def _time_decoding(sessions: Sequence[tuple[_Entry, Session]], place: int, settings: Settings) -> None:
    """Steps of decoding behind the prompt; a turn is one cycle of steps or several."""
    if not sessions:
        return
    calls, fastest = list[Steps](), math.inf
    for entry, session in sessions:
        case = entry.cases[place]
        with explained(entry.name, case.feeds):
            steps = Steps(session, entry.model, case.feeds, entry.pairs or {}, settings.tokens)
            for _ in range(2):
                fastest = min(fastest, steps.run_cycle())
        calls.append(steps)
    cycle = settings.tokens + 1
    count = cycle * max(math.ceil(LEAST_TURN / max(fastest, 1e-4)), 1)
    timings = interleaved(
        calls,
        rounds=settings.rounds,
        warmup=cycle,
        repeats=count - 1,  # with the untimed one at its beginning a turn is whole cycles
        min_seconds=0.0,
    )
    for (entry, _), timing in zip(sessions, timings, strict=True):
        entry.timings.setdefault((place, "decode"), []).append(timing)


def _latencies(
    entries: Sequence[_Entry], place: int, phases: Sequence[Phase], seed: int
) -> Iterator[Latency]:
    """Rows of the models that have one of the phases; ratios are to the first of them."""
    base: list[Timing] | None = None
    for entry in entries:
        for phase in phases:
            parts = entry.timings.get((place, phase))
            if parts is None:
                continue
            timing, case = Timing(tuple(turn for part in parts for turn in part.rounds)), entry.cases[place]
            yield Latency(
                number=entry.number,
                model=entry.name,
                phase=phase,
                batch=case.batch,
                sequence=case.sequence,
                p50=timing.median,
                p90=timing.quantile(0.9),
                p99=timing.quantile(0.99),
                calls=len(timing.calls),
                rounds=len(timing.rounds),
                ratio=None if base is None else ratio(parts, base, seed),
                trtexec=None if phase == "decode" else entry.trtexec[place],
            )
            base = base or parts
