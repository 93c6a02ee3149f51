"""The configurations of the GPU benchmark, and what their shapes say before anything is measured.

A step is a list of operations: products, attention, and between two of them one pass over what they
have written.  Each has to multiply so much and to move so many bytes, and takes at least as long as
the slower of the two takes the card at its own measured best.  The sum is a floor: the roofline of
the step.  (A kernel that does such a pass inside a product, as a bias's sum, may go below it.)
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
class Op:
    """One operation, `n` times in a step, and what of it cannot be avoided."""

    name: str
    n: int
    flops: float
    n_bytes: float  # through the card's memory: every operand read once, every result written once
    masked_flops: float = 0.0  # behind a causal mask: not needed, but counted by the literature

    def floor(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds, if its products and its copies go on side by side."""
        return self.n * max(self.flops / flops_per_s, self.n_bytes / bytes_per_s)


@dataclass(frozen=True)
class Work:
    """What cannot be avoided: operations, one after the other."""

    ops: tuple[Op, ...]

    @property
    def flops(self) -> float:
        """Of a causal attention only those that its mask leaves: half."""
        return sum(op.n * op.flops for op in self.ops)

    @property
    def literature_flops(self) -> float:
        """6 N + 12 L C T a token: with all of a causal attention   [Chowdhery et al. 2022, B]."""
        return self.flops + sum(op.n * op.masked_flops for op in self.ops)

    @property
    def n_bytes(self) -> float:
        return sum(op.n * op.n_bytes for op in self.ops)

    def floor(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds: the roofline, operation by operation."""
        return sum(op.floor(flops_per_s, bytes_per_s) for op in self.ops)

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


def training_work(setting: Setting, size: int = 2) -> Work:
    """One step with float32 parameters and AdamW.   size: bytes of an activation, 2 in bf16

    n rows go through either side.  The stream of residuals is float32, as the parameters are; what
    products and attention read and write is of `size`.
    """
    c, C, F = setting.config, setting.config.d_model, setting.config.d_ff
    V, n = c.tgt_vocab_size, setting.batch * setting.length
    n_layers = c.n_encoder_layers + c.n_decoder_layers
    n_cross = c.n_decoder_layers if c.n_encoder_layers else 0
    n_attentions = n_layers + n_cross
    n_norms = n_attentions + n_layers + bool(c.n_encoder_layers) + 1  # one ends each stack
    parameters = sum(matrices(c))  # tied, the head is the table; norms and biases are few
    stream, narrow = 4 * n * C, size * n * C
    ops = (
        *linear("attention's linears", 4 * n_attentions, n, C, C, size),
        *linear("feed-forward, first", n_layers, n, C, F, size),
        *linear("feed-forward, second", n_layers, n, F, C, size),
        *linear("head", 1, n, C, V, size, bias=False),
        *attention("attention, causal", c.n_decoder_layers, setting, size, causal=True),
        *attention("attention, all", c.n_encoder_layers + n_cross, setting, size, causal=False),
        # The stream and what a sublayer adds are read, their sum and its norm are written
        Op("residual and norm, forward", n_norms, 0, 2 * stream + 2 * narrow),
        # The stream, its gradient and the norm's are read; the gradient is written, and once more
        # narrow for the products of the sublayer before
        Op("residual and norm, backward", n_norms, 0, 3 * stream + 2 * narrow),
        # y of x, dx of x and dy
        Op("activation, forward", n_layers, 0, 2 * size * n * F),
        Op("activation, backward", n_layers, 0, 3 * size * n * F),
        # A softmax can be read once; its gradient needs it once more, and is written
        Op("loss, forward", 1, 0, size * n * V),
        Op("loss, backward", 1, 0, 2 * size * n * V),
        # Rows of the table and the stream; backward its gradient, added to rows of the table's
        Op("embedding", 2 if c.n_encoder_layers else 1, 0, 2 * stream + 3 * stream),
        # Read in float32, written narrow
        Op("weights, cast", 1 if size < 4 else 0, 0, (4 + size) * parameters),
        # The gradient (float32) is read for its norm; p, g, m, v are read and p, m, v written
        Op("clip", 1, 0, 4 * parameters),
        Op("AdamW", 1, 0, 28 * parameters),
    )
    return Work(tuple(op for op in ops if op.n))


def linear(
    name: str, n_times: int, n: int, n_in: int, n_out: int, size: int, bias: bool = True
) -> tuple[Op, ...]:
    """y = x Wᵀ + b for n rows, and its gradients: three products of the same three matrices.

    The gradient of the weight goes to a float32 parameter; that of the bias reads dy once more.
    """
    flops, matrix = 2 * n * n_in * n_out, n_in * n_out
    rows = size * (n * n_in + n * n_out)
    ops = (
        Op(f"{name}, y", n_times, flops, rows + size * matrix),
        Op(f"{name}, dx", n_times, flops, rows + size * matrix),
        Op(f"{name}, dW", n_times, flops, rows + 4 * matrix),
        Op(f"{name}, db", n_times, 0, size * n * n_out),
    )
    return ops if bias else ops[:3]


def attention(name: str, n_times: int, setting: Setting, size: int, causal: bool) -> tuple[Op, Op]:
    """Forward q kᵀ and its use, reading q, k, v and writing y; backward four products (what is made
    again of the first is the kernel's own affair), reading q, k, v, y, dy and writing dq, dk, dv.
    """
    n, C = setting.batch * setting.length, setting.config.d_model
    flops = 4 * n * setting.length * C  # two products of (T, D) and (D, T) for each head
    kept = flops / 2 if causal else flops
    narrow = size * n * C
    return (
        Op(f"{name}, forward", n_times, kept, 4 * narrow, flops - kept),
        Op(f"{name}, backward", n_times, 2 * kept, 8 * narrow, 2 * (flops - kept)),
    )


def decoding_work(config: TransformerConfig, batch: int, n_seen: float, size: int) -> Work:
    """One token more for each of a batch, by a decoder-only model that has seen `n_seen` tokens.

    All weights and all keys and values are read once; the rows themselves are few.   size: bytes of
    a number
    """
    c, C, F = config, config.d_model, config.d_ff

    def product(name: str, n_times: int, n_in: int, n_out: int) -> Op:
        return Op(name, n_times, 2 * batch * n_in * n_out, size * n_in * n_out)

    attended = 2 * batch * C * n_seen  # keys and values
    L = c.n_decoder_layers
    return Work(
        (
            product("attention's linears", 4 * L, C, C),
            product("feed-forward", 2 * L, C, F),
            product("head", 1, C, c.tgt_vocab_size),
            Op("attention", L, 2 * attended, size * attended),
        )
    )
