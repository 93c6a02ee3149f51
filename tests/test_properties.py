"""What must be true of any Transformer, without an oracle: who may change what, and who may not.

Those of the whole model (causality, pads on the right, samples apart, micro-batches) stand in
test_transformer.py, those of a single layer beside its other tests.
"""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import npformer
from npformer import ops
from npformer.attention import MultiHeadAttention
from npformer.decoder import DecoderLayer
from npformer.encoder import Encoder, EncoderLayer
from npformer.masks import causal_mask, padding_mask
from npformer.testing.conformance import GRADIENT, OUTPUT, randomise
from npformer.testing.models import batches, configs, make_model, numpy_step
from npformer.testing.strategies import leading_axes, seeds, sizes

EPS = float(np.finfo(np.float64).eps)
ROUNDING = 1e-12  # of numbers near 1: thousands of roundings


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def close(actual, expected, tolerance=ROUNDING):
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


# --- Softmax ----------------------------------------------------------------------------------


@given(leading_axes(), st.integers(1, 7), st.floats(-50, 50), seeds)
def test_softmax_sums_to_one_and_does_not_see_a_shift(leading, S, shift, seed):
    x, dy = normal(seed, *leading, S), normal(seed + 1, *leading, S)
    y, backward = ops.softmax(x)
    close(y.sum(axis=-1), np.ones(leading))
    shifted, backward_shifted = ops.softmax(x + shift)
    close(shifted, y)
    close(backward_shifted(dy), backward(dy))
    close(backward(dy).sum(axis=-1), np.zeros(leading))  # a shift has no effect: no gradient


@given(st.integers(2, 7), seeds)
def test_softmax_with_a_mask_is_softmax_of_what_is_left(S, seed):
    x, dy = normal(seed, S), normal(seed + 1, S)
    mask = np.random.default_rng(seed).random(S) < 0.5
    assume(mask.any())
    y, backward = ops.softmax(x, mask)
    left, backward_left = ops.softmax(x[mask])
    close(y[mask], left)
    close(backward(dy)[mask], backward_left(dy[mask]))
    assert not y[~mask].any()
    assert not backward(dy)[~mask].any()


@given(leading_axes(), st.integers(1, 7), st.floats(-50, 50), seeds)
def test_log_softmax_is_the_logarithm_and_does_not_see_a_shift(leading, S, shift, seed):
    x = normal(seed, *leading, S)
    y, _ = ops.log_softmax(x)
    close(np.exp(y), ops.softmax(x)[0])
    close(ops.log_softmax(x + shift)[0], y)


# --- LayerNorm --------------------------------------------------------------------------------


@given(leading_axes(), st.integers(3, 8), st.floats(-30, 30), st.floats(0.1, 30), seeds)
def test_layer_norm_does_not_see_shift_and_scale(leading, C, shift, scale, seed):
    x, weight, bias = normal(seed, *leading, C), normal(seed + 1, C), normal(seed + 2, C)
    assume((x.std(axis=-1) > 0.1).all())
    dy = normal(seed + 3, *leading, C)
    y, backward = ops.layer_norm(x, weight, bias, eps=0.0)
    again, backward_again = ops.layer_norm(scale * x + shift, weight, bias, eps=0.0)
    # Rounding the shifted x is off by eps of its size, of which std is what counts; then 16 C more
    size = np.abs(x).max() + abs(shift) / scale
    tolerance = 16 * C * EPS * size / x.std(axis=-1).min()
    close(again, y, tolerance)
    dx, dweight, dbias = backward(dy)
    close(backward_again(dy)[0] * scale, dx, tolerance)
    # So along these two directions there is no gradient
    close(dx.sum(axis=-1) / np.abs(dx).max(), np.zeros(leading), tolerance)
    close((dx * x).sum(axis=-1) / np.abs(dx).max(), np.zeros(leading), tolerance)
    xhat, _ = ops.layer_norm(x, np.ones(C), np.zeros(C), eps=0.0)
    close(xhat.mean(axis=-1), np.zeros(leading), tolerance)
    close((xhat**2).mean(axis=-1), np.ones(leading), tolerance)
    assert dweight.shape == dbias.shape == (C,)


@given(st.integers(2, 8), seeds)
def test_layer_norm_treats_every_row_and_permutes_with_the_features(C, seed):
    x, weight, bias = normal(seed, 4, C), normal(seed + 1, C), normal(seed + 2, C)
    order = np.random.default_rng(seed).permutation(C)
    y, _ = ops.layer_norm(x, weight, bias)
    # A row of features that are all alike is magnified by up to 1 / sqrt(eps)
    tolerance = 16 * C * EPS * np.abs(x).max() / 1e-5**0.5
    close(ops.layer_norm(x[:, order], weight[order], bias[order])[0], y[:, order], tolerance)
    for row, expected in zip(x, y, strict=True):
        close(ops.layer_norm(row, weight, bias)[0], expected, tolerance)


# --- Attention --------------------------------------------------------------------------------


@given(sizes("BTSDE"), seeds)
def test_attention_does_not_know_the_order_of_keys(drawn, seed):
    B, T, S, D, E = drawn
    q, k = normal(seed, B, T, D), normal(seed + 1, B, S, D)
    v, dy = normal(seed + 2, B, S, E), normal(seed + 3, B, T, E)
    mask = np.random.default_rng(seed).random((B, T, S)) < 0.7
    order = np.random.default_rng(seed).permutation(S)
    y, backward = ops.attention(q, k, v, mask)
    again, backward_again = ops.attention(q, k[:, order], v[:, order], mask[..., order])
    close(again, y)
    (dq, dk, dv), (dq2, dk2, dv2) = backward(dy), backward_again(dy)
    close(dq2, dq)
    close(dk2, dk[:, order])
    close(dv2, dv[:, order])


@given(sizes("BTSDE"), seeds)
def test_attention_is_a_mean_of_values(drawn, seed):
    B, T, S, D, E = drawn
    q, k, v = normal(seed, B, T, D), normal(seed + 1, B, S, D), normal(seed + 2, B, S, E)
    y, _ = ops.attention(q, k, v)
    assert (y <= v.max(axis=1, keepdims=True) + ROUNDING).all()
    assert (y >= v.min(axis=1, keepdims=True) - ROUNDING).all()
    close(ops.attention(q, k, np.ones_like(v))[0], np.ones((B, T, E)))


# --- Stacks without positions -----------------------------------------------------------------


def encoder(seed, norm_first):
    rng = np.random.default_rng(seed)
    layers = [
        EncoderLayer(8, 2, 12, activation="gelu", norm_first=norm_first, rng=rng, dtype=np.float64)
        for _ in range(2)
    ]
    return randomise(Encoder(layers), seed)


@pytest.mark.parametrize("norm_first", [False, True])
@given(st.integers(1, 3), st.integers(1, 6), seeds)
def test_an_encoder_without_positions_permutes_with_its_tokens(norm_first, B, S, seed):
    x, dy, model = normal(seed, B, S, 8), normal(seed + 1, B, S, 8), encoder(seed, norm_first)
    order = np.random.default_rng(seed).permutation(S)
    y, backward = model(x)
    again, backward_again = model(x[:, order])
    close(again, y[:, order], OUTPUT)
    dx = backward(dy)
    gradients = [p.grad.copy() for p in model.parameters()]
    model.zero_grad()
    close(backward_again(dy[:, order]), dx[:, order], GRADIENT)
    for p, expected in zip(model.parameters(), gradients, strict=True):
        close(p.grad, expected, GRADIENT)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("where", ["left", "middle", "right"])
@given(st.integers(1, 5), st.integers(1, 4), seeds)
def test_an_encoder_without_positions_does_not_see_pads_anywhere(
    norm_first, where, n, n_pads, seed
):
    model, x = encoder(seed, norm_first), normal(seed, 2, n, 8)
    at = {"left": 0, "middle": n // 2, "right": n}[where]
    padded = np.insert(x, [at] * n_pads, normal(seed + 1, n_pads, 8), axis=1)
    tokens = np.insert(np.full(n, True), [at] * n_pads, False)
    y, backward = model(x)
    y_padded, backward_padded = model(padded, tokens[np.newaxis, np.newaxis, np.newaxis])
    close(y_padded[:, tokens], y, OUTPUT)
    dy = normal(seed + 2, 2, n, 8)
    dx = backward(dy)
    gradients = [p.grad.copy() for p in model.parameters()]
    model.zero_grad()
    dy_padded = np.insert(dy, [at] * n_pads, 0.0, axis=1)
    dx_padded = backward_padded(dy_padded)
    close(dx_padded[:, tokens], dx, GRADIENT)
    assert not dx_padded[:, ~tokens].any()  # exactly 0
    for p, expected in zip(model.parameters(), gradients, strict=True):
        close(p.grad, expected, GRADIENT)


@given(st.integers(2, 6), seeds, st.data())
def test_a_causal_encoder_has_no_gradient_from_earlier_to_later(S, seed, data):
    model, x = encoder(seed, True), normal(seed, 2, S, 8)
    t = data.draw(st.integers(0, S - 2))
    _, backward = model(x, causal_mask(S))
    dy = normal(seed + 1, 2, S, 8)
    dy[:, t + 1 :] = 0  # only the outputs up to t are asked
    assert not backward(dy)[:, t + 1 :].any()


@pytest.mark.parametrize("Layer", [EncoderLayer, DecoderLayer])
def test_a_layer_of_which_nothing_is_said_is_the_papers(Layer):
    """Post-norm, relu, and without a probability nothing is dropped, rng or no rng."""
    rng = np.random.default_rng(0)
    layer = randomise(Layer(8, 2, 12, rng=rng, dtype=np.float64), 0)
    said = Layer(8, 2, 12, activation="relu", norm_first=False, eps=1e-5, rng=rng, dtype=np.float64)
    said.load_state_dict(layer.state_dict())
    inputs = [normal(1, 2, 3, 8), normal(2, 2, 4, 8)][: 1 + (Layer is DecoderLayer)]
    y, _ = layer(*inputs)
    np.testing.assert_array_equal(y, said(*inputs)[0])
    np.testing.assert_array_equal(y, layer(*inputs, rng=np.random.default_rng(3))[0])
    assert layer.self_attn(*[inputs[0]] * 3, rng=rng)[0].any()
    assert MultiHeadAttention(8, 2, rng=rng).dropout == 0


@pytest.mark.parametrize("n_caches", [1, 3])
@pytest.mark.parametrize("encoder_layers", [0, 1], ids=["decoder-only", "encoder-decoder"])
def test_a_cache_is_of_as_many_layers_as_the_stack(encoder_layers, n_caches):
    sizes = {"d_model": 8, "n_heads": 2, "d_ff": 12, "n_decoder_layers": 2}
    config = npformer.TransformerConfig(9, 9, **sizes, n_encoder_layers=encoder_layers)
    model, ids = make_model(config, 0), np.array([[3, 4]])
    cache = model.start(ids if encoder_layers else None)
    cache = cache._replace(layers=(cache.layers * 2)[:n_caches])
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is (shorter|longer)"):
        model.step(ids, cache)


# --- Whole models -----------------------------------------------------------------------------


@given(st.data(), seeds)
def test_a_model_permutes_with_its_samples(data, seed):
    config = data.draw(configs())
    model, batch = make_model(config, seed), data.draw(batches(config, given_masks=False))
    order = np.random.default_rng(seed).permutation(len(batch.tgt))
    src = None if batch.src is None else batch.src[order]
    found = numpy_step(model, batch)
    again = numpy_step(model, batch._replace(src=src, tgt=batch.tgt[order]))
    close(again.pop("logits"), found.pop("logits")[order], OUTPUT)
    for name, x in found.items():
        close(again[name], x, GRADIENT)


@given(st.data(), seeds)
def test_dropout_of_nothing_is_no_dropout(data, seed):
    config = data.draw(configs())  # every probability is 0
    model, batch = make_model(config, seed), data.draw(batches(config))
    without = numpy_step(model, batch)
    for name, x in numpy_step(model, batch, rng=np.random.default_rng(seed)).items():
        np.testing.assert_array_equal(x, without[name], err_msg=name)


def test_a_source_of_nothing_but_pads_is_no_source():
    """Nobody may attend to anything of it: numbers, not NaN, and the same whatever its length."""
    config = npformer.TransformerConfig(9, 9, d_model=8, n_heads=2, d_ff=12, max_len=8)
    model = make_model(config, 0)
    tgt = np.array([[1, 3, 4]])
    short, long = (np.full((1, n), config.src_pad_id) for n in (1, 5))
    assert not padding_mask(long, config.src_pad_id).any()
    logits = model.infer(short, tgt)
    assert np.isfinite(logits).all()
    close(model.infer(long, tgt), logits)
