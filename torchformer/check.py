"""The twins compared on one batch: logits, loss and the gradient of every parameter."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import npformer
from npformer.ops import cross_entropy
from npformer.tasks import PAD, Batch
from torchformer.convert import to_torch
from torchformer.transformer import as_numpy

# float64: what the two may differ by, relative to the largest value of the kind; a step of training
# is some thousands of roundings of 1e-16 each.
OUTPUT_BOUND, GRADIENT_BOUND = 1e-12, 1e-10


@dataclass(frozen=True)
class Comparison:
    """One quantity in one precision: the error, the most it may be, and where it was largest."""

    name: str
    dtype: str
    error: float  # max |NumPy - torch| (float64), max |NumPy - float64| (float32); relative
    bound: float
    where: str

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # NaN does not hold


def compare(model: npformer.Transformer, batch: Batch) -> list[Comparison]:
    """Both twins on the batch, without dropout, in float64 and in float32.

    float64: they agree to the bounds above.  float32: NumPy's distance to the float64 result is at
    most twice torch's own, plus a few roundings: neither is less exact than the other.
    """
    rows = []
    results = {}
    for dtype in (np.float64, np.float32):
        twin = npformer.Transformer(model.config, np.random.default_rng(0), dtype)
        twin.load_state_dict(model.state_dict())
        results[dtype] = numpy_step(twin, batch), torch_step(to_torch(twin), batch)
    (ours64, theirs64), (ours32, theirs32) = results[np.float64], results[np.float32]
    for name, bound in (
        ("logits", OUTPUT_BOUND),
        ("loss", OUTPUT_BOUND),
        ("gradients", GRADIENT_BOUND),
    ):
        error, where = _distance(ours64[name], theirs64[name])
        rows.append(Comparison(name, "float64", error, bound, where))
        error, where = _distance(ours32[name], theirs64[name])
        peer, _ = _distance(theirs32[name], theirs64[name])
        roundings = 32 * float(np.finfo(np.float32).eps)
        rows.append(Comparison(name, "float32", error, 2 * peer + roundings, where))
    return rows


def numpy_step(model: npformer.Transformer, batch: Batch) -> dict[str, dict[str, np.ndarray]]:
    logits, backward_model = model(batch.src, batch.tgt_in)
    loss, backward_loss = cross_entropy(logits, batch.tgt_out, ignore_index=PAD)
    model.zero_grad()
    backward_model(backward_loss(1.0))
    gradients = {name: p.grad.copy() for name, p in model.named_parameters()}
    return {"logits": {"": logits}, "loss": {"": np.asarray(loss)}, "gradients": gradients}


def torch_step(model, batch: Batch) -> dict[str, dict[str, np.ndarray]]:
    model.eval()
    src, tgt = torch.from_numpy(batch.src), torch.from_numpy(batch.tgt)
    logits = model(src, tgt[:, :-1])
    loss = F.cross_entropy(logits.mT, tgt[:, 1:], ignore_index=PAD)
    model.zero_grad()
    loss.backward()
    gradients = {name: as_numpy(p.grad) for name, p in model.named_parameters()}
    return {
        "logits": {"": as_numpy(logits)},
        "loss": {"": as_numpy(loss)},
        "gradients": gradients,
    }


def _distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference over all arrays, relative to the largest value of b, and its name."""
    if set(a) != set(b):
        return float("nan"), "the names differ"
    scale = max(float(np.abs(x).max()) for x in b.values())
    errors = {name: float(np.abs(a[name] - b[name]).max()) for name in b}
    worst = max(errors, key=lambda name: (np.isnan(errors[name]), errors[name]))
    return errors[worst] / scale, worst
