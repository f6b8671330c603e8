# SPDX-License-Identifier: Apache-2.0
"""English text at hand everywhere, split into calibration and evaluation documents that share no paragraph.

`pydoc` is the interpreter's own manual (`pydoc_data.topics`, PSF licence), so it differs a little between
Python versions; `kjv` is the King James Bible (public domain) of Debian's bible-kjv, which must be
installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from models.recipe import RecipeError

SOURCES = ("pydoc", "kjv")
_EVALUATION_EVERY = 4  # each fourth document is for evaluation
_SHORTEST = 40  # characters; shorter paragraphs are headings and the like


@dataclass(frozen=True)
class Corpus:
    """Paragraphs by purpose, in the order of their documents.

    Attributes:
        calibration: paragraphs to fit on.
        evaluation: paragraphs of other documents; none of them is in `calibration`.
    """

    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]


def corpus(source: str) -> Corpus:
    """Reads a source and splits it by document.

    The manual repeats itself (the page on compound statements holds the one on `if`), so a paragraph is
    kept once, and evaluation documents take theirs first.

    Args:
        source: one of `SOURCES`.
    """
    documents = list(_pydoc() if source == "pydoc" else _kjv())
    evaluation = _unique(documents[_EVALUATION_EVERY - 1 :: _EVALUATION_EVERY], set())
    del documents[_EVALUATION_EVERY - 1 :: _EVALUATION_EVERY]
    return Corpus(calibration=_unique(documents, set(evaluation)), evaluation=evaluation)


def spread(paragraphs: tuple[str, ...], count: int) -> list[str]:
    """`count` paragraphs at even distances, so that all documents have their share.

    Raises:
        RecipeError: there are not so many.
    """
    if len(paragraphs) < count:
        raise RecipeError(f"the text has {len(paragraphs)} paragraphs, {count} are wanted: ask for fewer")
    return [paragraphs[index * len(paragraphs) // count] for index in range(count)]


def _unique(documents: Iterable[list[str]], seen: set[str]) -> tuple[str, ...]:
    kept = []
    for paragraph in (paragraph for document in documents for paragraph in document):
        if paragraph not in seen:
            seen.add(paragraph)
            kept.append(paragraph)
    return tuple(kept)


def _pydoc() -> Iterator[list[str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        blocks = re.split(r"\n\s*\n", topics[name])
        paragraphs = [" ".join(block.split()) for block in blocks]
        yield [paragraph for paragraph in paragraphs if len(paragraph) >= _SHORTEST]


def _kjv() -> Iterator[list[str]]:
    if shutil.which("bible") is None:
        raise RecipeError("the bible command is missing: apt-get install bible-kjv, or use --text pydoc")
    done = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=True)
    books: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if found := re.match(r"(\d?[A-Za-z]+)\d+:\d+\s+(.*)", line):
            books.setdefault(found[1], []).append(found[2].strip())
    yield from books.values()
