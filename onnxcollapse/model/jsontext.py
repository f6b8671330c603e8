# SPDX-License-Identifier: Apache-2.0
"""JSON with the places where its parts stand, so that an edit leaves every other character as it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Part:
    """A JSON value in a text.

    Attributes:
        start: Its first character.
        end: The character behind its last.
        value: What it says; its own parts for an object or a list.
    """

    start: int
    end: int
    value: Any = field(repr=False)

    @property
    def members(self) -> dict[str, Part]:
        """The members of an object by their keys; none for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> list[Part]:
        """The items of a list; none for anything else."""
        return self.value if isinstance(self.value, list) else []


@dataclass(frozen=True)
class Edit:
    """Other text in the place of a part."""

    part: Part
    text: str


def parse(text: str) -> Part:
    """Reads JSON.

    Raises:
        ValueError: It is none.
    """
    _DECODER.decode(text)  # all that is wrong is found here, and said in words
    return _part(text, _skip(text, 0))


def apply(text: str, edits: Sequence[Edit]) -> str:
    """The text with edits, which do not overlap, made in it."""
    for edit in sorted(edits, key=lambda edit: -edit.part.start):
        text = text[: edit.part.start] + edit.text + text[edit.part.end :]
    return text


def keeping(text: str, part: Part, kept: Sequence[int]) -> Edit:
    """An edit that leaves some items in a list, which is written as it was."""
    items = part.items
    if not kept or not items:
        return Edit(part, "[]")
    between = text[items[0].end : items[1].start] if len(items) > 1 else ", "
    inner = between.join(text[items[place].start : items[place].end] for place in kept)
    return Edit(part, text[part.start : items[0].start] + inner + text[items[-1].end : part.end])


def _part(text: str, start: int) -> Part:
    if text[start] == "{":
        members: dict[str, Part] = {}
        at = _skip(text, start + 1)
        while text[at] != "}":
            key, at = scanstring(text, at + 1, True)
            members[key] = member = _part(text, _skip(text, _skip(text, at) + 1))
            at = _next(text, member.end)
        return Part(start, at + 1, members)
    if text[start] == "[":
        items: list[Part] = []
        at = _skip(text, start + 1)
        while text[at] != "]":
            items.append(_part(text, at))
            at = _next(text, items[-1].end)
        return Part(start, at + 1, items)
    value, end = _DECODER.raw_decode(text, start)
    return Part(start, end, value)


def _skip(text: str, at: int) -> int:
    while text[at] in _SPACE:
        at += 1
    return at


def _next(text: str, at: int) -> int:
    """Where the next item begins, or the bracket that ends them."""
    at = _skip(text, at)
    return _skip(text, at + 1) if text[at] == "," else at
