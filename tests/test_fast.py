"""The fast decoder is the one that people read: the same tokens."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import npformer
from npformer.testing.models import configs, make_model, sources
from npformer.testing.strategies import seeds
from torchformer import decoding, fast
from torchformer.convert import to_torch

IDS = {"src_pad_id": 0, "tgt_pad_id": 0, "share_embeddings": False}
CONFIG = npformer.TransformerConfig(9, 9, d_model=8, n_heads=2, d_ff=12, max_len=6)


@given(st.data(), st.integers(1, 10), st.integers(1, 4), seeds)
def test_fast_and_plain_decoding_choose_the_same_tokens(data, max_len, look_every, seed):
    config = data.draw(configs(encoder=True, **IDS))
    model, src = make_model(config, seed), torch.tensor(data.draw(sources(config)))
    for p in model.parameters():  # wider apart, so that answers differ and end
        p.data *= 1.5
    twin = to_torch(model).eval()
    expected = decoding.greedy(twin, src, max_len=max_len)
    assert fast.greedy(twin, src, max_len=max_len, look_every=look_every) == expected


@given(st.data(), st.integers(1, 5), st.integers(1, 6), seeds)
def test_a_decoder_only_model_continues_a_prompt(data, P, n_tokens, seed):
    config = data.draw(configs(encoder=False, tgt_pad_id=0, share_embeddings=False))
    twin = to_torch(make_model(config, seed)).eval()
    rng = np.random.default_rng(seed)
    prompt = torch.tensor(rng.integers(1, config.tgt_vocab_size, (3, P)))
    tokens = fast.continued(twin, prompt, n_tokens, never=[0])
    read = prompt
    for i in range(n_tokens):  # by the definition: everything again for each token
        logits = twin.infer(None, read)[:, -1].clone()
        logits[:, 0] = -torch.inf
        chosen = logits.argmax(dim=-1)
        assert torch.equal(tokens[:, i], chosen)
        read = torch.cat([read, chosen[:, None]], dim=1)


def test_a_source_of_pads_alone_is_decoded_as_plainly():
    twin = to_torch(make_model(CONFIG, 3)).eval()
    src = torch.tensor([[3, 4, 5], [0, 0, 0]])
    assert fast.greedy(twin, src, max_len=5) == decoding.greedy(twin, src, max_len=5)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_the_packed_product_is_the_product(n_rows):
    assert torch.backends.mkldnn.is_available()  # else there is nothing to see
    torch.manual_seed(0)
    parts, x = [torch.nn.Linear(24, n) for n in (24, 7)], torch.randn(n_rows, 24)
    with torch.no_grad():
        found = fast.product(*parts, packed=True)(x)
        expected = torch.cat([part(x) for part in parts], dim=-1)
        # Each a sum of 25 terms: off by as many roundings of their sizes at most
        sizes = torch.cat([x.abs() @ p.weight.abs().T + p.bias.abs() for p in parts], dim=-1)
        off = (found - expected).abs() / sizes
        assert found.shape == expected.shape
        assert float(off.max()) <= 2 * 25 * torch.finfo(torch.float32).eps
        table = torch.nn.Embedding(5, 24)
        off = fast.product(table, packed=True)(x) - x @ table.weight.T
        assert float(off.abs().max()) <= 2 * 24 * 24 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("pays", [True, False])
def test_with_packed_weights_and_without_it_chooses_the_same_tokens(pays, monkeypatch):
    twin = to_torch(make_model(replace(CONFIG, max_len=20), 4)).float().eval()
    src = torch.tensor([[3, 4, 5], [6, 7, 0]])
    seen, product = [], fast.product
    monkeypatch.setattr(fast, "packing_pays", lambda *_: pays)
    monkeypatch.setattr(
        fast, "product", lambda *a, packed: seen.append(packed) or product(*a, packed=packed)
    )
    assert fast.greedy(twin, src, max_len=19) == decoding.greedy(twin, src, max_len=19)
    assert set(seen) == {pays}


@pytest.mark.parametrize("slow", [True, False])
def test_whether_packing_pays_is_tried_once(slow, monkeypatch):
    """By the clock: whichever weights make the slower steps are not used, and not tried again."""
    twin = to_torch(make_model(replace(CONFIG, max_len=20), 4)).float().eval()
    src, steps, step = torch.tensor([[3, 4, 5]]), [], fast.StaticDecoder.step
    seconds = []  # that have passed

    def counted(decoder, *arguments):
        steps.append(decoder.packed)
        seconds.append(2.0 if decoder.packed == slow else 1.0)
        return step(decoder, *arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: sum(seconds))
    monkeypatch.setattr(fast.StaticDecoder, "step", counted)
    monkeypatch.setattr(fast, "_PAYS", {})
    for _ in range(2):
        fast.greedy(twin, src, max_len=19, eos_id=None)
    assert list(fast._PAYS.values()) == [not slow]
    assert steps == 3 * [False, True] + 36 * [not slow]
    assert not fast.packing_pays(twin.double(), twin.start(src), torch.tensor([1]))


@settings(max_examples=1)
@given(seeds)
def test_the_compiled_step_is_the_step(seed):
    """By the backend that changes nothing but the tracing: no graph break, no Python left in it."""
    twin = to_torch(make_model(CONFIG, seed % 100)).eval()
    src = torch.tensor([[3, 4, 5], [6, 7, 0]])
    with torch.no_grad():
        logits, cache = twin.step(torch.full((2, 1), 1), twin.start(src))
        decoder = fast.StaticDecoder(twin, cache, 5, [0, 1])
        token = decoder.choose(logits[:, -1], decoder.position - 1)
        traced = torch.compile(decoder.step, fullgraph=True, backend="eager", dynamic=False)
        again = traced(token, decoder.position, None)
        assert torch.equal(decoder.step(token, decoder.position, None), again)
        n_seen = int(decoder.position) + 1
        assert torch.equal(decoder.step(token, decoder.position, n_seen), again)


class Replayed:
    """What a CUDA graph is, on the CPU: the same work, at the same places, whatever is there."""

    def __init__(self, call):
        self.call, self.result = call, call()

    def replay(self):
        self.result.copy_(self.call())


def test_a_recorded_step_decodes_the_same_tokens(monkeypatch):
    def record(call):
        graph = Replayed(call)
        return graph, graph.result

    def recorded(step):
        anything = torch.tensor([8, 8])  # the tokens are there from the first call on
        return fast.Recorded(step, anything, step.__self__.position)

    twin = to_torch(make_model(replace(CONFIG, max_len=20), 6)).eval()
    src, prompt = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.full((2, 1), 1)
    expected = fast.continued(twin, prompt, 12, src=src, compiled=False)
    assert len(expected.unique()) > 2  # not one token for ever
    monkeypatch.setattr(fast, "record", record)
    monkeypatch.setattr(torch, "compile", recorded)
    assert torch.equal(fast.continued(twin, prompt, 12, src=src, compiled=True), expected)


def test_any_number_of_shapes_is_compiled_and_decoded(monkeypatch):
    """Dynamo keeps eight compiled forms of a function: one of them is for any length of source."""
    torch.compiler.reset()
    compiled, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda step, **how: compiled(step, backend=backend, **how)
    )
    twin = to_torch(make_model(replace(CONFIG, max_len=12), 5)).eval()
    for S in range(3, 13):
        src = torch.tensor(np.random.default_rng(S).integers(3, 9, (2, S)))
        expected = decoding.greedy(twin, src, max_len=4)
        assert fast.greedy(twin, src, max_len=4, compiled=True) == expected
    assert 1 < len(graphs) < 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_one_graph_a_token_decodes_the_same_tokens():
    twin = to_torch(make_model(replace(CONFIG, max_len=20), 5)).eval().cuda()
    for S in (3, 4, 5):
        src = torch.tensor(np.random.default_rng(S).integers(3, 9, (2, S))).cuda()
        assert fast.greedy(twin, src, max_len=19) == decoding.greedy(twin, src, max_len=19)


def test_an_empty_batch_has_no_answers():
    twin, none = to_torch(make_model(CONFIG, 0)).eval(), torch.ones((0, 3), dtype=torch.long)
    assert fast.greedy(twin, none, max_len=4) == []
    assert fast.continued(twin, none, 3, src=none).shape == (0, 3)


ALONE = replace(CONFIG, n_encoder_layers=0, max_len=9)


@pytest.mark.parametrize(
    "prompt", [[[1, 3, 4], [1, 5, 0]], [[1, 3, 4], [0, 1, 5]], [[0, 0, 4]], [[1, 0, 4]]]
)
def test_prompts_of_different_lengths_are_refused(prompt):
    """On either side: the next token came after the pads, and the positions counted them."""
    twin = to_torch(make_model(ALONE, 0)).eval()
    with pytest.raises(ValueError, match=r"prompt has pads .* continue those of one length"):
        fast.continued(twin, torch.tensor(prompt), 3)


def test_a_pad_that_is_chosen_would_not_be_attended_to_so_none_is():
    model: Any = make_model(ALONE, 0)
    model.head.bias.data[0] = 100
    twin = to_torch(model).eval()
    assert not (fast.continued(twin, torch.tensor([[1, 3]]), 5) == 0).any()
    assert (fast.continued(twin, torch.tensor([[1, 3]]), 5, eos_id=[5, 0])[0, 0] == 0).all()


@pytest.mark.parametrize("ends", [6, [5, 6], (6, 5), [5, 0], [1], 0])
def test_one_end_or_several(ends):
    """Each of them ends an answer, the pad and the start among them, and no other token does."""
    model: Any = make_model(replace(CONFIG, max_len=12, positions="learned"), 0)
    for table in (model.src_positions, model.tgt_positions):  # so that one token follows another
        table.weight.data *= 2
    twin = to_torch(model).eval()
    src = torch.tensor(np.random.default_rng(0).integers(3, 9, (12, 4)))
    options = {"max_len": 10, "eos_id": ends}
    answers = fast.greedy(twin, src, **options)
    assert answers == decoding.greedy(twin, src, **options)
    assert answers == npformer.greedy(model, src.numpy(), **options)
    lengths = [len(answer) for answer in answers]
    assert len({*lengths}) > 1  # some end, and not all at once
    assert not {token for answer in answers for token in answer} & {*np.atleast_1d(ends)}


def test_refuses():
    twin = to_torch(make_model(CONFIG, 0)).eval()
    with pytest.raises(ValueError, match="max_len must be 1 to 5, got 6"):
        fast.greedy(twin, torch.tensor([[3]]), max_len=6)
    with pytest.raises(ValueError, match="max_len must be 1 to 5, got 6"):
        fast.continued(twin, torch.tensor([[1, 3, 4]]), 4, src=torch.tensor([[3]]))
