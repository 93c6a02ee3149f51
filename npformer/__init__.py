"""npformer: the Transformer in plain NumPy, every gradient written by hand, to be read.

Reading order
    ops.py            every operation and, right below it, its gradient
    masks.py          who may attend to whom
    module.py         parameters and the tree that owns them
    layers.py         Linear, Embedding, LayerNorm
    attention.py      multi-head attention
    feedforward.py    the two-layer network between attentions
    positional.py     where a token stands
    encoder.py        one layer, then the stack
    decoder.py        the same with cross-attention
    transformer.py    the whole
    optim.py          how the gradients are used
    decoding.py       how an answer comes out
    cache.py          what need not be computed again for the next token

Letters
    B batch    T query / target positions    S key / source positions    C model width
    H heads    D = C / H    F feed-forward width    V vocabulary    L layers    N rows

`torchformer` is the same, file for file, in PyTorch.
"""

from typing import Any

from npformer import masks, ops, schedules
from npformer.attention import MultiHeadAttention
from npformer.config import TransformerConfig
from npformer.decoder import Decoder, DecoderLayer
from npformer.decoding import beam_search, greedy, sample
from npformer.encoder import Encoder, EncoderLayer
from npformer.feedforward import FeedForward
from npformer.layers import Embedding, LayerNorm, Linear
from npformer.module import Module, Parameter, no_grad
from npformer.ops import cross_entropy
from npformer.optim import SGD, Adam, AdamW, clip_grad_norm
from npformer.positional import LearnedPositions, SinusoidalPositions
from npformer.transformer import Transformer

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Decoder",
    "DecoderLayer",
    "Embedding",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "Module",
    "MultiHeadAttention",
    "Parameter",
    "SinusoidalPositions",
    "Transformer",
    "TransformerConfig",
    "beam_search",
    "clip_grad_norm",
    "cross_entropy",
    "greedy",
    "masks",
    "no_grad",
    "ops",
    "sample",
    "schedules",
]


def __getattr__(name: str) -> Any:
    """`npformer.pronounce`, `trace` and `explain_mask`, loaded for those who ask."""
    if name == "pronounce":
        from npformer.pronunciation import pronounce

        return pronounce
    if name == "explain_mask":
        from npformer.explain import explain_mask

        return explain_mask
    if name == "trace":
        from npformer.tracing import trace

        return trace
    raise AttributeError(f"module 'npformer' has no attribute {name!r}")
