"""The whole model: embeddings, encoder, decoder, head   [Vaswani et al. 2017, figure 1].

    model = Transformer(config, rng=np.random.default_rng(0))
    logits, backward_model = model(src, tgt_in, rng=rng)      # rng: dropout; leave it out for none
    loss, backward_loss = cross_entropy(logits, tgt_out, ignore_index=pad)
    model.zero_grad()
    backward_model(backward_loss(1.0))                        # adds to every parameter.grad
    optimizer.step()

Shapes  B batch, S source positions, T target positions, C model width, V target vocabulary.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from npformer import ops
from npformer.attention import check_heads_mask
from npformer.cache import Cache, LayerCache
from npformer.config import TransformerConfig
from npformer.decoder import Decoder, DecoderLayer
from npformer.encoder import Encoder, EncoderLayer
from npformer.layers import Embedding, LayerNorm, Linear
from npformer.masks import causal_mask, padding_mask
from npformer.module import Module, no_grad
from npformer.ops import Array, Forward, Mask, Rng
from npformer.positional import LearnedPositions, SinusoidalPositions

if TYPE_CHECKING:
    from pathlib import Path


class Transformer(Module):
    """Encoder-decoder, or decoder-only where the config has no encoder layers.

    src (B, S)   tgt (B, T)   integer ids   ->   logits (B, T, V)

    The padding masks of both sides and the causal mask of the target are made from the ids.  A
    mask that is given besides is `&`-ed to them: src_mask -> (B, H, S, S), for the encoder, and
    tgt_mask -> (B, H, T, T), for the decoder's self-attention.  Which shapes a mask may have:
    see MultiHeadAttention.  Decoder-only: src is None.

    `rng` draws the initial weights; the same seed gives both twins the same model.
    """

    src_embedding: Any  # None where the target's is shared, or there is no encoder
    src_positions: Any  # None where there is no encoder, like the encoder itself
    encoder: Any
    decoder: Any

    def __init__(
        self, config: TransformerConfig, rng: Rng | None = None, dtype: DTypeLike = np.float32
    ):
        c, rng = config, np.random.default_rng() if rng is None else rng
        kind: Any = dict(rng=rng, dtype=dtype)
        self.config = config
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"Transformer: dtype must be float32 or float64, got {self.dtype}")

        def embedding(vocab_size: int, pad_id: int) -> Embedding:
            return Embedding(vocab_size, c.d_model, pad_id, **kind)

        def positions() -> SinusoidalPositions | LearnedPositions:
            if c.positions == "sinusoidal":
                return SinusoidalPositions(c.max_len, c.d_model)
            return LearnedPositions(c.max_len, c.d_model, **kind)

        def layer(Layer: Any) -> Any:
            return Layer(
                c.d_model,
                c.n_heads,
                c.d_ff,
                activation=c.activation,
                norm_first=c.norm_first,
                attention_dropout=c.attention_dropout,
                activation_dropout=c.activation_dropout,
                sublayer_dropout=c.sublayer_dropout,
                eps=c.eps,
                **kind,
            )

        def final_norm() -> LayerNorm | None:
            return LayerNorm(c.d_model, c.eps, dtype=dtype) if c.final_norm else None

        has_encoder = c.n_encoder_layers > 0
        self.src_embedding = self.src_positions = self.encoder = None
        if has_encoder:
            if not c.share_embeddings:  # a shared table belongs to the target side, under one name
                self.src_embedding = embedding(c.src_vocab_size, c.src_pad_id)
            self.src_positions = positions()
            layers = [layer(EncoderLayer) for _ in range(c.n_encoder_layers)]
            self.encoder = Encoder(layers, final_norm())
        self.tgt_embedding = embedding(c.tgt_vocab_size, c.tgt_pad_id)
        self.tgt_positions = positions()
        if has_encoder:
            layers = [layer(DecoderLayer) for _ in range(c.n_decoder_layers)]
            self.decoder = Decoder(layers, final_norm())
        else:  # with no memory to attend to, a decoder is an encoder under a causal mask
            layers = [layer(EncoderLayer) for _ in range(c.n_decoder_layers)]
            self.decoder = Encoder(layers, final_norm())
        self.head = None if c.tie_head else Linear(c.d_model, c.tgt_vocab_size, **kind)

    def forward(
        self,
        src: Array | None,
        tgt: Array,
        src_mask: Mask = None,
        tgt_mask: Mask = None,
        rng: Rng | None = None,
    ) -> Forward:
        """logits = decode(tgt, memory) with memory = encode(src); without a source decode(tgt)."""
        self._check_source(src)
        self._check_ids("tgt", "(B, T)", tgt)
        if src is not None and len(src) != len(tgt):
            raise ValueError(f"Transformer: src has {len(src)} samples, tgt has {len(tgt)}")
        if src is None:
            return self.decode(tgt, None, None, tgt_mask, rng)
        memory, backward_encode = self.encode(src, src_mask, rng)  # (B, S, C)
        memory_mask = padding_mask(src, self.config.src_pad_id)  # (B, 1, 1, S)
        logits, backward_decode = self.decode(tgt, memory, memory_mask, tgt_mask, rng)  # (B, T, V)

        def backward(dlogits):
            backward_encode(backward_decode(dlogits))
            # nothing to return: ids are integers

        return logits, backward

    def encode(self, src: Array, src_mask: Mask = None, rng: Rng | None = None) -> Forward:
        """memory = encoder(embed(src)).   src (B, S)   ->   memory (B, S, C)"""
        self._check_source(src)
        mask = padding_mask(src, self.config.src_pad_id)  # (B, 1, 1, S)
        mask = self._and("src_mask", src_mask, mask, src.shape[1])  # -> (B, H, S, S)
        embedding = self.src_embedding or self.tgt_embedding
        x, backward_embed = self.embed(src, embedding, self.src_positions, rng)  # (B, S, C)
        memory, backward_encoder = self.encoder(x, mask, rng)
        return memory, lambda dmemory: backward_embed(backward_encoder(dmemory))

    def decode(
        self,
        tgt: Array,
        memory: Array | None,
        memory_mask: Mask = None,
        tgt_mask: Mask = None,
        rng: Rng | None = None,
    ) -> Forward:
        """logits = head(y) with y = decoder(embed(tgt), memory).

        tgt (B, T)   memory (B, S, C) or None   ->   logits (B, T, V);  backward -> dmemory
        memory_mask -> (B, H, T, S); None: all of the memory may be attended to
        """
        self._check_ids("tgt", "(B, T)", tgt)
        self._check_memory(memory, memory_mask, tgt)
        mask = padding_mask(tgt, self.config.tgt_pad_id) & causal_mask(tgt.shape[1])
        mask = self._and("tgt_mask", tgt_mask, mask, tgt.shape[1])  # -> (B, H, T, T)
        x, backward_embed = self.embed(tgt, self.tgt_embedding, self.tgt_positions, rng)
        if memory is None:
            y, backward_decoder = self.decoder(x, mask, rng)  # (B, T, C)
        else:
            y, backward_decoder = self.decoder(x, memory, mask, memory_mask, rng)  # (B, T, C)
        to_logits = self.head or self.tgt_embedding.as_head
        logits, backward_head = to_logits(y)  # (B, T, V)

        def backward(dlogits):
            if memory is None:
                return backward_embed(backward_decoder(backward_head(dlogits)))
            # dy = J_headᵀ dlogits;   dx, dmemory = J_decoderᵀ dy.
            dx, dmemory = backward_decoder(backward_head(dlogits))
            backward_embed(dx)
            return dmemory

        return logits, backward

    def start(self, src: Array | None, src_mask: Mask = None) -> Cache:
        """The cache of an answer that has not begun: `src` encoded, and nothing of the target."""
        self._check_source(src)
        with no_grad():
            if src is None:
                return Cache([LayerCache(None, None) for _ in self.decoder.layers])
            memory, _ = self.encode(src, src_mask)  # (B, S, C)
            memory_mask = padding_mask(src, self.config.src_pad_id)  # (B, 1, 1, S)
            return Cache(self.decoder.start(memory), None, memory_mask)

    def step(self, tgt: Array, cache: Cache, tgt_mask: Mask = None) -> tuple[Array, Cache]:
        """The logits of the next T tokens alone, from the cache of those before them.

        tgt (B, T)   tgt_mask -> (B, H, T, length + T)   ->   logits (B, T, V), cache

        However a sequence is cut into steps, the logits are those of `infer` on the whole of it.
        A pad counts as a position, so prompts of different lengths are not continued together as
        each is alone.
        """
        self._check_ids("tgt", "(B, T)", tgt)
        if cache.n_samples not in (None, len(tgt)):
            raise ValueError(
                f"Transformer: tgt has {len(tgt)} samples, the cache has {cache.n_samples}"
            )
        offset = cache.length
        known = padding_mask(tgt, self.config.tgt_pad_id)  # (B, 1, 1, T)
        if cache.tgt_mask is not None:
            known = np.concatenate([cache.tgt_mask, known], axis=-1)  # (B, 1, 1, length + T)
        mask = known & causal_mask(tgt.shape[1], offset=offset)
        mask = self._and("tgt_mask", tgt_mask, mask, tgt.shape[1])  # -> (B, H, T, length + T)
        with no_grad():
            x, _ = self.embed(tgt, self.tgt_embedding, self.tgt_positions, offset=offset)
            if cache.memory_mask is None:
                y, layers = self.decoder.step(x, cache.layers, mask)  # (B, T, C)
            else:
                y, layers = self.decoder.step(x, cache.layers, mask, cache.memory_mask)
            to_logits = self.head or self.tgt_embedding.as_head
            logits, _ = to_logits(y)  # (B, T, V)
        return logits, Cache(layers, known, cache.memory_mask)

    def embed(
        self,
        ids: Array,
        embedding: Embedding,
        positions: SinusoidalPositions | LearnedPositions,
        rng: Rng | None = None,
        offset: int = 0,
    ) -> Forward:
        """x = √C E[ids] + P: the token's row times √C, plus the position's   [§ 3.4].

        ids (B, T)   ->   x (B, T, C)
        """
        scale = math.sqrt(self.config.d_model) if self.config.scale_embedding else 1.0
        e, backward_embedding = embedding(ids)  # (B, T, C)
        x, backward_positions = positions(e * scale, offset)
        kept, backward_dropout = ops.dropout(x, self.config.embedding_dropout, rng)

        def backward(dx):
            backward_embedding(backward_positions(backward_dropout(dx)) * scale)

        return kept, backward

    def infer(
        self, src: Array | None, tgt: Array, src_mask: Mask = None, tgt_mask: Mask = None
    ) -> Array:
        """The logits alone, without dropout and without keeping anything for a backward."""
        with no_grad():
            logits, _ = self(src, tgt, src_mask, tgt_mask)
        return logits

    def save(self, folder: "str | Path") -> None:
        """Write config.json and model.safetensors, which both twins read; see checkpoint.py."""
        from npformer import checkpoint  # here, because loading it is slower than all the rest

        checkpoint.save(folder, self.config, self.state_dict())

    @classmethod
    def load(cls, folder: "str | Path", dtype: DTypeLike = np.float32) -> "Transformer":
        """The model in that folder.  Raises CheckpointError, naming the file and the reason."""
        from npformer import checkpoint

        config, state = checkpoint.load(folder)
        model = cls(config, np.random.default_rng(0), dtype)
        with checkpoint.blame(folder):
            model.load_state_dict(state)
        return model

    def _check_source(self, src: Array | None) -> None:
        if (src is None) != (self.encoder is None):
            raise ValueError(
                "Transformer: src must be None, the model is decoder-only"
                if self.encoder is None
                else "Transformer: src is None, but the model has an encoder"
            )
        if src is not None:
            self._check_ids("src", "(B, S)", src)

    def _check_ids(self, name: str, letters: str, ids: Array) -> None:
        if not isinstance(ids, np.ndarray) or ids.ndim != 2:
            got = f"shape {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
            raise ValueError(
                f"Transformer: {name} must be an array {letters} of integer ids, got {got}; "
                "a batch of one sequence is ids[None]"
            )
        if not 1 <= ids.shape[1] <= self.config.max_len:
            raise ValueError(
                f"Transformer: {name} has {ids.shape[1]} positions, the model takes 1 to "
                f"{self.config.max_len} (max_len)"
            )

    def _check_memory(self, memory: Array | None, memory_mask: Mask, tgt: Array) -> None:
        if (memory is None) != (self.encoder is None):
            raise ValueError(
                "Transformer: memory must be None, the model is decoder-only"
                if self.encoder is None
                else "Transformer: memory is None, but the model has an encoder"
            )
        if memory is None:
            if memory_mask is not None:
                raise ValueError("Transformer: memory_mask is given, but there is no memory")
            return
        B, C = len(tgt), self.config.d_model
        shape = tuple(getattr(memory, "shape", ()))
        if len(shape) != 3 or (shape[0], shape[2]) != (B, C) or shape[1] == 0:
            raise ValueError(
                f"Transformer: memory must be (B, S, C) with B = {B}, the samples of tgt, and "
                f"C = {C}, got shape {shape}"
            )
        scores = (len(tgt), self.config.n_heads, tgt.shape[1], memory.shape[1])  # (B, H, T, S)
        check_heads_mask("Transformer", memory_mask, scores, "memory_mask")

    def _and(self, name: str, given: Mask, mask: Array, T: int) -> Array:
        """A mask that was given allows nothing that ours forbids.   mask (B, 1, T or 1, S)"""
        if given is None:
            return mask
        scores = (len(mask), self.config.n_heads, T, mask.shape[-1])  # (B, H, T, S)
        check_heads_mask("Transformer", given, scores, name)
        return mask & given
