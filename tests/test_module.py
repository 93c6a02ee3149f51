"""Parameters and the tree of modules: names, state, and what no_grad does."""

import contextlib
import threading

import numpy as np
import pytest

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
