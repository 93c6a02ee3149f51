"""An oracle that we did not write: our weights in torch.nn's own attention, layers and Transformer.

torchformer could share a mistake with npformer, since the same people wrote both.  PyTorch's
modules have other names, stack q, k and v in one matrix, and mean the opposite by a mask's True.
"""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import npformer
import torchformer
from npformer.decoder import DecoderLayer
from npformer.encoder import EncoderLayer
from npformer.testing.conformance import assert_same, randomise
from npformer.testing.models import Batch, assert_same_step, configs, make_model, numpy_step
from npformer.testing.models import torch_step as twin_step
from npformer.testing.strategies import layouts, random_like, seeds, sizes, token_batches
from torchformer.convert import to_torch

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # a fast path of inference
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}
ACTIVATIONS["gelu_tanh"] = lambda x: F.gelu(x, approximate="tanh")


# --- Names ------------------------------------------------------------------------------------


def our_names(theirs):
    """What PyTorch's parameter is called here; three parameters where it has stacked q, k and v."""
    name = theirs.replace("multihead_attn", "cross_attn")
    name = re.sub(r"(^|\.)(linear[12])", r"\1feed_forward.\2", name)
    if "in_proj_" in name:
        return [name.replace("in_proj_", f"{letter}_proj.") for letter in "qkv"]
    return [name]


def load(module, state):
    """Our weights into PyTorch's module; every one of both is used."""
    used = []
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parts = our_names(name)
            parameter.copy_(torch.from_numpy(np.concatenate([state[part] for part in parts])))
            used += parts
    assert sorted(used) == sorted(state)
    return module


def named(module, gradients):
    """PyTorch's gradients by our names."""
    found = {}
    for (name, _), gradient in zip(module.named_parameters(), gradients, strict=True):
        parts = our_names(name)
        found |= dict(zip(parts, gradient.chunk(len(parts)), strict=True))
    return {name: gradient.numpy() for name, gradient in found.items()}


# --- Attention and layers ---------------------------------------------------------------------


@st.composite
def masks_with_a_key(draw, B, H, T, S):
    """(B, H, T, S) or None: a row without any key is 0 here and NaN in torch.nn."""
    if draw(st.booleans()):
        return None
    rng = np.random.default_rng(draw(seeds))
    mask = rng.random((B, H, T, S)) < draw(st.sampled_from([0.2, 0.5, 0.9]))
    mask[..., draw(st.integers(0, S - 1))] = True
    return draw(layouts(mask))


def inverted(mask):
    """As torch.nn wants it: True = may *not* attend, samples and heads as one axis."""
    return None if mask is None else torch.tensor(~mask).flatten(0, 1)


def our_step(module, inputs, options):
    y, backward = module(*inputs.values(), **options)
    gradients = backward(random_like(y.shape, np.float64, y.size))
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    found = {"y": y} | dict(zip(inputs, gradients, strict=True))
    return found | {name: p.grad for name, p in module.named_parameters()}


def oracle_step(module, inputs, options):
    tensors = {name: torch.tensor(x.copy(), requires_grad=True) for name, x in inputs.items()}
    y = module(*tensors.values(), **options)
    y = y[0] if isinstance(y, tuple) else y
    dy = torch.tensor(random_like(tuple(y.shape), np.float64, y.numel()).copy())
    gradients = torch.autograd.grad(y, [*tensors.values(), *module.parameters()], dy)
    found = {"y": y.detach().numpy()}
    found |= {name: g.numpy() for name, g in zip(tensors, gradients, strict=False)}
    return found | named(module, gradients[len(tensors) :])


@st.composite
def layers(draw, names, make):
    """One of our modules with inputs by name and masks: the first input is (B, T, C)."""
    B, T, S, H, D, d_ff = draw(sizes("BTSHDF", 6))
    seed = draw(seeds)
    lengths = dict(zip(names, [T, *[S] * (len(names) - 1)], strict=True))
    inputs = {
        name: draw(layouts(random_like((B, n, H * D), np.float64, seed + n)))
        for name, n in lengths.items()
    }
    options = {"mask": draw(masks_with_a_key(B, H, T, S if "key" in names else T))}
    if "memory" in names:
        options["memory_mask"] = draw(masks_with_a_key(B, H, T, S))
    kind = {
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "norm_first": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-5, 1e-2])),
    }
    rng = np.random.default_rng(seed)
    return randomise(make(H * D, H, d_ff, kind, rng), seed), inputs, options, (H * D, H, d_ff, kind)


def attention(C, H, d_ff, kind, rng):
    return npformer.MultiHeadAttention(C, H, rng=rng, dtype=np.float64)


def encoder_layer(C, H, d_ff, kind, rng):
    return EncoderLayer(C, H, d_ff, **kind, rng=rng, dtype=np.float64)


def decoder_layer(C, H, d_ff, kind, rng):
    return DecoderLayer(C, H, d_ff, **kind, rng=rng, dtype=np.float64)


def of_torch(Layer, C, H, d_ff, kind):
    return Layer(
        C,
        H,
        d_ff,
        dropout=0.0,
        activation=ACTIVATIONS[kind["activation"]],
        layer_norm_eps=kind["eps"],
        batch_first=True,
        norm_first=kind["norm_first"],
        dtype=torch.float64,
    )


@given(layers(("query", "key", "value"), attention))
def test_attention_is_that_of_torch(drawn):
    module, inputs, options, (C, H, *_) = drawn
    theirs = nn.MultiheadAttention(C, H, batch_first=True, dtype=torch.float64)
    load(theirs, module.state_dict())
    expected = oracle_step(
        theirs, inputs, {"attn_mask": inverted(options["mask"]), "need_weights": False}
    )
    assert_same("MultiHeadAttention", our_step(module, inputs, options), expected)


@given(layers(("x",), encoder_layer))
def test_the_encoder_layer_is_that_of_torch(drawn):
    module, inputs, options, sizes_and_kind = drawn
    theirs = load(of_torch(nn.TransformerEncoderLayer, *sizes_and_kind), module.state_dict())
    expected = oracle_step(theirs, inputs, {"src_mask": inverted(options["mask"])})
    assert_same("EncoderLayer", our_step(module, inputs, options), expected)


@given(layers(("x", "memory"), decoder_layer))
def test_the_decoder_layer_is_that_of_torch(drawn):
    module, inputs, options, sizes_and_kind = drawn
    theirs = load(of_torch(nn.TransformerDecoderLayer, *sizes_and_kind), module.state_dict())
    masks = {"tgt_mask": options["mask"], "memory_mask": options["memory_mask"]}
    expected = oracle_step(theirs, inputs, {name: inverted(x) for name, x in masks.items()})
    assert_same("DecoderLayer", our_step(module, inputs, options), expected)


# --- The whole model --------------------------------------------------------------------------


class Reference(nn.Module):
    """torch.nn.Transformer, and around it what it leaves out: embeddings, positions and a head."""

    def __init__(self, config, state):
        super().__init__()
        c = self.config = config
        kind = {"dtype": torch.float64}
        if not c.share_embeddings:
            self.src_embedding = nn.Embedding(c.src_vocab_size, c.d_model, c.src_pad_id, **kind)
        if c.positions == "learned":
            self.src_positions = nn.Embedding(c.max_len, c.d_model, **kind)
        self.transformer = nn.Transformer(
            c.d_model,
            c.n_heads,
            c.n_encoder_layers,
            c.n_decoder_layers,
            c.d_ff,
            dropout=0.0,
            activation=ACTIVATIONS[c.activation],
            layer_norm_eps=c.eps,
            batch_first=True,
            norm_first=c.norm_first,
            **kind,
        )
        if not c.final_norm:  # which torch.nn.Transformer always has
            self.transformer.encoder.norm = self.transformer.decoder.norm = None
        self.tgt_embedding = nn.Embedding(c.tgt_vocab_size, c.d_model, c.tgt_pad_id, **kind)
        if c.positions == "learned":
            self.tgt_positions = nn.Embedding(c.max_len, c.d_model, **kind)
        self.head = nn.Linear(c.d_model, c.tgt_vocab_size, **kind)
        load(self, state)

    def named_parameters(self, *args, **kwargs):
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.removeprefix("transformer."), parameter

    def parameters(self, recurse=True):
        return (parameter for _, parameter in self.named_parameters())

    def embed(self, side, ids):
        embedding = getattr(self, f"{side}_embedding", self.tgt_embedding)
        C, n = self.config.d_model, ids.shape[1]
        scale = C**0.5 if self.config.scale_embedding else 1.0
        if self.config.positions == "learned":
            return embedding(ids) * scale + getattr(self, f"{side}_positions").weight[:n]
        # § 3.5, written as it is printed: PE(pos, 2i) and PE(pos, 2i + 1)
        table = torch.zeros(n, C, dtype=torch.float64)
        for position in range(n):
            for column in range(C):
                angle = position / 10000 ** (2 * (column // 2) / C)
                table[position, column] = np.sin(angle) if column % 2 == 0 else np.cos(angle)
        return embedding(ids) * scale + table

    def forward(self, src, tgt, src_mask, tgt_mask):
        c = self.config
        src_pads, tgt_pads = src == c.src_pad_id, tgt == c.tgt_pad_id
        causal = torch.ones(tgt.shape[1], tgt.shape[1], dtype=torch.bool).triu(1)
        y = self.transformer(
            self.embed("src", src),
            self.embed("tgt", tgt),
            src_mask=src_mask,
            tgt_mask=causal if tgt_mask is None else causal | tgt_mask,
            src_key_padding_mask=src_pads,
            tgt_key_padding_mask=tgt_pads,
            memory_key_padding_mask=src_pads,
        )
        return self.head(y)


@st.composite
def models_and_batches(draw):
    """Any model with an encoder; batches in which every query has something to attend to."""
    config = draw(configs(encoder=True, tie_head=False))
    B, S, T = draw(sizes("BST", 6))
    src = draw(token_batches((B, S), config.src_vocab_size, config.src_pad_id)).copy()
    tgt = draw(token_batches((B, T + 1), config.tgt_vocab_size, config.tgt_pad_id)).copy()
    kept = draw(st.integers(0, S - 1))  # this source token and the first target are never pads
    src[:, kept] = (config.src_pad_id + 1) % config.src_vocab_size
    tgt[:, 0] = tgt[0, -1] = (config.tgt_pad_id + 1) % config.tgt_vocab_size
    options = {}
    for name, n, key in (("src_mask", S, kept), ("tgt_mask", T, 0)):
        mask = draw(masks_with_a_key(B, config.n_heads, n, n))
        if mask is not None:
            mask = mask.copy()
            mask[..., key] = True
        options[name] = mask
    batch = Batch(src, tgt, options, draw(st.sampled_from([0.0, 0.1])))
    return make_model(config, draw(seeds)), batch


def reference_step(reference, batch):
    src, tgt = (torch.tensor(x.astype(np.int64)) for x in (batch.src, batch.tgt))
    masks = {name: inverted(mask) for name, mask in batch.options.items()}
    logits = reference(src, tgt[:, :-1], **masks)
    pad, smoothing = reference.config.tgt_pad_id, batch.label_smoothing
    loss = F.cross_entropy(
        logits.flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=pad, label_smoothing=smoothing
    )
    gradients = torch.autograd.grad(loss, list(reference.parameters()), materialize_grads=True)
    found = {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    return found | named(reference, gradients)


@given(models_and_batches())
def test_the_whole_model_is_torchs_transformer(drawn):
    model, batch = drawn
    expected = reference_step(Reference(model.config, model.state_dict()), batch)
    assert_same_step("npformer in torch.nn.Transformer", numpy_step(model, batch), expected)
    twin = to_torch(model)
    assert isinstance(twin, torchformer.Transformer)
    assert_same_step("torchformer in torch.nn.Transformer", twin_step(twin, batch), expected)
