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

ends = st.sampled_from([EOS, PAD, SOS, [EOS, 4], None])  # of one id, of several, or none
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


@given(models_and_sources(), st.integers(1, 8), penalties, ends)
def test_one_beam_is_greedy(drawn, max_len, penalty, eos_id):
    model, src = drawn
    options = {"max_len": max_len, "eos_id": eos_id}
    found = npformer.beam_search(model, src, num_beams=1, length_penalty=penalty, **options)
    expected = npformer.greedy(model, src, **options)
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


@given(models_and_sources(), st.integers(1, 8), st.integers(1, 6), penalties, ends)
def test_both_twins_find_the_same_n_best(drawn, max_len, beams, penalty, eos_id):
    model, src = drawn
    options = {"max_len": max_len, "num_beams": beams, "num_return_sequences": beams}
    options |= {"length_penalty": penalty, "eos_id": eos_id}
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


@pytest.mark.parametrize("end", [PAD, SOS])
def test_an_end_that_is_the_pad_or_the_start_is_found_like_any_other(end):
    """The best of all that can be said in two tokens, and with more beams than there are tokens."""
    config = npformer.TransformerConfig(6, 5, 8, 2, 12, n_encoder_layers=1, n_decoder_layers=1)
    model, src = make_model(config, 1), np.array([[3, 4]])
    others, expected = [i for i in range(5) if i not in (PAD, SOS)], []
    rows = model.infer(np.repeat(src, 4, axis=0), np.array([[SOS, i] for i in (end, *others)]))
    keep = [end, *others]
    log_p = rows[:, :, keep] - np.logaddexp.reduce(rows[:, :, keep], axis=-1, keepdims=True)
    expected.append(([], log_p[0, 0, 0]))
    for i, token in enumerate(others, 1):
        expected.append(([token], (log_p[0, 0, i] + log_p[i, 1, 0]) / 2))
        for j, second in enumerate(others, 1):
            expected.append(([token, second], (log_p[0, 0, i] + log_p[i, 1, j]) / 2))
    expected.sort(key=lambda pair: -pair[1])
    options = {"max_len": 2, "num_beams": 20, "num_return_sequences": 20, "eos_id": end}
    twin = to_torch(model).eval()
    for (found,) in (
        npformer.beam_search(model, src, **options),
        torchformer.beam_search(twin, torch.tensor(src), **options),
    ):
        assert [h.tokens for h in found] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose(
            [h.score for h in found], [score for _, score in expected], rtol=0, atol=1e-12
        )


def test_options_may_be_numpys_numbers():
    """Its float32 made a score of float32, rounded to 1e-8."""
    model, src = make_model(CONFIG, 1), np.array([[3, 4]])
    plain = npformer.beam_search(model, src, max_len=4, num_beams=3, length_penalty=0.5)
    scalars = {"max_len": np.int8(4), "num_beams": np.int64(3), "length_penalty": np.float32(0.5)}
    assert npformer.beam_search(model, src, **scalars, sos_id=np.int8(1)) == plain
    twin = to_torch(model).eval()
    expected = torchformer.beam_search(
        twin, torch.tensor(src), max_len=4, num_beams=3, length_penalty=0.5
    )
    assert torchformer.beam_search(twin, torch.tensor(src), **scalars) == expected


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
