"""Nothing in a step waits for the device, or could not be recorded: seen on the CPU.

Two stand-ins.  A dispatch mode raises on the operators that bring a number to the host, in the
very calls that are recorded as graphs on CUDA.  And tensors on "meta" have no numbers at all:
whoever asks for one raises, and so does a tensor that was made on the CPU on the way.

What they cannot see: waits inside of kernels' host code (cuDNN's, cuBLAS's, a fused optimizer's),
copies from memory that is not pinned, allocations that make the allocator wait, streams that do
not wait for each other, what torch.compile makes of a step, and whether numbers are right.  Those
are for a card: pytest tests/test_fast.py tests/test_captured.py tests/test_devices.py --device cuda
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import npformer
import torchformer
from npformer import tasks
from npformer.tasks import Batch
from npformer.testing.models import make_model
from npformer.training import Recipe
from torchformer import captured, fast, masks
from torchformer.convert import to_torch
from torchformer.training import Trainer, add_gradients, count_targets

SIZES = {"d_model": 16, "n_heads": 2, "d_ff": 24, "max_len": 24}
BOTH = npformer.TransformerConfig(13, 13, **SIZES, n_encoder_layers=2, n_decoder_layers=2)
ALONE = npformer.TransformerConfig(
    13, 13, **SIZES, n_encoder_layers=0, n_decoder_layers=2, tie_head=True, norm_first=True
)

# Operators whose result has a size or a value that the host has to know
WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class NoWaits(TorchDispatchMode):
    """Raises on an operator that would wait; counts the others."""

    def __init__(self):
        super().__init__()
        self.n_ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(WAITS):
            raise AssertionError(f"{name} waits for the device")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("an index by booleans waits for the device")
        self.n_ops += 1
        return func(*args, **(kwargs or {}))


class Watched:
    """In the place of a graph: each replay is the call, watched."""

    def __init__(self, call, *_):
        self.call, self.n_ops = call, 0

    def replay(self):
        with NoWaits() as seen:
            self.call()
        self.n_ops = seen.n_ops

    def pool(self):
        return None


@pytest.fixture
def watched(monkeypatch):
    """Every graph there is."""
    graphs = []

    def record(*arguments):
        graphs.append(Watched(*arguments))
        return graphs[-1], None

    monkeypatch.setattr(captured, "record", record)
    monkeypatch.setattr(fast, "record", record)
    monkeypatch.setattr("torchformer.training.check_captured", lambda given, device: bool(given))
    return graphs


def ids(*shape):
    return np.random.default_rng(0).integers(3, 13, shape)


@pytest.mark.parametrize("wait", [None, lambda x: x.item(), lambda x: x[x > 0], torch.nonzero])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_captured_training_step_waits_for_nothing(precision, wait, watched, monkeypatch):
    """Forward with dropout, loss, backward, clipping, Adam; with pads in the source and without."""
    trainer = Trainer(
        BOTH, Recipe(batch_size=4, label_smoothing=0.1), 0, "cpu", precision, False, True
    )
    padded = Batch(ids(4, 8), ids(4, 9))
    padded.src[1, 3:] = tasks.PAD
    batches = [Batch(ids(4, 8), ids(4, 9)), padded]
    for batch in batches:
        trainer.step(batch, 1e-3)  # as it is written
    if wait is not None:
        plain = torchformer.training.train_step
        monkeypatch.setattr(
            torchformer.training, "train_step", lambda *a, **o: wait(loss := plain(*a, **o)) or loss
        )
        with pytest.raises(AssertionError, match="waits for the device"):
            trainer.step(padded, 1e-3)
        return
    for batch in batches:
        trainer.step(batch, 1e-3)
    assert [graph.n_ops > 500 for graph in watched] == [True, True]


@pytest.mark.parametrize("config", [BOTH, ALONE])
def test_a_recorded_decoding_step_waits_for_nothing(config, watched):
    twin = to_torch(make_model(config, 0), dtype=torch.float32).eval()
    src = torch.tensor(ids(2, 5)) if config is BOTH else None
    src_len = 0 if src is None else 6
    decoder = fast.FastDecoder(twin, 2, 20, src_len=src_len, compiled=False, recorded=True)
    prompt = torch.tensor(ids(2, 3))
    with NoWaits():  # nor does reading a prompt
        decoder.prefill(prompt, src)
    decoder.decode(10)
    assert watched[0].n_ops > 30


# --- On "meta": no numbers, and no host ----------------------------------------------------------


def on_meta(config):
    model = torchformer.Transformer(config, np.random.default_rng(0), device="meta")
    model.right_padded = True
    return model


def no_numbers(*shape):
    return torch.empty(shape, dtype=torch.int64, device="meta")


@pytest.mark.parametrize("options", [{}, {"src_mask": masks.FULL}])
@pytest.mark.parametrize("config", [BOTH, ALONE])
def test_a_step_stays_on_its_device(config, options, monkeypatch):
    """Loss, gradients and their clipping; with masks from the ids, and without."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # refuses meta
    model = on_meta(config).train()
    src, tgt = no_numbers(4, 5) if config is BOTH else None, no_numbers(4, 8)
    options = options if config is BOTH else {}
    loss = add_gradients(model, (src, tgt), count_targets(tgt), label_smoothing=0.1, **options)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert {loss.device.type, norm.device.type} == {"meta"}
    assert {p.grad.device.type for p in model.parameters()} == {"meta"}
    with pytest.raises(RuntimeError):  # it would have been seen
        loss.item()
    with pytest.raises(NotImplementedError):
        loss.cpu()


@pytest.mark.parametrize("config", [BOTH, ALONE])
def test_decoding_stays_on_its_device(config, watched):
    model = on_meta(config).eval()
    src, src_len = (no_numbers(2, 5), 6) if config is BOTH else (None, 0)
    decoder = fast.FastDecoder(model, 2, 20, src_len=src_len, compiled=False, recorded=True)
    assert decoder.prefill(no_numbers(2, 3), src).device.type == "meta"
    assert decoder.decode(5).device.type == "meta"
