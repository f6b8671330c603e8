# SPDX-License-Identifier: Apache-2.0
"""Tiny models as torch's two exporters write them."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse import Model, optimize
from onnxcollapse.structure import feedforwards, layers, linears, main_output, ranges, spine
from tests.support import outputs as run_whole

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

EXPORTERS = [("torchscript", 11), ("torchscript", 17), ("dynamo", 18)]


def export(module, arguments, names, exporter, opset, tmp_path, outputs=("out",), shapes=None):
    module.eval()
    with torch.no_grad():  # equal tensors (zero biases) would be stored once
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "torchscript":
            buffer = io.BytesIO()
            axes = {name: {0: "batch"} for name in names}
            torch.onnx.export(
                module, arguments, buffer, input_names=list(names), output_names=list(outputs), opset_version=opset,
                dynamo=False, dynamic_axes=axes,
            )  # fmt: skip
            path = tmp_path / "model.onnx"
            path.write_bytes(buffer.getvalue())
        else:
            program = torch.onnx.export(
                module, arguments, input_names=list(names), output_names=list(outputs), opset_version=opset,
                dynamo=True, verbose=False, dynamic_shapes=shapes,
            )  # fmt: skip
            path = tmp_path / "model.onnx"
            program.save(path)
    return ir.load(path)


def activations():
    nn = torch.nn
    return [
        nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.PReLU(12), nn.Hardswish(), nn.ReLU6(), nn.LeakyReLU(0.2),
        nn.ELU(), nn.Mish(), nn.Softplus(), nn.Sequential(nn.Tanh(), nn.Dropout()),
    ]  # fmt: skip


def chain_of_activations():
    """One feed-forward block per activation, each on a norm of the stream."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.acts = torch.nn.ModuleList(activations())
            self.ups = torch.nn.ModuleList(
                torch.nn.Linear(8, 12, bias=i % 2 == 0) for i in range(len(self.acts))
            )
            self.downs = torch.nn.ModuleList(torch.nn.Linear(12, 8) for _ in self.acts)
            self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(8) for _ in self.acts)

        def forward(self, x):
            for act, up, down, norm in zip(self.acts, self.ups, self.downs, self.norms, strict=True):
                z = up(norm(x))
                h = act(z.transpose(1, 2)).transpose(1, 2) if isinstance(act, torch.nn.PReLU) else act(z)
                x = x + down(h)
            return x

    return Net()


def check_sites(model, run, feeds, sites):
    """The region evaluated on real pre-activations gives the real hidden tensor."""
    for site in sites:
        wanted = [site.hidden.name, site.up.output.name] + (
            [] if site.gate is None else [site.gate.output.name]
        )
        hidden, *z = (
            np.moveaxis(a, site.up.axis, -1).reshape(-1, site.d_hidden) for a in run(model, feeds, wanted)
        )
        np.testing.assert_allclose(site.evaluate(*z), hidden, rtol=2e-5, atol=2e-6, err_msg=site.activation)


def check_linears(model, run, feeds):
    found = linears(model.graph)
    names = [linear.input.name for linear in found if linear.input.name not in feeds] + [
        linear.output.name for linear in found
    ]
    values = dict(zip(names, run(model, feeds, names), strict=True)) | feeds
    for linear in found:
        x, y = (np.moveaxis(values[v.name], linear.axis, -1) for v in (linear.input, linear.output))
        np.testing.assert_allclose(
            x.astype(np.float64) @ linear.matrix() + linear.offset(), y, rtol=1e-5, atol=5e-6
        )


def check_ranges(model, run, feeds, boxes):
    bounds = ranges(model.graph, boxes)
    values = [v for node in model.graph for v in node.outputs if v.name]
    for value, array in zip(values, run(model, feeds, [v.name for v in values]), strict=True):
        if array.dtype.kind == "f":
            found = bounds.of(value)
            assert ((found.low <= array) & (array <= found.high)).all(), value.name


@pytest.mark.parametrize(("exporter", "opset"), EXPORTERS)
def test_activations(run, tmp_path, exporter, opset):
    torch.manual_seed(0)
    net = chain_of_activations()
    for act in net.acts:
        if isinstance(act, torch.nn.PReLU):
            torch.nn.init.uniform_(act.weight, 0.1, 0.9)
    model = export(net, (torch.randn(2, 5, 8),), ["x"], exporter, opset, tmp_path)
    sites, refusals = feedforwards(model.graph)
    transposed = (
        len(net.acts) - 1
    )  # PReLU in torch acts on axis 1, so the exporter leaves Transposes around it
    assert len(sites) == transposed
    assert [refusal.reason for refusal in refusals if "Transpose" not in refusal.reason] == []
    feeds = {"x": np.random.default_rng(0).uniform(-1, 1, (2, 5, 8)).astype(np.float32)}
    check_sites(model, run, feeds, sites)
    check_linears(model, run, feeds)
    check_ranges(model, run, feeds, {"x": (-1.0, 1.0)})


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 11), ("dynamo", 18)])
def test_convolutions_and_mlp(run, tmp_path, exporter, opset):
    nn = torch.nn
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.PReLU(6), nn.Conv2d(6, 4, 1), nn.Sigmoid(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(16, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 10), nn.BatchNorm1d(10), nn.ReLU(),
        nn.Linear(10, 3),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.running_mean, -1, 1)
    model = export(net, (torch.randn(2, 3, 8, 8),), ["x"], exporter, opset, tmp_path)
    sites, refusals = feedforwards(model.graph)
    assert [(site.d_in, site.d_hidden, site.d_out, site.up.axis) for site in sites] == [
        (8, 6, 4, 1),
        (16, 10, 10, -1),
        (10, 10, 3, -1),
    ]
    assert refusals == []
    feeds = {"x": np.random.default_rng(0).uniform(0, 1, (2, 3, 8, 8)).astype(np.float32)}
    check_sites(model, run, feeds, sites)
    check_linears(model, run, feeds)
    check_ranges(model, run, feeds, {"x": (0.0, 1.0)})
    bounds = ranges(model.graph, {"x": (0.0, 1.0)})
    assert all(
        np.isfinite(bounds.channels(site.up.output, site.up.axis, site.d_hidden)).all() for site in sites
    )
    assert spine(model.graph)[0].name == "x"


def bert(transformers, **options):
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = transformers.BertModel(
        transformers.BertConfig(**shape, max_position_embeddings=16, attn_implementation="eager", **options)
    )

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return tuple(self.model(input_ids, attention_mask=attention_mask, return_dict=False))

    return Encoder()


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 14), ("dynamo", 20)])
def test_post_norm_encoder(run, tmp_path, exporter, opset):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 7))
    names, outputs = ["ids", "mask"], ["hidden", "pooled"]
    model = export(bert(transformers), (ids, torch.ones_like(ids)), names, exporter, opset, tmp_path, outputs)
    chain = spine(model.graph)
    assert (chain[0].name, chain[-1].name) == ("ids", "hidden")
    assert main_output(model.graph).name == "hidden"
    (run_of_layers,) = layers(model.graph)
    assert len(run_of_layers) == 3
    assert all(block.params == 4 * 16 * 17 + 2 * 16 * 32 + 48 + 4 * 16 for block in run_of_layers)
    assert run_of_layers[-1].end is chain[-1]
    sites, refusals = feedforwards(model.graph)
    assert [site.d_hidden for site in sites] == [32, 32, 32]
    assert refusals == []
    feeds = {"ids": ids.numpy(), "mask": np.ones((2, 7), np.int64)}
    check_sites(model, run, feeds, sites)
    check_linears(model, run, feeds)
    check_ranges(model, run, feeds, {})


def test_shared_layers(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 50,
        "embedding_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = transformers.AlbertModel(
        transformers.AlbertConfig(**shape, max_position_embeddings=16, attn_implementation="eager")
    )

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask=attention_mask, return_dict=False)[0]

    ids = torch.randint(0, 50, (2, 7))
    exported = export(Encoder(), (ids, torch.ones_like(ids)), ["ids", "mask"], "torchscript", 14, tmp_path)
    sites, _ = feedforwards(exported.graph)
    assert len(sites) == 4
    assert {site.params for site in sites} == {0}  # nothing belongs to one of them alone
    assert [len(run) for run in layers(exported.graph)] == [4]


def test_gated_decoder(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **shape, intermediate_size=32, max_position_embeddings=16, attn_implementation="eager"
        )
    )

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask=attention_mask, use_cache=False, return_dict=False)[0]

    ids = torch.randint(0, 50, (2, 7))
    exported = export(Decoder(), (ids, torch.ones_like(ids)), ["ids", "mask"], "dynamo", 18, tmp_path)
    sites, refusals = feedforwards(exported.graph)
    assert refusals == []
    assert [(site.d_in, site.d_hidden, site.gate is not None) for site in sites] == [(16, 32, True)] * 3
    weights = dict(model.named_parameters())
    for i, site in enumerate(sites):
        for linear, kind in ((site.gate, "gate"), (site.up, "up"), (site.down, "down")):
            ours = linear.matrix().T.astype(np.float32)
            np.testing.assert_array_equal(
                ours, weights[f"model.layers.{i}.mlp.{kind}_proj.weight"].detach().numpy()
            )
    feeds = {"ids": ids.numpy(), "mask": np.ones((2, 7), np.int64)}
    check_sites(exported, run, feeds, sites)
    check_linears(exported, run, feeds)
    assert [len(found) for found in layers(exported.graph)] == [3]
    assert spine(exported.graph)[0].name == "ids"


def test_sizes_of_a_decoder_are_read_from_its_ids(tmp_path):
    """Of GPT-2, whose Linears are `addmm`: blocks are there once these read tokens as they are."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=2, use_cache=False
    )

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = transformers.GPT2LMHeadModel(config)

        def forward(self, input_ids):
            return self.decoder(input_ids=input_ids).logits

    ids = torch.randint(0, 31, (2, 9))
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=31)}}
    export(Logits(), (ids,), ["ids"], "dynamo", 18, tmp_path, shapes=shapes)
    model = Model.load(tmp_path / "model.onnx")
    assert not feedforwards(model.graph)[0]
    found = optimize(model).model
    assert len(feedforwards(found.graph)[0]) == 2
    for sizes in ((3, 7), (1, 20)):
        x = np.random.default_rng(0).integers(0, 31, sizes)
        np.testing.assert_allclose(run_whole(found, ids=x)["out"], run_whole(model, ids=x)["out"], atol=1e-5)
