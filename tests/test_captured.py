"""A step that is captured is the step: the same losses and weights, bucket by bucket.

On the CPU a stand-in plays the graph: it does the same work at the same places, whatever is there.
Where there is a card, its own graphs are tried as well.
"""

import numpy as np
import pytest
import torch

import torchformer.training
from npformer import cli, presets, tasks
from npformer.tasks import PAD, Batch
from npformer.training import Recipe
from torchformer import captured, fast

SIZES = {"d_model": 16, "n_heads": 2, "d_ff": 24, "n_encoder_layers": 1, "n_decoder_layers": 2}
RATE = 2.0**-9  # is the same as a tensor in float32


class Replayed:
    """What a CUDA graph is: nothing is computed when it is recorded, all of it by each replay."""

    def __init__(self, call):
        self.call = call

    def replay(self):
        self.call()

    def pool(self):
        return "the pool"


@pytest.fixture
def recorded(monkeypatch):
    """How many graphs there are, and in which pools they were recorded."""
    pools = []

    def record(call, stream=None, pool=None):
        pools.append(pool)
        return Replayed(call), None

    monkeypatch.setattr(captured, "record", record)
    monkeypatch.setattr(fast, "record", lambda call, stream: (Replayed(call), None))
    monkeypatch.setattr(torchformer.training, "check_captured", lambda given, device: bool(given))
    return pools


TASK = tasks.load("sort")


def trainer_of(is_captured, dropout=0.0, dtype=torch.float32, device="cpu"):
    settings = {"model": SIZES | dict.fromkeys(presets.NO_DROPOUT, dropout) | {"max_len": 26}}
    config, _ = presets.build(TASK, settings | {"recipe": {}})
    # Adam's eps: else a gradient that is noise alone (of a key's bias) makes a step like any other
    recipe = Recipe(batch_size=8, label_smoothing=0.1, eps=1e-2)
    trainer = torchformer.training.Trainer(config, recipe, 3, device, captured=is_captured)
    trainer.model.to(dtype)
    return trainer


def ragged(step):
    """Of some lengths, with pads and without, now and then a row or two short of a full batch."""
    rng = np.random.default_rng(step)
    B, T = 8 - step % 3, 1 + 5 * step % 24
    S = 1 + 7 * step % 26 if step % 2 else 4 * (1 + step % 5)  # a multiple of 4 stays full
    src, tgt = rng.integers(3, 13, (B, S)), rng.integers(3, 13, (B, T + 1))
    if step % 2:
        src[1, S // 2 + 1 :] = PAD
    tgt[2, T // 2 + 2 :] = PAD
    return Batch(src, tgt)


PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@PRECISIONS
def test_captured_steps_are_the_steps(dtype, recorded):
    # A padded row or column adds zeros to a sum, which may then be added up in another order
    captured = assert_captured_steps_are_the_steps(dtype, "cpu", 64 * torch.finfo(dtype).eps)
    shapes = captured.inputs.keys()
    assert captured.graphs.keys() == shapes  # each has been here twice
    assert {shape.is_full for shape in shapes} == {True, False}
    assert 5 < len(shapes) < 15
    assert recorded == [None] + ["the pool"] * (len(shapes) - 1)  # one pool for all


@CARD
@PRECISIONS
def test_captured_steps_are_the_steps_on_a_card(dtype):
    # There every shape has kernels of its own, and a table's gradient is added up in any order
    captured = assert_captured_steps_are_the_steps(dtype, "cuda", 1024 * torch.finfo(dtype).eps)
    assert captured.graphs.keys() == captured.inputs.keys()
    assert all(isinstance(graph, torch.cuda.CUDAGraph) for graph in captured.graphs.values())


def assert_captured_steps_are_the_steps(dtype, device, off):
    plain, ours = (
        trainer_of(is_captured, dtype=dtype, device=device) for is_captured in (False, True)
    )
    for step in [*range(1, 16), *range(1, 16)]:  # on a card each loss is that of the step before
        batch = ragged(step)
        assert ours.step(batch, RATE) == pytest.approx(plain.step(batch, RATE), rel=off), step
    scale = max(float(x.abs().max()) for x in plain.model.state_dict().values())
    for name, x in plain.model.state_dict().items():
        assert float((ours.model.state_dict()[name] - x).abs().max()) <= off * scale, name
    assert ours.captured is not None
    return ours.captured


@CARD
def test_each_replay_of_a_captured_step_drops_other_entries():
    trainer, batch = trainer_of(True, dropout=0.5, device="cuda"), ragged(3)
    losses = [trainer.step(batch, 0.0) for _ in range(8)]  # the first twice, it is late by one
    assert len(set(losses)) == 7


def test_a_run_that_goes_on_takes_the_steps_of_one_that_never_stopped(recorded):
    """With dropout: the random numbers go on as well.  Its graphs are recorded anew."""
    trainer, batches = trainer_of(True, 0.1), [ragged(step % 5) for step in range(20)]
    losses = [trainer.step(batch, RATE) for batch in batches[:12]]
    weights, state = trainer.weights(), trainer.state()
    losses = [trainer.step(batch, RATE) for batch in batches[12:]]
    again = trainer_of(True, 0.1)
    for batch in batches[:7]:  # of another life: what was recorded is of no use
        again.step(batch, RATE)
    again.load(weights, *state)
    assert again.captured is not None
    assert not again.captured.graphs
    assert [again.step(batch, RATE) for batch in batches[12:]] == losses
    assert again.captured.graphs
    for name, x in trainer.weights().items():
        np.testing.assert_array_equal(again.weights()[name], x, err_msg=name)


def test_a_trainer_that_captures_answers_as_any_other_between_its_steps(recorded):
    plain, ours = trainer_of(False), trainer_of(True)
    rng = np.random.default_rng(0)
    for round in range(3):
        for step in range(1, 7):
            for trainer in (plain, ours):
                trainer.step(ragged(step), 2.0**-5)
        sources = [rng.integers(3, 13, n).tolist() for n in (1, 4, 8 + 8 * round, 8)]
        answers = plain.answer(sources, 10)
        assert ours.answer(sources, 10) == answers
        assert any(answers)
    assert len(ours.decoders) == 2  # of sources up to 16 and up to 32


def test_out_of_memory_says_the_batch_that_would_fit_and_leaves_no_graph(recorded, monkeypatch):
    trainer = trainer_of(True)
    for _ in range(2):
        trainer.step(ragged(3), RATE)
    assert trainer.captured.graphs
    forward = trainer.model.forward

    def limited(src, tgt, *args, **options):
        if len(src) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(src, tgt, *args, **options)

    monkeypatch.setattr(trainer.model, "forward", limited)
    with pytest.raises(ValueError, match="out of memory with a batch of 8; 4 would fit"):
        trainer.step(ragged(6), RATE)
    assert not trainer.captured.graphs
    assert not trainer.captured.inputs


def test_out_of_memory_for_graphs_alone_is_said_to_be_that(recorded, monkeypatch):
    trainer = trainer_of(True)
    for _ in range(2):
        trainer.step(ragged(3), RATE)
    forward = trainer.model.forward

    def limited(*args, **options):
        if trainer.captured.graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **options)

    monkeypatch.setattr(trainer.model, "forward", limited)
    with pytest.raises(ValueError, match="a batch of 8 and CUDA graphs: --no-capture would fit"):
        trainer.step(ragged(6), RATE)


def test_without_a_cuda_device_it_is_refused_in_one_line(capsys, tmp_path):
    out = ["--out", str(tmp_path / "run"), "--steps", "1"]
    for arguments, line in [
        (["--backend", "torch", "--device", "cpu", "--capture"], "--capture needs a CUDA device"),
        (["--capture"], "--precision, --compile and --capture need --backend torch"),
    ]:
        assert cli.main(["train", "sort", *arguments, *out]) == 2
        assert line in capsys.readouterr().err


# --- Buckets --------------------------------------------------------------------------------------


def test_buckets_are_few_and_little_longer():
    assert [captured.rounded_up(n) for n in (1, 4, 5, 32, 33, 64, 65, 1000)] == [
        4, 4, 8, 32, 36, 64, 72, 1024
    ]  # fmt: skip
    for n in range(1, 3000):
        longer = captured.rounded_up(n)
        assert n <= longer < n + max(4, n / 8)
        assert captured.rounded_up(longer) == longer
    assert len({captured.rounded_up(n) for n in range(1025, 2049)}) == 8


def test_a_batch_in_its_bucket_asks_for_nothing_more():
    batch = ragged(5)
    B, S, T = len(batch.src), batch.src.shape[1], batch.tgt.shape[1] - 1
    found = captured.in_bucket(batch, 8, 26)
    assert found.src.shape == (8, captured.rounded_up(S))
    assert found.tgt.shape == (8, min(captured.rounded_up(T), 26) + 1)
    np.testing.assert_array_equal(found.src[:B, :S], batch.src)
    np.testing.assert_array_equal(found.tgt[:B, : T + 1], batch.tgt)
    assert (found.src[:, S:] == PAD).all()
    assert (found.tgt[:, T + 1 :] == PAD).all()
    assert (found.tgt[B:] == PAD).all()
    assert (found.src[B:, 0] != PAD).all()  # something to attend to
    counted = torchformer.training.count_targets(torch.tensor(found.tgt))
    assert counted == (batch.tgt_out != PAD).sum()
