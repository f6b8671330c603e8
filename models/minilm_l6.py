# SPDX-License-Identifier: Apache-2.0
"""all-MiniLM-L6-v2, a sentence encoder, exported from its safetensors (Apache-2.0).

BERT with 6 layers of 384/1536, erf-GELU, post-norm. Opsets below 14 are exported with eager attention. Needs
`pip install torch transformers safetensors tokenizers scipy` (and onnxscript for `--exporter dynamo`).
"""

from __future__ import annotations

import argparse
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import encoder, recipe

if TYPE_CHECKING:
    import torch

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OUTPUT = "last_hidden_state"
_SDPA_FROM = 14  # the first opset that torch can write scaled_dot_product_attention for


def build(args: argparse.Namespace) -> None:
    """Exports the model and writes its data."""
    recipe.require("torch", "transformers", "safetensors", "tokenizers", install="-r models/requirements.txt")
    if args.source:
        with recipe.filling(args.output / recipe.SOURCE) as folder:
            for name in _FILES:
                shutil.copyfile(encoder.l6_files(name) / name, folder / name)
        encoder.write_inputs(args.output, args.text, _INPUTS)
        return
    module = _load(encoder.l6_files(*_FILES), args.dtype, "sdpa" if args.opset >= _SDPA_FROM else "eager")
    with recipe.replacing(args.output / recipe.MODEL) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about shape checks that are constant for this model
        _export(module, temporary, args.exporter, args.opset)
    encoder.write_data(args.output, args.text)


def _load(folder: Path, dtype: str, attention: str) -> torch.nn.Module:
    import torch
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of the pooler's weights, which are left out on purpose

    class Encoder(torch.nn.Module):
        """The encoder with positional inputs and one output."""

        def __init__(self, bert: torch.nn.Module) -> None:
            super().__init__()
            self.bert = bert

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
        ) -> torch.Tensor:
            return self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state

    bert = BertModel.from_pretrained(
        folder,
        add_pooling_layer=False,
        attn_implementation=attention,
        dtype=torch.float16 if dtype == "fp16" else torch.float32,
    )
    return Encoder(bert).eval()


def _export(module: torch.nn.Module, target: Path, exporter: str, opset: int) -> None:
    import torch

    example = tuple(torch.ones(2, 16, dtype=torch.int64) for _ in _INPUTS)
    names: dict[str, Any] = {"input_names": list(_INPUTS), "output_names": [_OUTPUT], "opset_version": opset}
    axes = {0: "batch", 1: "sequence"}
    if exporter == "dynamo":
        shapes = {name: dict(axes) for name in _INPUTS}
        torch.onnx.export(
            module, example, str(target), dynamo=True, dynamic_shapes=shapes, external_data=False, **names
        )
    else:
        dynamic = dict.fromkeys((*_INPUTS, _OUTPUT), axes)
        torch.onnx.export(module, example, str(target), dynamo=False, dynamic_axes=dynamic, **names)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds or measures; returns the exit status."""
    parser = encoder.arguments("minilm_l6", __doc__)
    recipe.add_source(parser)
    parser.add_argument("--opset", type=int, default=17)
    parser.add_argument("--exporter", choices=("torchscript", "dynamo"), default="torchscript")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32")
    return recipe.run(parser.parse_args(argv), build, encoder.measure)


if __name__ == "__main__":
    raise SystemExit(main())
