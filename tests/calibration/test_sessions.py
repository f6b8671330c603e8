# SPDX-License-Identifier: Apache-2.0
"""Sessions: weights handed over in memory, inner outputs, providers and what happens without them."""

from __future__ import annotations

import logging
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse.calibration import Provider, available_providers, open_session, providers
from onnxcollapse.calibration.handover import hand_over
from onnxcollapse.calibration.sessions import open_file
from onnxcollapse.errors import DataError, ModelError, ProviderError
from onnxcollapse.model.model import Model

rng = np.random.default_rng(5)
X = rng.standard_normal((6, 20)).astype(np.float32)

CUDA_WORKS = providers.works(providers.CUDA)


def run(model, outputs=None, **feeds):
    with open_session(model, provider="cpu", outputs=outputs) as session:
        return session.run(feeds)


def test_runs_a_model_and_ignores_foreign_feeds(mlp):
    model = mlp()
    w1, w2 = (model.graph.initializers[name].const_value.numpy() for name in ("w1", "w2"))
    got = run(model, x=X, foreign=X)
    np.testing.assert_allclose(got["y"], np.maximum(X @ w1, 0) @ w2, rtol=1e-5, atol=1e-6)
    assert list(got) == ["y"]


def test_inner_values_as_outputs(mlp):
    got = run(mlp(), ["a", "z", "a"], x=X)
    assert list(got) == ["a", "z"]
    np.testing.assert_array_equal(got["a"], np.maximum(got["z"], 0))
    with pytest.raises(ModelError, match="'nothing' is not in the main graph"):
        run(mlp(), ["nothing"], x=X)


def test_sizes_fix_free_dimensions(mlp, tmp_path):
    mlp().save(tmp_path / "model.onnx")
    with open_file(tmp_path / "model.onnx", "cpu", sizes={"N": 3, "elsewhere": 7}) as session:
        assert session.run({"x": np.ones((3, 20), np.float32)})["y"].shape == (3, 5)
        with pytest.raises(ModelError, match=r"cannot run a batch of x \(2, 20\)"):
            session.run({"x": np.ones((2, 20), np.float32)})


def test_large_weights_stay_out_of_the_skeleton(mlp):
    handover = hand_over(mlp())
    assert list(handover.values) == ["w1"]  # w2 is below 1 KiB
    assert len(handover.skeleton) < 2000
    assert handover.values["w1"].data_ptr() == handover.arrays[0].ctypes.data


def test_weights_of_a_file_are_not_copied(mlp, tmp_path):
    path = tmp_path / "model.onnx"
    model = mlp()
    model.save(path)
    loaded = Model.load(path)
    handover = hand_over(loaded)
    mapped = loaded.graph.initializers["w1"].const_value.numpy()
    assert np.shares_memory(handover.arrays[0], mapped)
    np.testing.assert_array_equal(run(loaded, x=X)["y"], run(model, x=X)["y"])


def test_the_session_keeps_its_weights_alive(mlp):
    model = mlp()
    want = run(model, x=X)["y"]
    session = open_session(model, provider="cpu")
    del model
    junk = [np.full((20, 30), 1e9, np.float32) for _ in range(100)]
    np.testing.assert_array_equal(session.run({"x": X})["y"], want)
    del junk
    session.close()


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
        (ir.DataType.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
        (ir.DataType.FLOAT8E5M2, ml_dtypes.float8_e5m2),
        (ir.DataType.INT4, ml_dtypes.int4),
        (ir.DataType.UINT4, ml_dtypes.uint4),
        (ir.DataType.FLOAT16, np.float16),
        (ir.DataType.INT8, np.int8),
        (ir.DataType.UINT16, np.uint16),
    ],
)
def test_weights_of_narrow_types(build, dtype, kind):
    model = build(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[N,64] x) => (float[N,64] y) { c = Cast<to = 1>(w)  y = MatMul(x, c) }""",
        w=np.zeros((1, 1), np.float32),
    )
    array = rng.integers(0, 8, (64, 64)).astype(kind)
    value = model.graph.initializers["w"]
    value.const_value = ir.Tensor(array, dtype=dtype, name="w")
    value.dtype, value.shape = dtype, ir.Shape([64, 64])
    x = rng.standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_allclose(run(model, x=x)["y"], x @ array.astype(np.float32), rtol=1e-4, atol=1e-4)


def test_bf16_outputs_come_as_float32(build):
    model = build(
        """<ir_version: 9, opset_import: ["" : 17]>
        g (float[N,4] x) => (bfloat16[N,4] y) { y = Cast<to = 16>(x) }"""
    )
    got = run(model, x=X[:, :4])["y"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, X[:, :4].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_weights_in_constants_subgraphs_and_functions(build):
    """Constants of the main graph are handed over; what lies deeper stays inside, from a file as well."""
    big = rng.standard_normal((32, 32)).astype(np.float32)
    text = ", ".join(f"{v:.9g}" for v in big.reshape(-1))
    model = build(
        f"""<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[N,32] x, bool flag) => (float[N,32] y) {{
            w = Constant<value = float[32,32] {{ {text} }}>()
            h = MatMul(x, w)
            i = If (flag) <
                then_branch = a () => (float[N,32] t) <float[32,32] v = {{ {text} }}> {{ t = MatMul(h, v) }},
                else_branch = b () => (float[N,32] e) {{
                    u = Constant<value = float[32,32] {{ {text} }}>()
                    e = MatMul(x, u)
                }}
            >
            y = own.times(i)
        }}
        <domain: "own", opset_import: ["" : 17]>
        times (a) => (b) {{ u = Constant<value = float[32,32] {{ {text} }}>()  b = MatMul(a, u) }}"""
    )
    x = rng.standard_normal((3, 32)).astype(np.float32)
    assert list(hand_over(model).values) == ["w"]
    for flag, power in ((True, 3), (False, 2)):
        want = x @ np.linalg.matrix_power(big.astype(np.float64), power)
        np.testing.assert_allclose(run(model, x=x, flag=np.array(flag))["y"], want, rtol=1e-3, atol=1e-2)


def test_weights_in_subgraphs_of_a_file(build, tmp_path):
    v = rng.standard_normal((32, 32)).astype(np.float32)
    text = ", ".join(f"{value:.9g}" for value in v.reshape(-1))
    model = build(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,32] x, bool flag) => (float[N,32] y) {{
            y = If (flag) <
                then_branch = a () => (float[N,32] t) <float[32,32] v = {{ {text} }}> {{ t = MatMul(x, v) }},
                else_branch = b () => (float[N,32] e) {{ e = Identity(x) }}
            >
        }}"""
    )
    for external in (False, True):
        path = tmp_path / f"{external}" / "model.onnx"
        path.parent.mkdir()
        model.save(path, external=external)
        x = rng.standard_normal((3, 32)).astype(np.float32)
        got = run(Model.load(path), x=x, flag=np.array(True))["y"]
        np.testing.assert_allclose(got, x @ v, rtol=1e-4, atol=1e-4)


def test_defaults_of_inputs_may_be_overridden(build):
    default = np.ones((1, 400), np.float32)
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,400] x, float[1,400] shift) => (float[N,400] y) { y = Add(x, shift) }""",
        shift=default,
    )
    x = np.zeros((2, 400), np.float32)
    assert (run(model, x=x)["y"] == 1).all()
    assert (run(model, x=x, shift=5 * default)["y"] == 5).all()


def test_large_index_tensors_are_still_read_by_shape_inference(build):
    """A Reshape target of 1 KiB stays in the skeleton."""
    target = np.array([1] * 198 + [-1, 4], np.int64)
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4] x) => (float[M,4] y) { r = Reshape(x, t)  f = Flatten<axis = 199>(r)  y = Relu(f) }""",
        t=target,
    )
    assert hand_over(model).values == {}
    assert run(model, x=X[:, :4])["y"].shape == (6, 4)


def test_a_model_that_cannot_be_loaded(build, tmp_path):
    model = build(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Nonsense(x) }'
    )
    model.path = tmp_path / "strange.onnx"
    with pytest.raises(ModelError, match=r"cannot load .*strange\.onnx: .*Nonsense") as caught:
        open_session(model, provider="cpu")
    assert "\n" not in str(caught.value)


def test_missing_inputs_and_failing_runs(mlp):
    with open_session(mlp(), provider="cpu") as session:
        with pytest.raises(DataError, match="input 'x' is not in the data"):
            session.run({})
        with pytest.raises(ModelError, match=r"cannot run a batch of x \(2, 7\)"):
            session.run({"x": np.zeros((2, 7), np.float32)})


def test_opening_a_session_leaves_the_model(mlp):
    model = mlp()
    before = ir.to_proto(model.ir).SerializeToString(deterministic=True)
    open_session(model, provider="cpu", outputs=["a"]).close()
    assert ir.to_proto(model.ir).SerializeToString(deterministic=True) == before


def test_the_provider_is_stated(mlp):
    session = open_session(mlp(), provider="cpu")
    assert session.provider == Provider("cpu", "CPUExecutionProvider")
    assert open_session(mlp(), provider="CPUExecutionProvider").provider.obtained == "CPUExecutionProvider"
    assert "CPUExecutionProvider" in available_providers()


def test_unknown_providers(mlp):
    for name in ("quantum", "QNNExecutionProvider", ""):
        with pytest.raises(
            ProviderError, match=r"is not available; choose one of auto, cpu, cuda, tensorrt, .*CPU"
        ):
            open_session(mlp(), provider=name)


@pytest.mark.skipif(CUDA_WORKS, reason="CUDA works here")
@pytest.mark.parametrize("name", ["cuda", "CUDAExecutionProvider", "tensorrt"])
def test_a_provider_that_does_not_work_is_warned_about_once(mlp, caplog, capfd, name):
    providers.chain.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            session = open_session(mlp(), provider=name)
    assert session.provider == Provider(name, "CPUExecutionProvider")
    assert session.run({"x": X})["y"].shape == (6, 5)
    [message] = [record.getMessage() for record in caplog.records]
    assert "does not work here, using CPUExecutionProvider instead" in message
    assert "pip install" in message
    assert capfd.readouterr() == ("", "")  # ONNX Runtime's own complaints are kept out


@pytest.mark.skipif(CUDA_WORKS, reason="CUDA works here")
def test_auto_takes_the_cpu_without_a_word(mlp, caplog):
    providers.chain.cache_clear()
    assert open_session(mlp()).provider == Provider("auto", "CPUExecutionProvider")
    assert not caplog.records


def test_a_build_without_cuda(mlp, caplog, monkeypatch):
    monkeypatch.setattr(providers, "available_providers", lambda: ("CPUExecutionProvider",))
    providers.chain.cache_clear()
    providers.works.cache_clear()
    try:
        assert open_session(mlp(), provider="cuda").provider.obtained == "CPUExecutionProvider"
        assert "onnxcollapse[cuda]" in caplog.text
    finally:
        providers.chain.cache_clear()
        providers.works.cache_clear()


def test_cuda_is_used_where_it_works(monkeypatch):
    monkeypatch.setattr(providers, "works", lambda name: name == providers.CUDA)
    providers.chain.cache_clear()
    try:
        assert providers.chain("auto") == (providers.CUDA, providers.CPU)
        assert providers.chain("cuda") == (providers.CUDA, providers.CPU)
        assert providers.chain("tensorrt") == (providers.CUDA, providers.CPU)
        assert providers.chain("cpu") == (providers.CPU,)
    finally:
        providers.chain.cache_clear()
    assert providers.OPTIONS[providers.CUDA]["use_tf32"] == "0"


def test_importing_the_package_imports_no_runtime():
    code = (
        "import sys, onnxcollapse.calibration, onnxcollapse.verification; print('onnxruntime' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_string_tensors_pass(build):
    model = build(
        '<ir_version: 8, opset_import: ["" : 17]> g (string[N] x) => (string[N] y) { y = Identity(x) }'
    )
    assert run(model, x=np.array(["a", "b"], object))["y"].tolist() == ["a", "b"]


def test_weights_of_a_shared_tensor(build):
    """One tensor behind two initializers, and one that is an output as well."""
    w = rng.standard_normal((32, 32)).astype(np.float32)
    model = build(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,32] x) => (float[N,32] y, float[32,32] w) { h = MatMul(x, w)  y = MatMul(h, v) }""",
        w=w,
        v=w,
    )
    model.graph.initializers["v"].const_value = model.graph.initializers["w"].const_value
    x = rng.standard_normal((3, 32)).astype(np.float32)
    got = run(model, x=x)
    np.testing.assert_array_equal(got["w"], w)
    np.testing.assert_allclose(got["y"], x @ w @ w, rtol=1e-3, atol=1e-3)


def test_a_large_initializer_that_nothing_reads_does_no_harm(mlp):
    import onnx_ir as ir

    model = mlp()
    unused = ir.tensor(np.zeros((64, 64), np.float32), name="unused")
    value = ir.Value(name="unused", type=ir.TensorType(unused.dtype), shape=unused.shape, const_value=unused)
    model.graph.initializers["unused"] = value
    with open_session(model, provider="cpu") as session:
        assert session.run({"x": np.zeros((1, 20), np.float32)})


@pytest.mark.parametrize("bound", [False, True])
def test_a_prepared_batch_is_run_as_often_as_wanted(mlp, bound):
    model, x = mlp(), np.ones((3, 20), np.float32)
    with open_session(model, provider="cpu") as session:
        session._bound = bound  # as on a device
        run = session.prepared({"x": x, "other": x})
        assert run() is None if bound else np.array_equal(run()[0], session.run({"x": x})["y"])
        run()
        with pytest.raises(DataError, match="'x'"):
            session.prepared({})
