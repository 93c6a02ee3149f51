"""The whole model: embeddings, encoder, decoder, head   [Vaswani et al. 2017, figure 1].

    model = Transformer(config, rng=np.random.default_rng(0), device="cuda")
    logits = model(src, tgt_in)                               # dropout: model.train(), .eval()
    loss = F.cross_entropy(logits.mT, tgt_out, ignore_index=pad)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

Shapes  B batch, S source positions, T target positions, C model width, V target vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npformer import checkpoint
from npformer.config import TransformerConfig
from torchformer import ops
from torchformer.attention import check_heads_mask
from torchformer.cache import Cache, LayerCache
from torchformer.decoder import Decoder, DecoderLayer
from torchformer.encoder import Encoder, EncoderLayer
from torchformer.masks import CAUSAL, FULL, causal_mask, padding_mask
from torchformer.ops import Mask
from torchformer.positional import LearnedPositions, SinusoidalPositions


class Transformer(nn.Module):
    """Encoder-decoder, or decoder-only where the config has no encoder layers.

    src (B, S)   tgt (B, T)   integer ids   ->   logits (B, T, V)

    The padding masks of both sides and the causal mask of the target are made from the ids.  A
    mask that is given besides is `&`-ed to them: src_mask -> (B, H, S, S), for the encoder, and
    tgt_mask -> (B, H, T, T), for the decoder's self-attention.  Which shapes a mask may have:
    see MultiHeadAttention.  Decoder-only: src is None.

    `rng` is a NumPy generator and draws the initial weights: the same seed gives both twins the
    same model.

    Set `right_padded` where the targets' pads all stand at the end: the causal mask then hides them
    from every token by itself, and goes to kernels that know it without reading it.  Logits at the
    tokens and all gradients of a loss that ignores pads are the same.  For the same reason give
    src_mask=masks.FULL where no source has a pad: who makes the batch knows, and to ask the device
    would be to wait for it.
    """

    right_padded = False

    src_embedding: Any  # None where the target's is shared, or there is no encoder
    src_positions: Any  # None where there is no encoder, like the encoder itself
    encoder: Any
    decoder: Any

    def __init__(
        self,
        config: TransformerConfig,
        rng: np.random.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ):
        super().__init__()
        c, rng = config, np.random.default_rng() if rng is None else rng
        self.config = config

        def embedding(vocab_size: int, pad_id: int) -> nn.Embedding:
            return nn.Embedding(vocab_size, c.d_model, padding_idx=pad_id)

        def positions() -> SinusoidalPositions | LearnedPositions:
            kind = SinusoidalPositions if c.positions == "sinusoidal" else LearnedPositions
            return kind(c.max_len, c.d_model)

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
            )

        def final_norm() -> nn.LayerNorm | None:
            return nn.LayerNorm(c.d_model, c.eps) if c.final_norm else None

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
        self.head = None if c.tie_head else nn.Linear(c.d_model, c.tgt_vocab_size)
        self.to(device=device, dtype=dtype)
        self.initialise(rng)

    @torch.no_grad()
    def initialise(self, rng: np.random.Generator) -> None:
        """Matrices Xavier-uniform, biases 0, tables N(0, 1/C) with the pad row 0; norms stay 1, 0.

        Draws in the order of the parameters, which is the order in which the NumPy twin draws.
        """
        c = self.config
        for name, parameter in self.named_parameters():
            shape = tuple(parameter.shape)
            if "embedding" in name or "positions" in name:
                drawn = rng.normal(0, c.d_model**-0.5, shape)
                if "embedding" in name:
                    drawn[c.src_pad_id if name.startswith("src") else c.tgt_pad_id] = 0
                parameter.copy_(torch.from_numpy(drawn))
            elif parameter.ndim == 2:
                bound = math.sqrt(6 / sum(shape))
                parameter.copy_(torch.from_numpy(rng.uniform(-bound, bound, shape)))
            elif "norm" not in name:
                parameter.zero_()

    def forward(
        self,
        src: Tensor | None,
        tgt: Tensor,
        src_mask: Mask = None,
        tgt_mask: Mask = None,
        rng=None,
    ) -> Tensor:
        """logits = decode(tgt, memory) with memory = encode(src); without a source decode(tgt)."""
        self._check_source(src)
        self._check_ids("tgt", "(B, T)", tgt)
        if src is not None and len(src) != len(tgt):
            raise ValueError(f"Transformer: src has {len(src)} samples, tgt has {len(tgt)}")
        if src is None:
            return self.decode(tgt, None, None, tgt_mask, rng)
        memory = self.encode(src, src_mask, rng)  # (B, S, C)
        memory_mask = None if src_mask is FULL else padding_mask(src, self.config.src_pad_id)
        return self.decode(tgt, memory, memory_mask, tgt_mask, rng)  # (B, T, V)

    def encode(self, src: Tensor, src_mask: Mask = None, rng=None) -> Tensor:
        """memory = encoder(embed(src)).   src (B, S)   ->   memory (B, S, C)"""
        self._check_source(src)
        if src_mask is FULL:
            mask = None  # every kernel is faster without one
        else:
            mask = padding_mask(src, self.config.src_pad_id)  # (B, 1, 1, S)
            mask = self._and("src_mask", src_mask, mask, src.shape[1])  # -> (B, H, S, S)
        embedding = self.src_embedding or self.tgt_embedding
        x = self.embed(src, embedding, self.src_positions, rng)  # (B, S, C)
        return self.encoder(x, mask, rng)

    def decode(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        memory_mask: Mask = None,
        tgt_mask: Mask = None,
        rng=None,
    ) -> Tensor:
        """logits = head(y) with y = decoder(embed(tgt), memory).

        tgt (B, T)   memory (B, S, C) or None   ->   logits (B, T, V)
        memory_mask -> (B, H, T, S); None: all of the memory may be attended to
        """
        self._check_ids("tgt", "(B, T)", tgt)
        self._check_memory(memory, memory_mask, tgt)
        if self.right_padded and tgt_mask is None:
            mask = CAUSAL  # a token sees none of the pads, which all come after it
        else:
            causal = causal_mask(tgt.shape[1], device=tgt.device)
            mask = padding_mask(tgt, self.config.tgt_pad_id) & causal
            mask = self._and("tgt_mask", tgt_mask, mask, tgt.shape[1])  # -> (B, H, T, T)
        x = self.embed(tgt, self.tgt_embedding, self.tgt_positions, rng)
        if memory is None:
            y = self.decoder(x, mask, rng)  # (B, T, C)
        else:
            y = self.decoder(x, memory, mask, memory_mask, rng)  # (B, T, C)
        to_logits = self.head or self._tied_head
        return to_logits(y)  # (B, T, V)

    @torch.no_grad()
    def start(self, src: Tensor | None, src_mask: Mask = None) -> Cache:
        """The cache of an answer that has not begun: `src` encoded, and nothing of the target."""
        self._check_source(src)
        if src is None:
            return Cache([LayerCache(None, None) for _ in self.decoder.layers])
        with evaluating(self):
            memory = self.encode(src, src_mask)  # (B, S, C)
        memory_mask = padding_mask(src, self.config.src_pad_id)  # (B, 1, 1, S)
        return Cache(self.decoder.start(memory), None, memory_mask)

    @torch.no_grad()
    def step(self, tgt: Tensor, cache: Cache, tgt_mask: Mask = None) -> tuple[Tensor, Cache]:
        """The logits of the next T tokens alone, from the cache of those before them.

        tgt (B, T)   tgt_mask -> (B, H, T, length + T)   ->   logits (B, T, V), cache

        However a sequence is cut into steps, the logits are those of `infer` on the whole of it.
        A pad counts as a position, so prompts of different lengths are not continued together as
        each is alone.  Dropout is off, in training as well.
        """
        self._check_ids("tgt", "(B, T)", tgt)
        if cache.n_samples not in (None, len(tgt)):
            raise ValueError(
                f"Transformer: tgt has {len(tgt)} samples, the cache has {cache.n_samples}"
            )
        offset = cache.length
        known = padding_mask(tgt, self.config.tgt_pad_id)  # (B, 1, 1, T)
        if cache.tgt_mask is not None:
            known = torch.cat([cache.tgt_mask, known], dim=-1)  # (B, 1, 1, length + T)
        causal = causal_mask(tgt.shape[1], offset=offset, device=tgt.device)
        mask = self._and("tgt_mask", tgt_mask, known & causal, tgt.shape[1])
        x = self.embed(tgt, self.tgt_embedding, self.tgt_positions, offset=offset, p=0.0)
        if cache.memory_mask is None:
            y, layers = self.decoder.step(x, cache.layers, mask)  # (B, T, C)
        else:
            y, layers = self.decoder.step(x, cache.layers, mask, cache.memory_mask)
        to_logits = self.head or self._tied_head
        return to_logits(y), Cache(layers, known, cache.memory_mask)  # (B, T, V)

    def embed(
        self,
        ids: Tensor,
        embedding: nn.Embedding,
        positions: SinusoidalPositions | LearnedPositions,
        rng=None,
        offset: int = 0,
        p: float | None = None,
    ) -> Tensor:
        """x = √C E[ids] + P: the token's row times √C, plus the position's   [§ 3.4].

        ids (B, T)   ->   x (B, T, C)
        p   of dropout; None: that of the config, in training
        """
        scale = math.sqrt(self.config.d_model) if self.config.scale_embedding else 1.0
        try:
            e = embedding(ids)  # (B, T, C)
        except IndexError:
            raise ops.unknown_id("embedding", ids, embedding.num_embeddings) from None
        x = positions(e * scale, offset)
        p = self.config.embedding_dropout if p is None else p
        return ops.dropout(x, p, self.training, rng)

    def _tied_head(self, x: Tensor) -> Tensor:
        """logits = x Wᵀ: the table read the other way, a score for each of its rows   [§ 3.4]."""
        weight = self.tgt_embedding.weight
        is_pad = torch.arange(len(weight), device=weight.device) == self.config.tgt_pad_id
        # The row of the pad gets no gradient
        weight = torch.where(is_pad[:, None], weight.detach(), weight)
        return F.linear(x, weight)

    @torch.no_grad()
    def infer(
        self, src: Tensor | None, tgt: Tensor, src_mask: Mask = None, tgt_mask: Mask = None
    ) -> Tensor:
        """The logits alone, without dropout and without keeping anything for a backward."""
        with evaluating(self):
            return self(src, tgt, src_mask, tgt_mask)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign=False):
        """torch's, but all or nothing: what does not fit is refused before a tensor is written."""
        own = {name: x for name, x in self.state_dict().items() if strict or name in state_dict}
        found = {name: x for name, x in state_dict.items() if strict or name in own}
        for name, x in found.items():
            got = f"a {type(x).__name__}, not a tensor"
            if isinstance(x, Tensor):
                is_number = x.is_floating_point() if assign else not x.is_complex()
                got = "" if is_number else f"{x.dtype}, the model's is {own[name].dtype}"
            if got:
                raise ValueError(f"the weights do not fit this model: {name} is {got}")
        checkpoint.check_state({name: tuple(x.shape) for name, x in own.items()}, found)
        for name, x in found.items():
            try:
                torch.empty_like(own[name]).copy_(x)
            except RuntimeError as error:  # sparse, quantized, or without numbers
                raise ValueError(f"the weights do not fit this model: {name}: {error}") from None
        return super().load_state_dict(state_dict, strict, assign)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which both twins read; see checkpoint.py."""
        checkpoint.save(folder, self.config, {k: as_numpy(x) for k, x in self.state_dict().items()})

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> "Transformer":
        """The model in that folder.  Raises CheckpointError, naming the file and the reason."""
        config, state = checkpoint.load(folder)
        model = cls(config, np.random.default_rng(0), dtype, device)
        with checkpoint.blame(folder):
            model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})
        return model

    def _check_source(self, src: Tensor | None) -> None:
        if (src is None) != (self.encoder is None):
            raise ValueError(
                "Transformer: src must be None, the model is decoder-only"
                if self.encoder is None
                else "Transformer: src is None, but the model has an encoder"
            )
        if src is not None:
            self._check_ids("src", "(B, S)", src)

    def _check_ids(self, name: str, letters: str, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            got = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(
                f"Transformer: {name} must be a tensor {letters} of integer ids, got {got}; "
                "a batch of one sequence is ids[None]"
            )
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"Transformer: {name}: ids must be an integer tensor, int64 or int32, "
                f"got {ids.dtype}"
            )
        if not 1 <= ids.shape[1] <= self.config.max_len:
            raise ValueError(
                f"Transformer: {name} has {ids.shape[1]} positions, the model takes 1 to "
                f"{self.config.max_len} (max_len)"
            )

    def _check_memory(self, memory: Tensor | None, memory_mask: Mask, tgt: Tensor) -> None:
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

    def _and(self, name: str, given: Mask, mask: Tensor, T: int) -> Tensor:
        """A mask that was given allows nothing that ours forbids.   mask (B, 1, T or 1, S)"""
        if given is None:
            return mask
        scores = (len(mask), self.config.n_heads, T, mask.shape[-1])  # (B, H, T, S)
        check_heads_mask("Transformer", given, scores, name)
        return mask & (causal_mask(T, device=mask.device) if given is CAUSAL else given)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards each module is in training that was, and no other."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def as_numpy(x: Tensor) -> np.ndarray:
    """The values on the host; bfloat16, which NumPy lacks, as float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
