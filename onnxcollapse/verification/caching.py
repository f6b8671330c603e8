# SPDX-License-Identifier: Apache-2.0
"""Whether a decoder computes the same through its cache as in one pass."""

from __future__ import annotations

import numpy as np

from onnxcollapse.calibration import filling
from onnxcollapse.calibration.data import Dataset
from onnxcollapse.calibration.masks import cache_pairs, is_cache_name
from onnxcollapse.calibration.sessions import open_session
from onnxcollapse.calibration.signature import data_signature
from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model

SAMPLES = 4

_FILLED = ("attention_mask", "token_type_ids", "position_ids", "cache_position", "use_cache_branch")


def cache_gap(model: Model, data: Dataset, provider: str = "auto") -> float | None:
    """How far the last token's outputs through the cache are from those of one pass over all tokens.

    Padding is taken for tokens in both.

    Args:
        model: A decoder with inputs of tokens and caches; one of which all caches have left decodes without.
        data: Held-out samples of it; four are looked at.
        provider: See open_session.

    Returns:
        Relative L2; None where the model does not decode: a cache has no partner.

    Raises:
        ModelError: The model cannot run.
    """
    signature = data_signature(model)
    inputs = [spec.name for spec in signature.inputs]
    outputs = [spec.name for spec in signature.outputs]
    name = filling.tokens_name(signature)
    pairs = cache_pairs(inputs, outputs) if any(map(is_cache_name, (*inputs, *outputs))) else {}
    batch = next(data.batches("heldout", SAMPLES))
    if name is None or pairs is None or name not in batch:
        return None
    tokens = batch[name][:SAMPLES]
    if tokens.shape[1] < 2:
        tokens = np.repeat(tokens, 2, axis=1)
    given = {
        key: array[: len(tokens)]
        for key, array in batch.items()
        if key in inputs and key != name and key not in _FILLED and not is_cache_name(key)
    }
    past = tokens.shape[1] - 1
    with open_session(model, provider=provider) as session:
        whole = session.run(filling.step(signature, tokens, 0, given))
        first = session.run(filling.step(signature, tokens[:, :-1], 0, given))
        cache = {key: first[output] for key, output in pairs.items()}
        last = session.run(filling.step(signature, tokens[:, -1:], past, given | cache))
    gaps = [
        _relative(last[key], whole[key][:, -1:])
        for key in outputs
        if not is_cache_name(key) and whole[key].ndim > 1 and whole[key].dtype.kind == "f"
    ]
    if not gaps or not np.isfinite(gaps).all():
        raise ModelError(
            "the model gives no finite outputs when it decodes through its cache; check it and the data"
        )
    return max(gaps)


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    size = float(np.linalg.norm(wanted.astype(np.float64)))
    gap = float(np.linalg.norm(found.astype(np.float64) - wanted))
    return gap / size if size else gap
