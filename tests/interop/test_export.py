# SPDX-License-Identifier: Apache-2.0
"""Exports of small random models: what is written is what the source computes."""

from __future__ import annotations

import shutil
import sys
import warnings
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcollapse import Model, optimize
from onnxcollapse.calibration.filling import complete
from onnxcollapse.errors import DataError, ExportError, ModelError, OptionError
from onnxcollapse.interop import hugging_face
from onnxcollapse.interop.agreement import Run, check, difference
from onnxcollapse.interop.export import ExportOptions, export
from onnxcollapse.model import size
from tests.interop.sources import MODULES, VOCABULARY, save_bert, save_llama, save_t5
from tests.support import mlp, outputs, rows

torch = pytest.importorskip("torch", reason="needs torch: pip install onnxcollapse[export]")
pytest.importorskip("optimum.exporters.onnx", reason="needs optimum-onnx: pip install onnxcollapse[export]")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install onnxcollapse[export]")


@pytest.fixture(scope="module", autouse=True)
def warned():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading through optimum warns of what is deprecated
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    source, out = save_t5(folder / "source"), folder / "out"
    return source, out, export(str(source), out)


@pytest.fixture(scope="module")
def decoder(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("decoder") / "deeper" / "out"
    return out, export(str(llama), out)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The current folder, with modules.py in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "modules", raising=False)
    (tmp_path / "modules.py").write_text(MODULES)
    yield tmp_path
    sys.modules.pop("modules", None)


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("modules.py", "__pycache__"))


def test_a_decoder_generates_through_its_cache_as_its_source_does(llama, decoder):
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoModelForCausalLM

    out, found = decoder
    assert (found.task, found.dtype, found.opset) == ("text-generation-with-past", "fp32", 18)
    assert set(found.outputs) == {"logits"}
    assert 0 < found.outputs["logits"].rel_l2 < 1e-5
    assert found.outputs["logits"].max_abs < 1e-5
    assert left(out) == ["config.json", "generation_config.json", "model.onnx"]
    prompt = torch.randint(2, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    told = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    ours = ORTModelForCausalLM.from_pretrained(out).generate(prompt, **told)
    theirs = AutoModelForCausalLM.from_pretrained(llama).generate(prompt, **told)
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_the_check_of_a_decoder_reads_padding_and_cache(llama, decoder):
    model = Model.load(decoder[0])
    runs = list(
        hugging_face._runs(
            str(llama), decoder[0] / "model.onnx", "text-generation-with-past", 0, hugging_face._decoded
        )
    )
    assert [run.feeds["input_ids"].shape for run in runs] == [(3, 10), (3, 1)]
    assert check(model, runs, 1e-3).problem is None
    crossed = {name: name.replace("past_key_values", "present") for name in runs[1].carried}
    crossed["past_key_values.0.key"] = "present.1.key"
    assert "'logits' differs" in check(model, [runs[0], replace(runs[1], carried=crossed)], 1e-3).problem
    whole = {"input_ids": runs[0].feeds["input_ids"]}
    assert "'logits' differs" in check(model, [replace(runs[0], feeds=whole)], 1e-3).problem


def test_the_exact_passes_run_on_an_exported_folder(decoder, tmp_path):
    model = Model.load(decoder[0])
    result = optimize(model)
    result.model.save(tmp_path / "small")
    assert left(tmp_path / "small") == ["config.json", "generation_config.json", "model.onnx"]
    ids = {"input_ids": np.arange(12).reshape(2, 6) % VOCABULARY}
    feeds = complete(ids, model.signature())
    one, other = outputs(model, **feeds), outputs(Model.load(tmp_path / "small"), **feeds)
    np.testing.assert_allclose(one["logits"], other["logits"], atol=1e-5)


def test_without_cache(llama, tmp_path):
    found = export(str(llama), tmp_path / "out", ExportOptions(cache=False, dtype="fp16", opset=17))
    assert (found.task, found.dtype, found.opset) == ("text-generation", "fp16", 17)
    assert 1e-5 < found.outputs["logits"].rel_l2 < 1e-2
    names = [spec.name for spec in Model.load(tmp_path / "out").signature().inputs]
    assert names == ["input_ids", "attention_mask", "position_ids"]


def test_an_encoder_goes_with_its_tokenizer(bert, tmp_path):
    from optimum.onnxruntime import ORTModelForFeatureExtraction
    from transformers import AutoModel, AutoTokenizer

    found = export(str(bert), tmp_path / "out")
    assert found.task == "feature-extraction"
    assert 0 < found.outputs["last_hidden_state"].rel_l2 < 1e-5
    words = AutoTokenizer.from_pretrained(tmp_path / "out")(
        ["w1 w2 w3", "w4"], padding=True, return_tensors="pt"
    )
    ours = ORTModelForFeatureExtraction.from_pretrained(tmp_path / "out")(**words).last_hidden_state
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(bert)(**words).last_hidden_state
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_weights_that_the_source_lacks_are_random_and_found(bert, tmp_path):
    """A head for masked words is made anew each time that the folder is loaded."""
    with pytest.raises(ExportError, match=r"output 'logits' differs from the source's by .* rel-l2"):
        export(str(bert), tmp_path / "out", ExportOptions(task="fill-mask"))
    assert left(tmp_path) == []


@pytest.mark.parametrize("allowed", [False, True])
def test_an_exporter_that_goes_wrong_is_found(llama, tmp_path, monkeypatch, caplog, allowed):
    import optimum.exporters.onnx as optimum

    real = optimum.main_export

    def wrong(source, folder, **options):
        real(source, folder, **options)
        model = Model.load(folder)
        weight = max(model.graph.initializers.values(), key=lambda value: value.const_value.size)
        weight.const_value = ir.tensor(weight.const_value.numpy() * 1.01, name=weight.name)
        model.save(folder)

    monkeypatch.setattr(optimum, "main_export", wrong)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("before")
    if not allowed:
        with pytest.raises(
            ExportError, match=r"differs from the source's by 0\.0\d+ rel-l2.*nothing was written"
        ):
            export(str(llama), tmp_path / "out")
        assert left(tmp_path / "out") == ["config.json"]
        assert (tmp_path / "out" / "config.json").read_text() == "before"
    else:
        found = export(str(llama), tmp_path / "out", ExportOptions(allow_difference=True))
        assert found.outputs["logits"].rel_l2 > 1e-3
        assert "written all the same" in caplog.text
        assert left(tmp_path / "out") == ["config.json", "generation_config.json", "model.onnx"]


def test_a_source_that_cannot_run_is_told_in_one_line(bert, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such operator\nand more")

    for where, fact in (
        (
            "onnxcollapse.interop.hugging_face._computed",
            "cannot run in torch to be compared: no such operator;",
        ),
        (
            "optimum.exporters.onnx.main_export",
            "cannot export it for feature-extraction in fp32: no such operator;",
        ),
    ):
        monkeypatch.setattr(where, fail)
        with pytest.raises(ModelError, match=fact):
            export(str(bert), tmp_path / "out")
        assert left(tmp_path) == []


@pytest.mark.parametrize(
    "options, fact",
    [
        ({"task": "fill-mask"}, "a llama has no task 'fill-mask'"),
        ({"task": "feature-extraction", "dynamic": ("x.0=b",)}, "leave out --dynamic"),
    ],
)
def test_options_that_do_not_suit_a_folder(llama, tmp_path, options, fact):
    with pytest.raises(OptionError, match=fact):
        export(str(llama), tmp_path / "out", ExportOptions(**options))
    assert left(tmp_path) == []


def test_an_encoder_decoder_is_two_files_that_generate_as_the_source_does(translator):
    from optimum.onnxruntime import ORTModelForSeq2SeqLM
    from transformers import AutoModelForSeq2SeqLM

    source, out, found = translator
    assert found.task == "text2text-generation-with-past"
    assert set(found.outputs) == {"last_hidden_state", "logits"}
    assert all(0 < worst.rel_l2 < 1e-5 for worst in found.outputs.values())
    names = ["config.json", "decoder_model_merged.onnx", "encoder_model.onnx", "generation_config.json"]
    assert left(out) == names
    parts = [Model.load(out / name) for name in names[1:3]]
    assert found.params == sum(size(part).params for part in parts)
    ids = torch.randint(2, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    ours = ORTModelForSeq2SeqLM.from_pretrained(out).generate(ids, **told)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(source).generate(ids, **told)
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_a_wrong_encoder_is_found_beside_a_right_decoder(translator, tmp_path, monkeypatch):
    import optimum.exporters.onnx as optimum

    real = hugging_face._encoded

    def other(module, task, names):
        for run in real(module, task, names):
            yield replace(run, expected={name: value + 1 for name, value in run.expected.items()})

    def again(source, folder, **options):
        shutil.copytree(translator[1], folder, dirs_exist_ok=True)

    monkeypatch.setattr(optimum, "main_export", again)
    monkeypatch.setattr(hugging_face, "_encoded", other)
    with pytest.raises(ExportError, match="'last_hidden_state' differs"):
        export(str(translator[0]), tmp_path / "out")
    assert left(tmp_path) == []


def test_several_files_are_not_taken(llama, tmp_path, monkeypatch):
    import optimum.exporters.onnx as optimum

    def several(source, folder, **options):
        for name in ("encoder_model.onnx", "decoder_model.onnx"):
            (folder / name).touch()

    monkeypatch.setattr(optimum, "main_export", several)
    with pytest.raises(ModelError, match=r"decoder_model\.onnx, encoder_model\.onnx; only single files"):
        export(str(llama), tmp_path / "out")
    assert left(tmp_path) == []


def test_inputs_by_name_with_two_dynamic_axes(modules):
    dynamic = ("ids.0=rows", "mask.0=rows", "ids.1=length", "mask.1=length")
    found = export("modules:by_name", "out.onnx", ExportOptions(dynamic=dynamic))
    assert (found.task, found.dtype) == (None, "fp32")
    assert {name: worst.rel_l2 < 1e-6 for name, worst in found.outputs.items()} == {
        "logits": True,
        "states.0": True,
    }
    model = Model.load("out.onnx")
    shapes = {spec.name: spec.shape for spec in model.signature().inputs}
    assert shapes == {"mask": ("rows", "length"), "ids": ("rows", "length")}
    assert b"modules.py" not in (modules / "out.onnx").read_bytes(), "torch's stack traces name local folders"
    made = sys.modules["modules"].by_name()[0].eval()
    ids, mask = np.arange(20).reshape(4, 5) % 10, rows(4, 5)
    with torch.no_grad():
        expected = made(torch.tensor(ids), torch.tensor(mask))["logits"]
    np.testing.assert_allclose(outputs(model, ids=ids, mask=mask)["logits"], expected, atol=1e-6)


def test_inputs_by_place_have_the_names_of_the_parameters(modules):
    export("modules:by_place", "out.onnx", ExportOptions(opset=17))
    model = Model.load("out.onnx")
    assert model.ir.graph.opset_imports[""] == 17
    assert [(spec.name, spec.shape) for spec in model.signature().inputs] == [("ids", ("batch", 6))]


@pytest.mark.parametrize("dynamic, shape", [((), ("batch", 6)), (("none",), (4, 6))])
def test_one_input_alone(modules, dynamic, shape):
    found = export("modules:alone", "out.onnx", ExportOptions(dynamic=dynamic))
    assert list(found.outputs) == ["output"]
    assert Model.load("out.onnx").signature().inputs[0].shape == shape


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_other_types_differ_by_their_rounding(modules, dtype):
    found = export("modules:alone", "out.onnx", ExportOptions(dtype=dtype))
    assert found.dtype == dtype
    assert 1e-5 < found.outputs["output"].rel_l2 < {"fp16": 1e-3, "bf16": 1e-2}[dtype]
    with pytest.raises(ExportError, match="tolerance 1e-06"):
        export("modules:alone", "out.onnx", ExportOptions(dtype=dtype, tolerance=1e-6))


def test_a_module_may_write_to_what_it_is_given(modules):
    found = export("modules:in_place", "out.onnx")
    assert max(one.rel_l2 for one in found.outputs.values()) < 1e-6


def test_a_module_keeps_its_own_type(modules):
    assert export("modules:half", "out.onnx").dtype == "fp16"


@pytest.mark.parametrize(
    "source, options",
    [("noise", {}), ("noise", {"opset": 17}), ("branch", {"opset": 17})],
)
def test_what_cannot_be_traced_is_found(modules, source, options):
    """Numbers drawn in the module; a branch that the data chooses, of which the old exporter keeps the one it saw."""
    with pytest.raises(ExportError, match="output 'output' differs from the source's"):
        export(f"modules:{source}", "out.onnx", ExportOptions(**options))
    assert left(modules) == []


@pytest.mark.parametrize(
    "source, options, error, fact",
    [
        ("branch", {}, ModelError, "torch cannot export the module: Could not guard"),
        ("fixed", {"opset": 17}, ModelError, r"the module cannot run x \[3, 6\].*any size"),
        ("nameless", {}, DataError, "does not name its inputs"),
        ("no_pair", {}, DataError, "gives a Branch; return"),
        ("no_tensor", {}, DataError, "example input 'x' is no tensor"),
        ("misnamed", {}, DataError, "do not fit forward"),
        ("broken", {}, DataError, "fails with ValueError: no weights"),
        ("absent", {}, DataError, "has no 'absent'"),
        ("alone", {"dynamic": ("input.0",)}, OptionError, r"is not name\.axis=symbol"),
        ("alone", {"dynamic": ("input.2=n",)}, OptionError, r"no such axis; the inputs are input \[4, 6\]"),
        ("alone", {"task": "feature-extraction"}, OptionError, "--task and --cache are for Hugging Face"),
        ("alone", {"cache": True}, OptionError, "--task and --cache are for Hugging Face"),
    ],
)
def test_what_cannot_be_exported(modules, source, options, error, fact):
    with pytest.raises(error, match=fact):
        export(f"modules:{source}", "out.onnx", ExportOptions(**options))
    assert left(modules) == []


def test_a_size_that_the_export_took_for_fixed_is_a_difference():
    model = mlp([8, 16, 4])
    x = rows(3, 8)
    runs = [Run({"x": x}, outputs(model, x=x))]
    assert check(model, runs, 0.0).problem is None
    model.graph.inputs[0].shape = type(model.graph.inputs[0].shape)((2, 8))
    assert "cannot run a batch of x (3, 8)" in check(model, runs, 1.0).problem


def test_types_that_do_not_fit_are_found_in_bf16_too():
    """torch's optimizer folds a BatchNormalization in bf16 to weights in fp32."""
    text = """<ir_version: 10, opset_import: ["": 20]> mixed (bfloat16[n, 2] x) => (bfloat16[n, 2] y)
    <TYPE[2, 2] w = {ONE, 0, 0, ONE}> { y = MatMul (x, w) }"""
    x = rows(3, 2)
    for kind, one, right in (("bfloat16", "16256", True), ("float", "1", False)):
        proto = onnx.parser.parse_model(text.replace("TYPE", kind).replace("ONE", one))
        model = Model(ir.from_proto(proto))
        problem = check(model, [Run({"x": x}, {"y": x})], 1e-2).problem
        assert problem is None if right else "is not valid ONNX" in problem


def test_outputs_that_are_missing_or_of_another_shape_are_differences():
    model, x = mlp([8, 16, 4]), rows(3, 8)
    y = outputs(model, x=x)["y"]
    assert "output 'z' of the source is not" in check(model, [Run({"x": x}, {"z": y})], 1.0).problem
    assert "'y' has the shape [3, 4]" in check(model, [Run({"x": x}, {"y": y[:2]})], 1.0).problem
    assert check(model, [Run({"x": x}, {})], 1.0).problem == "no output could be compared"


def test_differences():
    one = np.array([3.0, 4.0, np.nan, np.inf], np.float32)
    assert difference(one, one).rel_l2 == 0
    found = difference(np.array([3.0, 4.5, np.nan, np.inf]), one)
    assert (found.max_abs, found.rel_l2) == (0.5, pytest.approx(0.1))
    assert difference(np.array([1.0]), np.array([0.0])).rel_l2 == np.inf
    assert not difference(np.array([np.nan]), np.array([1.0])).rel_l2 <= 1e9
    model, x = mlp([8, 4]), rows(2, 8)
    good, bad = Run({"x": x}, outputs(model, x=x)), Run({"x": x}, {"y": np.full((2, 4), np.nan)})
    assert check(model, [good], 1e-3).problem is None
    for runs in ([bad], [good, bad], [bad, good]):
        assert check(model, runs, 1e9).problem
