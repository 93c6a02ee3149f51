"""The shape of a Transformer: one frozen dataclass, shared by the twins.  Standard library only."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from npformer import options

FORMAT_VERSION = 1  # of config.json
LARGEST = 2**31 - 1  # of a size: whatever comes of two of them is an integer of NumPy and of torch
LARGEST_TABLE = 2**24  # numbers of sinusoidal positions, where the weights are fewer
CHOICES = {
    "activation": ("relu", "gelu", "gelu_tanh"),
    "positions": ("sinusoidal", "learned"),
}
# Below this no model can be; what is not listed is at least 1, ids are held to their vocabulary
LEAST = {"n_encoder_layers": 0, "src_vocab_size": None, "src_pad_id": None, "tgt_pad_id": None}


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
        for field in fields(self):  # NumPy's scalars come out as Python's, which JSON can write
            value = _checked(field.name, getattr(self, field.name), type(field.default))
            object.__setattr__(self, field.name, value)
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}: "
                "each head takes an equal slice of the model width"
            )
        for side in ("src", "tgt") if self.n_encoder_layers else ("tgt",):
            pad, size = getattr(self, f"{side}_pad_id"), getattr(self, f"{side}_vocab_size")
            if not 0 <= pad < size:
                raise ValueError(f"{side}_pad_id={pad} is not in the {side} vocabulary of {size}")
        if self.share_embeddings and (
            (self.src_vocab_size, self.src_pad_id) != (self.tgt_vocab_size, self.tgt_pad_id)
        ):
            raise ValueError(
                "share_embeddings=True needs one vocabulary: src_vocab_size and src_pad_id must "
                "equal tgt_vocab_size and tgt_pad_id"
            )
        n_rows = self.max_len * (2 if self.n_encoder_layers else 1)
        most = max(LARGEST_TABLE, self.n_parameters)
        if self.positions == "sinusoidal" and n_rows * self.d_model > most:
            raise ValueError(
                f"max_len={self.max_len} is too much for a model of {self.n_parameters:,} numbers: "
                f"its sinusoidal positions would be {n_rows * self.d_model:,}, at most {most:,}"
            )

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


def _checked(name: str, value: Any, default_type: type) -> Any:
    """Of the kind that is declared, and in its range: JSON and TOML bring anything."""
    if name == "final_norm" or default_type is bool:
        return options.flag(name, value)
    if default_type is str:
        return options.choice(name, value, CHOICES[name])
    if name == "eps":
        return options.positive(name, value)
    if default_type is float:
        return options.probability(name, value)
    return options.integer(name, value, LEAST.get(name, 1), LARGEST)
