# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import pytest

from onnxcollapse import Budget, Target
from onnxcollapse.errors import OptionError
from onnxcollapse.report import render, write_report
from onnxcollapse.rewriting import Entry, Journal, Saving
from onnxcollapse.rewriting.pipeline import Result
from tests.rewriting.branches import Drop, branches, run

VOID = {"meta", "td", "th", "tr", "p"}
"""Elements that HTML lets end by themselves."""


class Page(HTMLParser):
    """Checks that elements nest, and collects the text of cells, headings, notes and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not data.strip() or "style" in self.open:
            return
        self.texts.append(data)
        if "table" in self.open:
            self.rows[-1][-1] += data.strip()

    def row(self, *start: str) -> list[str]:
        [found] = [row for row in self.rows if row[: len(start)] == list(start)]
        return found


def made_up(*entries: Entry, **changes) -> Result:
    """A result with entries of the test's choice around a real model."""
    result = run(branches(1.0, 1.0), Drop(), data=False)
    result.journal = Journal(list(entries), {"model": "m.onnx", "seed": 0})
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def page(result: Result) -> Page:
    return Page(render(result, result.to_dict()))


def test_a_page_of_a_real_run_says_what_happened():
    result = run(branches(1e-4, 0.5, 2e-4), Drop())
    found = page(result)
    text = " ".join(found.texts)
    assert f"Error at the outputs on held-out data: {result.error:.4g} (rel-l2)" in text
    assert "inside the budget of 0.01; measured on CPUExecutionProvider" in text
    assert found.row("params")[:4] == ["params", "192", "66", "-65.6%"]
    assert found.row("bytes")[1:3] == ["768", "264"]
    assert found.row("drop", "b0")[2:4] == ["zero it is", "63"]
    row = found.row("drop", "b1 (zero)")
    assert row[2] == "declined"
    assert "over the budget of 0.01" in row[3]
    assert found.row("seed")[1] == "0"
    assert found.row("metric")[1] == "rel-l2"


def test_a_page_needs_nothing_else():
    found = page(run(branches(1e-4), Drop()))
    assert not found.tags & {"script", "link", "img", "iframe"}
    assert found.links == []
    text = render(run(branches(1e-4), Drop()), run(branches(1e-4), Drop()).to_dict())
    assert text.startswith("<!doctype html>")
    assert "url(" not in text
    assert "http" not in text


NASTY = "<script>alert('1')</script>&amp;\"quoted\""


def test_names_and_reasons_are_text_and_never_markup():
    entries = [
        Entry("kept", f"pass {NASTY}", f"site {NASTY}", f"variant {NASTY}", f"reason {NASTY}"),
        Entry("declined", f"pass {NASTY}", f"left {NASTY}", f"variant {NASTY}", f"why {NASTY}"),
    ]
    result = made_up(*entries, notes=[f"note {NASTY}"], provider=NASTY, error=0.5, budget=Budget(0.1, NASTY))
    result.journal.facts = {"model": NASTY, NASTY: [NASTY]}
    found = page(result)
    assert "script" not in found.tags
    assert found.row(f"pass {NASTY}", f"site {NASTY}")[2] == f"reason {NASTY}"
    assert found.row(f"pass {NASTY}", f"left {NASTY} (variant {NASTY})")[3] == f"why {NASTY}"
    assert f"note {NASTY}" in found.texts
    assert f"onnxcollapse: {NASTY}" in found.texts
    assert NASTY in found.row(NASTY)[0]
    assert NASTY not in render(result, result.to_dict())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"error": None}, ["was not measured", "no calibration data"]),
        ({"error": 0.005, "budget": Budget(0.01, "kl")}, ["0.005 (kl)", "inside the budget of 0.01"]),
        ({"error": 0.3, "budget": Budget(None, target=Target("params", 0.5))}, ["0.3", "without a cap"]),
        ({"error": 0.3, "met": False}, ["misses what was asked for"]),
        ({"notes": ["say this"]}, ["say this"]),
    ],
)
def test_the_verdict(changes, words):
    text = " ".join(page(made_up(**changes)).texts)
    for word in words:
        assert word in text


def test_unmeasured_figures_are_empty_and_odd_ones_shown():
    entries = [
        Entry("kept", "p", "a", reason="r", saving=Saving(params=1234567), predicted_error=0.0123456),
        Entry("rolled-back", "p", "b", reason="r", predicted_error=math.inf, error=0.5),
    ]
    found = page(made_up(*entries))
    assert found.row("p", "a")[2:] == ["r", "1,234,567", "0.01235", "", ""]
    assert found.row("p", "b")[2:5] == ["rolled-back", "r", "inf"]


def test_empty_tables_say_so_and_a_model_without_parameters_divides_by_nothing():
    result = made_up()
    summary = {
        **result.to_dict(),
        **{f"{n}_{w}": 0 for n in ("params", "bytes", "flops") for w in ("before", "after")},
    }
    text = " ".join(Page(render(result, summary)).texts)
    assert text.count("Nothing.") == 2
    assert "+0.0%" in text


def test_the_folder_holds_three_files_of_valid_json_and_html(tmp_path):
    result = made_up(Entry("kept", "p", "a", predicted_error=math.inf))
    folder = tmp_path / "deep" / "folder"
    write_report(result, {**result.to_dict(), "error": math.nan}, folder)

    def reject(word):
        raise ValueError(f"{word} is no JSON")

    summary = json.loads((folder / "report.json").read_text(), parse_constant=reject)
    journal = json.loads((folder / "journal.json").read_text(), parse_constant=reject)
    assert summary["error"] == "nan"
    assert summary["rewrites"][0]["predicted_error"] == journal["entries"][0]["predicted_error"] == "inf"
    Page((folder / "report.html").read_text(encoding="utf-8"))
    write_report(result, result.to_dict(), folder)
    assert json.loads((folder / "report.json").read_text())["error"] is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("precious")
    result = made_up()
    with pytest.raises(OptionError, match=r"file'? cannot be written: .*; choose another"):
        write_report(result, result.to_dict(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
