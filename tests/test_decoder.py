"""One decoder layer and the stack: the contract, the derivative, the twin; who asks whom."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchformer
from npformer.decoder import Decoder, DecoderLayer
from npformer.layers import LayerNorm
from npformer.testing.conformance import (
    Example,
    check_contract,
    check_gradient,
    check_peer,
    check_twin,
    randomise,
)
from npformer.testing.strategies import layouts, masks, random_like, seeds, sizes

SMOOTH = ["gelu", "gelu_tanh"]  # relu has a kink: float64 against the twin, and nothing else


@st.composite
def decoders(draw, activations=SMOOTH, layer_alone=False):
    B, T, S, H, D, F = draw(sizes("BTSHDF", 6))
    C, seed = H * D, draw(seeds)
    n_layers, final_norm = draw(st.integers(1, 3)), draw(st.booleans())
    kind = dict(
        activation=draw(st.sampled_from(activations)), norm_first=draw(st.booleans()), eps=1e-2
    )

    def make(dtype):
        rng = np.random.default_rng(seed)
        if layer_alone:
            return randomise(DecoderLayer(C, H, F, **kind, rng=rng, dtype=dtype), seed)
        layers = [DecoderLayer(C, H, F, **kind, rng=rng, dtype=dtype) for _ in range(n_layers)]
        return randomise(
            Decoder(layers, LayerNorm(C, 1e-2, dtype=dtype) if final_norm else None), seed
        )

    def make_twin():
        if layer_alone:
            return torchformer.DecoderLayer(C, H, F, **kind)
        layers = [torchformer.DecoderLayer(C, H, F, **kind) for _ in range(n_layers)]
        return torchformer.Decoder(layers, torch.nn.LayerNorm(C, 1e-2) if final_norm else None)

    x, memory = (random_like((B, n, C), np.float64, seed + n) for n in (T, S))
    return Example(
        make,
        make_twin,
        (draw(layouts(x)), draw(layouts(memory))),
        {"mask": draw(masks((B, H), T, T)), "memory_mask": draw(masks((B, H), T, S))},
        n_summed=n_layers * (18 * C + F + T + S + B * (T + S)),
    )


decoder_layers = decoders(layer_alone=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(example=decoder_layers | decoders())
def test_contract(example, dtype):
    check_contract(example, dtype)


@given(decoder_layers | decoders())
def test_gradient_is_the_derivative(example):
    check_gradient(example)


@given(decoders(["relu", *SMOOTH], layer_alone=True) | decoders(["relu", *SMOOTH]))
def test_agrees_with_the_twin(example):
    check_twin(example)


@given(decoder_layers | decoders())
def test_float32_is_as_exact_as_the_twin(example):
    check_peer(example)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_memory_that_nobody_may_attend_to_has_no_gradient(norm_first):
    rng = np.random.default_rng(0)
    layer = DecoderLayer(6, 2, 8, norm_first=norm_first, rng=rng, dtype=np.float64)
    x, memory = random_like((2, 3, 6), np.float64, 0), random_like((2, 5, 6), np.float64, 1)
    memory_mask = np.full((2, 1, 1, 5), True)
    memory_mask[1] = False
    y, backward = layer(x, memory, memory_mask=memory_mask)
    dx, dmemory = backward(random_like(y.shape, np.float64, 2))
    assert dmemory[0].any()
    assert not dmemory[1].any()
    assert dx.any(axis=-1).all()


@pytest.mark.parametrize("norm_first", [False, True])
def test_pre_norm_never_touches_the_residual_stream(norm_first):
    rng = np.random.default_rng(0)
    layer = DecoderLayer(6, 2, 8, norm_first=norm_first, rng=rng, dtype=np.float64)
    for linear in (
        layer.self_attn.out_proj,
        layer.cross_attn.out_proj,
        layer.feed_forward.linear2,
    ):
        linear.weight.data[...] = 0  # the sublayers return 0
    x, memory = random_like((2, 3, 6), np.float64, 0), random_like((2, 5, 6), np.float64, 1)
    y, backward = layer(x, memory)
    dx, dmemory = backward(random_like(y.shape, np.float64, 2))
    if norm_first:
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(dx, random_like(y.shape, np.float64, 2))
    else:
        expected = layer.norm3(layer.norm2(layer.norm1(x)[0])[0])[0]
        np.testing.assert_array_equal(y, expected)
    assert not dmemory.any()
