# SPDX-License-Identifier: Apache-2.0
import subprocess

import pytest

from models import text
from models.recipe import RecipeError


def test_calibration_and_evaluation_share_no_paragraph():
    found = text.corpus("pydoc")
    assert len(found.calibration) > 512
    assert len(found.evaluation) > 256
    everything = found.calibration + found.evaluation
    assert len(set(everything)) == len(everything)
    assert all(paragraph == " ".join(paragraph.split()) for paragraph in everything)


def test_shared_paragraphs_stay_with_the_evaluation(monkeypatch):
    documents = [["a", "same"], ["b", "b"], ["c"], ["d", "same"], ["e"]]
    monkeypatch.setattr(text, "_pydoc", lambda: iter(documents))
    found = text.corpus("pydoc")
    assert found.evaluation == ("d", "same")
    assert found.calibration == ("a", "b", "c", "e")


def test_spread_covers_the_whole_text_evenly():
    assert text.spread(tuple("abcdefgh"), 4) == ["a", "c", "e", "g"]
    with pytest.raises(RecipeError, match="has 2 paragraphs, 3 are wanted"):
        text.spread(("a", "b"), 3)


def test_verses_are_split_by_book(monkeypatch):
    verses = (
        "Ge1:1 In the beginning\nGe1:2 And the earth\n1Sm1:1 Now there was\nEx1:1 Now these\nRu1:1 Now it\n"
    )
    done = subprocess.CompletedProcess([], 0, stdout=verses)
    monkeypatch.setattr(text.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(text.subprocess, "run", lambda *args, **options: done)
    found = text.corpus("kjv")
    assert found.calibration == ("In the beginning", "And the earth", "Now there was", "Now these")
    assert found.evaluation == ("Now it",)


def test_no_bible_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(text.shutil, "which", lambda tool: None)
    with pytest.raises(RecipeError, match="apt-get install bible-kjv, or use --text pydoc"):
        text.corpus("kjv")
