"""Sampling: the probabilities of a plain reference, drawn as often as they say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import npformer
import torchformer
from npformer import decoding
from npformer.testing.models import configs, make_model, sources
from npformer.testing.strategies import seeds
from torchformer import decoding as torch_decoding
from torchformer.convert import to_torch

IDS = {"src_pad_id": 0, "tgt_pad_id": 0, "share_embeddings": False}
CONFIG = npformer.TransformerConfig(9, 9, d_model=8, n_heads=2, d_ff=12, max_len=6)


def plain(logits, temperature, top_k, top_p):
    """One row, token by token, as one would explain it."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    by_likelihood = sorted(range(len(p)), key=lambda token: (-logits[token], token))
    if top_k:
        p[by_likelihood[top_k:]] = 0
    p /= p.sum()
    reached = 0.0
    for token in by_likelihood:
        if reached >= top_p:
            p[token] = 0
        reached += p[token]
    return p / p.sum()


@given(
    st.integers(1, 4),
    st.integers(2, 9),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.integers(0, 10),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    seeds,
)
def test_probabilities_are_those_of_the_plain_definition(B, V, temperature, k, p, seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((B, V)) * 3
    logits[:, 0] = -np.inf  # as the pad has it
    ours = decoding.probabilities(logits, temperature, k, p)
    expected = [plain(row, temperature, k, p) for row in logits]
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    theirs = torch_decoding.probabilities(torch.tensor(logits), temperature, k, p)
    np.testing.assert_allclose(theirs.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_tokens_come_as_often_as_their_probability_says(library):
    model = make_model(CONFIG, 3)
    src = np.tile([[3, 4, 5]], (4000, 1))
    logits = model.infer(src[:1], np.array([[1]]))[0, -1].copy()
    logits[[0, 1]] = -np.inf
    expected = plain(logits, 1.5, 5, 0.95)
    options = {"max_len": 1, "temperature": 1.5, "top_k": 5, "top_p": 0.95}
    if library == "numpy":
        answers = npformer.sample(model, src, rng=np.random.default_rng(0), **options)
    else:
        generator = torch.Generator().manual_seed(0)
        twin = to_torch(model).eval()
        answers = torchformer.sample(twin, torch.tensor(src), rng=generator, **options)
    counts = np.bincount([a[0] if a else 2 for a in answers], minlength=9)
    deviation = np.sqrt(len(src) * expected * (1 - expected))
    assert (abs(counts - len(src) * expected) <= 4 * deviation).all()
    assert (expected > 0).sum() > 2


likeliest_alone = st.sampled_from([{"top_k": 1}, {"temperature": 1e-29}, {"top_p": 1e-9}])


@given(st.data(), likeliest_alone, st.sampled_from([2, 0, 1, [2, 4], None]), seeds)
def test_the_one_most_likely_token_is_greedy(data, likeliest, eos_id, seed):
    config = data.draw(configs(encoder=True, **IDS))
    model, src = make_model(config, seed), data.draw(sources(config))
    options = {"max_len": 6, "eos_id": eos_id}
    expected = npformer.greedy(model, src, **options)
    options |= likeliest
    assert npformer.sample(model, src, rng=np.random.default_rng(seed), **options) == expected
    twin, generator = to_torch(model).eval(), torch.Generator().manual_seed(seed)
    assert torchformer.sample(twin, torch.tensor(src), rng=generator, **options) == expected


def test_options_may_be_numpys_numbers():
    model, src = make_model(CONFIG, 3), np.tile([[3, 4, 5]], (20, 1))
    plain = {"max_len": 5, "temperature": 0.5, "top_k": 4, "top_p": 0.75, "eos_id": 2}
    scalars = {"max_len": np.int8(5), "temperature": np.float32(0.5), "top_k": np.array(4)}
    scalars |= {"top_p": np.float16(0.75), "sos_id": np.array(1), "eos_id": np.uint8(2)}
    expected = npformer.sample(model, src, rng=np.random.default_rng(0), **plain)
    assert npformer.sample(model, src, rng=np.random.default_rng(0), **scalars) == expected
    twin, ids = to_torch(model), torch.tensor(src)
    drawn = [
        torchformer.sample(twin, ids, rng=torch.Generator().manual_seed(0), **options)
        for options in (plain, scalars)
    ]
    assert drawn[0] == drawn[1]


def test_one_seed_one_answer_another_seed_another():
    model, src = make_model(CONFIG, 3), np.tile([[3, 4, 5]], (20, 1))
    draw = [
        npformer.sample(model, src, max_len=5, rng=np.random.default_rng(seed))
        for seed in (0, 0, 1)
    ]
    assert draw[0] == draw[1] != draw[2]
    assert len({tuple(answer) for answer in draw[0]}) > 5
    assert not {0, 1, 2} & {token for answer in draw[0] for token in answer}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0; for 0 there is greedy"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"max_len": 9}, "max_len must be 1 to 5"),
    ],
)
def test_refuses(options, message):
    rng, ids, options = np.random.default_rng(0), np.array([[3, 4]]), {"max_len": 3} | options
    with pytest.raises(ValueError, match=message):
        npformer.sample(npformer.Transformer(CONFIG, rng), ids, rng=rng, **options)
    twin = torchformer.Transformer(CONFIG, rng).eval()
    with pytest.raises(ValueError, match=message):
        torchformer.sample(twin, torch.tensor(ids), rng=torch.Generator(), **options)
