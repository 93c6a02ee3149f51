"""A step that is captured is the step: the same losses and weights, bucket by bucket.

On the CPU a stand-in plays the graph: it does the same work at the same places, whatever is there.
"""

import numpy as np
import pytest
import torch

import torchformer.training
from npformer import presets, tasks
from npformer.tasks import PAD, Batch
from npformer.training import Recipe
from torchformer import captured

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
    monkeypatch.setattr(torchformer.training, "check_captured", lambda given, device: bool(given))
    return pools


TASK = tasks.load("sort")


def trainer_of(is_captured, dropout=0.0, dtype=torch.float32):
    settings = {"model": SIZES | dict.fromkeys(presets.NO_DROPOUT, dropout) | {"max_len": 26}}
    config, _ = presets.build(TASK, settings | {"recipe": {}})
    # Adam's eps: else a gradient that is noise alone (of a key's bias) makes a step like any other
    recipe = Recipe(batch_size=8, label_smoothing=0.1, eps=1e-2)
    trainer = torchformer.training.Trainer(config, recipe, 3, captured=is_captured)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_captured_steps_are_the_steps(dtype, recorded):
    plain, ours = (trainer_of(is_captured, dtype=dtype) for is_captured in (False, True))
    # A padded row or column adds zeros to a sum, which may then be added up in another order
    off = 64 * torch.finfo(dtype).eps
    for step in [*range(1, 16), *range(1, 16)]:
        batch = ragged(step)
        assert ours.step(batch, RATE) == pytest.approx(plain.step(batch, RATE), rel=off), step
    assert ours.captured is not None
    shapes = ours.captured.inputs.keys()
    assert ours.captured.graphs.keys() == shapes  # each has been here twice
    assert {shape.full_source for shape in shapes} == {True, False}
    assert 5 < len(shapes) < 15
    assert recorded == [None] + ["the pool"] * (len(shapes) - 1)  # one pool for all
    scale = max(float(x.abs().max()) for x in plain.model.state_dict().values())
    for name, x in plain.model.state_dict().items():
        assert float((ours.model.state_dict()[name] - x).abs().max()) <= off * scale, name
