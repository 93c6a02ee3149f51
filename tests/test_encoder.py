"""One encoder layer and the stack: the contract, the derivative, the twin; where norms stand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchformer
from npformer.encoder import Encoder, EncoderLayer
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
def encoder_layers(draw, activations=SMOOTH, eps=(1e-5, 1e-2)):
    B, S, H, D, F = draw(sizes("BSHDF", 6))
    C, seed, mask = H * D, draw(seeds), draw(masks((B, H), S, S))
    kind = dict(
        activation=draw(st.sampled_from(activations)),
        norm_first=draw(st.booleans()),
        eps=draw(st.sampled_from(eps)),
    )

    def make(dtype):
        rng = np.random.default_rng(seed)
        return randomise(EncoderLayer(C, H, F, **kind, rng=rng, dtype=dtype), seed)

    return Example(
        make,
        lambda: torchformer.EncoderLayer(C, H, F, **kind),
        (draw(layouts(random_like((B, S, C), np.float64, seed))),),
        {"mask": mask},
        n_summed=13 * C + F + S + B * S,
    )


@st.composite
def encoders(draw, activations=SMOOTH):
    B, S, H, D, F = draw(sizes("BSHDF", 6))
    C, seed, mask = H * D, draw(seeds), draw(masks((B, H), S, S))
    n_layers, final_norm = draw(st.integers(1, 3)), draw(st.booleans())
    kind = dict(
        activation=draw(st.sampled_from(activations)), norm_first=draw(st.booleans()), eps=1e-2
    )

    def make(dtype):
        rng = np.random.default_rng(seed)
        layers = [EncoderLayer(C, H, F, **kind, rng=rng, dtype=dtype) for _ in range(n_layers)]
        return randomise(
            Encoder(layers, LayerNorm(C, 1e-2, dtype=dtype) if final_norm else None), seed
        )

    def make_twin():
        layers = [torchformer.EncoderLayer(C, H, F, **kind) for _ in range(n_layers)]
        return torchformer.Encoder(layers, torch.nn.LayerNorm(C, 1e-2) if final_norm else None)

    return Example(
        make,
        make_twin,
        (draw(layouts(random_like((B, S, C), np.float64, seed))),),
        {"mask": mask},
        n_summed=n_layers * (13 * C + F + S + B * S),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(example=encoder_layers() | encoders())
def test_contract(example, dtype):
    check_contract(example, dtype)


@given(encoder_layers() | encoders())
def test_gradient_is_the_derivative(example):
    check_gradient(example)


@given(encoder_layers(["relu", *SMOOTH]) | encoders(["relu", *SMOOTH]))
def test_agrees_with_the_twin(example):
    check_twin(example)


@given(encoder_layers(eps=[1e-2]) | encoders())
def test_float32_is_as_exact_as_the_twin(example):
    """With a large eps: 1/sqrt(eps) is by how much a LayerNorm may magnify a rounding."""
    check_peer(example)


# --- Where the norms stand --------------------------------------------------------------------


def layer_with_silent_sublayers(norm_first):
    """Both sublayers return 0, so that only the residual and the norms are left."""
    rng = np.random.default_rng(0)
    layer = EncoderLayer(6, 2, 8, norm_first=norm_first, rng=rng, dtype=np.float64)
    for linear in (layer.self_attn.out_proj, layer.feed_forward.linear2):
        linear.weight.data[...] = 0
    return layer


def test_pre_norm_never_touches_the_residual_stream():
    x = random_like((2, 3, 6), np.float64, 0)
    y, backward = layer_with_silent_sublayers(norm_first=True)(x)
    np.testing.assert_array_equal(y, x)
    dy = random_like(y.shape, np.float64, 1)
    np.testing.assert_array_equal(backward(dy), dy)  # around the norms, not through them


def test_post_norm_normalises_the_residual_stream():
    x = random_like((2, 3, 6), np.float64, 0)
    layer = layer_with_silent_sublayers(norm_first=False)
    y, _ = layer(x)
    np.testing.assert_array_equal(y, layer.norm2(layer.norm1(x)[0])[0])
    assert (y != x).any()
