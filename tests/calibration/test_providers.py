# SPDX-License-Identifier: Apache-2.0
"""What --provider may say, and what becomes of it in a session, with a stand-in for hosts that have a GPU."""

from __future__ import annotations

import logging

import pytest

from onnxcollapse.calibration import open_session, providers
from onnxcollapse.calibration.providers import CPU, CUDA, TENSORRT, Spec
from onnxcollapse.errors import OptionError, ProviderError

DEFAULTS = providers.OPTIONS[CUDA]


class Host:
    """Plays ONNX Runtime on a host where some providers work."""

    def __init__(self, monkeypatch, *working: str) -> None:
        self.opened: list[list[tuple[str, dict]]] = []
        self.refusal: Exception | None = None
        self.runs: str | None = None
        monkeypatch.setattr(providers, "works", lambda name: name in (*working, CPU))
        monkeypatch.setattr(providers, "_open", self._open)

    def _open(self, model, options, entries):
        self.opened.append([(name, dict(given)) for name, given in entries])
        if self.refusal is not None:
            raise self.refusal
        self._first = self.runs or entries[0][0]
        return self

    def get_providers(self):
        return [self._first, CPU]


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing that a test pretends about the host outlives it."""
    for cached in (providers.chain, providers.parse, providers.warn_fallback):
        cached.cache_clear()
    yield
    for cached in (providers.chain, providers.parse, providers.warn_fallback):
        cached.cache_clear()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("auto", Spec("auto")),
        ("cpu", Spec(CPU)),
        ("CPUExecutionProvider", Spec(CPU)),
        ("cuda", Spec(CUDA)),
        ("cuda:1", Spec(CUDA, 1)),
        ("CUDAExecutionProvider:0", Spec(CUDA, 0)),
        ("cuda,device_id=2", Spec(CUDA, 2)),
        ("cuda:0,gpu_mem_limit=4GB", Spec(CUDA, 0, {"gpu_mem_limit": str(4 << 30)})),
        ("cuda, use_tf32 = 1", Spec(CUDA, None, {"use_tf32": "1"})),
        (
            "tensorrt:3,trt_fp16_enable=1,trt_max_workspace_size=512MB",
            Spec(TENSORRT, 3, {"trt_fp16_enable": "1", "trt_max_workspace_size": str(512 << 20)}),
        ),
    ],
)
def test_specs(text, expected):
    assert providers.parse(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("cuda:", "device '' is no number; write it as cuda:0"),
        ("cuda:-1", "device '-1' is no number"),
        ("cuda:1:2", "device '1:2' is no number"),
        ("cuda,device_id=x", "device 'x' is no number"),
        ("cuda:0,device_id=1", "gives the device twice"),
        ("cuda,use_tf32", "'use_tf32' is no option=value; write NAME"),
        ("cuda,=1", "'=1' is no option=value"),
        ("cuda,use_tf32=", "'use_tf32=' is no option=value"),
        ("cuda,", "'' is no option=value"),
        ("cuda,use_tf32=1,use_tf32=0", "gives 'use_tf32' twice"),
        ("cuda,gpu_mem_limit=lots", "option gpu_mem_limit lots: give a size such as 4GB"),
        ("cpu:0", "cpu takes neither a device nor options"),
        ("cpu,threads=4", "cpu takes neither a device nor options"),
        ("auto,use_tf32=1", "auto takes neither a device nor options; name another provider"),
    ],
)
def test_what_is_no_spec_is_one_clear_error(text, message):
    with pytest.raises(OptionError, match=message) as caught:
        providers.chain(text)
    assert "--provider" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_is_looked_up_without_its_device():
    with pytest.raises(ProviderError, match=r"execution provider 'quantum' is not available; choose one of"):
        providers.chain("quantum:1,qubits=4")


def test_devices_without_numbers(monkeypatch):
    monkeypatch.setattr(providers, "available_providers", lambda: ("OpenVINOExecutionProvider", CPU))
    with pytest.raises(OptionError, match="have no numbers; give its own option"):
        providers.parse("OpenVINOExecutionProvider:1")
    spec = providers.parse("OpenVINOExecutionProvider,device_type=GPU,device_id=x")
    assert spec.options == {"device_type": "GPU", "device_id": "x"}


def test_options_in_force():
    assert providers.options_of("auto", CUDA) == DEFAULTS
    assert providers.options_of("auto", CPU) == providers.options_of("cuda:1,use_tf32=1", CPU) == {}
    assert providers.options_of("cuda:1", CUDA) == {**DEFAULTS, "device_id": "1"}
    assert providers.options_of("cuda,use_tf32=1", CUDA) == {**DEFAULTS, "use_tf32": "1"}
    tensorrt = "tensorrt:1,trt_fp16_enable=1"
    assert providers.options_of(tensorrt, TENSORRT) == {"device_id": "1", "trt_fp16_enable": "1"}
    assert providers.options_of(tensorrt, CUDA) == {
        **DEFAULTS,
        "device_id": "1",
    }  # what TensorRT leaves to CUDA


def test_the_device_to_bind_to():
    assert providers.device_of("cuda:1", CUDA) == ("cuda", 1)
    assert providers.device_of("auto", CUDA) == ("cuda", 0)
    assert (
        providers.device_of("tensorrt:2", TENSORRT) == providers.device_of("tensorrt:2", CUDA) == ("cuda", 2)
    )
    assert providers.device_of("cuda:1", CPU) == ("cpu", 0)


def test_every_provider_of_the_chain_is_opened_with_its_options(monkeypatch):
    host = Host(monkeypatch, CUDA, TENSORRT)
    spec = "tensorrt:1,trt_fp16_enable=1"
    assert providers.chain(spec) == (TENSORRT, CUDA, CPU)
    providers.create(b"", None, providers.chain(spec), spec)
    first = (TENSORRT, {"device_id": "1", "trt_fp16_enable": "1"})
    assert host.opened == [[first], [first, (CUDA, {**DEFAULTS, "device_id": "1"}), (CPU, {})]]


def test_options_are_tried_once_and_only_where_there_are_some(monkeypatch):
    host = Host(monkeypatch, CUDA)
    for spec in ("cuda", "auto", "cpu", "cuda:1", "cuda:1"):
        providers.chain(spec)
    assert len(host.opened) == 1


def test_options_that_onnx_runtime_refuses(monkeypatch):
    host = Host(monkeypatch, CUDA)
    host.refusal = RuntimeError(
        "/src/provider_options_utils.h:151 Status Parse(const ProviderOptions&) const it != end() was false. "
        'Unknown provider option: "colour".\n\nstack'
    )
    with pytest.raises(ProviderError) as caught:
        providers.chain("cuda,colour=red")
    assert str(caught.value) == (
        'ONNX Runtime refuses --provider cuda,colour=red: Unknown provider option: "colour".; '
        "correct its device or options"
    )
    host.refusal, host.runs = None, CPU
    with pytest.raises(ProviderError, match="refuses --provider cuda:9: it runs on the CPU instead"):
        providers.chain("cuda:9")


def test_a_missing_library_is_told_once_with_the_remedy(monkeypatch, mlp, caplog):
    monkeypatch.setattr(providers, "works", lambda name: name == CPU)
    spec = "cuda:1,gpu_mem_limit=1GB"
    with caplog.at_level(logging.WARNING):
        sessions = [open_session(mlp(), provider=spec) for _ in range(3)]
    [message] = [record.getMessage() for record in caplog.records]
    assert message == (
        f"provider '{spec}' does not work here, using CPUExecutionProvider instead; "
        "`pip install onnxcollapse[cuda]` and a recent NVIDIA driver are needed"
    )
    assert {(s.provider.requested, s.provider.obtained) for s in sessions} == {(spec, CPU)}
    assert sessions[0].provider.options == {}


def test_models_that_a_provider_leaves_to_another_are_told_of_once(caplog):
    for _ in range(3):
        providers.warn_fallback("tensorrt", CUDA)
    assert len(caplog.records) == 1
    assert "pip install tensorrt onnxcollapse[cuda]" in caplog.text


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), OSError("libcudart is missing")])
def test_ctrl_c_while_the_runtime_is_imported(monkeypatch, cause):
    """Native modules say that they could not be set up, whatever the reason."""

    def fail(name):
        raise ImportError("initialization failed") from cause

    monkeypatch.setattr(providers.importlib, "import_module", fail)
    expected = KeyboardInterrupt if isinstance(cause, KeyboardInterrupt) else ImportError
    with pytest.raises(expected):
        providers.runtime.__wrapped__()
