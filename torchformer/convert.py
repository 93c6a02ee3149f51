"""Carry a model from one twin to the other: a loop over equal names, exact in both directions."""

import numpy as np
import torch

import npformer
import torchformer
from torchformer.transformer import as_numpy


def to_torch(
    model: npformer.Transformer,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> "torchformer.Transformer":
    """The same model in PyTorch.  dtype None keeps the model's own; float64 -> float32 rounds."""
    kind: torch.dtype = dtype or getattr(torch, model.dtype.name)
    twin = torchformer.Transformer(model.config, np.random.default_rng(0), kind, device)
    twin.load_state_dict({name: torch.from_numpy(x) for name, x in model.state_dict().items()})
    return twin


def to_numpy(module: "torchformer.Transformer", dtype=None) -> npformer.Transformer:
    """The same model in NumPy.  dtype None keeps the module's own; bfloat16 becomes float32."""
    state = {name: as_numpy(x) for name, x in module.state_dict().items()}
    dtype = dtype or next(iter(state.values())).dtype
    twin = npformer.Transformer(module.config, np.random.default_rng(0), dtype)
    twin.load_state_dict(state)
    return twin
