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
    if not isinstance(model, npformer.Transformer):
        raise TypeError(f"to_torch: expected an npformer.Transformer, got {_kind(model)}")
    kind: torch.dtype = dtype or getattr(torch, model.dtype.name)
    twin = torchformer.Transformer(model.config, np.random.default_rng(0), kind, device)
    twin.load_state_dict({name: torch.from_numpy(x) for name, x in model.state_dict().items()})
    return twin


def to_numpy(module: "torchformer.Transformer", dtype=None) -> npformer.Transformer:
    """The same model in NumPy.  dtype None keeps the module's own; half precisions, in which NumPy
    does not calculate, become float32.
    """
    if not isinstance(module, torchformer.Transformer):
        raise TypeError(
            f"to_numpy: expected a torchformer.Transformer, got {_kind(module)}; one that is "
            "wrapped (compiled, distributed) has to be unwrapped first"
        )
    state = {name: as_numpy(x) for name, x in module.state_dict().items()}
    if dtype is None:
        dtype = np.promote_types(next(iter(state.values())).dtype, np.float32)
    twin = npformer.Transformer(module.config, np.random.default_rng(0), dtype)
    twin.load_state_dict(state)
    return twin


def _kind(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"
