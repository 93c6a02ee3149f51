"""Parameters and the tree of modules: names, state, and what no_grad does."""

import contextlib
import threading
from collections import deque, namedtuple

import numpy as np
import pytest
import torch

import npformer
import torchformer
from npformer import SGD, clip_grad_norm
from npformer.layers import LayerNorm, Linear
from npformer.module import Module, Parameter, no_grad


class Tree(Module):
    """Parameters, a part, a list of parts and a part that is not there."""

    def __init__(self, seed=0, dtype=np.float32):
        rng = np.random.default_rng(seed)
        self.scale = Parameter(np.ones(3, dtype))
        self.first = Linear(3, 3, rng=rng, dtype=dtype)
        self.layers = [Linear(3, 3, rng=rng, dtype=dtype), LayerNorm(3, dtype=dtype)]
        self.nothing = None
        self.number = 0.5

    def forward(self, x):
        backwards = []
        for part in (self.first, *self.layers):
            x, backward_part = part(x)
            backwards.append(backward_part)

        def backward(dy):
            for backward_part in reversed(backwards):
                dy = backward_part(dy)
            return dy

        return x, backward


NAMES = ["scale", "first.weight", "first.bias"]
NAMES += [f"layers.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")]


def test_names_are_paths_in_the_order_of_definition():
    tree = Tree()
    assert [name for name, _ in tree.named_parameters()] == NAMES
    assert list(tree.state_dict()) == NAMES
    assert tree.parameters() == [p for _, p in tree.named_parameters()]  # == of objects: identity


def test_zero_grad_writes_into_the_gradients():
    tree = Tree()
    grads = [p.grad for p in tree.parameters()]
    for grad in grads:
        grad += 1
    tree.zero_grad()
    assert not any(grad.any() for grad in grads)
    assert all(p.grad is grad for p, grad in zip(tree.parameters(), grads, strict=True))


def test_state_dict_is_a_copy_and_loading_copies_into_place():
    tree, other = Tree(0), Tree(1)
    state = tree.state_dict()
    state["scale"][0] = 7
    assert tree.scale.data[0] == 1
    data = [p.data for p in other.parameters()]
    other.load_state_dict(state)
    assert all(p.data is x for p, x in zip(other.parameters(), data, strict=True))
    for name, x in other.state_dict().items():
        np.testing.assert_array_equal(x, state[name], err_msg=name)
    state["scale"][0] = 8
    assert other.scale.data[0] == 7


def test_loading_converts_to_the_dtype_of_the_parameters():
    tree = Tree(dtype=np.float32)
    tree.load_state_dict({name: x.astype(np.float64) for name, x in Tree(1).state_dict().items()})
    assert {p.data.dtype for p in tree.parameters()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(tree.first.weight.data, Tree(1).first.weight.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("first.bias"), r"lacks 'first\.bias'$"),
        (lambda s: [s.pop("first.bias"), s.pop("scale")], r"lacks 'scale' and 1 more"),
        (lambda s: s.update(extra=np.ones(1)), r"has unknown 'extra'$"),
        (lambda s: s.update(extra=s.pop("scale")), r"lacks 'scale' and has unknown 'extra'"),
        (lambda s: s.update(scale=np.ones(4)), r"scale is \(4,\), the model's is \(3,\)"),
        (lambda s: s.update(scale=np.ones((1, 3))), r"scale is \(1, 3\), the model's is \(3,\)"),
    ],
)
def test_loading_is_strict_and_all_or_nothing(change, message):
    tree, state = Tree(0), Tree(1).state_dict()
    before = tree.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        tree.load_state_dict(state)
    for name, x in tree.state_dict().items():
        np.testing.assert_array_equal(x, before[name], err_msg=name)


def test_no_grad_refuses_to_go_backward_and_ends_with_its_block():
    tree, x = Tree(), np.ones((2, 3), np.float32)
    with contextlib.suppress(KeyError), no_grad():
        _, backward = tree(x)
        with no_grad():
            pass
        _, backward_too = tree(x)
        raise KeyError  # leaves the block like any other exit
    for refused in (backward, backward_too):
        with pytest.raises(RuntimeError, match=r"ran under no_grad\(\): there is no way back"):
            refused(x)
    assert not any(p.grad.any() for p in tree.parameters())
    _, backward = tree(x)
    backward(x)
    assert tree.layers[0].weight.grad.any()


def test_no_grad_is_of_one_thread():
    tree, x = Tree(), np.ones((2, 3), np.float32)
    backwards = []
    with no_grad():
        thread = threading.Thread(target=lambda: backwards.append(tree(x)[1]))
        thread.start()
        thread.join()
    assert backwards[0](x).shape == x.shape


def test_under_no_grad_no_activation_outlives_its_layer():
    """Each part's backward, and with it what it captured, is gone when the part returns."""
    kept = []

    class Watched(Linear):
        def forward(self, x):
            y, backward = super().forward(x)
            kept.append(backward)
            return y, backward

    class Chain(Module):
        def __init__(self):
            self.layers = [Watched(3, 3, rng=np.random.default_rng(i)) for i in range(3)]

        def forward(self, x):
            received = []
            for layer in self.layers:
                x, backward = layer(x)
                received.append(backward)
            assert not set(map(id, received)) & set(map(id, kept))
            return x, None

    with no_grad():
        Chain()(np.ones((2, 3), np.float32))
    assert len(kept) == 3


def test_a_parameter_says_what_it_is():
    assert repr(Parameter(np.ones((2, 3), np.float32))) == "Parameter(2, 3), float32"


# --- Parts in containers ----------------------------------------------------------------------


class Held(Module):
    """Parts in every container that has an order, beside what is no part."""

    def __init__(self):
        rng = np.random.default_rng(0)
        one = lambda: Linear(2, 2, rng=rng)  # noqa: E731
        self.pair = (one(), Parameter(np.ones(2, np.float32)))
        self.by_name = {"sum": one(), "deep": {"er": [LayerNorm(2)]}}
        self.nested = [[one()], (), [3, "x", (Parameter(np.ones(1, np.float32)),)]]
        self.sizes, self.words = [1, 2, 3], {"a": 1, 2: "b", "c.d": None}
        self.Two = namedtuple("Two", "left right")
        self.two = self.Two(one(), 5)
        self.tied = self.pair[0]
        self.tied_weight = self.pair[0].weight


def weights_of(name):
    return [f"{name}.weight", f"{name}.bias"]


HELD = [*weights_of("pair.0"), "pair.1", *weights_of("by_name.sum")]
HELD += [*weights_of("by_name.deep.er.0"), *weights_of("nested.0.0"), "nested.2.2.0"]
HELD += weights_of("two.0")
TIED = [*weights_of("tied"), "tied_weight"]


def test_parts_in_tuples_dicts_and_nested_lists_are_found():
    """The names are those of torch's ModuleList and ModuleDict; what is no part is passed over."""
    held = Held()
    assert [name for name, _ in held.named_parameters()] == HELD
    assert list(held.state_dict()) == HELD + TIED  # torch's, too, has a tied one by each name


def test_a_parameter_in_two_places_is_one():
    """Counted once by clipping, moved once by an optimizer, as in torch."""
    held = Held()
    assert len(set(held.parameters())) == len(held.parameters()) == len(HELD)
    state = {name: np.full_like(x, 3) for name, x in held.state_dict().items()}
    held.load_state_dict(state)
    SGD(held.parameters(), 1.0)
    assert held.tied_weight is held.pair[0].weight
    held.tied_weight.data += 1
    assert (held.state_dict()["pair.0.weight"] == 4).all()
    p = Parameter(np.zeros(1))
    p.grad += 3
    assert clip_grad_norm([p, p], 1.5) == 3
    assert p.grad[0] == pytest.approx(1.5)


def test_a_view_has_the_same_containers_and_ties():
    held = Held()
    view = held.view()
    assert [name for name, _ in view.named_parameters()] == HELD
    assert view.tied is view.pair[0]
    assert view.tied_weight is view.tied.weight
    assert (view.two.right, view.sizes, view.words) == (5, held.sizes, held.words)
    for p, q in zip(held.parameters(), view.parameters(), strict=True):
        assert q.data is p.data
        q.grad += 1
        assert not p.grad.any()


def test_a_view_reads_the_weights_wherever_an_optimizer_has_put_them():
    tree = Tree()
    view = tree.view()
    optimizer = SGD(tree.parameters(), 0.5)  # packs them after the view was made
    for p in tree.parameters():
        p.grad = np.ones_like(p.grad)
    optimizer.step()
    tree.scale.data = tree.scale.data * 3
    for p, q in zip(tree.parameters(), view.parameters(), strict=True):
        assert q.data is p.data
    view.scale.data = np.zeros(3, np.float32)
    assert not tree.scale.data.any()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({Parameter(np.ones(1))}, "^part: parts in a set have no names; use a list or a dict$"),
        (deque([Parameter(np.ones(1))]), "^part: parts in a deque have no names; use a list"),
        ({"a": Parameter(np.ones(1))}.values(), "^part: parts in a dict_values have no names;"),
        ({"a.b": Parameter(np.ones(1))}, "^part: the key 'a.b' must be a string without a dot$"),
        ({0: Parameter(np.ones(1))}, "^part: the key 0 must be a string without a dot$"),
    ],
    ids=["set", "deque", "values", "dot", "integer"],
)
def test_parts_that_could_not_be_named_are_refused(held, message):
    tree = Tree()
    tree.part = held
    for call in (tree.parameters, tree.state_dict, tree.view):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_layers_of_a_stack_may_come_from_a_generator():
    rng = np.random.default_rng(0)
    made = (npformer.EncoderLayer(4, 2, 4, rng=rng) for _ in range(2))
    stack = npformer.Encoder(made)
    assert len(stack.parameters()) == 32
    x = np.ones((1, 2, 4), np.float32)
    once = stack(x)[0]
    np.testing.assert_array_equal(stack(x)[0], once)
    assert not np.array_equal(once, x)
    twin = torchformer.Encoder(torchformer.EncoderLayer(4, 2, 4) for _ in range(2))
    assert len(list(twin.parameters())) == 32


# --- Loading is all or nothing ----------------------------------------------------------------


BAD_VALUES = {
    "complex": np.ones(3, complex),
    "text": np.array(["1", "2", "3"]),
    "objects": np.array([1.0, None, 2.0]),
    "torch's bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "ragged": [1.0, [2.0], 3.0],
    "None": None,
    "raw bytes": np.zeros(3, "V2"),
    "dates": np.zeros(3, "M8[s]"),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
@pytest.mark.parametrize("name", [NAMES[0], NAMES[-1]])
def test_a_load_that_fails_has_changed_nothing(kind, name):
    tree = Tree()
    before = tree.state_dict()
    state = {key: x + 1 for key, x in before.items()}
    with pytest.raises(ValueError, match=f"^the weights do not fit this model: {name}"):
        tree.load_state_dict(state | {name: BAD_VALUES[kind]})
    for key, x in tree.state_dict().items():
        np.testing.assert_array_equal(x, before[key], err_msg=key)


@pytest.mark.parametrize("dtype", ["int64", "float16", "bfloat16", "bool"])
def test_what_is_exact_in_a_float_is_loaded(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    tree = Tree()
    tree.load_state_dict({name: x.astype(dtype) for name, x in tree.state_dict().items()})
    assert tree.scale.data.dtype == np.float32
    np.testing.assert_array_equal(tree.scale.data, 1)
    tree.load_state_dict({name: x.tolist() for name, x in tree.state_dict().items()})
    tree.load_state_dict({name: torch.from_numpy(x) for name, x in tree.state_dict().items()})
    np.testing.assert_array_equal(tree.scale.data, 1)


def test_the_twin_loads_all_or_nothing():
    """torch's own load_state_dict copies what fits before it raises."""
    config = npformer.TransformerConfig(9, 9, 6, 2, 7, 1, 1)
    model = torchformer.Transformer(config, np.random.default_rng(0))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    other = {name: x + 1 for name, x in before.items()}
    last = list(other)[-1]
    lacking = {name: x for name, x in other.items() if name != last}
    for state, message in (
        (lacking, f"lacks '{last}'$"),
        (other | {"extra": torch.ones(1)}, "has unknown 'extra'$"),
        (other | {last: torch.ones(2)}, rf"{last} is \(2,\), the model's is \(9,\)$"),
        (other | {last: other[last].to(torch.complex64)}, f"{last} is torch.complex64, the model"),
        (other | {last: [1.0] * 9}, f"{last} is a list, not a tensor$"),
        (other | {last: other[last].to("meta")}, f"{last}: Cannot copy out of meta tensor"),
        (other | {last: other[last].to_sparse()}, f"{last}: "),
    ):
        for options in ({}, {"assign": True}, {"strict": False}):
            if options == {"strict": False} and message.startswith(("lacks", "has unknown")):
                continue
            with pytest.raises(
                ValueError, match=f"^the weights do not fit this model: .*{message}"
            ):
                model.load_state_dict(state, **options)
            for name, x in model.state_dict().items():
                assert torch.equal(x, before[name]), name
    for kind in (torch.int64, torch.bool):  # assigned, they would be no parameter
        with pytest.raises(ValueError, match=f"{last} is {kind}, the model's is torch.float32$"):
            model.load_state_dict(other | {last: other[last].to(kind)}, assign=True)
        assert torch.equal(model.state_dict()[last], before[last])
    assert model.load_state_dict(lacking, strict=False).missing_keys == [last]
    assert torch.equal(model.state_dict()[next(iter(before))], other[next(iter(before))])
    model.load_state_dict({name: x.double() for name, x in before.items()})
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
