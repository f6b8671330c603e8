# SPDX-License-Identifier: Apache-2.0
"""`benchmarks` and `models` are run from the checkout and not installed, so the checkout has to be importable."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
