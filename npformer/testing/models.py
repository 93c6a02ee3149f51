"""Whole models for tests: configurations and batches to draw, and one step of either twin.

config = draw(configs())
batch = draw(batches(config))
assert_same_step("Transformer", numpy_step(model, batch), torch_step(to_torch(model), batch))
"""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from npformer.config import TransformerConfig
from npformer.ops import cross_entropy
from npformer.testing import conformance
from npformer.testing.conformance import Tensors, randomise
from npformer.testing.strategies import masks, sizes, token_batches
from npformer.transformer import Transformer

Array = np.ndarray
KINDS_OF_DROPOUT = [f"{kind}_dropout" for kind in ("embedding", "attention", "activation")]
KINDS_OF_DROPOUT.append("sublayer_dropout")


class Batch(NamedTuple):
    """What a step is given.  tgt (B, T + 1): its first T are read, its last T are asked for."""

    src: Array | None
    tgt: Array
    options: dict[str, Array | None]  # src_mask, tgt_mask
    label_smoothing: float = 0.0


# --- What to draw -----------------------------------------------------------------------------


@st.composite
def configs(draw, encoder: bool | None = None, dropout: bool = False, **fixed: Any):
    """Any model that is small.  `encoder`: with one, without, or either;  `fixed`: some fields."""
    shared = draw(st.booleans())
    heads, d_head, d_ff = draw(st.sampled_from([(1, 5, 7), (2, 3, 11), (3, 4, 7), (4, 2, 13)]))
    src_vocab_size, tgt_vocab_size = (11, 11) if shared else draw(st.permutations([10, 9]))
    values: dict[str, Any] = dict(
        src_vocab_size=src_vocab_size,
        tgt_vocab_size=tgt_vocab_size,
        d_model=heads * d_head,
        n_heads=heads,
        d_ff=d_ff,
        n_encoder_layers=draw(st.integers(0 if not encoder else 1, 0 if encoder is False else 2)),
        n_decoder_layers=draw(st.integers(1, 2)),
        max_len=14,
        tgt_pad_id=draw(st.sampled_from([0, 4, tgt_vocab_size - 1])),
        activation=draw(st.sampled_from(["relu", "gelu", "gelu_tanh"])),
        norm_first=draw(st.booleans()),
        final_norm=draw(st.booleans()),
        positions=draw(st.sampled_from(["sinusoidal", "learned"])),
        scale_embedding=draw(st.booleans()),
        share_embeddings=shared,
        tie_head=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-5, 1e-2])),
    )
    values["src_pad_id"] = values["tgt_pad_id"] if shared else draw(st.sampled_from([0, 5]))
    for kind in KINDS_OF_DROPOUT:
        values[kind] = draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])) if dropout else 0.0
    return TransformerConfig(**(values | fixed))


@st.composite
def batches(draw, config: TransformerConfig, pads: bool = True, given_masks: bool = True):
    """Sequences with pads anywhere, ids of any integer type; at least one target is no pad."""
    B, S, T = draw(sizes("BST", 6))
    src_pad = config.src_pad_id if pads else None
    src = draw(token_batches((B, S), config.src_vocab_size, src_pad))
    tgt = draw(token_batches((B, T + 1), config.tgt_vocab_size, config.tgt_pad_id)).copy()
    tgt[0, -1] = (config.tgt_pad_id + 1) % config.tgt_vocab_size
    if not pads:
        src = np.where(src == config.src_pad_id, (src + 1) % config.src_vocab_size, src)
        tgt = np.where(tgt == config.tgt_pad_id, (tgt + 1) % config.tgt_vocab_size, tgt)
    options = {}
    if given_masks:
        options["tgt_mask"] = draw(masks((B, config.n_heads), T, T))
        if config.n_encoder_layers:
            options["src_mask"] = draw(masks((B, config.n_heads), S, S))
    smoothing = draw(st.sampled_from([0.0, 0.1]))
    return Batch(src if config.n_encoder_layers else None, tgt, options, smoothing)


@st.composite
def models_and_batches(draw, dtype: Any = np.float64, **options: Any):
    """A model in which nothing is at its start, and a batch for it."""
    config = draw(configs(**options))
    return make_model(config, draw(st.integers(0, 2**32 - 1)), dtype), draw(batches(config))


@st.composite
def sources(draw, config: TransformerConfig, most: int = 4) -> Array:
    """A ragged batch: from 1 to 6 tokens each, pads on the right.   -> (B, S)"""
    B, S = draw(st.integers(1, most)), draw(st.integers(1, 6))
    pad = config.src_pad_id
    src = draw(token_batches((B, S), config.src_vocab_size)).astype(np.int64)
    src[src == pad] = (pad + 3) % config.src_vocab_size
    for row, n in zip(src, draw(st.lists(st.integers(1, S), min_size=B, max_size=B)), strict=True):
        row[n:] = pad
    return src


def make_model(config: TransformerConfig, seed: int, dtype: Any = np.float64) -> Transformer:
    model = Transformer(config, np.random.default_rng(seed), dtype)
    randomise(model, seed)
    return model


# --- One step ---------------------------------------------------------------------------------


def numpy_step(model: Transformer, batch: Batch, rng: Any = None) -> Tensors:
    """ "logits", "loss", and the gradient of every parameter by its name."""
    logits, backward_model = model(batch.src, batch.tgt[:, :-1], **batch.options, rng=rng)
    loss, backward_loss = cross_entropy(
        logits, batch.tgt[:, 1:], model.config.tgt_pad_id, batch.label_smoothing
    )
    model.zero_grad()
    backward_model(backward_loss(1.0))
    gradients = {name: p.grad.copy() for name, p in model.named_parameters()}
    return {"logits": logits, "loss": np.asarray(loss)} | gradients


def torch_step(twin: Any, batch: Batch, rng: Any = None) -> Tensors:
    """The same by torchformer and autograd.  `rng` (see replay.py) turns dropout on."""
    import torch
    import torch.nn.functional as F

    twin.train(rng is not None)
    src = None if batch.src is None else torch.tensor(batch.src.astype(np.int64))
    tgt = torch.tensor(batch.tgt.astype(np.int64))
    options = {name: conformance.to_tensor(x) for name, x in batch.options.items()}
    logits = twin(src, tgt[:, :-1], **options, rng=rng)
    loss = F.cross_entropy(
        logits.mT,
        tgt[:, 1:],
        ignore_index=twin.config.tgt_pad_id,
        label_smoothing=batch.label_smoothing,
    )
    parameters = dict(twin.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    found = dict(zip(parameters, gradients, strict=True)) | {"logits": logits, "loss": loss}
    return {name: found[name].detach().numpy() for name in ("logits", "loss", *parameters)}


def assert_same_step(name: str, actual: Tensors, expected: Tensors) -> None:
    """float64: logits and loss to 1e-12, every gradient to 1e-10 of the largest of them all."""
    conformance.assert_same(name, actual, expected, outputs=("logits", "loss"))
