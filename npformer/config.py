"""The shape of a Transformer: one frozen dataclass, shared by the twins.  Standard library only."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

FORMAT_VERSION = 1  # of config.json
LARGEST = 2**31 - 1  # of a size: whatever comes of two of them is an integer of NumPy and of torch


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides what a model computes, by the same names in both twins.

    Raises ValueError, naming the field, for a value that no model can have.
    """

    src_vocab_size: int  # V of the source; not used where there is no encoder
    tgt_vocab_size: int  # V of the target
    d_model: int = 64  # C, the width of the residual stream
    n_heads: int = 4  # H; each head has width D = C / H
    d_ff: int = 256  # F, the inner width of the feed-forward layers
    n_encoder_layers: int = 3  # 0: the decoder-only model, without cross-attention
    n_decoder_layers: int = 3
    max_len: int = 512  # positions there are; a longer sequence is an error
    src_pad_id: int = 0  # never attended to, its embedding is 0 and stays 0
    tgt_pad_id: int = 0
    activation: str = "relu"  # "relu" (the paper), "gelu" (erf) or "gelu_tanh" (GPT-2)
    norm_first: bool = False  # False: post-norm, the paper; True: pre-norm
    final_norm: bool | None = None  # a LayerNorm after each stack; None: where norm_first
    positions: str = "sinusoidal"  # or "learned"
    scale_embedding: bool = True  # multiply embeddings by √C (§ 3.4)
    share_embeddings: bool = False  # one table for source and target
    tie_head: bool = False  # logits by the target embedding's own table (§ 3.4), without a bias
    embedding_dropout: float = 0.1  # of embedding + position (§ 5.4)
    attention_dropout: float = 0.1  # of the attention weights; the paper has none, torch does
    activation_dropout: float = 0.1  # inside the feed-forward layer; the paper has none, torch does
    sublayer_dropout: float = 0.1  # of each sublayer's output, before the residual sum (§ 5.4)
    eps: float = 1e-5  # LayerNorm's, inside the root

    def __post_init__(self):
        if self.final_norm is None:
            object.__setattr__(self, "final_norm", self.norm_first)
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), type(field.default))
        for name in ("tgt_vocab_size", "d_model", "n_heads", "d_ff", "n_decoder_layers", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"{field.name} must be at most {LARGEST}, got {_shown(value)}")
        if self.n_encoder_layers < 0:
            raise ValueError(f"n_encoder_layers must be at least 0, got {self.n_encoder_layers}")
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}: "
                "each head takes an equal slice of the model width"
            )
        for side in ("src", "tgt") if self.n_encoder_layers else ("tgt",):
            pad, size = getattr(self, f"{side}_pad_id"), getattr(self, f"{side}_vocab_size")
            if not 0 <= pad < size:
                raise ValueError(f"{side}_pad_id={pad} is not in the {side} vocabulary of {size}")
        if self.activation not in ("relu", "gelu", "gelu_tanh"):
            raise ValueError(f"activation must be relu, gelu or gelu_tanh, got {self.activation!r}")
        if self.positions not in ("sinusoidal", "learned"):
            raise ValueError(f"positions must be sinusoidal or learned, got {self.positions!r}")
        if self.share_embeddings and (
            (self.src_vocab_size, self.src_pad_id) != (self.tgt_vocab_size, self.tgt_pad_id)
        ):
            raise ValueError(
                "share_embeddings=True needs one vocabulary: src_vocab_size and src_pad_id must "
                "equal tgt_vocab_size and tgt_pad_id"
            )
        for kind in ("embedding", "attention", "activation", "sublayer"):
            p = getattr(self, f"{kind}_dropout")
            if not 0 <= p <= 1:
                raise ValueError(f"{kind}_dropout is a probability, got {p}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be positive, got {self.eps}")

    @property
    def d_head(self) -> int:  # D
        return self.d_model // self.n_heads

    @property
    def n_parameters(self) -> int:
        """How many numbers a model of this shape has; the same in both twins."""
        C, F, with_memory = self.d_model, self.d_ff, self.n_encoder_layers > 0
        attention, feed_forward = 4 * (C * C + C), F * C + F + C * F + C
        norm = 2 * C
        layer = attention + feed_forward + 2 * norm
        n = self.n_encoder_layers * layer
        n += self.n_decoder_layers * (layer + with_memory * (attention + norm))
        n += self.tgt_vocab_size * C
        n += 0 if self.tie_head else C * self.tgt_vocab_size + self.tgt_vocab_size
        n += with_memory * (not self.share_embeddings) * self.src_vocab_size * C
        n_stacks = 1 + with_memory
        n += n_stacks * norm if self.final_norm else 0
        n += n_stacks * self.max_len * C if self.positions == "learned" else 0
        return n

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TransformerConfig":
        """Raises ValueError for text that is not JSON, another format version or an unknown key."""
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version!r}, this program reads {FORMAT_VERSION}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown key {unknown[0]!r}")
        if missing := sorted({"src_vocab_size", "tgt_vocab_size"} - set(values)):
            raise ValueError(f"missing key {missing[0]!r}")
        return cls(**values)


def _check_type(name: str, value: Any, default_type: type) -> None:
    """ints where ints are declared, numbers for floats: JSON and TOML bring anything."""
    if name == "final_norm" or default_type is bool:
        expected, ok = "true or false", isinstance(value, bool)
    elif default_type is float:
        expected, ok = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    elif default_type is str:
        expected, ok = "a string", isinstance(value, str)
    else:
        expected, ok = "an integer", isinstance(value, int) and not isinstance(value, bool)
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """In a message: not all of it where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
