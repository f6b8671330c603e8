# SPDX-License-Identifier: Apache-2.0
"""``python -m onnxcollapse`` is ``onnxcollapse``."""

from onnxcollapse.cli import main

main(prog_name="onnxcollapse")
