"""Greedy decoding: what the full forward would choose, sample by sample, in both twins."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import npformer
import torchformer
from npformer.testing.models import KINDS_OF_DROPOUT as DROPOUTS
from npformer.testing.models import configs, make_model, sources
from npformer.testing.strategies import seeds
from torchformer import fast
from torchformer.cache import LayerCache
from torchformer.convert import to_torch

SOS, EOS = 1, 2
WITH_IDS = {"src_pad_id": 0, "tgt_pad_id": 0, "share_embeddings": False}


@st.composite
def models_and_sources(draw):
    """A model that answers something, and a ragged batch of sources."""
    config = draw(configs(encoder=True, **WITH_IDS))
    model = make_model(config, draw(seeds))
    return model, draw(sources(config))


# Of one id or several, the pad and the start among them
ends = st.sampled_from([EOS, 0, SOS, [EOS, 5], (3, 0), np.array([4, SOS, 6]), np.int64(7), None])


def choose_without_a_cache(model, source, max_len, eos_id=EOS):
    """One sample, the whole forward for each token: the definition.  And by how much it chose."""
    answer, margin = [], np.inf
    ends = [] if eos_id is None else np.atleast_1d(eos_id)
    while len(answer) < max_len:
        logits = model.infer(source[None], np.array([[SOS, *answer]]))[0, -1].copy()
        logits[[i for i in (0, SOS) if i not in ends]] = -np.inf
        second, first = np.sort(logits)[-2:]
        margin = min(margin, first - second)
        if logits.argmax() in ends:
            break
        answer.append(int(logits.argmax()))
    return answer, margin


@given(models_and_sources(), st.integers(1, 9), ends)
def test_greedy_is_the_argmax_of_the_full_forward_for_each_sample_alone(drawn, max_len, eos_id):
    model, src = drawn
    alone = [choose_without_a_cache(model, row[row != 0], max_len, eos_id) for row in src]
    assume(min(margin for _, margin in alone) > 1e-9)  # a tie is decided by the last rounding
    expected, options = [answer for answer, _ in alone], {"max_len": max_len, "eos_id": eos_id}
    assert npformer.greedy(model, src, **options) == expected
    twin = to_torch(model).eval()
    assert torchformer.greedy(twin, torch.tensor(src), **options) == expected
    assert fast.greedy(twin, torch.tensor(src), **options) == expected


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


def decoded(how, model, library, **options):
    """The answers to four samples, by any of the ways."""
    ids = np.ones((4, 2), int) if library == "numpy" else torch.ones((4, 2), dtype=torch.long)
    if how == "sample":
        options |= {"top_k": 1}
        options["rng"] = np.random.default_rng(0) if library == "numpy" else torch.Generator()
    package = npformer if library == "numpy" else torchformer
    found = getattr(package, how)(model, ids, **options)
    return [hypotheses[0].tokens for hypotheses in found] if how == "beam_search" else found


class ScriptedCache:
    def __init__(self, samples, length):
        self.samples, self.length = samples, length

    def select(self, kept):
        kept = np.arange(len(self.samples))[np.asarray(kept)]
        return ScriptedCache([self.samples[i] for i in kept], self.length)


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


WAYS = pytest.mark.parametrize("how", ["greedy", "beam_search", "sample"])
LIBRARIES = pytest.mark.parametrize("library", ["numpy", "torch"])


@LIBRARIES
@WAYS
def test_an_end_that_is_the_start_or_the_pad_ends(how, library):
    """A head that wants 2 at once, where 2 starts as well, was made to say something else."""
    lines = [[2], [5, 2], [5, 6, 7, 3], [4, 4, 2]]
    model = Scripted(lines, library)
    options = {"max_len": 4} | ({"num_beams": 1} if how == "beam_search" else {})
    expected = [[], [5], [5, 6, 7, 3], [4, 4]]
    assert decoded(how, model, library, sos_id=2, eos_id=2, **options) == expected
    assert decoded(how, model, library, eos_id=0, **options) == [[], [], [], []]
    several = decoded(how, model, library, eos_id=[7, 2, 3], **options)
    assert several == [[], [5], [5, 6], [4, 4]]


@LIBRARIES
@WAYS
@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")]
)
def test_logits_that_are_no_numbers_are_an_error_that_says_where(how, library, value, said):
    """[] by greedy, pads by NumPy's sample, another error by torch's: now one error."""

    class Poisoned(Scripted):
        def step(self, tgt, cache):
            logits, after = super().step(tgt, cache)
            if cache.length == 2:
                rows = [s == 3 for s in cache.samples]
                logits[rows, 0, 4 if value != -np.inf else slice(None)] = value
            return logits, after

    model = Poisoned([4 * [EOS], [5, 6, 7, 8], 4 * [EOS], [5, 6, 7, 8]], library)
    with pytest.raises(
        ValueError, match=f"^the logits are {said} at token 3 of sample 3: a weight"
    ):
        decoded(how, model, library, max_len=4)


def fast_greedy(twin, src, **options):
    return fast.greedy(twin, src, compiled=False, **options)


def drawn_sample(model, src, **options):
    is_ours = isinstance(model, npformer.Transformer)
    rng: Any = np.random.default_rng(0) if is_ours else torch.Generator()
    return (npformer if is_ours else torchformer).sample(model, src, rng=rng, **options)


POISON = {  # the tensor, what is written into it, and what its logits are
    "NaN in the head": ("head.weight", (3, 0), np.nan, "NaN"),
    "NaN in an embedding": ("tgt_embedding.weight", 1, np.nan, "NaN"),
    "NaN in the encoder": ("encoder.layers.0.norm1.weight", 0, np.nan, "NaN"),
    "NaN in a key": ("decoder.layers.0.cross_attn.k_proj.weight", 0, np.nan, "NaN"),
    "infinity in the head": ("head.bias", 4, np.inf, "infinite"),
    "nothing but -infinity": ("head.bias", slice(None), -np.inf, "infinite"),
    "a sum that overflows": ("head.weight", slice(None), 3e38, "(NaN|infinite)"),
}


@pytest.mark.parametrize("what", POISON)
def test_weights_that_are_no_numbers_are_one_error_everywhere(what):
    name, where, value, said = POISON[what]
    model = npformer.Transformer(CONFIG, np.random.default_rng(0))
    dict(model.named_parameters())[name].data[where] = value
    twin, src = to_torch(model), np.array([[3, 4], [5, 0]])
    message = f"^the logits are {said} at token 1 of sample 0: a weight of the model"
    for decode in (npformer.greedy, npformer.beam_search, drawn_sample):
        with np.errstate(all="ignore"), pytest.raises(ValueError, match=message):
            decode(model, src, max_len=4)
    for decode in (torchformer.greedy, torchformer.beam_search, drawn_sample, fast_greedy):
        with pytest.raises(ValueError, match=message):
            decode(twin, torch.tensor(src), max_len=4)


def test_fast_says_where_as_well():
    """The third token is the first that reads position 2."""
    model: Any = make_model(replace(CONFIG, positions="learned", max_len=9), 3)
    model.tgt_positions.weight.data[2] = np.nan
    src = np.array([[3, 4], [5, 6]])
    for decode, of in ((npformer.greedy, np.array), (fast_greedy, torch.tensor)):
        with pytest.raises(ValueError, match=r"^the logits are NaN at token 3 of sample 0"):
            decode(model if of is np.array else to_torch(model), of(src), max_len=6, eos_id=None)


@pytest.mark.parametrize("training", [True, False])
def test_decoding_does_not_drop_out_and_leaves_each_module_in_its_mode(training):
    """Three calls in training gave three answers."""
    config = replace(CONFIG, **dict.fromkeys(DROPOUTS, 0.5))
    model = make_model(config, 3)
    twin, src = to_torch(model).train(training), torch.tensor([[3, 4, 5], [6, 7, 0]])
    twin.decoder.layers[0].feed_forward.train(not training)  # a part on its own
    twin.encoder.layers[0].self_attn.train(not training)
    modes = [module.training for module in twin.modules()]
    expected = npformer.greedy(model, src.numpy(), max_len=5)
    logits = torch.from_numpy(model.infer(src.numpy(), np.array([[1, 3], [1, 4]])))
    tgt = torch.tensor([[1, 3], [1, 4]])
    for _ in range(3):
        assert torchformer.greedy(twin, src, max_len=5) == expected
        assert fast.greedy(twin, src, max_len=5) == expected
        found = torchformer.beam_search(twin, src, max_len=5, num_beams=1)
        assert [hypotheses[0].tokens for hypotheses in found] == expected
        generator = torch.Generator()
        assert torchformer.sample(twin, src, max_len=5, rng=generator, top_k=1) == expected
        torch.testing.assert_close(twin.step(tgt, twin.start(src))[0], logits)
        torch.testing.assert_close(twin.infer(src, tgt), logits)
        assert [module.training for module in twin.modules()] == modes
    for call in (
        lambda: twin.infer(src, tgt[0]),
        lambda: twin.start(src[0]),
        lambda: torchformer.greedy(twin, src * 99, max_len=5),
    ):
        with pytest.raises((ValueError, IndexError)):
            call()
        assert [module.training for module in twin.modules()] == modes


def test_a_layers_own_step_does_not_drop_out_in_training():
    layer = torchformer.DecoderLayer(8, 2, 12, activation_dropout=0.9, sublayer_dropout=0.9)
    x, memory = torch.randn(2, 1, 8), torch.randn(2, 3, 8)
    once, again = (layer.train(on).step(x, layer.start(memory))[0] for on in (True, False))
    assert torch.equal(once, again)
    alone = torchformer.EncoderLayer(8, 2, 12, activation_dropout=0.9, sublayer_dropout=0.9)
    once, again = (alone.train(on).step(x, LayerCache(None, None))[0] for on in (True, False))
    assert torch.equal(once, again)


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
    twin, none = to_torch(model), np.ones((0, 3), int)
    for decode in (npformer.greedy, npformer.beam_search, drawn_sample):
        assert decode(model, none, max_len=4) == []
    for decode in (torchformer.greedy, torchformer.beam_search, drawn_sample, fast_greedy):
        assert decode(twin, torch.tensor(none), max_len=4) == []
