# SPDX-License-Identifier: Apache-2.0
"""Where tests run."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps what needs torch in one process: importing it takes seconds, as do the exports that tests share."""
    for item in items:
        if hasattr(getattr(item, "module", None), "torch"):
            item.add_marker(pytest.mark.xdist_group("torch"))
