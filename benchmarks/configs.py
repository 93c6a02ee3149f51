"""The sizes that are measured.  Standard library only, so that a start can be timed around it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npformer import TransformerConfig


@dataclass(frozen=True)
class Size:
    """An encoder-decoder Transformer and the batch it is trained on."""

    name: str
    d_model: int
    n_layers: int  # of the encoder, and as many of the decoder
    n_heads: int
    d_ff: int
    vocab_size: int  # of the source and of the target
    batch: int  # sequences
    length: int  # tokens of each, source and target alike

    def model_config(self, dropout: float = 0.0) -> "TransformerConfig":
        """Post-norm with final norms, because that is what torch.nn.Transformer computes."""
        from npformer import TransformerConfig

        return TransformerConfig(
            self.vocab_size,
            self.vocab_size,
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_ff=self.d_ff,
            n_encoder_layers=self.n_layers,
            n_decoder_layers=self.n_layers,
            max_len=self.length,
            final_norm=True,
            embedding_dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=dropout,
            sublayer_dropout=dropout,
        )


SIZES = {
    size.name: size
    for size in (
        Size("S", 64, 3, 4, 256, 13, 32, 12),
        Size("M", 256, 3, 8, 1024, 1000, 32, 32),
        Size("B", 512, 6, 8, 2048, 8000, 8, 64),
    )
}
