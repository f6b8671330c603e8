# SPDX-License-Identifier: Apache-2.0
"""merge-ffn: exact where blocks are copies, closed-form errors, what it saves, what it leaves alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
from onnxcollapse.passes.merge_ffn import MergeFfn
from onnxcollapse.passes.narrow_ffn import NarrowFfn
from onnxcollapse.passes.refit import Refit

from onnxcollapse import Budget, Decline, Target, optimize
from onnxcollapse.calibration import plan
from onnxcollapse.errors import ModelError, OptionError
from onnxcollapse.model import flops, size
from onnxcollapse.rewriting import storage
from onnxcollapse.rewriting.fitting import Fitter, Place
from onnxcollapse.rewriting.passes import offers_of
from onnxcollapse.rewriting.progress import Progress
from onnxcollapse.rewriting.registry import defaults, parse
from onnxcollapse.structure import feedforwards, linears
from tests.passes.narrowing import at, heldout, narrowed
from tests.support import Net, data_for, file_bytes, mlp, outputs, relative, rows

MEASURE = storage.measure


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch):
    """Two processes for each run take most of its time; one test has them."""

    def fails(*arguments):
        raise OSError("not measured here")

    monkeypatch.setattr(storage, "measure", fails)


WIDTH, HIDDEN = 12, 32
FORMS = ("plain", "bias-free", "gemm", "gated")
TIES = ("average", "anchor", "fit")


def weights(form, random):
    """Matrices and offsets of one block: gate (if gated), up, down."""
    shapes = [(WIDTH, HIDDEN)] * (2 if form == "gated" else 1) + [(HIDDEN, WIDTH)]
    matrices = [random.normal(size=shape) / shape[0] ** 0.5 for shape in shapes]
    biased = form in ("plain", "gemm")
    return matrices, [random.normal(size=m.shape[1]) * 0.3 if biased else None for m in matrices]


def shuffled(block, random):
    """The same block with its neurons in another order."""
    order = random.permutation(HIDDEN)
    (*first, last), (*biases, end) = block
    return (
        [*(m[:, order] for m in first), last[order]],
        [*(None if b is None else b[order] for b in biases), end],
    )


def stack(form, blocks):
    """h + 0.3 FFN(norm(h)), block by block."""
    net = Net(2)
    gamma, beta, share = net.const(np.ones(WIDTH)), net.const(np.zeros(WIDTH)), net.const(0.3)
    spelling = "gemm" if form == "gemm" else "matmul"
    h = net.dense("x", WIDTH, WIDTH, name="h0")
    for place, ((*first, last), (*biases, end)) in enumerate(blocks):
        x = net.op("LayerNormalization", h, gamma, beta, axis=-1, name=f"n{place}")
        z = [net.linear(x, m, b, spelling=spelling) for m, b in zip(first, biases, strict=True)]
        hidden = net.op("Relu", z[0]) if len(z) == 1 else net.op("Mul", net.op("Sigmoid", z[0]), z[1])
        update = net.linear(hidden, last, end, spelling=spelling, name=f"u{place}")
        h = net.op("Add", h, net.op("Mul", update, share), name=f"h{place + 1}")
    net.dense(h, WIDTH, 5, name="y")
    return net.model({"x": ["n", WIDTH]}, {"y": ["n", 5]})


def copies(form, count=3):
    random = np.random.default_rng(7)
    block = weights(form, random)
    return stack(form, [block, *(shuffled(block, random) for _ in range(count - 1))])


def different(form, count=4):
    random = np.random.default_rng(8)
    return stack(form, [weights(form, random) for _ in range(count)])


def merged(model, x, *passes, share=0.85, budget=None):
    target = Target("params", share)
    return optimize(
        model, data_for(model, x), budget=Budget(budget, target=target), passes=passes, provider="cpu"
    )


def offers(model, data, item):
    """What the pass offers, by site."""
    fitter = Fitter(model.clone(), data, plan(model), "cpu", Progress())
    order = {node: index for index, node in enumerate(model.graph)}
    places = [Place.of(item, site, order) for site in item.sites(model) if not isinstance(site, Decline)]
    return {
        place.site.name: offer
        for place, statistics in fitter.statistics(model, places)
        for offer in offers_of(item, place.site, statistics)
    }


def kept(result):
    return [entry for entry in result.journal.of("kept") if entry.pass_name.startswith("merge-ffn")]


# Exact


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tie", TIES)
def test_shuffled_copies_of_one_block_merge_exactly(form, tie):
    model, x = copies(form), rows(600, WIDTH)
    result = merged(model, x, MergeFfn(tie=tie, window=3), share=0.7)
    assert result.met
    assert [entry.site for entry in kept(result)] == ["u2"]
    small = result.model
    assert relative(outputs(small, x=x)["y"], outputs(model, x=x)["y"]) < 2e-4  # a ridge of 1e-4 at most
    wide = [tensor for tensor in small.graph.initializers.values() if HIDDEN in tuple(tensor.shape)]
    matrices = [value for value in wide if len(value.shape) == 2 and WIDTH in tuple(value.shape)]
    assert len(matrices) == (3 if form == "gated" else 2)
    assert all(len(value.uses()) == 3 for value in matrices)


def test_without_alignment_shuffled_copies_do_not_merge():
    model, x = copies("plain"), rows(600, WIDTH)
    data = data_for(model, x)
    errors = [
        offers(model, data, MergeFfn("average", 3, permute=p))["u2"].predicted_error for p in (True, False)
    ]
    assert errors[0] < 1e-3  # sums are of fp32
    assert errors[1] > 0.3


def test_the_average_is_that_of_the_paper():
    random = np.random.default_rng(8)
    blocks = [weights("plain", random) for _ in range(2)]
    mean = [
        [(a + b) / 2 for a, b in zip(*(block[0] for block in blocks), strict=True)],
        [(a + b) / 2 for a, b in zip(*(block[1] for block in blocks), strict=True)],
    ]
    model, x = stack("plain", blocks), rows(300, WIDTH)
    result = merged(model, x, MergeFfn("average", permute=False), share=0.7)
    wanted = outputs(stack("plain", [mean, mean]), x=x)["y"]
    assert relative(outputs(result.model, x=x)["y"], wanted) < 1e-5


# Errors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tie", TIES)
def test_the_error_predicted_is_that_on_the_held_out_rows(form, tie):
    model, x = different(form), rows(600, WIDTH)
    data, item = data_for(model, x), MergeFfn(tie)
    held = heldout(data)
    found = offers(model, data, item)
    assert list(found) == ["u1", "u2", "u3"]
    for place, offer in enumerate(found.values()):
        errors = []
        for number, own in zip((place, place + 1), offer.payload.weights(), strict=True):
            read, want = (at(model, name, held).astype(np.float64) for name in (f"n{number}", f"u{number}"))
            z = [
                read @ m + (0 if b is None else b)
                for m, b in zip(own.matrices[:-1], own.offsets, strict=False)
            ]
            hidden = np.maximum(z[0], 0) if len(z) == 1 else z[1] / (1 + np.exp(-z[0]))
            hidden = hidden if own.scale is None else hidden * own.scale
            got = hidden @ own.matrices[-1] + (0 if own.offsets[-1] is None else own.offsets[-1])
            errors.append(relative(got, want) ** 2)
        assert offer.predicted_error == pytest.approx(np.mean(errors) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_fitted_is_closer_than_what_is_averaged(form):
    model, x = different(form), rows(900, WIDTH)
    data = data_for(model, x)
    errors = {tie: offers(model, data, MergeFfn(tie))["u1"].predicted_error for tie in TIES}
    plain = offers(model, data, MergeFfn("fit", scale=False))["u1"].predicted_error
    assert errors["fit"] < plain < 0.9 * min(errors["average"], errors["anchor"])
    assert merged(model, x, MergeFfn()).error < 0.7 * merged(model, x, MergeFfn("average")).error


# Saving


@pytest.mark.parametrize("tie", TIES)
def test_it_saves_all_but_one_set_and_the_file_shrinks_by_that(tie, tmp_path, monkeypatch):
    model, x = different("plain"), rows(600, WIDTH)
    if tie == "fit":
        monkeypatch.setattr(storage, "measure", MEASURE)
    result = merged(model, x, MergeFfn(tie))
    [entry] = kept(result)
    one = 2 * WIDTH * HIDDEN + HIDDEN + WIDTH
    own = 2 * HIDDEN + WIDTH if tie == "fit" else 0  # scales of both, and the second offset
    assert entry.saving.params == one - own == size(model).params - size(result.model).params
    shrunk = len(file_bytes(model, tmp_path)) - len(file_bytes(result.model, tmp_path))
    assert shrunk == pytest.approx(4 * (one - own), rel=0.2)
    shapes = {"x": (1, WIDTH)}
    assert flops(result.model, shapes=shapes) == flops(model, shapes=shapes)
    assert "FLOPs stay" in entry.reason
    [note] = [note for note in result.notes if note.startswith("weights that blocks share are stored once")]
    number = r"([\d.]+) [Mk]B instead of ([\d.]+)"
    memory = f", a session that has run once {number} of memory" if tie == "fit" else ""
    found = re.search(f"weights take {number}{memory}; FLOPs stay", note)
    assert found is not None
    saved = float(found[2]) - float(found[1])
    assert saved * 1e3 == pytest.approx(4 * (one - own), abs=100)


def test_windows_that_share_a_block_exclude_each_other():
    model, x = different("plain", 5), rows(600, WIDTH)
    result = merged(model, x, MergeFfn(), share=0.66)
    assert len(kept(result)) == 2
    assert result.met
    assert abs(int(kept(result)[0].site[1:]) - int(kept(result)[1].site[1:])) >= 2


def test_it_competes_with_other_passes_and_refit_leaves_what_is_shared():
    model, x = different("plain"), rows(900, WIDTH)
    alone = merged(model, x, MergeFfn(), share=0.6)
    both = merged(model, x, MergeFfn(), NarrowFfn(align=4), Refit(), share=0.6)
    assert both.met
    assert both.error < alone.error
    again = merged(model, x, MergeFfn(), Refit())
    assert len(kept(again)) == 1
    assert again.after.params == merged(model, x, MergeFfn()).after.params


@dataclass(frozen=True)
class Blind(MergeFfn):
    """Cannot look closer."""

    name = "blind"

    def look_closer(self, scratch, site, statistics):
        raise ModelError("it is too dark")


def test_a_site_that_cannot_be_looked_at_is_declined_and_the_others_go_on():
    model, x = different("plain"), rows(400, WIDTH)
    result = merged(model, x, Blind(), MergeFfn("average"))
    assert "it is too dark" in {entry.reason for entry in result.journal.of("declined")}
    assert len(kept(result)) == 1


def test_a_pass_given_twice_runs_once():
    model, x = different("plain"), rows(400, WIDTH)
    assert len(kept(merged(model, x, MergeFfn(), MergeFfn()))) == 1


def test_where_memory_cannot_be_measured_the_result_stays():
    result = merged(different("plain"), rows(400, WIDTH), MergeFfn("average"))
    assert result.met
    [note] = [note for note in result.notes if "stored once" in note]
    assert "of memory" not in note


def test_two_runs_give_the_same_bytes(tmp_path):
    model, x = different("gated"), rows(400, WIDTH)
    files = [file_bytes(merged(model, x, MergeFfn()).model, tmp_path) for _ in range(2)]
    assert files[0] == files[1]


# What stays


def test_nothing_changes_where_the_budget_has_no_room(tmp_path):
    model, x = different("plain"), rows(400, WIDTH)
    result = merged(model, x, MergeFfn(), budget=1e-6)
    assert not result.met
    assert not any("stored once" in note for note in result.notes)
    assert file_bytes(result.model, tmp_path) == file_bytes(model, tmp_path)
    assert any("over the budget" in entry.reason for entry in result.journal)


def declined(model, item=None):
    return [site.reason for site in (item or MergeFfn()).sites(model) if isinstance(site, Decline)]


def test_it_says_why_blocks_cannot_share():
    slopes = [np.random.default_rng(0).uniform(0.1, 0.4, 20) for _ in range(3)]
    assert any(
        "no 2 feed-forward blocks of one form" in reason for reason in declined(mlp([8, 30, 8, 40, 8]))
    )
    assert any("no 5 feed-forward blocks" in r for r in declined(different("plain"), MergeFfn(window=5)))
    same = [slopes[0]] * 3
    uneven = mlp([8, 20, 20, 20, 8], "PRelu", slopes=same)
    assert all("blocks of one form" in reason or "for each channel" in reason for reason in declined(uneven))
    assert declined(uneven)


def test_blocks_that_are_tied_already_are_left():
    model, x = different("plain"), rows(400, WIDTH)
    small = merged(model, x, MergeFfn("average")).model
    assert "its blocks share their weights already" in declined(small)


def test_a_channelwise_constant_keeps_neurons_in_their_order():
    net = Net(3)
    slope, h = net.const(np.linspace(0.1, 0.5, HIDDEN)), net.dense("x", WIDTH, WIDTH)
    for place in range(2):
        update = net.dense(
            net.op("PRelu", net.dense(h, WIDTH, HIDDEN), slope), HIDDEN, WIDTH, name=f"u{place}"
        )
        h = net.op("Add", h, update)
    net.dense(h, WIDTH, 4, name="y")
    model = net.model({"x": ["n", WIDTH]}, {"y": ["n", 4]})
    assert any("a constant for each channel" in reason for reason in declined(model))


def test_a_target_that_tying_does_not_lower_declines_it():
    model, x = different("plain"), rows(400, WIDTH)
    result = optimize(
        model, data_for(model, x), budget=Budget(None, target=Target("flops", 0.9)), passes=[MergeFfn("average")],
        provider="cpu",
    )  # fmt: skip
    assert not kept(result)
    assert any("saves no flops" in entry.reason for entry in result.journal)


@pytest.mark.parametrize(
    ("measure", "there"),
    [("params", True), ("bytes", True), ("flops", False), ("latency", False), (None, False)],
)
def test_by_default_it_runs_where_the_target_names_what_it_saves(measure, there):
    assert any(item.name == "merge-ffn" for item in defaults(measure=measure)) == there


def test_bad_options_are_told():
    with pytest.raises(OptionError, match="window 1 must be at least 2"):
        parse("merge-ffn:window=1")
    with pytest.raises(OptionError, match="scale is for tie=fit"):
        parse("merge-ffn:tie=average,scale=false")
    with pytest.raises(OptionError, match="permute does nothing for tie=anchor"):
        parse("merge-ffn:tie=anchor,permute=false")
    with pytest.raises(OptionError, match=r"average\|anchor\|fit"):
        parse("merge-ffn:tie=sum")


@pytest.mark.parametrize("tie", TIES)
def test_in_a_chain_every_other_block_is_taken(tie):
    model, x = mlp([WIDTH, *[24] * 6, 5]), rows(500, WIDTH)
    windows = [site for site in MergeFfn(tie).sites(model) if not isinstance(site, Decline)]
    assert len(windows) == 2  # of the four blocks 24 -> 24 -> 24: the first and third, the second and fourth
    for window in windows:
        first, second = (set(block.nodes) for block in window.blocks)
        assert not first & second
    found = offers(model, data_for(model, x), MergeFfn(tie))
    for first, offer in zip((1, 2), found.values(), strict=True):
        wanted = x.astype(np.float64)
        layers, scales = [(one.matrix(), one.offset()) for one in linears(model.graph)], {}
        for place, own in zip((first, first + 2), offer.payload.weights(), strict=True):
            layers[place : place + 2] = zip(own.matrices, own.offsets, strict=True)
            scales[place + 1] = 1.0 if own.scale is None else own.scale
        for place, (matrix, offset) in enumerate(layers):
            wanted = (np.maximum(wanted, 0) if place else wanted) * scales.get(place, 1.0) @ matrix + offset
        small = narrowed(model, MergeFfn(tie), offer)
        assert relative(outputs(small, x=x)["y"], wanted) < 1e-5
    result = merged(model, x, MergeFfn(tie), share=0.9)
    assert len(kept(result)) == 1
    assert result.after.params < result.before.params


def test_blocks_inside_the_window_see_what_is_between():
    model = different("plain", 3)
    [window] = [site for site in MergeFfn(window=3).sites(model) if not isinstance(site, Decline)]
    made = {value.name for node in window.nodes for value in node.outputs}
    assert {"n1", "n2", "h1", "h2", "u0", "u1", "u2"} <= made
    assert not {"n0", "h0", "h3", "y"} & made
    assert len(feedforwards(model.graph)[0]) == 3
