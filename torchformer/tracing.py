"""Every named intermediate of one step of the torch twin, under the names of npformer.tracing.

    seen = trace(model, src, tgt_in, target=tgt_out)       # an npformer.tracing.Trace
    difference(npformer.trace(numpy_model, ...), seen)     # the first tensor that differs

Attention goes the way on which its weights are written down (ops.attention_weights), not through a
fused kernel, and without dropout.  A gradient `dx` is autograd's for the local `x`.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npformer import tracing
from npformer.tracing import Entry, Trace
from torchformer.transformer import Transformer, as_numpy, evaluating

READ = ("ops", "attention", "feedforward", "positional", "encoder", "decoder", "transformer")


def trace(model: Transformer, *inputs: Any, target: Tensor | None = None, **options: Any) -> Trace:
    """One step of the model: forward and, where there is a `target` (B, T), loss and backward."""
    watcher = _Watcher(model)
    about: dict[str, Any] = {"config": model.config.to_json()}
    about["inputs"] = [list(x.shape) for x in inputs if x is not None]
    with evaluating(model), watcher:
        # Given an rng, attention makes its weights explicitly; in eval mode nothing is drawn
        logits = model(*inputs, rng=object(), **options)
    if target is not None:
        loss = F.cross_entropy(logits.mT, target, ignore_index=model.config.tgt_pad_id)
        about["loss"] = loss.item()
        watcher.add_gradients(loss)
    return Trace(watcher.entries, about)


class _Watcher(tracing.Watcher):
    package = "torchformer"
    files = READ
    module_type = nn.Module

    def __init__(self, model: Any):
        super().__init__(model)
        self.tensors: list[tuple[int, Tensor]] = []  # which entry, and its tensor

    def paths_of(self, model: Any) -> dict[int, str]:
        return {id(module): path for path, module in model.named_modules()}

    def array_of(self, value: Any) -> np.ndarray | None:
        return as_numpy(value).copy() if isinstance(value, Tensor) else None

    def noted(self, name: str, value: Any) -> None:
        if value.requires_grad:
            self.tensors.append((len(self.entries) - 1, value))

    def add_gradients(self, loss: Tensor) -> None:
        """Of each tensor that was noted, last first: as backward makes them.

        Not of what has one name several times, as the x that goes through a stack.
        """
        names = {entry.name for entry in self.entries}
        once = [
            (i, x)
            for i, x in self.tensors
            if "#" not in self.entries[i].name and f"{self.entries[i].name}#2" not in names
        ]
        tensors = [x for _, x in once]
        found = torch.autograd.grad(loss, tensors, allow_unused=True)
        for (i, _), gradient in reversed(list(zip(once, found, strict=True))):
            if gradient is not None:
                entry = self.entries[i]
                path, dot, local = entry.name.rpartition(".")
                name = f"{path}{dot}d{local}"
                self.entries.append(
                    Entry(name, "backward", as_numpy(gradient).copy(), entry.letters,
                          f"the gradient of: {entry.formula}", entry.file, entry.line,
                          equation=f"autograd:  d{local} = ∂loss / ∂{local}")
                )  # fmt: skip
