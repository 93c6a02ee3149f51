"""The configurations of the GPU benchmark, and what their shapes say before anything is measured.

A step has to multiply so much and to move so many bytes, whoever writes it.  Divided by what the
card can do, that is a floor: no step is faster.
"""

from dataclasses import dataclass

import torch

from npformer import TransformerConfig

DATASHEET = {  # dense bf16 TFLOP/s, TB/s
    "H200": (989, 4.8),
    "H100": (989, 3.35),
    "A100": (312, 2.0),
    "L40": (181, 0.86),
    "4090": (165, 1.0),
}


@dataclass(frozen=True)
class Setting:
    """A model and its batch."""

    config: TransformerConfig
    batch: int
    length: int  # of the target, and of the source where there is one

    @property
    def tokens(self) -> int:
        """Source and target."""
        return self.batch * self.length * (2 if self.config.n_encoder_layers else 1)


def config_of(layers: tuple[int, int], C: int, heads: int, vocab: int, length: int):
    return TransformerConfig(
        vocab,
        vocab,
        d_model=C,
        n_heads=heads,
        d_ff=4 * C,
        n_encoder_layers=layers[0],
        n_decoder_layers=layers[1],
        max_len=length,
        activation="relu" if layers[0] else "gelu_tanh",
        norm_first=not layers[0],
        positions="sinusoidal" if layers[0] else "learned",
        final_norm=True,  # as torch.nn.Transformer has one
        share_embeddings=bool(layers[0]),
        tie_head=True,
        embedding_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        sublayer_dropout=0.0,
    )


def settings(device: torch.device) -> dict[str, Setting]:
    """A: encoder-decoder base.  B: decoder-only, 124M.  C: decoder-only, 1.3B.  On a CPU, toys."""
    if device.type == "cuda":
        return {
            "A": Setting(config_of((6, 6), 512, 8, 32_768, 128), 256, 128),
            "B": Setting(config_of((0, 12), 768, 12, 50_304, 1024 + 64), 32, 1024),
            "C": Setting(config_of((0, 24), 2048, 16, 50_304, 2048 + 64), 8, 2048),
        }
    return {
        "A": Setting(config_of((1, 1), 64, 4, 128, 32), 4, 32),
        "B": Setting(config_of((0, 2), 64, 4, 128, 48), 4, 32),
        "C": Setting(config_of((0, 3), 96, 4, 128, 48), 2, 32),
    }


def datasheet(device: torch.device) -> tuple[float, float] | None:
    """What the card's maker says, or None for one that is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((figures for card, figures in DATASHEET.items() if card in name), None)


# --- Floors -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What cannot be avoided."""

    flops: float
    n_bytes: float  # through the card's memory

    def floor(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds, if products and copies go on side by side: the roofline."""
        return max(self.flops / flops_per_s, self.n_bytes / bytes_per_s)

    @property
    def intensity(self) -> float:
        """FLOP for each byte."""
        return self.flops / self.n_bytes


def matrices(config: TransformerConfig) -> tuple[int, int, int]:
    """Weights that multiply: those of the encoder, of the decoder's layers, and of the head."""
    c, C = config, config.d_model
    attention, feed_forward = 4 * C * C, 2 * C * c.d_ff
    n_attentions = 2 if c.n_encoder_layers else 1
    encoder = c.n_encoder_layers * (attention + feed_forward)
    decoder = c.n_decoder_layers * (n_attentions * attention + feed_forward)
    return encoder, decoder, C * c.tgt_vocab_size


def training_work(setting: Setting) -> Work:
    """One step in bf16 with float32 parameters and AdamW.

    Products: 6 FLOP for a weight and a token, forward and backward; scores and their use, of which
    causal attention needs half.

    Bytes for each parameter: the optimizer reads p, g, m, v and writes p, m, v (28); the gradient
    is written once and read for its norm (8); a bf16 copy is made (6) and read forward and
    backward (4).  For each token what backward needs of the forward, in bf16, written and read: an
    attention's input, q, k, v and output, a feed-forward network's input and both of its insides, a
    norm's input; and of the logits, values and gradients.
    """
    c, C, F = setting.config, setting.config.d_model, setting.config.d_ff
    n, T = setting.batch * setting.length, setting.length  # tokens of a side
    encoder, decoder, head = matrices(c)
    scores = 12 * T * C  # 2 products forward, 4 backward, 2 FLOP each
    causal, full = c.n_decoder_layers * scores / 2, c.n_encoder_layers * scores
    if c.n_encoder_layers:
        causal += c.n_decoder_layers * scores  # cross-attention sees everything
    flops = n * (6 * (encoder + decoder + head) + causal + full)
    parameters = encoder + decoder + head  # the head is the table; norms and biases are few
    kept = c.n_encoder_layers * (5 * C + C + 2 * F + 2 * C)
    n_attentions = 2 if c.n_encoder_layers else 1
    kept += c.n_decoder_layers * (n_attentions * 5 * C + C + 2 * F + (n_attentions + 1) * C)
    return Work(flops, 46 * parameters + n * (2 * 2 * kept + 4 * 2 * c.tgt_vocab_size))


def decoding_work(config: TransformerConfig, batch: int, n_seen: float, size: int) -> Work:
    """One token more for each of a batch, by a decoder-only model that has seen `n_seen` tokens.

    All weights and all keys and values are read once.   size: bytes of a number
    """
    _, decoder, head = matrices(config)
    attended = 2 * config.n_decoder_layers * config.d_model * n_seen  # keys and values of a sample
    flops = 2 * batch * (decoder + head + attended)
    return Work(flops, size * (decoder + head + batch * attended))
