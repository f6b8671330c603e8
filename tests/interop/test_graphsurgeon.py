# SPDX-License-Identifier: Apache-2.0
"""A graphsurgeon script as a pass: checked, measured and rolled back like any other rewrite."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcollapse import Budget, Model, optimize
from onnxcollapse.interop.graphsurgeon import GraphSurgeonPass
from tests.cli.workspace import Workspace, logging_restored
from tests.support import Net, data_for, mlp, outputs, relative, rows

SPEC = "graphsurgeon:script=edit.py"
PROMISED = f"{SPEC},keeps-function=true"


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with logging_restored():
        yield Workspace(tmp_path)


@pytest.fixture
def script(workspace):
    def write(body: str, name: str = "edit.py") -> None:
        (workspace.folder / name).write_text("import numpy as np\nimport onnx_graphsurgeon as gs\n\n" + body)

    return write


SCALE = """
def edit(graph):
    weight = next(node for node in graph.nodes if node.op == "Gemm").inputs[1]
    weight.values = weight.values * np.float32({factor})
"""

FUSE = """
def edit(graph):
    for node in list(graph.nodes):
        if node.op == "Identity":
            [source], [copy] = node.inputs, node.outputs
            producer = source.inputs[0]
            node.outputs.clear()
            producer.outputs = [copy]
    graph.cleanup().toposort()
"""


COPY = """
def edit(graph):
    other = graph.copy()
    change(other)
    return other
"""


def identity_model() -> Model:
    net = Net()
    hidden = net.op("Relu", net.dense("x", 8, 64, spelling="gemm"))
    net.op("Identity", net.dense(hidden, 64, 8, spelling="gemm"), name="y")
    model = net.model({"x": ["n", 8]}, {"y": ["n", 8]})
    model.graph[0].doc_string = "where it came from"
    model.ir.metadata_props["about"] = "this model"
    return model


def test_a_script_that_keeps_the_function_runs_without_data(workspace, script):
    workspace.write_model(identity_model())
    script(FUSE)
    found = workspace.summary("--pass", PROMISED, calib=None)
    [rewrite] = found["rewrites"]
    assert (rewrite["pass"], rewrite["detail"]) == (
        "graphsurgeon:script=edit.py,keeps-function=True", "edited by edit.py:edit",
    )  # fmt: skip
    small = Model.load(workspace.folder / "out.onnx")
    assert [node.op_type for node in small.graph] == ["Gemm", "Relu", "Gemm"]
    assert small.graph[0].doc_string == "where it came from"
    assert small.ir.metadata_props["about"] == "this model"
    x = rows(20, 8)
    np.testing.assert_array_equal(outputs(small, x=x)["y"], outputs(identity_model(), x=x)["y"])


def test_a_promise_is_checked_where_there_is_data(workspace, script):
    script(SCALE.format(factor=1.5))
    found = workspace.summary("--pass", PROMISED, "--pass", "cleanup")
    assert found["rewrites"] == []
    [declined] = found["declined"]
    assert "the outputs moved by" in declined["reason"]
    assert found["error"] == 0.0


def test_without_a_promise_it_takes_data_to_run(workspace, script):
    script(SCALE.format(factor=1.001))
    found = workspace.summary("--pass", SPEC, calib=None)
    assert found["rewrites"] == []
    assert "--calib" in found["declined"][0]["reason"]


def test_a_change_inside_the_budget_is_kept_with_its_error(workspace, script):
    workspace.write_model(mlp([8, 64, 8]))
    script(SCALE.format(factor=1.001))
    found = workspace.summary("--pass", SPEC, "--budget", "0.01")
    assert [entry["pass"] for entry in found["rewrites"]] == [SPEC]
    x = rows(300, 8, seed=5)
    measured = relative(
        outputs(Model.load("out.onnx"), x=x)["y"], outputs(Model.load("model.onnx"), x=x)["y"]
    )
    assert 0 < measured < 0.002
    assert found["error"] == pytest.approx(measured, rel=0.1)


def test_a_change_over_the_budget_is_rolled_back_with_the_reason(workspace, script):
    workspace.write_model(mlp([8, 64, 8]))
    script(SCALE.format(factor=1.5))
    found = workspace.summary("--pass", SPEC, "--budget", "0.01", "--report", "rep")
    assert found["rewrites"] == []
    [declined] = found["declined"]
    assert "over the budget of 0.01" in declined["reason"]
    journal = json.loads((workspace.folder / "rep" / "journal.json").read_text())
    assert [entry["reason"] for entry in journal["entries"]] == [declined["reason"]]
    assert (workspace.folder / "out.onnx").read_bytes() == (workspace.folder / "model.onnx").read_bytes()


def test_a_script_runs_beside_passes_and_before_they_look_again(workspace, script):
    """The script makes a PRelu with slope 1 of a LeakyRelu; then the block folds."""
    net = Net()
    hidden = net.op("LeakyRelu", net.dense("x", 8, 64, spelling="gemm"), alpha=0.95)
    net.dense(hidden, 64, 8, spelling="gemm", name="y")
    workspace.write_model(net.model({"x": ["n", 8]}, {"y": ["n", 8]}))
    script("""
def edit(graph):
    for node in graph.nodes:
        if node.op == "LeakyRelu":
            node.op, node.attrs = "PRelu", {}
            node.inputs.append(gs.Constant("slope", np.array([1.0], np.float32)))
""")
    found = workspace.summary("--pass", SPEC, "--pass", "fold-affine", "--budget", "0.1")
    assert [entry["pass"] for entry in found["rewrites"]] == [SPEC, "fold-affine", "fold-affine"]
    assert found["params_after"] == 8 * 8 + 8


def test_two_scripts_run_one_after_the_other(workspace, script):
    workspace.write_model(mlp([8, 64, 8]))
    script("""
def double(graph):
    weight = next(node for node in graph.nodes if node.op == "Gemm").inputs[1]
    weight.values = weight.values * 2

def halve(graph):
    weight = next(node for node in graph.nodes if node.op == "Gemm").inputs[1]
    assert not (weight.values == 0).any()
    weight.values = weight.values / 2
""")
    first, second = (
        f"{SPEC},function=double,keeps-function=true",
        f"{SPEC},function=halve,keeps-function=true",
    )
    found = workspace.summary("--pass", first, "--pass", second, calib=None)
    assert [entry["detail"] for entry in found["rewrites"]] == [
        "edited by edit.py:double",
        "edited by edit.py:halve",
    ]
    small, model = Model.load("out.onnx"), Model.load("model.onnx")
    x = rows(20, 8)
    np.testing.assert_array_equal(outputs(small, x=x)["y"], outputs(model, x=x)["y"])


def test_a_script_may_return_another_graph(workspace, script):
    workspace.write_model(identity_model())
    script(FUSE.replace("def edit", "def change") + COPY)
    workspace.summary("--pass", PROMISED, calib=None)
    small = Model.load(workspace.folder / "out.onnx")
    assert [node.op_type for node in small.graph] == ["Gemm", "Relu", "Gemm"]
    assert small.graph[0].doc_string == "where it came from"
    assert small.ir.metadata_props["about"] == "this model"


def test_big_weights_are_read_and_replaced_and_external_data_stays_external(workspace, script):
    model = mlp([64, 256, 64])
    workspace.write_model(model, external=True)
    np.savez("calib.npz", x=rows(200, 64))
    script("""
def edit(graph):
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.values
    weight = graph.tensors()["c2"]
    assert weight.values.shape == (64, 256), weight.values.shape
    weight.values = weight.values + np.float32(1e-4)
""")
    found = workspace.summary("--pass", SPEC, "--budget", "0.5")
    assert len(found["rewrites"]) == 1
    assert (workspace.folder / "out.onnx.data").stat().st_size > 2 * 64 * 256 * 4
    small = Model.load("out.onnx")
    for name in ("c0", "c1", "c2", "c3"):
        got, was = (item.graph.initializers[name].const_value.numpy() for item in (small, model))
        np.testing.assert_array_equal(got, was + np.float32(1e-4) if name == "c2" else was)


def test_a_script_that_narrows_a_layer_need_not_mind_declared_shapes(workspace, script):
    model = mlp([8, 64, 8])
    model = Model(ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model.ir))))
    assert model.graph[1].outputs[0].shape[1] == 64
    for name in ("c0", "c1"):  # neurons 32 to 63 do nothing
        tensor = model.graph.initializers[name].const_value.numpy().copy()
        tensor[32:] = 0
        model.graph.initializers[name].const_value = ir.tensor(tensor, name=name)
    workspace.write_model(model)
    script("""
def edit(graph):
    tensors = graph.tensors()
    for name, part in (("c0", np.s_[:32]), ("c1", np.s_[:32]), ("c2", np.s_[:, :32])):
        tensors[name].values = tensors[name].values[part]
""")
    found = workspace.summary("--pass", SPEC, "--budget", "0.01")
    assert found["params_after"] == 8 * 32 + 32 + 32 * 8 + 8
    assert found["error"] == pytest.approx(0.0, abs=1e-6)
    onnx.checker.check_model(str(workspace.folder / "out.onnx"), full_check=True)
    small = Model.load("out.onnx")
    assert [str(value) for value in small.graph[1].outputs[0].shape] == ["n", "32"]


def test_scripts_may_import_their_neighbours_define_dataclasses_and_print(workspace, script):
    script("FACTOR = 1.0\n", "neighbour.py")
    (workspace.folder / "edit.py").write_text("""
from __future__ import annotations
from dataclasses import dataclass
import neighbour
print("at import")

@dataclass
class Job:
    factor: float

def edit(graph):
    import neighbour
    print("at work", Job(neighbour.FACTOR))
""")
    result = workspace.optimize("--pass", PROMISED, "--json", calib=None)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["rewrites"]
    assert "at work Job(factor=1.0)" in result.stderr


@pytest.mark.parametrize(
    "body, words",
    [
        ("def edit(graph):\n    raise KeyError('gone')\n", ["edit fails with KeyError", "gone"]),
        ("def edit(graph):\n    raise SystemExit(0)\n", ["edit fails with SystemExit"]),
        ("def edit(graph)\n    pass\n", ["cannot be imported", "SyntaxError"]),
        ("import no_such_module\n", ["cannot be imported", "no_such_module"]),
        ("raise SystemExit(0)\n", ["cannot be imported", "SystemExit"]),
        ("def other(graph):\n    pass\n", ["has no function 'edit'", "function=NAME"]),
        ("def edit(graph):\n    return 3\n", ["returns a int", "gs.Graph"]),
        ("def edit(graph):\n    return gs.export_onnx(graph)\n", ["returns a ModelProto"]),
        (
            "def edit(graph):\n    graph.nodes[0].inputs[0] = graph.nodes[-1].outputs[0]\n",
            ["broken graph", "cycle"],
        ),
        ("def edit(graph):\n    graph.nodes.pop(0)\n", ["broken graph", "nothing makes"]),
        ("def edit(graph):\n    graph.nodes[0].inputs[1].values = [1, 2]\n", ["broken graph"]),
        ("def edit(graph):\n    graph.nodes[0].op = None\n", ["broken graph"]),
        (
            "def edit(graph):\n    graph.outputs.clear()\n    graph.nodes.clear()\n",
            ["broken graph", "no outputs"],
        ),
    ],
)
@pytest.mark.parametrize("mode", ["exact", "lossy"])
def test_scripts_that_fail_end_the_run_and_lose_nothing(workspace, script, body, words, mode):
    script(body)
    options = ("--pass", PROMISED) if mode == "exact" else ("--pass", SPEC, "--calib", "calib.npz")
    line = workspace.refused("optimize", "model.onnx", "-o", "out.onnx", *options)
    for word in ("edit.py", *words):
        assert word in line


def test_a_script_that_does_not_exist_is_found_before_the_work(workspace):
    line = workspace.refused("optimize", "missing.onnx", "-o", "out.onnx", "--pass", PROMISED)
    assert "script 'edit.py' does not exist" in line


@pytest.mark.parametrize("mode", ["exact", "lossy"])
def test_a_graph_that_no_runtime_takes_is_declined_with_its_reason(workspace, script, mode):
    script(
        "def edit(graph):\n    weight = graph.nodes[0].inputs[1]\n    weight.values = weight.values.astype(float)\n"
    )
    found = json.loads(
        workspace.optimize(
            "--pass", PROMISED if mode == "exact" else SPEC, "--budget", "0.5", "--json"
        ).stdout
    )
    assert found["rewrites"] == []
    [declined] = found["declined"]
    assert "cannot load" in declined["reason"]


def test_a_model_that_graphsurgeon_cannot_hold_is_declined(tmp_path, monkeypatch):
    import onnx_graphsurgeon as gs

    def refuse(_):
        raise ValueError("too odd")

    monkeypatch.setattr(gs, "import_onnx", refuse)
    path = tmp_path / "edit.py"
    path.write_text("def edit(graph):\n    pass\n")
    result = optimize(mlp([4, 8, 4]), passes=[GraphSurgeonPass(str(path), keeps_function=True)])
    [entry] = result.journal.of("declined")
    assert "graphsurgeon cannot take the model over: ValueError: too odd" in entry.reason


def test_a_rolled_back_script_leaves_the_model_untouched(tmp_path):
    path = tmp_path / "edit.py"
    path.write_text("import numpy as np\n" + SCALE.format(factor=3))
    model = mlp([8, 64, 8])
    before = model.to_bytes()
    result = optimize(
        model, data_for(model, rows(100, 8)), budget=Budget(0.01), passes=[GraphSurgeonPass(str(path))]
    )
    assert not result.journal.of("kept")
    assert result.model.to_bytes() == model.to_bytes() == before
