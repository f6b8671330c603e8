# SPDX-License-Identifier: Apache-2.0
"""Real models for the slow tests: built once by their recipes, skipped with the reason when they cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Builds a recipe's folder: real("minilm_l3")."""
    base, made = tmp_path_factory.mktemp("real"), {}

    def build(recipe: str, *options: str) -> Path:
        key = (recipe, *options)
        if key not in made:
            folder = base / "-".join(key).replace("/", "_")
            done = subprocess.run(
                [sys.executable, "-m", f"models.{recipe}", "-o", str(folder), *options],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            made[key] = folder if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]
        if isinstance(made[key], str):
            pytest.skip(f"{recipe} cannot be built here: {made[key]}")
        return made[key]

    return build


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python from the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
