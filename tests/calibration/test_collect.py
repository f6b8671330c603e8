# SPDX-License-Identifier: Apache-2.0
"""Statistics that the probes collect against the same sums in numpy."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from onnxcollapse.calibration import Gram, GramMatrix, Moments, MomentSums, Ref, collect, open_data
from onnxcollapse.errors import DataError, ModelError

rng = np.random.default_rng(7)
X = rng.standard_normal((100, 20)).astype(np.float32) + 3

FIELDS = ("mean", "variance", "minimum", "maximum", "positive_rate", "negative_square")


def rows(data, part, name="x"):
    return np.concatenate([batch[name].astype(np.float64) for batch in data.batches(part)])


def activations(model, x):
    w1, w2 = (model.graph.initializers[name].const_value.numpy().astype(np.float64) for name in ("w1", "w2"))
    z = x @ w1
    a = np.maximum(z, 0)
    return {"x": x, "z": z, "a": a, "y": a @ w2}


def assert_grams_equal(got: GramMatrix, want: GramMatrix, rtol=1e-5):
    """Relative to the size of the two columns multiplied, as sums may cancel."""
    assert got.count == want.count
    assert got.widths == want.widths
    scale = np.sqrt(np.diag(want.matrix)) + 1e-6  # dead neurons are exactly 0
    assert (np.abs(got.matrix - want.matrix) / np.outer(scale, scale)).max() < rtol
    np.testing.assert_array_equal(got.matrix, got.matrix.T)


def assert_moments_equal(got: MomentSums, want: MomentSums, rtol=1e-5):
    assert got.count == want.count
    for name in FIELDS:
        scale = np.abs(getattr(want, name)).max()
        np.testing.assert_allclose(
            getattr(got, name), getattr(want, name), rtol=0, atol=rtol * scale, err_msg=name
        )


@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 15, 17, 18, 21, 23])
def test_sums_equal_numpy(mlp, opset):
    model = mlp(opset=opset)
    data = open_data({"x": X}, model)
    gram, moments = Gram((Ref("x"), Ref("a")), (Ref("y"),)), Moments(Ref("z"))
    statistics = collect(model, [gram, moments], data, provider="cpu")
    for part, result in (("fit", statistics.fit), ("heldout", statistics.heldout)):
        values = activations(model, rows(data, part))
        assert_grams_equal(
            result(gram), GramMatrix.from_rows({name: values[name] for name in ("x", "a", "y")})
        )
        assert_moments_equal(result(moments), MomentSums.from_rows(values["z"]))
    assert statistics.fit(gram).count == 75
    assert statistics.heldout(gram).count == 25
    assert statistics.fit(gram).refs == gram.refs


def test_a_large_offset_does_not_drown_the_covariance(mlp):
    model = mlp()
    x = X + 1e4
    data = open_data({"x": x}, model)
    statistics = collect(model, [Gram((Ref("x"),)), Moments(Ref("x"))], data, provider="cpu")
    gram, want = statistics.fit(Gram((Ref("x"),))), np.cov(rows(data, "fit").T, bias=True)
    covariance = gram.block(1, 1) - np.outer(gram.mean(1), gram.mean(1))
    assert np.abs(covariance - want).max() < 1e-4
    np.testing.assert_allclose(statistics.fit(Moments(Ref("x"))).variance, np.diag(want), rtol=1e-4)


@pytest.mark.parametrize(("dtype", "kind"), [("float16", np.float16), ("double", np.float64)])
def test_other_float_types(mlp, dtype, kind):
    model = mlp(dtype=dtype)
    data = open_data({"x": (X / 3).astype(kind)}, model)
    gram = Gram((Ref("x"),), (Ref("x"), Ref("z")))
    got = collect(model, [gram], data, provider="cpu").fit(gram)
    values = activations(model, rows(data, "fit"))
    want = GramMatrix.from_rows({Ref("x"): values["x"], Ref("x", axis=0): values["x"], "z": values["z"]})
    assert_grams_equal(got, want, 2e-3 if dtype == "float16" else 1e-5)
    np.testing.assert_allclose(got.matrix[:21, :21], want.matrix[:21, :21], rtol=1e-5)  # x itself is exact


def test_fp16_sums_do_not_overflow(build):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float16[N,4] x) => (float16[N,4] y) { y = Relu(x) }"""
    )
    x = np.full((64, 4), 3e4, np.float16)
    gram = Gram((Ref("y"),))
    got = collect(model, [gram], open_data({"x": x}, model), provider="cpu").fit(gram)
    np.testing.assert_allclose(got.block("y", "y"), float(np.float16(3e4)) ** 2, rtol=1e-6)


CONV = """<ir_version: 8, opset_import: ["" : {opset}]>
conv (float[N,3,H,W] x) => (float[N,8] pooled) {{
    c = Conv<kernel_shape = [1, 1]>(x, w)
    r = Relu(c)
    p = GlobalAveragePool(r)
    pooled = Flatten(p)
}}"""


@pytest.mark.parametrize("opset", [9, 13, 20])
@pytest.mark.parametrize("known_rank", [True, False])
def test_channels_on_axis_1(build, opset, known_rank):
    w = rng.standard_normal((8, 3, 1, 1)).astype(np.float32)
    model = build(CONV.format(opset=opset), w=w)
    if known_rank:
        for node in model.graph:
            if node.op_type in ("Conv", "Relu"):
                node.outputs[0].shape = type(model.graph.inputs[0].shape)(["N", 8, "H", "W"])
    x = rng.standard_normal((10, 3, 5, 4)).astype(np.float32)
    data = open_data({"x": x}, model)
    gram, moments = Gram((Ref("x", axis=1),), (Ref("r", axis=1),)), Moments(Ref("c", axis=1))
    statistics = collect(model, [gram, moments], data, provider="cpu")
    flat = rows(data, "fit").transpose(0, 2, 3, 1).reshape(-1, 3)
    c = flat @ w[:, :, 0, 0].T.astype(np.float64)
    assert_grams_equal(statistics.fit(gram), GramMatrix.from_rows({"x": flat, "r": np.maximum(c, 0)}))
    assert_moments_equal(statistics.fit(moments), MomentSums.from_rows(c))
    assert statistics.fit(gram).count == 7 * 20 + 20  # of 10 samples 2 are held out


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("known_rank", [True, False])
def test_channels_on_axis_minus_2(build, known_rank, opset):
    model = build(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[N,4,S] x) => (float[N,6,S] y) {{ t = MatMul(w, x)  y = Relu(t) }}""",
        w=rng.standard_normal((6, 4)).astype(np.float32),
    )
    if not known_rank:
        model.graph.outputs[0].shape = None
    x = rng.standard_normal((12, 4, 7)).astype(np.float32)
    data = open_data({"x": x}, model)
    gram = Gram((Ref("x", axis=-2),), (Ref("y", axis=-2),))
    flat = rows(data, "fit").transpose(0, 2, 1).reshape(-1, 4)
    y = np.maximum(flat @ model.graph.initializers["w"].const_value.numpy().T, 0)
    assert_grams_equal(
        collect(model, [gram], data, provider="cpu").fit(gram), GramMatrix.from_rows({"x": flat, "y": y})
    )


def test_padding_is_left_out(encoder):
    model = encoder()
    lengths = rng.integers(1, 10, 30)
    mask = (np.arange(10) < lengths[:, None]).astype(np.int64)
    ids = np.where(mask == 1, rng.integers(0, 50, (30, 10)), 0)
    data = open_data({"input_ids": ids, "attention_mask": mask}, model)
    gram, moments, pooled = Gram((Ref("h"),)), Moments(Ref("h")), Moments(Ref("pooled"))
    statistics = collect(model, [gram, moments, pooled], data, provider="cpu")
    table = model.graph.initializers["table"].const_value.numpy()
    real = np.concatenate([table[b["input_ids"]][b["attention_mask"] == 1] for b in data.batches("fit")])
    assert_grams_equal(statistics.fit(gram), GramMatrix.from_rows({"h": real}))
    assert_moments_equal(statistics.fit(moments), MomentSums.from_rows(real))
    assert statistics.fit(pooled).count == data.count("fit")  # a row a sample, not a token: unmasked


def test_padded_and_unpadded_data_give_the_same_sums(encoder):
    model = encoder()
    ids = rng.integers(0, 50, (16, 6))
    short = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    long = {name: np.pad(array, [(0, 0), (0, 5)]) for name, array in short.items()}
    gram = Gram((Ref("h"),))
    full, padded = open_data(short, model), open_data(long, model)
    assert padded.padded and not full.padded  # nothing is masked where there is nothing to mask
    a, b = (collect(model, [gram], data, provider="cpu").fit(gram) for data in (full, padded))
    assert_grams_equal(b, a, 1e-6)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21])
def test_the_mask_of_a_cache_graph_covers_past_and_present(build, opset):
    model = build(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (int64[B,S] input_ids, int64[B,T] attention_mask, float[B,2,P,3] past_key_values_0_key)
            => (float[B,S,6] h, float[B,2,P,3] present_0_key) {{
            h = Gather(table, input_ids)
            present_0_key = Identity(past_key_values_0_key)
        }}""",
        table=rng.standard_normal((50, 6)).astype(np.float32),
    )
    ids, past = rng.integers(0, 50, (8, 3)), rng.standard_normal((8, 2, 4, 3)).astype(np.float32)
    mask = np.ones((8, 7), np.int64)
    mask[:, :4] = 0
    mask[0, 5:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "past_key_values_0_key": past}
    data = open_data(feeds, model, heldout=0.1)
    gram = Gram((Ref("h"),))
    statistics = collect(model, [gram], data, provider="cpu")
    assert statistics.fit(gram).count + statistics.heldout(gram).count == 8 * 3 - 2
    without_past = open_data({"input_ids": ids}, model)
    statistics = collect(model, [gram], without_past, provider="cpu")
    assert statistics.fit(gram).count + statistics.heldout(gram).count == 24


def test_targets_of_a_reference(mlp):
    model, reference = mlp(seed=0), mlp(seed=1)
    data = open_data({"x": X}, model)
    gram = Gram((Ref("a"),), (Ref("a", "reference"), Ref("y", "reference")))
    got = collect(model, [gram], data, provider="cpu", reference=reference).heldout(gram)
    x = rows(data, "heldout")
    ours, theirs = activations(model, x), activations(reference, x)
    want = {Ref("a"): ours["a"], Ref("a", "reference"): theirs["a"], Ref("y", "reference"): theirs["y"]}
    assert_grams_equal(got, GramMatrix.from_rows(want))
    assert got.refs == gram.refs


def test_a_reference_that_is_a_copy_gives_the_same_tensor(mlp):
    model = mlp()
    data = open_data({"x": X}, model)
    gram = Gram((Ref("y"),), (Ref("y", "reference"),))
    for reference in (model, model.clone(), None):
        got = collect(model, [gram], data, provider="cpu", reference=reference).fit(gram)
        np.testing.assert_array_equal(got.matrix[1:6, 1:6], got.matrix[6:, 6:])
        np.testing.assert_array_equal(got.matrix[1:6, 1:6], got.matrix[1:6, 6:])


def test_models_are_left_as_they_are(mlp):
    import onnx_ir as ir

    model, reference = mlp(0), mlp(1)
    before = [ir.to_proto(m.ir).SerializeToString(deterministic=True) for m in (model, reference)]
    data = open_data({"x": X}, model)
    collect(model, [Gram((Ref("a"),), (Ref("y", "reference"),))], data, provider="cpu", reference=reference)
    assert [ir.to_proto(m.ir).SerializeToString(deterministic=True) for m in (model, reference)] == before


def test_two_runs_are_identical_to_the_bit(mlp):
    model = mlp()
    gram, moments = Gram((Ref("x"), Ref("a")), (Ref("y"),)), Moments(Ref("z"))
    runs = []
    for _ in range(2):
        statistics = collect(model, [gram, moments], open_data({"x": X}, model, seed=3), provider="cpu")
        runs.append([statistics.fit(gram).matrix, statistics.heldout(moments).variance])
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


def test_only_the_prefix_runs(build):
    """The probed model is cut behind the last probe: an operator that would fail later never runs."""
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4] x) => (float[K] y) <int64[1] bad = {-7}> { z = Relu(x)  y = Reshape(z, bad) }"""
    )
    gram = Gram((Ref("z"),))
    x = rng.standard_normal((8, 4)).astype(np.float32)
    assert collect(model, [gram], open_data({"x": x}, model), provider="cpu").fit(gram).count == 6


def test_graph_inputs_can_be_probed_and_progress_is_told(mlp):
    model, told = mlp(), []
    data = open_data({"x": X}, model, batch_size=32)
    collect(model, [Moments(Ref("x"))], data, provider="cpu", progress=lambda *step: told.append(step))
    assert told == [(32, 100), (64, 100), (75, 100), (100, 100)]


def test_parts_and_no_requests(mlp):
    model = mlp()
    data = open_data({"x": X}, model)
    assert collect(model, [], data, provider="cpu").results == {}
    only = collect(model, [Moments(Ref("x"))], data, provider="cpu", parts=("heldout",))
    assert [part for part, _ in only.results] == ["heldout"]


def test_numbers_that_are_none(build):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4] x) => (float[N,4] y) { z = Log(x)  y = Relu(z) }"""
    )
    data = open_data({"x": rng.standard_normal((20, 4)).astype(np.float32)}, model)
    for request in (Gram((Ref("x"), Ref("z"))), Moments(Ref("z"))):
        with pytest.raises(DataError, match="tensor 'z' of the model becomes NaN"):
            collect(model, [request], data, provider="cpu")


def test_tensors_that_cannot_be_probed(build, mlp):
    data = open_data({"x": X}, mlp())
    with pytest.raises(ModelError, match="'nothing' is not in the model's main graph"):
        collect(mlp(), [Moments(Ref("nothing"))], data, provider="cpu")
    with pytest.raises(ModelError, match="rank 2 and no axis 3"):
        collect(mlp(), [Moments(Ref("x", axis=3))], data, provider="cpu")
    branch = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,20] x, bool flag) => (float[N,20] y) {
            y = If (flag) <
                then_branch = a () => (float[N,20] t) { inner = Relu(x)  t = Neg(inner) },
                else_branch = b () => (float[N,20] e) { e = Identity(x) }
            >
        }"""
    )
    fed = open_data({"x": X, "flag": np.array(True)}, branch)
    with pytest.raises(ModelError, match="'inner' lies in a subgraph"):
        collect(branch, [Moments(Ref("inner"))], fed, provider="cpu")
    assert collect(branch, [Moments(Ref("y"))], fed, provider="cpu").fit(Moments(Ref("y"))).count == 75


def test_tensors_of_unequal_rows(build):
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4,2] x) => (float[N,2] y) { y = ReduceMean<axes = [1], keepdims = 0>(x) }"""
    )
    data = open_data({"x": rng.standard_normal((8, 4, 2)).astype(np.float32)}, model)
    with pytest.raises(ModelError, match="cannot run a batch"):
        collect(model, [Gram((Ref("x"),), (Ref("y"),))], data, provider="cpu")


def test_an_old_opset(build):
    model = build(
        '<ir_version: 3, opset_import: ["" : 8]> g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }'
    )
    data = open_data({"x": np.ones((4, 2), np.float32)}, model)
    with pytest.raises(ModelError, match="opset 8"):
        collect(model, [Moments(Ref("y"))], data, provider="cpu")


def test_batches_do_not_pile_up(mlp):
    """Ten times the batches take no more memory: sums are kept, never activations."""

    def peak(samples):
        model = mlp()
        data = open_data({"x": np.ones((samples, 20), np.float32)}, model, batch_size=100)
        collect(model, [Gram((Ref("x"), Ref("a")))], data, provider="cpu")  # warm up
        tracemalloc.start()
        collect(model, [Gram((Ref("x"), Ref("a")))], data, provider="cpu")
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result - samples * 100  # the permutation and the units of the split

    few, many = peak(1000), peak(10000)
    assert many < few + 300_000
