"""The whole model, NumPy against torchformer: logits, loss and the gradient of every parameter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import npformer
import torchformer
from npformer.compare import max_norm_error
from npformer.ops import cross_entropy
from npformer.tasks import Batch
from torchformer.captured import options_of
from torchformer.convert import to_numpy, to_torch
from torchformer.masks import CAUSAL, FULL
from torchformer.training import add_gradients

OUTPUT, GRADIENT = 1e-12, 1e-10  # the contract, in float64


@st.composite
def configs(draw):
    shared = draw(st.booleans())
    heads = draw(st.sampled_from([1, 2, 3]))
    return npformer.TransformerConfig(
        src_vocab_size=11,
        tgt_vocab_size=11 if shared else 9,
        d_model=heads * draw(st.sampled_from([3, 4, 5])),
        n_heads=heads,
        d_ff=draw(st.sampled_from([7, 16])),
        n_encoder_layers=draw(st.integers(0, 2)),
        n_decoder_layers=draw(st.integers(1, 2)),
        max_len=12,
        activation=draw(st.sampled_from(["relu", "gelu", "gelu_tanh"])),
        norm_first=draw(st.booleans()),
        final_norm=draw(st.sampled_from([None, True, False])),
        positions=draw(st.sampled_from(["sinusoidal", "learned"])),
        scale_embedding=draw(st.booleans()),
        share_embeddings=shared,
        tie_head=draw(st.booleans()),
    )


def trained_like(config: npformer.TransformerConfig, rng) -> npformer.Transformer:
    """Biases not 0 and LayerNorm weights not 1: a forgotten one would not show otherwise."""
    model = npformer.Transformer(config, rng, np.float64)
    for _, parameter in model.named_parameters():
        if parameter.data.ndim == 1:
            parameter.data += 0.3 * rng.standard_normal(parameter.data.shape)
    return model


@settings(max_examples=40)
@given(configs(), st.integers(0, 2**32 - 1))
def test_logits_loss_and_every_gradient_agree_in_float64(config, seed):
    rng = np.random.default_rng(seed)
    model = trained_like(config, rng)
    src, tgt = rng.integers(1, 11, (3, 7)), rng.integers(1, 9, (3, 6))
    src[1, 4:] = 0
    src[2, :2] = 0
    tgt[2, 3:] = 0
    if config.n_encoder_layers == 0:
        src = None
    logits, backward_model = model(src, tgt[:, :-1])
    loss, backward_loss = cross_entropy(logits, tgt[:, 1:], ignore_index=0, label_smoothing=0.1)
    model.zero_grad()
    backward_model(backward_loss(1.0))

    twin = to_torch(model).eval()
    targets = torch.from_numpy(tgt)
    theirs = twin(None if src is None else torch.from_numpy(src), targets[:, :-1])
    their_loss = F.cross_entropy(theirs.mT, targets[:, 1:], ignore_index=0, label_smoothing=0.1)
    their_loss.backward()

    expected = theirs.detach().numpy()
    assert max_norm_error(logits, expected, abs(expected).max()) <= OUTPUT
    assert abs(loss - their_loss.item()) <= OUTPUT * abs(loss)
    ours = {name: p.grad for name, p in model.named_parameters()}
    gradients = {
        name: torch.zeros_like(p).numpy() if p.grad is None else p.grad.numpy()
        for name, p in twin.named_parameters()
    }
    assert list(ours) == list(gradients)
    scale = max(abs(g).max() for g in gradients.values())
    errors = {name: max_norm_error(ours[name], g, scale) for name, g in gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= GRADIENT, f"the gradient of {worst}: {errors[worst]:.2g}"


@settings(max_examples=20)
@given(configs(), st.integers(0, 2**32 - 1))
def test_sources_without_a_pad_need_no_mask(config, seed):
    """masks.FULL, as the trainers say it of a batch: no attention gets a mask that is read."""
    config = replace(config, n_encoder_layers=config.n_encoder_layers or 1)
    rng = np.random.default_rng(seed)
    twin = to_torch(trained_like(config, rng)).eval()
    twin.right_padded = True
    src, tgt = rng.integers(1, 11, (3, 7)), rng.integers(1, 9, (3, 6))
    tgt[2, 3:] = 0
    seen, attention = [], torchformer.ops.attention

    def watching(q, k, v, mask=None, p=0.0, rng=None):
        seen.append(mask)
        return attention(q, k, v, mask, p, rng)

    def step(src, **options):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torchformer.ops, "attention", watching)
            twin.zero_grad()
            batch = torch.from_numpy(src), torch.from_numpy(tgt)
            loss = add_gradients(twin, batch, 13, label_smoothing=0.1, **options)
        return {"loss": loss.numpy()} | {n: p.grad.numpy() for n, p in twin.named_parameters()}

    assert options_of(Batch(src, tgt)) == {"src_mask": FULL}
    expected, masked = step(src), [isinstance(mask, torch.Tensor) for mask in seen]
    assert masked.count(True) == config.n_encoder_layers + config.n_decoder_layers
    found = step(src, src_mask=FULL)
    assert not any(isinstance(mask, torch.Tensor) for mask in seen)
    assert [mask for mask in seen if mask is not None] == [CAUSAL] * config.n_decoder_layers
    assert abs(found.pop("loss") - expected["loss"]) <= OUTPUT * abs(expected.pop("loss"))
    scale = max(abs(g).max() for g in expected.values())
    for name, g in expected.items():
        assert max_norm_error(found[name], g, scale) <= GRADIENT, name
    src[1, 4:] = 0
    assert options_of(Batch(src, tgt)) == {}


@pytest.mark.parametrize("tie_head", [True, False])
def test_one_seed_gives_both_twins_the_same_weights(tie_head):
    config = npformer.TransformerConfig(11, 9, d_model=12, n_heads=3, d_ff=20, tie_head=tie_head)
    for ours, theirs in ((np.float32, torch.float32), (np.float64, torch.float64)):
        model = npformer.Transformer(config, np.random.default_rng(5), ours)
        twin = torchformer.Transformer(config, np.random.default_rng(5), theirs)
        assert list(model.state_dict()) == list(twin.state_dict())
        for name, x in twin.state_dict().items():
            np.testing.assert_array_equal(model.state_dict()[name], x.numpy(), err_msg=name)


def test_conversion_and_checkpoints_are_exact_in_both_directions(tmp_path):
    config = npformer.TransformerConfig(11, 9, d_model=12, n_heads=3, d_ff=20, norm_first=True)
    model = npformer.Transformer(config, np.random.default_rng(5))
    model.save(tmp_path / "a")
    twin = torchformer.Transformer.load(tmp_path / "a")
    twin.save(tmp_path / "b")
    for other in (to_numpy(to_torch(model)), npformer.Transformer.load(tmp_path / "b")):
        assert other.config == config
        for name, x in model.state_dict().items():
            np.testing.assert_array_equal(x, other.state_dict()[name], err_msg=name)


def test_both_decode_the_same_tokens():
    config = npformer.TransformerConfig(11, 9, d_model=12, n_heads=3, d_ff=20, max_len=12)
    rng = np.random.default_rng(1)
    model = trained_like(config, rng)
    model.head.bias.data[2] += 1.5  # so that samples stop at different times
    src = rng.integers(1, 11, (20, 7))
    src[::3, 4:] = 0
    ours = npformer.greedy(model, src, max_len=10)
    theirs = torchformer.greedy(to_torch(model).eval(), torch.from_numpy(src), max_len=10)
    assert ours == theirs
    assert len({len(answer) for answer in ours}) > 1, "all stop at once: nothing was tested"
