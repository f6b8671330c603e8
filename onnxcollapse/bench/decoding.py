# SPDX-License-Identifier: Apache-2.0
"""Decoding token by token: what a step gives as present.* goes into past_* of the next, and stays on the device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from onnxcollapse.calibration import filling
from onnxcollapse.calibration.masks import cache_pairs, is_cache_name
from onnxcollapse.calibration.sessions import Session
from onnxcollapse.calibration.signature import data_signature
from onnxcollapse.model.model import Model, Signature

if TYPE_CHECKING:
    from onnxruntime import OrtValue


def caches(model: Model) -> dict[str, str] | None:
    """The output that is the next value of each cache; None for a model that does not decode through one."""
    signature = data_signature(model)
    if filling.tokens_name(signature) is None:
        return None
    names = [[spec.name for spec in specs] for specs in (signature.inputs, signature.outputs)]
    return cache_pairs(*names)


class Steps:
    """Decoding, one token of every sample a call; after `cycle` calls it begins anew behind the prompt.

    Every step is fed the prompt's last token: which one it is makes no difference to how long it takes. A step is the
    binding of its inputs and the run; choosing the next token is not part of it.

    Attributes:
        cycle: Calls until the cache is that of the prompt again.
    """

    def __init__(
        self,
        session: Session,
        model: Model,
        feeds: Mapping[str, np.ndarray],
        pairs: Mapping[str, str],
        tokens: int,
    ) -> None:
        """Runs the prompt.

        Args:
            session: The model's session.
            model: The model.
            feeds: The prompt, every input filled in.
            pairs: See caches.
            tokens: Steps that count; the first of a cycle is one more, to get over what ran before.
        """
        self.cycle = tokens + 1
        self._session, self._pairs, self._place = session, pairs, 0
        signature = data_signature(model)
        past = next(array.shape[-2] for name, array in feeds.items() if is_cache_name(name))
        past += feeds[filling.tokens_name(signature) or ""].shape[1]
        self._inputs = [
            session.put(_step(signature, feeds, pairs, past + place)) for place in range(self.cycle)
        ]
        self._cache: dict[str, OrtValue] = {}
        self._prompt = self._cache = self._next(session.run_there(session.put(feeds)))

    def __call__(self) -> None:
        """Runs one step."""
        made = self._session.run_there({**self._inputs[self._place], **self._cache})
        self._place = (self._place + 1) % self.cycle
        self._cache = self._next(made) if self._place else self._prompt

    def run_cycle(self) -> float:
        """Runs as many steps as are in a cycle; returns the seconds."""
        began = time.perf_counter()
        for _ in range(self.cycle):
            self()
        return time.perf_counter() - began

    def _next(self, outputs: Mapping[str, OrtValue]) -> dict[str, OrtValue]:
        """The caches of the next step: those given, or as they were where a merged decoder gives an empty one instead.

        So it does with those of an encoder's states, which do not change.
        """
        made = {name: outputs[output] for name, output in self._pairs.items()}
        empty = (name for name, value in made.items() if 0 in value.shape())
        return made | {name: self._cache[name] for name in empty if name in self._cache}


def _step(
    signature: Signature, feeds: Mapping[str, np.ndarray], pairs: Mapping[str, str], past: int
) -> dict[str, np.ndarray]:
    """The inputs but the caches of a step after `past` tokens."""
    name = filling.tokens_name(signature) or ""
    obvious = {name, "cache_position", *pairs}
    others = {
        spec.name: feeds[spec.name]
        for spec in signature.inputs
        if spec.name not in obvious and not filling.is_fillable(spec, {name}, signature)
    }
    found = filling.step(signature, feeds[name][:, -1:], past, others)
    return {name: array for name, array in found.items() if name not in pairs}
