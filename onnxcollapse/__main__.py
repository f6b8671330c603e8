# SPDX-License-Identifier: Apache-2.0
"""``python -m onnxcollapse`` is ``onnxcollapse``."""

from __future__ import annotations

import sys


def run() -> None:
    """Runs the command line; Ctrl-C while its modules are still being imported is one line, too."""
    try:
        from onnxcollapse.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("onnxcollapse: interrupted\n")
        sys.exit(130)
    main(prog_name="onnxcollapse")


if __name__ == "__main__":
    run()
