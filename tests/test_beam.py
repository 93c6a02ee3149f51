"""Beam search: greedy with one beam, exhaustive with enough, and the same n-best in both twins."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import npformer
import torchformer
from npformer.testing.conformance import OUTPUT
from npformer.testing.models import configs, make_model, sources
from npformer.testing.strategies import seeds
from torchformer.convert import to_torch

PAD, SOS, EOS = 0, 1, 2
IDS = {"src_pad_id": PAD, "tgt_pad_id": PAD, "share_embeddings": False}
# A score sums up to 8 log p, each a logit less a log-sum.  The logits of two ways to compute them
# agree to OUTPUT of the largest, some tens; a penalty of -0.5 multiplies by up to sqrt(8).
CLOSE = 8 * 2 * 50 * 3 * OUTPUT

penalties = st.sampled_from([-0.5, 0.0, 0.6, 1.0, 2.0])


@st.composite
def models_and_sources(draw, **fixed):
    config = draw(configs(encoder=True, **IDS, **fixed))
    model = make_model(config, draw(seeds))
    for p in model.parameters():  # wider apart: answers that differ, and of several lengths
        p.data *= draw(st.sampled_from([1.0, 1.5, 2.0]))
    return model, draw(sources(config, most=3))


def log_p_of(model, source, tokens):
    """log p(tokens), from the full forward, of the tokens that may be chosen."""
    logits = model.infer(source[None], np.array([[SOS, *tokens[:-1]]]))[0].copy()  # (T, V)
    logits[:, [PAD, SOS]] = -np.inf
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return sum(log_p[t, token] for t, token in enumerate(tokens))


def every_hypothesis(model, source, max_len, penalty):
    """All that can be said in max_len tokens, best first."""
    words = range(3, model.config.tgt_vocab_size)
    found = []
    for n in range(max_len + 1):
        for tokens in itertools.product(words, repeat=n):
            chosen = [*tokens, EOS] if n < max_len else list(tokens)
            score = log_p_of(model, source, chosen) / len(chosen) ** penalty
            found.append((list(tokens), score))
    return sorted(found, key=lambda pair: -pair[1])


def tell_apart(hypotheses):
    scores = sorted(score for _, score in hypotheses)
    return all(b - a > 1e-9 for a, b in itertools.pairwise(scores))


@given(models_and_sources(), st.integers(1, 8), penalties)
def test_one_beam_is_greedy(drawn, max_len, penalty):
    model, src = drawn
    found = npformer.beam_search(model, src, max_len=max_len, num_beams=1, length_penalty=penalty)
    expected = npformer.greedy(model, src, max_len=max_len)
    assert [hypotheses[0].tokens for hypotheses in found] == expected


@settings(max_examples=20)
@given(models_and_sources(tgt_vocab_size=5, src_vocab_size=6), penalties, st.booleans())
def test_with_a_beam_for_everything_it_is_exhaustive(drawn, penalty, early):
    """Two words and an end: 1 + 2 + 4 hypotheses that end, and 8 that three tokens cut off."""
    model, src = drawn
    found = npformer.beam_search(
        model,
        src,
        max_len=3,
        num_beams=15,
        num_return_sequences=15,
        length_penalty=penalty,
        early_stopping=early,
    )
    for source, hypotheses in zip(src, found, strict=True):
        expected = every_hypothesis(model, source[source != PAD], 3, penalty)
        assume(tell_apart(expected))
        assert [h.tokens for h in hypotheses] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose(
            [h.score for h in hypotheses], [s for _, s in expected], rtol=0, atol=CLOSE
        )


@given(models_and_sources(), st.integers(1, 8), st.integers(1, 6), penalties)
def test_both_twins_find_the_same_n_best(drawn, max_len, beams, penalty):
    model, src = drawn
    options = {"max_len": max_len, "num_beams": beams, "num_return_sequences": beams}
    options["length_penalty"] = penalty
    ours = npformer.beam_search(model, src, **options)
    twin = to_torch(model).eval()
    theirs = torchformer.beam_search(twin, torch.tensor(src), **options)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose([h.score for h in a], [h.score for h in b], rtol=0, atol=CLOSE)
        if tell_apart(a):
            assert [h.tokens for h in a] == [h.tokens for h in b]


@given(models_and_sources(), st.integers(1, 8), st.integers(1, 5), penalties, st.data())
def test_stopping_early_loses_nothing(drawn, max_len, beams, penalty, data):
    model, src = drawn
    options = {"max_len": max_len, "num_beams": beams, "length_penalty": penalty}
    options["num_return_sequences"] = data.draw(st.integers(1, beams))
    early = npformer.beam_search(model, src, **options)
    assert early == npformer.beam_search(model, src, **options, early_stopping=False)


@given(models_and_sources(), st.integers(1, 6), st.integers(2, 5))
def test_a_score_is_the_probability_of_the_answer_and_answers_differ(drawn, max_len, beams):
    model, src = drawn
    found = npformer.beam_search(
        model, src, max_len=max_len, num_beams=beams, num_return_sequences=beams
    )
    for source, hypotheses in zip(src, found, strict=True):
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(h.tokens) for h in hypotheses}) == len(hypotheses)
        for tokens, score in hypotheses:
            assert not {PAD, SOS, EOS} & set(tokens)
            ended = [*tokens, EOS]
            candidates = [ended] if len(tokens) < max_len else [tokens]
            expected = [log_p_of(model, source[source != PAD], c) / len(c) for c in candidates]
            assert np.isclose(score, expected, rtol=0, atol=CLOSE).any()


@given(models_and_sources(), st.integers(1, 6), st.integers(1, 4))
def test_samples_do_not_know_of_each_other(drawn, max_len, beams):
    model, src = drawn
    options = {"max_len": max_len, "num_beams": beams, "num_return_sequences": beams}
    together = npformer.beam_search(model, src, **options)
    for i, source in enumerate(src):
        (alone,) = npformer.beam_search(model, source[None], **options)
        if tell_apart(alone):
            assert [h.tokens for h in together[i]] == [h.tokens for h in alone]


CONFIG = npformer.TransformerConfig(9, 9, d_model=8, n_heads=2, d_ff=12, max_len=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "must be 1 to num_beams = 2, got 3"),
        ({"num_return_sequences": 0}, "num_return_sequences must be 1 to num_beams = 5, got 0"),
        ({"max_len": 6}, "max_len must be 1 to 5, got 6"),
    ],
)
def test_refuses(options, message):
    rng, ids = np.random.default_rng(0), np.array([[3, 4]])
    options = {"max_len": 3} | options
    with pytest.raises(ValueError, match=message):
        npformer.beam_search(npformer.Transformer(CONFIG, rng), ids, **options)
    twin = torchformer.Transformer(CONFIG, rng).eval()
    with pytest.raises(ValueError, match=message):
        torchformer.beam_search(twin, torch.tensor(ids), **options)
