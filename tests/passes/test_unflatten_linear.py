# SPDX-License-Identifier: Apache-2.0
"""unflatten-linear: Linears between Reshapes that only flatten tokens and undo it read the tokens themselves."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnxcollapse.passes.cleanup import Cleanup
from onnxcollapse.passes.narrow_ffn import NarrowFfn
from onnxcollapse.passes.unflatten_linear import UnflattenLinear

from onnxcollapse import Budget, Decline, Target, open_data, optimize
from onnxcollapse.structure import feedforwards
from tests.support import Net, outputs

WIDTH, HIDDEN = 12, 20
WIDEST = np.iinfo(np.int64).max


class Flat(Net):
    """Builds Linears as torch's exporter writes `addmm`."""

    def numbers(self, *values: int) -> str:
        return self.const(values, dtype=np.int64)

    def axis(self, x: str, axis: int) -> str:
        taken = self.op("Gather", self.op("Shape", x), self.const(axis, dtype=np.int64), axis=0)
        return self.op("Unsqueeze", taken, self.numbers(0))

    def last(self, x: str) -> str:
        taken = self.op("Slice", self.op("Shape", x), self.numbers(-1), self.numbers(WIDEST), self.numbers(0))
        return self.op("Unsqueeze", self.op("Squeeze", taken, self.numbers(0)), self.numbers(0))

    def joined(self, *parts: str) -> str:
        return self.op("Concat", *parts, axis=0)

    def gemm(self, x: str, d_in: int, d_out: int, *, bias=True, **attributes) -> str:
        shape = (d_out, d_in) if attributes.get("transB") else (d_in, d_out)
        weight = self.const(self.random.normal(size=shape) / d_in**0.5)
        rest = [self.const(self.random.normal(size=d_out))] if bias else []
        return self.op("Gemm", x, weight, *rest, **attributes)

    def addmm(self, x: str, d_in: int, d_out: int, name: str | None = None, **attributes) -> str:
        flat = self.op("Reshape", x, self.joined(self.numbers(-1), self.last(x)))
        made = self.gemm(flat, d_in, d_out, **attributes)
        back = self.joined(self.axis(x, 0), self.axis(x, 1), self.numbers(d_out))
        return self.op("Reshape", made, back, name=name)

    def made(self, shape=("n", "t", WIDTH), out=("n", "t", WIDTH)):
        return self.model({"x": list(shape)}, {"y": list(out)})


def block(**attributes):
    """Two Linears around a Tanh."""
    net = Flat(1)
    hidden = net.op("Tanh", net.addmm("x", WIDTH, HIDDEN, **attributes))
    net.addmm(hidden, HIDDEN, WIDTH, name="y", **attributes)
    return net.made()


def between(first, last, x_shape=("n", "t", WIDTH), d_in=WIDTH, out=("n", "t", WIDTH), **attributes):
    """One Gemm between two Reshapes of given shapes, each a number, or a function that makes a tensor."""
    net = Flat(2)

    def target(parts):
        if all(isinstance(part, int) for part in parts):
            return net.numbers(*parts)
        return net.joined(*(net.numbers(part) if isinstance(part, int) else part(net) for part in parts))

    flat = net.op("Reshape", "x", target(first))
    net.op("Reshape", net.gemm(flat, d_in, WIDTH, **attributes), target(last), name="y")
    return net.made(x_shape, out)


def rows(net):
    return net.axis("x", 0)


def tokens(net):
    return net.axis("x", 1)


def kinds(model):
    return [node.op_type for node in model.graph]


def feed(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("attributes", [{}, {"transB": 1}, {"bias": False}])
def test_blocks_get_their_usual_form(attributes):
    model = block(**attributes)
    assert not feedforwards(model.graph)[0]
    result = optimize(model, passes=[UnflattenLinear(), Cleanup()])
    assert len(result.journal.of("kept")) >= 2
    assert kinds(result.model) == (
        ["MatMul", "Tanh", "MatMul"] if "bias" in attributes else ["MatMul", "Add", "Tanh", "MatMul", "Add"]
    )
    assert len(feedforwards(result.model.graph)[0]) == 1
    x = feed(3, 5, WIDTH)
    np.testing.assert_allclose(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"], atol=1e-5)
    assert result.after.params <= result.before.params


def test_behind_it_blocks_become_narrower():
    model = block()
    data = open_data({"x": feed(64, 5, WIDTH)}, model)
    passes = [UnflattenLinear(), NarrowFfn(align=1)]
    result = optimize(
        model, data, budget=Budget(None, target=Target("params", 0.8)), passes=passes, provider="cpu"
    )
    assert result.met and result.after.params < 0.8 * result.before.params


@pytest.mark.parametrize(
    "first, last, options",
    [
        ([-1, WIDTH], [rows, tokens, WIDTH], {}),
        ([-1, WIDTH], [rows, -1, WIDTH], {}),
        ([-1, WIDTH], [-1, tokens, WIDTH], {}),
        ([-1, WIDTH], [rows, tokens, -1], {}),
        ([-1, WIDTH], [-1, 5, WIDTH], {"x_shape": ("n", 5, WIDTH), "out": ("n", 5, WIDTH)}),
        ([-1, lambda net: net.last("x")], [rows, tokens, WIDTH], {"x_shape": ("n", "t", "d")}),
        ([-1, WIDTH], [rows, WIDTH], {"x_shape": ("n", WIDTH), "out": ("n", WIDTH)}),
    ],
)
def test_shapes_are_read_whatever_they_are_made_of(first, last, options):
    model = between(first, last, **options)
    result = optimize(model, passes=[UnflattenLinear(), Cleanup()])
    assert "Reshape" not in kinds(result.model)
    x = feed(3, WIDTH) if len(last) == 2 else feed(3, 5, WIDTH)
    np.testing.assert_allclose(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"], atol=1e-5)


@pytest.mark.parametrize(
    "first, last, options, reason",
    [
        ([-1, WIDTH], [tokens, rows, WIDTH], {}, "does not restore"),
        ([-1, WIDTH], [-1, WIDTH], {"out": ("m", WIDTH)}, "does not restore"),
        ([-1, WIDTH], [0, 2, WIDTH], {"out": ("n", 2, WIDTH)}, "does not restore"),
        ([-1, WIDTH], [rows, -1, WIDTH], {"x_shape": ("n", "t", 2 * WIDTH)}, "is not known to be the Linear's input"),
        ([-1, WIDTH], [rows, -1, WIDTH], {"x_shape": ("n", "t", "d")}, "is not known to be the Linear's input"),
        ([rows, WIDTH], [rows, WIDTH], {"x_shape": ("n", "t", "d"), "out": ("n", WIDTH)}, "does not flatten"),
        ([-1, WIDTH], [rows, tokens, WIDTH], {"alpha": 2.0}, "has factors"),
        ([-1, WIDTH], [rows, tokens, WIDTH], {"beta": 0.5}, "has factors"),
    ],
)  # fmt: skip
def test_what_only_looks_like_it_is_declined(first, last, options, reason):
    model = between(first, last, **options)
    (found,) = UnflattenLinear().sites(model)
    assert isinstance(found, Decline) and reason in found.reason


def test_a_transposed_weight_that_others_read_is_declined():
    net = Flat(3)
    weight = net.const(net.random.normal(size=(WIDTH, WIDTH)))
    flat = net.op("Reshape", "x", net.numbers(-1, WIDTH))
    made = net.op("Gemm", flat, weight, transB=1)
    back = net.op("Reshape", made, net.joined(net.axis("x", 0), net.axis("x", 1), net.numbers(WIDTH)))
    net.op("MatMul", back, weight, name="y")
    (found,) = UnflattenLinear().sites(net.made())
    assert isinstance(found, Decline) and "stored twice" in found.reason


@pytest.mark.parametrize(
    "shape, taken", [((1, WIDTH), True), ((), True), ((1,), True), ((10, WIDTH), False), ((10, 1), False)]
)
def test_a_bias_of_each_token_is_declined(shape, taken):
    net = Flat(5)
    flat = net.op("Reshape", "x", net.numbers(-1, WIDTH))
    made = net.op(
        "Gemm",
        flat,
        net.const(net.random.normal(size=(WIDTH, WIDTH))),
        net.const(net.random.normal(size=shape)),
    )
    net.op("Reshape", made, net.numbers(2, 5, WIDTH), name="y")
    model = net.made((2, 5, WIDTH), (2, 5, WIDTH))
    (found,) = UnflattenLinear().sites(model)
    assert isinstance(found, Decline) != taken
    result = optimize(model, passes=[UnflattenLinear()])
    x = feed(2, 5, WIDTH)
    np.testing.assert_allclose(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"], atol=1e-5)


def test_what_is_read_flat_as_well_stays():
    net = Flat(4)
    made = net.gemm(net.op("Reshape", "x", net.numbers(-1, WIDTH)), WIDTH, WIDTH)
    net.op("Reshape", made, net.joined(net.axis("x", 0), net.axis("x", 1), net.numbers(WIDTH)), name="y")
    net.op("ReduceSum", made, name="z", keepdims=0)
    model = net.model({"x": ["n", "t", WIDTH]}, {"y": ["n", "t", WIDTH], "z": []})
    assert list(UnflattenLinear().sites(model)) == []


def kept_rewrites(model):
    return optimize(model, passes=[UnflattenLinear()]).journal.of("kept")


def test_one_number_is_no_list_of_tokens():
    net = Flat(2)
    made = net.gemm(net.op("Reshape", "x", net.numbers(-1, 1)), 1, HIDDEN)
    net.op("Reshape", made, net.numbers(HIDDEN), name="y")
    assert not kept_rewrites(net.made((), (HIDDEN,)))


@pytest.mark.parametrize("shape", [(1, HIDDEN), (1, 1)])
def test_a_bias_does_not_add_an_axis(shape):
    net = Flat(2)
    flat = net.op("Reshape", "x", net.numbers(-1, WIDTH))
    weight, bias = net.const(net.random.normal(size=(WIDTH, HIDDEN))), net.const(np.ones(shape))
    net.op("Reshape", net.op("Gemm", flat, weight, bias), net.numbers(HIDDEN), name="y")
    model = net.made((WIDTH,), (HIDDEN,))
    x = np.ones(WIDTH, np.float32)
    after = optimize(model, passes=[UnflattenLinear()]).model
    assert outputs(after, x=x)["y"].shape == outputs(model, x=x)["y"].shape == (HIDDEN,)


def swapped(shape, cast=None):
    """Tokens flattened and put back with their axes in the other order, or through a cast."""
    net = Flat(2)
    source = net.op("Tanh", "x", name="q")
    flat = net.op("Reshape", source, net.numbers(-1, WIDTH))
    parts = [net.axis(source, axis) for axis in ((0, 1) if cast else (1, 0))]
    if cast is not None:
        parts = [net.op("Cast", net.op("Cast", part, to=cast), to=7) for part in parts]
    net.op("Reshape", net.gemm(flat, WIDTH, HIDDEN), net.joined(*parts, net.numbers(HIDDEN)), name="y")
    return net.made(shape, ("a", "b", HIDDEN))


def test_unknown_sizes_are_not_equal_whatever_they_are_declared_as():
    model = swapped(("n", "t", WIDTH))
    for value in model.graph.inputs:
        value.shape = ir.Shape([-1, -1, WIDTH])
    assert not kept_rewrites(model)


def test_what_a_file_declares_of_inner_tensors_proves_nothing():
    model = swapped(("n", "t", WIDTH))
    (q,) = (node.outputs[0] for node in model.graph if node.outputs[0].name == "q")
    q.shape = ir.Shape([5, 5, WIDTH])
    assert not kept_rewrites(model)


@pytest.mark.parametrize("kind", [9, 2])
def test_a_cast_that_changes_numbers_is_read_as_such(kind):
    assert not kept_rewrites(swapped(("n", "t", WIDTH), cast=kind))
    assert kept_rewrites(swapped(("n", "t", WIDTH), cast=6))


def decoder(*, steps=(0, 1), shape=("n", "t"), back=(0, 1)):
    """Reads its sizes from the token ids, as torch's newer exporter writes decoders: inference alone names few."""
    net = Flat(4)
    length = net.op("Squeeze", net.op("Shape", "x", start=1, end=2))
    view = net.joined(net.numbers(-1), net.op("Shape", "x", start=1, end=2))
    ids = net.op("Reshape", net.op("Cast", "x", to=7), view, allowzero=1)
    words = net.op("Gather", net.const(net.random.normal(size=(9, WIDTH))), ids)
    start, step = (net.const(number, dtype=np.int64) for number in steps)
    places = net.op("Unsqueeze", net.op("Range", start, length, step), net.numbers(0))
    h = net.op("Add", words, net.op("Gather", net.const(net.random.normal(size=(16, WIDTH))), places))

    def linear(h, d_in, d_out, name=None):
        made = net.gemm(net.op("Reshape", h, net.numbers(-1, d_in)), d_in, d_out)
        sizes = [net.op("Shape", "x", start=axis, end=axis + 1) for axis in back]
        return net.op("Reshape", made, net.joined(*sizes, net.numbers(d_out)), name=name)

    linear(net.op("Tanh", linear(h, WIDTH, HIDDEN)), HIDDEN, WIDTH, "y")
    return net.made(shape, ("a", "b", WIDTH))


@pytest.mark.parametrize("shape", [("n", "t"), (None, None), (None, "t")])
def test_sizes_are_followed_to_the_inputs_that_they_are_of(shape):
    model = decoder(shape=shape)
    result = optimize(model, passes=[UnflattenLinear(), Cleanup()])
    assert kinds(result.model).count("MatMul") == 2
    assert len(feedforwards(result.model.graph)[0]) == 1
    for sizes in ((3, 5), (2, 7), (1, 1)):
        x = np.random.default_rng(0).integers(0, 9, sizes).astype(np.float32)
        np.testing.assert_allclose(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"], atol=1e-5)


@pytest.mark.parametrize("options", [{"steps": (1, 1)}, {"steps": (0, 2)}, {"back": (1, 0)}])
def test_sizes_that_are_others_are_told_apart(options):
    (entry,) = kept_rewrites(decoder(**options))
    assert entry.site == "y", "it restores what the first one made, whatever that is"


def undone(net, source, *sizes, given=None):
    """A Linear on flattened tokens, and the shape that is said to restore them."""
    flat = net.op("Reshape", source, net.numbers(-1, WIDTH))
    net.op("Reshape", net.gemm(flat, WIDTH, HIDDEN), net.joined(*sizes, net.numbers(HIDDEN)), name="y")
    return net.model(given or {"x": ["n", "t", WIDTH]}, {"y": ["a", "b", HIDDEN]})


def test_axes_of_one_input_that_share_a_name_are_told_apart():
    net = Flat(2)
    source = net.op("Tanh", "x")
    sizes = [net.axis(source, axis) for axis in (1, 0)]
    assert not kept_rewrites(undone(net, source, *sizes, given={"x": ["?", "?", WIDTH]}))


def test_a_number_made_one_on_the_way_is_another():
    """onnx's own inference follows it through the cast as if it were the size still."""
    net = Flat(2)
    size = net.axis("w", 0)
    one = net.op("Cast", net.op("Cast", size, to=9), to=7)
    source = net.op("Reshape", "x", net.joined(one, net.numbers(-1), net.numbers(WIDTH)))
    model = undone(net, source, size, net.numbers(-1), given={"x": ["n", WIDTH], "w": ["a"]})
    assert not kept_rewrites(model)


def test_what_branches_declare_proves_nothing():
    def branch(op, name):
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "b", WIDTH])
        return helper.make_graph([helper.make_node(op, ["x"], [name])], name, [], [output])

    net = Flat(2)
    holds = net.op("Less", net.op("ReduceSum", "x", keepdims=0), net.const(0.0))
    source = net.op("If", holds, then_branch=branch("Identity", "one"), else_branch=branch("Neg", "other"))
    assert not kept_rewrites(undone(net, source, *(net.axis(source, axis) for axis in (1, 0))))
