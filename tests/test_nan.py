"""NaN and infinity in every input of every op, and in dy: where torch has NaN we have it, too.

A NaN that is swallowed on its way, forward or back, hides the bug that made it.  Planted are NaN,
inf and -inf, one at a time, in each place of each input; torch, which has the same value planted,
says where the NaNs belong.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import npformer
import torchformer
from npformer import normalize, ops

RNG = np.random.default_rng(0)
MASK = np.array([[True, True, False], [True, True, True], [False, False, True]])  # (T, S)
NOTHING = np.array([[True, True, False], [False, False, False], [True, True, True]])
IDS, TARGETS = np.array([2, 0, 2]), np.array([1, 0, 2])
KEEP = np.array([[1.0, 0, 1], [0, 1, 1]]) * 1.5  # what dropout multiplies by


def tensor(x):
    return torch.from_numpy(x)


class Op(NamedTuple):
    """An op, its twin and the shapes of their arrays."""

    name: str
    ours: Any
    theirs: Any
    shapes: tuple[tuple[int, ...], ...]


def running(dtype):
    return normalize.Running(np.full(2, 0.1, dtype), np.full(2, 0.7, dtype))


def dropped(x, p):
    """By the mask of one seed, so that both drop the same."""
    return ops.dropout(x, p, np.random.default_rng(3))


def without_ignored(x, ignore_index=None, **_):
    """torch passes on a NaN in an ignored row, where the loss does not depend on it."""
    return torch.where(tensor(ignore_index != TARGETS)[:, None], x, 0.0)


OPS = [
    Op("matmul", ops.matmul, torch.matmul, ((2, 3, 2), (2, 4))),
    Op("matmul, broadcast", ops.matmul, torch.matmul, ((2, 1, 3, 2), (3, 2, 2))),
    Op("matmul, vectors", ops.matmul, torch.matmul, ((3,), (3,))),
    Op("mv", ops.mv, torch.mv, ((2, 3), (3,))),
    Op("linear", ops.linear, F.linear, ((2, 3), (4, 3), (4,))),
    Op(
        "embedding",
        lambda w: ops.embedding(IDS, w, 0),
        lambda w: F.embedding(tensor(IDS), w, 0),
        ((3, 2),),
    ),
    Op("softmax", ops.softmax, lambda x: x.softmax(-1), ((2, 3),)),
    Op("log_softmax", ops.log_softmax, lambda x: x.log_softmax(-1), ((2, 3),)),
    Op(
        "masked_fill",
        lambda x: ops.masked_fill(x, MASK, 0.5),
        lambda x: x.masked_fill(tensor(MASK), 0.5),
        ((3, 3),),
    ),
    *[
        Op(
            f"{kind}, {name}",
            lambda *x, mask=mask, kind=kind: getattr(ops, kind)(*x, mask),
            lambda *x, mask=mask, kind=kind: getattr(torchformer.ops, kind)(
                *x, mask if mask is None else tensor(mask)
            ),
            ((1, 1, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2))[: 3 if kind == "attention" else 2],
        )
        for kind in ("attention", "attention_weights")
        for name, mask in (("no mask", None), ("mask", MASK), ("an empty row", NOTHING))
    ],
    Op(
        "layer_norm",
        ops.layer_norm,
        lambda x, w, b: F.layer_norm(x, (3,), w, b),
        ((2, 3), (3,), (3,)),
    ),
    Op("rms_norm", normalize.rms_norm, lambda x, w: F.rms_norm(x, (3,), w, 1e-5), ((2, 3), (3,))),
    Op(
        "batch_norm",
        lambda x, w, b: normalize.batch_norm(x, w, b, running(x.dtype)),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        ((2, 2, 2), (2,), (2,)),
    ),
    Op(
        "batch_norm, running",
        lambda x, w, b: normalize.batch_norm(x, w, b, running(x.dtype), False),
        lambda x, w, b: F.batch_norm(
            x, torch.full((2,), 0.1).to(x), torch.full((2,), 0.7).to(x), w, b
        ),
        ((2, 2, 2), (2,), (2,)),
    ),
    Op(
        "instance_norm",
        normalize.instance_norm,
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
        ((2, 2, 3), (2,), (2,)),
    ),
    Op(
        "group_norm",
        lambda x, w, b: normalize.group_norm(x, 2, w, b),
        lambda x, w, b: F.group_norm(x, 2, w, b),
        ((2, 4, 2), (4,), (4,)),
    ),
    Op("relu", ops.relu, F.relu, ((2, 3),)),
    Op("gelu", ops.gelu, F.gelu, ((2, 3),)),
    Op("gelu_tanh", ops.gelu_tanh, lambda x: F.gelu(x, approximate="tanh"), ((2, 3),)),
    *[
        Op(
            f"dropout {p}",
            lambda x, p=p: dropped(x, p),
            lambda x, p=p: x * tensor(dropped(np.ones((2, 3)), p)[0]).to(x),
            ((2, 3),),
        )
        for p in (0.0, 0.5, 1.0)
    ],
    *[
        Op(
            f"cross_entropy, {name}",
            lambda x, options=options: ops.cross_entropy(x, TARGETS, **options),
            lambda x, options=options: F.cross_entropy(
                without_ignored(x, **options), tensor(TARGETS), **options
            ),
            ((3, 4),),
        )
        for name, options in (
            ("plain", {}),
            ("ignored rows", {"ignore_index": 0}),
            ("smoothing", {"label_smoothing": 0.1, "ignore_index": 0}),
        )
    ],
]

PLANTED = [np.nan, np.inf, -np.inf]
STRICTER = {("relu", "dy")}  # dy is multiplied by 0 where x < 0, and torch writes a 0


def not_finite(x, bad):
    """Of a planted infinity it depends on the order of the sums whether inf or NaN comes out."""
    return np.isnan(x) if np.isnan(bad) else ~np.isfinite(x)


def ours(op, arrays, dy):
    y, backward = op.ours(*arrays)
    gradients = backward(dy)
    return [np.asarray(y), *(gradients if isinstance(gradients, tuple) else (gradients,))]


def theirs(op, arrays, dy):
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    y = op.theirs(*tensors)
    gradients = torch.autograd.grad(y, tensors, torch.tensor(dy))
    return [y.detach().numpy(), *(g.numpy() for g in gradients)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@sdpa_kernel(SDPBackend.MATH)  # the fused kernel, without a mask, loses a NaN in q
def test_nan_goes_where_it_goes_in_torch(op, dtype):
    arrays = [RNG.standard_normal(shape).astype(dtype) for shape in op.shapes]
    dy = np.asarray(RNG.standard_normal(np.shape(op.ours(*arrays)[0])), dtype)
    for i in range(len(arrays) + 1):
        name = f"input {i}" if i < len(arrays) else "dy"
        for bad in PLANTED:
            for place in np.ndindex(np.shape([*arrays, dy][i])):
                planted = [x.copy() for x in [*arrays, dy]]
                planted[i][place] = bad
                with np.errstate(all="ignore"):
                    found = ours(op, planted[:-1], planted[-1])
                expected = theirs(op, planted[:-1], planted[-1])
                for k, (a, b) in enumerate(zip(found, expected, strict=True)):
                    a, b = not_finite(a, bad), not_finite(b, bad)
                    about = f"{bad} in {name} at {place}, {f'gradient {k}' if k else 'y'}"
                    assert not (b & ~a).any(), f"{about}: swallowed, torch has {b}, we {a}"
                    if (op.name, name) not in STRICTER:
                        assert not (a & ~b).any(), f"{about}: torch has {b}, we {a}"


def test_every_op_is_planted_in():
    done = {op.name.split(",")[0].split(" ")[0] for op in OPS}
    rest = {"dot", "mm", "bmm"}  # ranks of matmul
    for module in (ops, normalize):
        for name, f in vars(module).items():
            if getattr(f, "__module__", "") == module.__name__ and name[0] != "_":
                returns = getattr(f, "__annotations__", {}).get("return")
                if returns is ops.Forward and name not in ("normalize", "scale_and_shift"):
                    assert name in done | rest, name


@pytest.mark.parametrize("bad", PLANTED)
@pytest.mark.parametrize("what", ["key", "value", "both"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_masked_key_is_nan_in_both_twins_or_in_neither(bad, what, dtype):
    """Of the op by torch's own choice of a kernel, and of the module; forward and backward."""
    B, H, T, S, D = 2, 2, 3, 4, 5
    q, k, v = (RNG.standard_normal((B, H, n, D)).astype(dtype) for n in (T, S, S))
    mask = np.ones((B, 1, T, S), bool)
    mask[0, :, :, 3] = False  # a pad of sample 0
    if what != "value":
        k[0, 0, 3] = bad
    if what != "key":
        v[0, 0, 3] = bad
    dy = RNG.standard_normal((B, H, T, D)).astype(dtype)
    with np.errstate(invalid="ignore"):
        y, backward = ops.attention(q, k, v, mask)
        found = [y, *backward(dy)]
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    for rng in (None, object()):  # an rng: the weights are made explicitly, as for a trace
        out = torchformer.ops.attention(*tensors, tensor(mask), 0.0, rng)
        expected = [out, *torch.autograd.grad(out, tensors, tensor(dy))]
        for name, a, b in zip(("y", "dq", "dk", "dv"), found, expected, strict=True):
            b = b.detach().numpy()
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
    assert np.isnan(y[0, 0]).all()  # 0 · NaN and 0 · inf are NaN
    assert np.isfinite(y[1]).all()
    assert np.isfinite(y[0, 1]).all()


@pytest.mark.parametrize("where", ["key", "value"])
def test_a_masked_position_that_is_nan_is_so_in_both_modules(where):
    config = {"d_model": 8, "n_heads": 2}
    ours = npformer.MultiHeadAttention(**config, rng=np.random.default_rng(0))
    twin = torchformer.MultiHeadAttention(**config)
    twin.load_state_dict({name: tensor(x) for name, x in ours.state_dict().items()})
    query, key, value = (RNG.standard_normal((2, n, 8)).astype(np.float32) for n in (3, 4, 4))
    (key if where == "key" else value)[0, 3] = np.nan
    mask = np.array([[True, True, True, False], [True] * 4])[:, None, None, :]
    y, backward = ours(query, key, value, mask)
    gradients = backward(np.ones_like(y))
    tensors = [torch.tensor(x, requires_grad=True) for x in (query, key, value)]
    out = twin(*tensors, tensor(mask))
    expected = [out, *torch.autograd.grad(out.sum(), tensors)]
    for a, b in zip([y, *gradients], expected, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b.detach().numpy()))
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
