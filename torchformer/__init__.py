"""torchformer: the Transformer of npformer in PyTorch modules, file for file, to be run on a GPU.

Read it beside npformer: the same classes in the same order under the same names, without the
backward passes, which autograd writes.  npformer's ops.py, module.py, layers.py and optim.py have
their twins in PyTorch itself: torch.nn.functional, torch.nn and torch.optim.
"""

from npformer.config import TransformerConfig
from torchformer import masks, ops
from torchformer.attention import MultiHeadAttention
from torchformer.decoder import Decoder, DecoderLayer
from torchformer.decoding import beam_search, greedy, sample
from torchformer.encoder import Encoder, EncoderLayer
from torchformer.feedforward import FeedForward
from torchformer.positional import LearnedPositions, SinusoidalPositions
from torchformer.transformer import Transformer

__all__ = [
    "Decoder",
    "DecoderLayer",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "LearnedPositions",
    "MultiHeadAttention",
    "SinusoidalPositions",
    "Transformer",
    "TransformerConfig",
    "beam_search",
    "greedy",
    "masks",
    "ops",
    "sample",
]
