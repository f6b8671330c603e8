# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from onnxcollapse.errors import MetricError
from onnxcollapse.verification import METRICS, metric, rows
from onnxcollapse.verification import softmax as softmaxes

rng = np.random.default_rng(11)
WANT = rng.standard_normal((40, 7))
GOT = WANT + 0.3 * rng.standard_normal((40, 7))


def measure(spec, got, want, batches=1, **feeds):
    """The value of a metric on one output, fed in several batches."""
    one = metric(spec)
    for part in np.array_split(np.arange(len(want)), batches):
        feed = {name: array[part] for name, array in feeds.items()} or {"x": want[part]}
        one.update({"y": got[part]}, {"y": want[part]}, feed)
    return one.value()


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


EXPECTED = {
    "rel-l2": np.sqrt(np.square(GOT - WANT).sum() / np.square(WANT).sum()),
    "cosine": 1 - cosines(GOT, WANT).mean(),
    "kl": (softmax(WANT) * (np.log(softmax(WANT)) - np.log(softmax(GOT)))).sum(-1).mean(),
    "top1": (GOT.argmax(-1) != WANT.argmax(-1)).mean(),
}


@pytest.mark.parametrize("spec", METRICS)
@pytest.mark.parametrize("batches", [1, 7])
def test_formulas(spec, batches):
    assert EXPECTED[spec] > 0.01
    assert measure(spec, GOT, WANT, batches) == pytest.approx(EXPECTED[spec], rel=1e-12)


@pytest.mark.parametrize("spec", METRICS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_identical_outputs_have_no_error(spec, dtype):
    want = (WANT * 1000).astype(dtype)
    assert measure(spec, want.copy(), want) == 0


@pytest.mark.parametrize("spec", METRICS)
def test_sums_are_fp64(spec):
    """fp16 outputs whose squares overflow in their own type."""
    got, want = (GOT * 3000).astype(np.float16), (WANT * 3000).astype(np.float16)
    wide = measure(spec, got.astype(np.float64), want.astype(np.float64))
    assert np.isfinite(wide)
    assert measure(spec, got, want) == wide


@pytest.mark.parametrize("spec", METRICS)
def test_rows_are_cut_into_blocks(spec, monkeypatch):
    whole = measure(spec, GOT, WANT)
    monkeypatch.setattr(rows, "BLOCK", 20)
    assert measure(spec, GOT, WANT) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("spec", METRICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_in_the_candidate(spec, bad):
    got = GOT.copy()
    got[13, 2] = bad
    assert measure(spec, got, WANT, 3) == np.inf


@pytest.mark.parametrize("spec", METRICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_in_the_reference(spec, bad):
    want = WANT.copy()
    want[13, 2] = bad
    with pytest.raises(MetricError, match="'y' of the reference is NaN or infinite"):
        measure(spec, GOT, want)


def test_masked_logits():
    """-inf in both is agreement; in the reference alone it is a probability of 0."""
    got, want = GOT.copy(), WANT.copy()
    got[:, 3] = want[:, 3] = -np.inf
    keep = [0, 1, 2, 4, 5, 6]
    for spec in METRICS:
        assert measure(spec, got, want) == pytest.approx(
            measure(spec, GOT[:, keep], WANT[:, keep]), rel=1e-12
        )
    got[:, 3] = 0.5
    assert measure("rel-l2", got, want) == measure("cosine", got, want) == np.inf
    p, q = softmax(want), softmax(got)
    expected = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0).sum(-1).mean()
    assert measure("kl", got, want) == pytest.approx(expected, rel=1e-12)


def test_references_of_zeros():
    zeros = np.zeros((4, 3))
    assert measure("rel-l2", zeros, zeros) == 0
    assert measure("rel-l2", zeros + 1e-9, zeros) == np.inf
    assert measure("cosine", zeros, zeros) == 0
    assert measure("cosine", zeros + 1, zeros) == 1
    assert measure("cosine", zeros, zeros + 1) == 1
    assert measure("cosine", -WANT, WANT) == pytest.approx(2)


def test_kl_is_stable():
    logits = np.array([[1e4, 0.0, -1e4], [1e4 + 1, 1e4, 1e4]])
    assert measure("kl", logits + 500, logits) == pytest.approx(0, abs=1e-9)
    assert measure("kl", logits[::-1], logits) > 100


@pytest.mark.parametrize("spec", METRICS)
def test_padding_is_left_out(spec):
    got, want = GOT.reshape(4, 10, 7).copy(), WANT.reshape(4, 10, 7)
    mask = (np.arange(10) < np.array([[10], [3], [1], [6]])).astype(np.int64)
    expected = measure(spec, got[mask == 1], want[mask == 1])
    got[mask == 0] = np.nan
    assert measure(spec, got, want, 2, attention_mask=mask) == pytest.approx(expected, rel=1e-12)
    deep = measure(spec, got.reshape(4, 10, 1, 7), want.reshape(4, 10, 1, 7), attention_mask=mask)
    assert deep == pytest.approx(expected, rel=1e-12)


def test_the_mask_is_left_alone_where_it_does_not_belong():
    """A pooled output [B, d] whose d happens to be the sequence length."""
    mask = np.zeros((40, 7), np.int64)
    assert measure("rel-l2", GOT, WANT, attention_mask=mask) == pytest.approx(EXPECTED["rel-l2"], rel=1e-12)


def test_the_mask_of_past_and_present():
    got, want = GOT.reshape(4, 10, 7), WANT.reshape(4, 10, 7)
    mask = np.ones((4, 13), np.int64)
    mask[:, -1] = 0
    expected = measure("rel-l2", got[:, :-1], want[:, :-1])
    ids = np.zeros((4, 10), np.int64)
    assert measure("rel-l2", got, want, attention_mask=mask, input_ids=ids) == pytest.approx(expected)


def test_the_worst_output_counts_and_caches_do_not():
    one = metric("rel-l2")
    want = {"a": WANT, "b": WANT, "present.0.key": WANT, "ids": np.arange(3)}
    got = {"a": WANT * 1.1, "b": WANT * 1.2, "present.0.key": WANT * 9, "ids": np.arange(3)}
    one.update(got, want, {"x": WANT})
    assert one.value() == pytest.approx(0.2)
    assert one.values() == pytest.approx({"a": 0.1, "b": 0.2, "present.0.key": 8.0})
    del got["present.0.key"]  # the cache of a removed layer
    one.update(got, want, {"x": WANT})
    only_caches = metric("rel-l2")
    only_caches.update({"present.0.key": WANT * 1.5}, {"present.0.key": WANT}, {"x": WANT})
    assert only_caches.value() == pytest.approx(0.5)


def test_outputs_that_do_not_fit():
    one = metric("kl")
    with pytest.raises(MetricError, match="output 'y' is missing"):
        one.update({}, {"y": WANT}, {})
    with pytest.raises(MetricError, match=r"'y' has shape \[40, 6\] instead of \[40, 7\]"):
        one.update({"y": GOT[:, :6]}, {"y": WANT}, {})
    with pytest.raises(MetricError, match="no floating-point output"):
        one.update({"y": np.arange(3)}, {"y": np.arange(3)}, {})
    assert metric("kl").value() == 0


def test_scalar_outputs():
    one = metric("rel-l2")
    one.update({"y": np.float32([1.1])[0:1].reshape(())}, {"y": np.float32([1.0]).reshape(())}, {})
    assert one.value() == pytest.approx(0.1, rel=1e-6)


WIDE = 5000  # entries a row: more than what stays in float64


def wide(scale, rows=6, dtype=np.float32, seed=5):
    """Logits [rows, WIDE] and what they are moved to."""
    random = np.random.default_rng(seed)
    want = 3 * random.standard_normal((rows, WIDE))
    return (want + scale * random.standard_normal(want.shape)).astype(dtype), want.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("scale", [3.0, 0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("spec", ["kl", "top1"])
def test_wide_rows_in_float32_are_as_good_as_in_float64(spec, scale, dtype):
    got, want = wide(scale, dtype=dtype)
    exact = measure(spec, got.astype(np.float64), want.astype(np.float64))
    assert measure(spec, got, want, 2) == pytest.approx(exact, rel=1e-6, abs=1e-7)
    assert measure(spec, want.copy(), want) == 0


def test_small_divergences_of_narrow_rows_are_seen():
    want = WANT.astype(np.float32)
    got = want.copy()
    got[:, 0] += np.float32(1e-4)
    p = softmax(want.astype(np.float64))[:, 0]
    expected = (np.square(got[:, 0].astype(np.float64) - want[:, 0]) * p * (1 - p)).mean() / 2
    assert 1e-10 < expected < 1e-8
    assert measure("kl", got, want) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("spec", ["kl", "top1"])
def test_wide_rows_with_numbers_that_are_none(spec):
    got, want = wide(0.3)
    for bad in (np.nan, np.inf, -np.inf):
        broken = got.copy()
        broken[3, 7] = bad
        assert measure(spec, broken, want) == np.inf
        if bad != -np.inf:
            with pytest.raises(MetricError, match="of the reference is NaN or infinite"):
                measure(spec, want, broken)
    got[:, 3] = want[:, 3] = -np.inf
    exact = measure(spec, got.astype(np.float64), want.astype(np.float64))
    assert measure(spec, got, want) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("spec", ["kl", "top1", "perplexity"])
def test_what_is_known_of_a_reference_is_used_by_every_candidate(spec, monkeypatch):
    kept = softmaxes.Kept()
    made, real = [], kept.of

    def counted(owner, key, make):
        return real(owner, key, lambda: made.append(key) or make())

    monkeypatch.setattr(kept, "of", counted)
    batches = [wide(0.2, 8, seed=seed)[1].reshape(2, 4, WIDE) for seed in range(2)]
    ids = rng.integers(0, WIDE, (2, 4))
    feeds = {"input_ids": ids, "attention_mask": np.array([[1, 1, 1, 0], [1, 1, 1, 1]])}
    candidates = [
        [batch + np.float32(factor) * np.roll(batch, 1, -1) for batch in batches]
        for factor in (0.0, 0.05, 0.2)
    ]
    shared, alone = ([metric(spec, known) for _ in candidates] for known in (kept, None))
    for number, batch in enumerate(batches):
        for candidate, one, other in zip(candidates, shared, alone, strict=True):
            one.update({"y": candidate[number]}, {"y": batch}, feeds)
            other.update({"y": candidate[number]}, {"y": batch}, feeds)
    assert [one.value() for one in shared] == [other.value() for other in alone]
    assert shared[0].value() == 0
    assert shared[2].value() > 0 or spec != "kl"
    assert len(made) == 2 * len(set(made))  # once a batch


@pytest.mark.parametrize("spec", ["l2", "", "file.py", "REL-L2"])
def test_unknown_metrics(spec):
    with pytest.raises(
        MetricError,
        match=r"is unknown; choose rel-l2, cosine, kl, top1, perplexity, continuation or file\.py:function",
    ):
        metric(spec)


FUNCTIONS = """
import numpy as np
def size(outputs, reference, batch):
    outputs["y"], reference["y"], batch["x"]
    return len(batch["x"])
def gap(outputs, reference, batch): return np.abs(outputs["y"] - reference["y"]).max()
def broken(outputs, reference, batch): return outputs["nothing"]
def textual(outputs, reference, batch): return "bad"
def nan(outputs, reference, batch): return float("nan")
number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def test_user_functions_are_averaged_by_samples(file):
    sizes = [6] * 5 + [5] * 2  # of 40 samples in 7 batches
    assert measure(f"{file}:size", GOT, WANT, 7) == pytest.approx(sum(n * n for n in sizes) / 40)
    assert measure(f"{file}:gap", GOT, WANT) == pytest.approx(np.abs(GOT - WANT).max())
    assert metric(f"{file}:gap").value() == 0
    assert metric(f"{file}:gap").name == f"{file}:gap"
    assert measure(f"{file}:nan", GOT, WANT) == np.inf


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "fails with KeyError: 'nothing'; correct the function"),
        ("textual", "fails with ValueError"),
        ("missing", "has no function 'missing'"),
        ("number", "has no function 'number'"),
    ],
)
def test_user_functions_that_do_not_work(file, name, message):
    with pytest.raises(MetricError, match=message):
        measure(f"{file}:{name}", GOT, WANT)


def test_user_files_that_do_not_work(tmp_path):
    with pytest.raises(MetricError, match=r"there is no file .*nowhere\.py"):
        metric(f"{tmp_path}/nowhere.py:f")
    (tmp_path / "bad.py").write_text("1 +")
    with pytest.raises(MetricError, match=r"running .*bad\.py fails with SyntaxError"):
        metric(f"{tmp_path}/bad.py:f")
