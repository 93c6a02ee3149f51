"""Greedy decoding: what the full forward would choose, sample by sample, in both twins."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import npformer
import torchformer
from npformer.testing.models import configs, make_model, sources
from npformer.testing.strategies import seeds
from torchformer.convert import to_torch

SOS, EOS = 1, 2
WITH_IDS = {"src_pad_id": 0, "tgt_pad_id": 0, "share_embeddings": False}


@st.composite
def models_and_sources(draw):
    """A model that answers something, and a ragged batch of sources."""
    config = draw(configs(encoder=True, **WITH_IDS))
    model = make_model(config, draw(seeds))
    return model, draw(sources(config))


def choose_without_a_cache(model, source, max_len):
    """One sample, the whole forward for each token: the definition.  And by how much it chose."""
    answer, margin = [], np.inf
    while len(answer) < max_len:
        logits = model.infer(source[None], np.array([[SOS, *answer]]))[0, -1].copy()
        logits[[0, SOS]] = -np.inf
        second, first = np.sort(logits)[-2:]
        margin = min(margin, first - second)
        if logits.argmax() == EOS:
            break
        answer.append(int(logits.argmax()))
    return answer, margin


@given(models_and_sources(), st.integers(1, 9))
def test_greedy_is_the_argmax_of_the_full_forward_for_each_sample_alone(drawn, max_len):
    model, src = drawn
    alone = [choose_without_a_cache(model, row[row != 0], max_len) for row in src]
    assume(min(margin for _, margin in alone) > 1e-9)  # a tie is decided by the last rounding
    expected = [answer for answer, _ in alone]
    assert npformer.greedy(model, src, max_len=max_len) == expected
    twin = to_torch(model).eval()
    assert torchformer.greedy(twin, torch.tensor(src), max_len=max_len) == expected


class Scripted:
    """Stands for a model: sample i says what is written for it, whatever it is asked."""

    def __init__(self, lines, library):
        self.lines, self.library, self.asked = lines, library, []
        self.encoder, self.config = True, npformer.TransformerConfig(9, 9, max_len=8)

    def start(self, src):
        return ScriptedCache(list(range(len(src))), 0)

    def step(self, tgt, cache):
        self.asked.append((cache.samples, tgt.tolist()))
        logits = np.zeros((len(tgt), 1, 9))
        logits[:, :, 0] = 9  # the pad, which is never chosen
        for row, sample in zip(logits, cache.samples, strict=True):
            row[0, self.lines[sample][cache.length]] = 5
        logits = logits if self.library == "numpy" else torch.tensor(logits)
        return logits, ScriptedCache(cache.samples, cache.length + 1)


class ScriptedCache:
    def __init__(self, samples, length):
        self.samples, self.length = samples, length

    def select(self, kept):
        return ScriptedCache([s for s, k in zip(self.samples, kept, strict=True) if k], self.length)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_each_sample_stops_on_its_own_and_is_no_longer_computed(library):
    model = Scripted([[5, EOS], [4, 3, 6, 7, 8], [EOS], [8, 4, EOS]], library)
    ids = np.ones((4, 2), int)
    answers = (
        npformer.greedy(model, ids, max_len=4)
        if library == "numpy"
        else torchformer.greedy(model, torch.tensor(ids), max_len=4)
    )
    assert answers == [[5], [4, 3, 6, 7], [], [8, 4]]
    assert model.asked == [
        ([0, 1, 2, 3], [[SOS], [SOS], [SOS], [SOS]]),
        ([0, 1, 3], [[5], [4], [8]]),
        ([1, 3], [[3], [4]]),
        ([1], [[6]]),
    ]


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_start_and_end_may_have_other_ids(library):
    model = Scripted([[5, 7], [7], [6, EOS, 3, 7]], library)
    ids = np.ones((3, 2), int)
    if library == "numpy":
        answers = npformer.greedy(model, ids, max_len=4, sos_id=4, eos_id=7)
    else:
        answers = torchformer.greedy(model, torch.tensor(ids), max_len=4, sos_id=4, eos_id=7)
    assert answers == [[5], [], [6, EOS, 3]]
    assert model.asked[0] == ([0, 1, 2], [[4], [4], [4]])


CONFIG = npformer.TransformerConfig(9, 9, d_model=8, n_heads=2, d_ff=12, max_len=6)
ALONE = npformer.TransformerConfig(9, 9, d_model=8, n_heads=2, n_encoder_layers=0, max_len=6)


@pytest.mark.parametrize(
    ("config", "ids", "max_len", "message"),
    [
        (CONFIG, [[3, 4]], 6, "max_len must be 1 to 5, got 6: the model has 6 positions"),
        (CONFIG, [[3, 4]], 0, "max_len must be 1 to 5, got 0"),
        (ALONE, [[3, 4]], 3, "the model is decoder-only"),
        (CONFIG, [3, 4], 3, r"src must be an? \w+ \(B, S\).* got shape \(2,\)"),
        (CONFIG, [[3] * 7], 3, "src has 7 positions"),
    ],
)
def test_refuses(config, ids, max_len, message):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        npformer.greedy(npformer.Transformer(config, rng), np.array(ids), max_len=max_len)
    twin = torchformer.Transformer(config, rng).eval()
    with pytest.raises(ValueError, match=message):
        torchformer.greedy(twin, torch.tensor(ids), max_len=max_len)


def test_no_samples_no_answers():
    model = npformer.Transformer(CONFIG, np.random.default_rng(0))
    assert npformer.greedy(model, np.ones((0, 3), int), max_len=4) == []
