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
from npformer import compare
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
        found = fast.Product(*parts, packed=True)(x)
        expected = torch.cat([part(x) for part in parts], dim=-1)
        # Each a sum of 25 terms: off by as many roundings of their sizes at most
        sizes = torch.cat([x.abs() @ p.weight.abs().T + p.bias.abs() for p in parts], dim=-1)
        off = (found - expected).abs() / sizes
        assert found.shape == expected.shape
        assert float(off.max()) <= 2 * 25 * torch.finfo(torch.float32).eps
        table = torch.nn.Embedding(5, 24)
        off = fast.Product(table, packed=True)(x) - x @ table.weight.T
        assert float(off.abs().max()) <= 2 * 24 * 24 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("pays", [True, False])
def test_with_packed_weights_and_without_it_chooses_the_same_tokens(pays, monkeypatch):
    twin = to_torch(make_model(replace(CONFIG, max_len=20), 4)).float().eval()
    src = torch.tensor([[3, 4, 5], [6, 7, 0]])
    seen, static = [], fast.StaticDecoder
    monkeypatch.setattr(fast, "packing_pays", lambda *_: pays)
    monkeypatch.setattr(fast, "StaticDecoder", lambda *a: seen.append(a[-1]) or static(*a))
    assert fast.greedy(twin, src, max_len=19) == decoding.greedy(twin, src, max_len=19)
    assert seen == [pays]


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
    assert not fast.packing_pays(twin.double(), 1)


@settings(max_examples=1)
@given(seeds)
def test_the_compiled_step_is_the_step(seed):
    """By the backend that changes nothing but the tracing: no graph break, no Python left in it."""
    twin = to_torch(make_model(CONFIG, seed % 100)).eval()
    src = torch.tensor([[3, 4, 5], [6, 7, 0]])
    with torch.no_grad():
        logits, cache = twin.step(torch.full((2, 1), 1), twin.start(src))
        decoder = fast.StaticDecoder(twin, 2, 5, 3, [0, 1])
        decoder.fill(cache, is_fixed=True)
        token = decoder.choose(logits[:, -1], decoder.position - 1)
        traced = torch.compile(decoder.step, fullgraph=True, backend="eager", dynamic=False)
        again = traced(token, decoder.position, None)
        assert torch.equal(decoder.step(token, decoder.position, None), again)
        n_seen = int(decoder.position) + 1
        assert torch.equal(decoder.step(token, decoder.position, n_seen), again)


class Replayed:
    """What a CUDA graph is, on the CPU: the same work, at the same places, whatever is there."""

    def __init__(self, call):
        self.replay = call


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are recorded."""
    made = []

    def record(call, stream):
        made.append(Replayed(call))
        return made[-1], None

    monkeypatch.setattr(fast, "record", record)
    return made


def test_a_recorded_step_decodes_the_same_tokens_batch_after_batch(graphs):
    """With pads in the sources, and without; shorter ones; weights that change."""
    twin = to_torch(make_model(replace(CONFIG, max_len=40), 5)).eval()
    options = {"src_len": 4, "never": [0], "compiled": False, "recorded": True}
    decoder = fast.FastDecoder(twin, 2, 39, **options)
    assert decoder.recording_seconds > 0
    chosen = set()
    for src, prompt in [
        ([[3, 4, 5], [6, 7, 0]], [[1], [1]]),
        ([[3, 4, 5, 6], [6, 7, 3, 4]], [[1, 5, 3], [1, 6, 4]]),
        ([[8], [5]], [[1, 5], [1, 4]]),
    ]:
        src, prompt = torch.tensor(src), torch.tensor(prompt)
        expected = fast.continued(twin, prompt, 36, src=src, compiled=False)
        assert torch.equal(decoder.continued(prompt, 36, src), expected)
        first = decoder.prefill(prompt, src)
        assert torch.equal(first, expected[:, 0])
        parts = [decoder.decode(n) for n in (5, 1, 29)]
        assert torch.equal(torch.cat(parts, dim=1), expected[:, 1:])
        chosen |= set(expected.flatten().tolist())
        twin.load_state_dict(to_torch(make_model(twin.config, len(chosen))).state_dict())
        decoder.read_weights()
    assert len(chosen) > 3  # not one token for ever
    assert len(graphs) == 1


def test_a_step_that_is_recorded_reads_a_room_of_whole_blocks(graphs):
    twin = to_torch(make_model(replace(CONFIG, max_len=100), 5)).eval()
    for room, aligned in ((1, 64), (64, 64), (65, 128), (100, 128)):
        decoder = fast.FastDecoder(twin, 1, room, src_len=1, compiled=False, recorded=True)
        assert {layer.keys.shape[2] for layer in decoder.decoder.layers} == {aligned}
        assert decoder.decoder.known.shape[-1] == aligned


def test_a_decoder_that_is_kept_refuses_what_it_has_no_room_for():
    twin = to_torch(make_model(CONFIG, 0)).eval()
    with pytest.raises(ValueError, match=r"room must be 1 to 6 positions \(max_len\), got 7"):
        fast.FastDecoder(twin, 1, 7)
    decoder = fast.FastDecoder(twin, 2, 4, src_len=2)
    src, prompt = torch.tensor([[3], [4]]), torch.tensor([[1], [1]])
    with pytest.raises(ValueError, match=r"src has 3 positions, at most 2 \(src_len\)"):
        decoder.prefill(prompt, torch.tensor([[3, 4, 5], [3, 4, 5]]))
    with pytest.raises(ValueError, match=r"prompt must be \(2, 1 to 4\): .*; got \(3, 1\)"):
        decoder.prefill(torch.ones(3, 1, dtype=torch.int64), src)
    with pytest.raises(ValueError, match=r"prompt must be \(2, 1 to 4\): .*; got \(2, 5\)"):
        decoder.prefill(torch.ones(2, 5, dtype=torch.int64), src)
    decoder.prefill(prompt, src)
    assert decoder.decode(2).shape == (2, 2)
    with pytest.raises(ValueError, match="2 tokens more than 3 do not fit into the room of 4"):
        decoder.decode(2)
    assert decoder.decode(1).shape == (2, 1)


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


def assert_chooses_what_the_model_does(device, dtype, compiled):
    """With pads in sources and prompts, and without.

    In half precision a close call may go either way: by what the eager model makes of the same
    tokens, each must be as likely as the likeliest one, but for roundings.
    """
    twin = to_torch(make_model(replace(CONFIG, max_len=40), 5)).to(dtype).eval().to(device)
    decoder = fast.FastDecoder(twin, 2, 24, src_len=5, never=[0, 1], compiled=compiled)
    assert (decoder.replay is not None) == (device == "cuda")
    precision = str(dtype).removeprefix("torch.")
    off = compare.roundings_of_a_step(twin.config, 24, precision) * compare.eps(precision)
    for S in (3, 4, 5):
        rng = np.random.default_rng(S)
        src, prompt = (torch.tensor(ids, device=device) for ids in rng.integers(3, 9, (2, 2, S)))
        if S > 3:
            src[1, 2:] = 0
            prompt[0, 1] = 0
        first = decoder.prefill(prompt, src)  # `continued` refuses pads
        tokens = torch.cat([first[:, None], decoder.decode(19)], dim=1)
        read = torch.cat([prompt, tokens], dim=1)
        logits = twin.infer(src, read[:, :-1])[:, S - 1 :].float()  # (2, 20, V)
        logits[..., :2] = -torch.inf
        best, chosen = logits.amax(dim=-1), logits.gather(-1, tokens[..., None])[..., 0]
        assert float((best - chosen).max()) <= off * float(best.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_any_precision_it_chooses_what_the_model_does(dtype):
    assert_chooses_what_the_model_does("cpu", dtype, compiled=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # Inductor's import
@pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled")  # of rows of this length
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # which are not wanted here
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_a_token_chooses_what_the_model_does(dtype, compiled):
    assert_chooses_what_the_model_does("cuda", dtype, compiled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_one_graph_a_token_decodes_the_same_tokens():
    twin = to_torch(make_model(replace(CONFIG, max_len=20), 5)).eval().cuda()  # in float64
    for S in (3, 4, 5):
        src = torch.tensor(np.random.default_rng(S).integers(3, 9, (2, S))).cuda()
        expected = decoding.greedy(twin, src, max_len=19)
        assert fast.greedy(twin, src, max_len=19, compiled=False) == expected


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
    twin, ids = to_torch(make_model(ALONE, 0)).eval(), torch.tensor(prompt)
    with pytest.raises(ValueError, match=r"prompt has pads, .* continue those of one length"):
        fast.continued(twin, ids, 3)
    with pytest.raises(ValueError, match=r"prompt has pads, .* continue those of one length"):
        fast.FastDecoder(twin, len(ids), 6).continued(ids, 3)


def test_a_start_that_is_the_pad_is_no_padding():
    model = make_model(CONFIG, 0)
    twin, src = to_torch(model).eval(), np.array([[3, 4], [5, 0]])
    expected = npformer.greedy(model, src, max_len=5, sos_id=0)
    assert fast.greedy(twin, torch.tensor(src), max_len=5, sos_id=0) == expected
    assert decoding.greedy(twin, torch.tensor(src), max_len=5, sos_id=0) == expected


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


@pytest.mark.parametrize(
    "never", [np.array([5, 6]), torch.tensor([5, 6]), {5, 6}, (5, 6), range(5, 7), iter([5, 6])]
)
def test_never_is_any_collection_of_ids(never):
    """Of an array Python asked whether it is true."""
    twin = to_torch(make_model(replace(CONFIG, n_encoder_layers=0), 0)).eval()
    prompt = torch.tensor([[1, 3]])
    expected = fast.continued(twin, prompt, 3, never=[5, 6])
    assert torch.equal(fast.continued(twin, prompt, 3, never=never), expected)


def test_a_decoder_that_is_kept_refuses_ids_that_there_are_not():
    """-1 forbade the last token, and as an end it ended nothing."""
    twin = to_torch(make_model(replace(CONFIG, n_encoder_layers=0), 0)).eval()
    for never in ([-1], [9], [1.0]):
        with pytest.raises(ValueError, match=r"^never must be "):
            fast.FastDecoder(twin, 1, 5, never=never)
    with pytest.raises(ValueError, match=r"^none of the 9 tokens may be chosen"):
        fast.FastDecoder(twin, 1, 5, never=range(9))
    decoder = fast.FastDecoder(twin, 1, 5, never=(i for i in (0, 1)))
    decoder.prefill(torch.tensor([[1, 3]]))
    for message, options in (
        ("^ends must be ", {"ends": [-1]}),
        ("^ends must be ", {"ends": [9]}),
        ("^n_tokens must be at least 0, got -1$", {"n_tokens": -1}),
        ("^look_every must be at least 1, got 0$", {"ends": [2], "look_every": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.decode(**{"n_tokens": 2} | options)
    ended = decoder.decode(2, ends=np.arange(9), look_every=1)  # whatever was first is an end
    assert (ended == 0).all()


def test_refuses():
    twin = to_torch(make_model(CONFIG, 0)).eval()
    with pytest.raises(ValueError, match="max_len must be 1 to 5, got 6"):
        fast.greedy(twin, torch.tensor([[3]]), max_len=6)
    with pytest.raises(ValueError, match="max_len must be 1 to 5, got 6"):
        fast.continued(twin, torch.tensor([[1, 3, 4]]), 4, src=torch.tensor([[3]]))
