# SPDX-License-Identifier: Apache-2.0
"""A decoder as ONNX Runtime's generative model builder writes it, and its folder."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper

from onnxcollapse import Model
from onnxcollapse.calibration import open_session
from onnxcollapse.calibration.filling import step
from onnxcollapse.calibration.masks import cache_pairs
from tests.support import Net

VOCABULARY, WIDTH, HEADS, GROUPS, HEAD, HIDDEN, LENGTH = 61, 32, 4, 2, 16, 48, 64
CONTRIB = "com.microsoft"


class Builder(Net):
    """Writes nodes with the names, domains and stated shapes of the model builder."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.infos = []

    def node(
        self, kind, inputs, name, outputs=(0,), *, width=WIDTH, domain=None, dtype=TensorProto.FLOAT, **kw
    ):
        """Adds a node that has the outputs of these numbers, of [batch, sequence, width]; returns their names."""
        made = [f"{name}/output_{n}" if n in outputs else "" for n in range(outputs[-1] + 1)]
        self.nodes.append(helper.make_node(kind, inputs, made, name=name, domain=domain, **kw))
        shape = width if isinstance(width, list) else ["batch_size", "sequence_length", width]
        self.infos += [helper.make_tensor_value_info(v, dtype, shape) for v in made if v]
        found = [value for value in made if value]
        return found[0] if len(found) == 1 else found

    def project(self, x, rows, columns, name, *, scale=1.0):
        drawn = self.random.normal(size=(rows, columns)) / rows**0.5 * scale
        weight = self.const(drawn, f"{name[1:].replace('/', '.')}.weight")
        return self.node("MatMul", [x, weight], name, width=columns)


def grouped(layers=4, *, packed=False, weak=(1, 2), seed=7):
    """input_ids -> logits through GroupQueryAttention and SwiGLU; those in `weak` add little to the stream.

    As the builder has it, rotation, causality and caches are GroupQueryAttention's own business, every norm but the
    first is fused with the sum before it, and the last one yields no sum.
    """
    net = Builder(seed)
    table = net.const(net.random.normal(size=(VOCABULARY, WIDTH)), "model.embed_tokens.weight")
    stream = skip = net.node("Gather", [table, "input_ids"], "/model/embed_tokens/Gather")
    shared = [*_lengths(net), *_rotation(net)]
    norm, stream = _norm(net, 0, "input", stream, None)
    for layer in range(layers):
        scale = 0.02 if layer in weak else 0.5
        skip = _attention(net, layer, norm, shared, packed, scale)
        norm, stream = _norm(net, layer, "post_attention", stream, skip)
        skip = _swiglu(net, layer, norm, scale)
        if layer + 1 < layers:
            norm, stream = _norm(net, layer + 1, "input", stream, skip)
    norm, _ = _norm(net, layers, "final_norm", stream, skip, last=True)
    head = net.const(net.random.normal(size=(WIDTH, VOCABULARY)) / 4, "lm_head.MatMul.weight")
    net.nodes.append(helper.make_node("MatMul", [norm, head], ["logits"], name="/lm_head/MatMul"))
    return _model(net, layers)


def _lengths(net):
    """Tokens of each row but one, and those of the longest one, from the mask."""
    base, one = "/model/attn_mask_reformat/attn_mask_subgraph", net.const([1], "one", np.int64)
    place = net.const(1, "place", np.int64)
    total = net.node(
        "ReduceSum", ["attention_mask", one], f"{base}/ReduceSum", width=["batch_size", 1], dtype=7
    )
    before = net.node("Sub", [total, one], f"{base}/Sub", width=["batch_size", 1], dtype=7)
    shape = net.node("Shape", ["attention_mask"], f"{base}/Shape", width=[2], dtype=7)
    longest = net.node("Gather", [shape, place], f"{base}/Gather", width=[], dtype=7, axis=0)
    return [
        net.node("Cast", [before], f"{base}/Sub/Cast", width=["batch_size", 1], dtype=6, to=6),
        net.node("Cast", [longest], f"{base}/Gather/Cast", width=[], dtype=6, to=6),
    ]


def _rotation(net):
    angles = np.arange(LENGTH)[:, None] / 10000 ** (np.arange(0, HEAD, 2) / HEAD)
    return [net.const(np.cos(angles), "cos_cache"), net.const(np.sin(angles), "sin_cache")]


def _norm(net, layer, place, stream, skip, last=False):
    """The norm of the stream and the stream itself."""
    name = f"/model/layers.{layer}/{place}_layernorm"
    gamma = net.const(net.random.normal(1, 0.1, size=WIDTH), f"{name[1:].replace('/', '.')}.weight")
    kind = "SimplifiedLayerNormalization"
    if skip is None:
        norm = net.node(kind, [stream, gamma], f"{name}/LayerNorm", epsilon=1e-5, axis=-1, stash_type=1)
        return norm, stream
    given = [stream, skip, gamma], f"{name}/SkipLayerNorm", ((0,) if last else (0, 3))
    found = net.node(f"Skip{kind}", *given, domain=CONTRIB, epsilon=1e-5)
    return (found, None) if last else found


def _attention(net, layer, norm, shared, packed, scale):
    base = f"/model/layers.{layer}/attn"
    if packed:
        three = [net.project(norm, WIDTH, (HEADS + 2 * GROUPS) * HEAD, f"{base}/qkv_proj/MatMul"), "", ""]
    else:
        heads = {"q": HEADS, "k": GROUPS, "v": GROUPS}
        three = [net.project(norm, WIDTH, n * HEAD, f"{base}/{p}_proj/MatMul") for p, n in heads.items()]
    past, present = (
        [f"{way}.{layer}.{kind}" for kind in ("key", "value")] for way in ("past_key_values", "present")
    )
    name = f"{base}/GroupQueryAttention"
    mixed = f"{name}/output_0"
    net.nodes.append(
        helper.make_node(
            "GroupQueryAttention", [*three, *past, *shared], [mixed, *present], name=name, domain=CONTRIB,
            num_heads=HEADS, kv_num_heads=GROUPS, scale=HEAD**-0.5, local_window_size=-1, softcap=0.0, do_rotary=1,
            rotary_interleaved=0,
        )
    )  # fmt: skip
    net.infos.append(
        helper.make_tensor_value_info(
            mixed, TensorProto.FLOAT, ["batch_size", "sequence_length", HEADS * HEAD]
        )
    )
    return net.project(mixed, HEADS * HEAD, WIDTH, f"{base}/o_proj/MatMul", scale=scale)


def _swiglu(net, layer, norm, scale):
    base = f"/model/layers.{layer}/mlp"
    gate, up = (net.project(norm, WIDTH, HIDDEN, f"{base}/{name}_proj/MatMul") for name in ("gate", "up"))
    sigmoid = net.node("Sigmoid", [gate], f"{base}/act_fn/Sigmoid", width=HIDDEN)
    silu = net.node("Mul", [gate, sigmoid], f"{base}/act_fn/Mul", width=HIDDEN)
    hidden = net.node("Mul", [silu, up], f"{base}/Mul", width=HIDDEN)
    return net.project(hidden, HIDDEN, WIDTH, f"{base}/down_proj/MatMul", scale=scale)


def _model(net, layers):
    def ids(name, length):
        return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch_size", length])

    def caches(way, length):
        shape = ["batch_size", GROUPS, length, HEAD]
        names = [f"{way}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]

    graph = helper.make_graph(
        net.nodes,
        "main_graph",
        [
            ids("input_ids", "sequence_length"),
            ids("attention_mask", "total_sequence_length"),
            *caches("past_key_values", "past_sequence_length"),
        ],
        [
            helper.make_tensor_value_info(
                "logits", TensorProto.FLOAT, ["batch_size", "sequence_length", VOCABULARY]
            ),
            *caches("present", "total_sequence_length"),
        ],
        net.initializers,
        value_info=net.infos,
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1)]
    return Model(ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8)))


def folder(path, model, layers=4):
    """Writes the model with its two config files; loaded from there it has them as companions."""
    path.mkdir()
    model.save(path / "model.onnx")
    (path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": layers}, indent=2)
    )
    roles = [("past_key_names", "past_key_values.%d.key"), ("past_value_names", "past_key_values.%d.value")]
    inputs = {name: name for name in ("input_ids", "attention_mask")} | dict(roles)
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    decoder = {
        "filename": "model.onnx", "head_size": HEAD, "hidden_size": WIDTH, "inputs": inputs, "outputs": outputs,
        "num_attention_heads": HEADS, "num_hidden_layers": layers, "num_key_value_heads": GROUPS,
    }  # fmt: skip
    genai = {"model": {"context_length": LENGTH, "decoder": decoder, "type": "llama"}, "search": {"top_k": 1}}
    (path / "genai_config.json").write_text(json.dumps(genai, indent=4))
    return Model.load(path)


def windows(count=48, length=12, seed=0):
    """Token ids [count, length]."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (count, length))


def caches(model):
    """Names of the model's caches, inputs and outputs."""
    both = (*model.graph.inputs, *model.graph.outputs)
    return [value.name for value in both if value.name.startswith(("past", "present"))]


def prefill(model, tokens):
    """Logits of one full forward pass."""
    with open_session(model, provider="cpu") as session:
        return session.run(step(model.signature(), tokens, 0, {}))["logits"]


def decoded(model, tokens, prompt=3):
    """Logits of the same tokens: a prompt first, then one by one through the cache."""
    signature = model.signature()
    pairs = (
        cache_pairs([spec.name for spec in signature.inputs], [spec.name for spec in signature.outputs]) or {}
    )
    found, past, cache = [], 0, {}
    with open_session(model, provider="cpu") as session:
        for part in [tokens[:, :prompt], *np.split(tokens[:, prompt:], tokens.shape[1] - prompt, axis=1)]:
            outputs = session.run(step(signature, part, past, cache))
            found.append(outputs["logits"])
            past += part.shape[1]
            cache = {name: outputs[output] for name, output in pairs.items()}
    return np.concatenate(found, axis=1)


def tensor(model, name, tokens):
    """A tensor of one full forward pass."""
    copy = model.clone()
    copy.graph.outputs.append(next(v for node in copy.graph for v in node.outputs if v.name == name))
    with open_session(copy, provider="cpu") as session:
        return session.run(step(copy.signature(), tokens, 0, {}))[name]
