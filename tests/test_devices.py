"""The torch twin on a device and in a precision, against the float64 NumPy oracle.

    pytest --device cuda --dtype bfloat16

The rule is that of float32 everywhere (compare.peer_bound): weights and inputs are rounded to the
precision, the oracle calculates with these numbers in float64, and the device may be as far from it
as twice what the CPU is that calculates in the same precision.  TF32 is off, and said so.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import npformer
from npformer import compare
from npformer.testing.conformance import N_NUDGED, stacked
from npformer.testing.models import Batch, batches, configs, make_model, numpy_step
from npformer.testing.strategies import seeds
from torchformer.convert import to_torch


@pytest.fixture(scope="module")
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("--device cuda: torch finds no CUDA device here")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


@pytest.fixture(scope="module")
def dtype(request):
    return getattr(torch, request.config.getoption("--dtype"))


def rounded(model, dtype):
    """The model in float64, its numbers those that `dtype` has."""
    for p in model.parameters():
        p.data[...] = torch.from_numpy(p.data).to(dtype).double().numpy()
    return model


def torch_step(twin, batch, device):
    """Logits, loss and every gradient, in the precision of the twin; the loss in float32."""
    twin = twin.to(device).eval()  # without dropout
    src = None if batch.src is None else torch.tensor(batch.src.astype(np.int64), device=device)
    tgt = torch.tensor(batch.tgt.astype(np.int64), device=device)
    masks = {k: None if m is None else torch.tensor(m.copy(), device=device)
             for k, m in batch.options.items()}  # fmt: skip
    logits = twin(src, tgt[:, :-1], **masks)
    loss = F.cross_entropy(
        logits.float().mT if logits.dtype != torch.float64 else logits.mT,
        tgt[:, 1:],
        ignore_index=twin.config.tgt_pad_id,
        label_smoothing=batch.label_smoothing,
    )
    parameters = dict(twin.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    found = dict(zip(parameters, gradients, strict=True)) | {"logits": logits, "loss": loss}
    return {name: x.detach().cpu().double().numpy() for name, x in found.items()}


def nudged(model, batch, dtype, rng):
    """The oracle's answer where every weight is off by half an ulp of `dtype`."""
    other = npformer.Transformer(model.config, np.random.default_rng(0), np.float64)
    other.load_state_dict(model.state_dict())
    for p in other.parameters():
        p.data *= 1 + torch.finfo(dtype).eps / 2 * rng.choice([-1, 1], p.data.shape)
    return numpy_step(other, batch)


def assert_within_the_rule(name, model, batch, device, dtype):
    oracle = numpy_step(model, batch)
    found = torch_step(to_torch(model).to(dtype), batch, device)
    peer = torch_step(to_torch(model).to(dtype), batch, torch.device("cpu"))
    rng = np.random.default_rng(0)
    off = stacked([nudged(model, batch, dtype, rng) for _ in range(N_NUDGED)])
    eps = torch.finfo(dtype).eps
    floor = max(np.abs(x).max(initial=0) for k, x in oracle.items() if k not in ("logits", "loss"))
    c = model.config
    n = c.d_model + c.d_ff + max(batch.tgt.shape[1], 0 if batch.src is None else batch.src.shape[1])
    for key, expected in oracle.items():
        assert np.isfinite(found[key]).all(), f"{name}: {key} is not finite"
        error = np.abs(peer[key] - expected).max(initial=0)
        error += np.abs(off[key] - expected).max(initial=0)
        scale = np.abs(expected).max(initial=0)
        if key not in ("logits", "loss"):
            scale = max(scale, floor)
        compare.assert_close(f"{name}: {key}", found[key], expected, 2 * error + n * eps * scale)


@settings(max_examples=20)
@given(st.data(), seeds)
def test_logits_loss_and_gradients_are_within_the_rule(device, dtype, data, seed):
    # No relu: a rounding may change a sign, and with it everything after.  eps: see test_encoder.py
    activation = data.draw(st.sampled_from(["gelu", "gelu_tanh"]))
    config = data.draw(configs(activation=activation, eps=1e-2))
    model = rounded(make_model(config, seed), dtype)
    batch = data.draw(batches(config))
    assert_within_the_rule("Transformer", model, batch, device, dtype)


@pytest.mark.parametrize("length", [64, 192, 704])
def test_key_padding_at_lengths_where_kernels_have_been_wrong(length, device, dtype):
    """Masked attention in half precision: some fused kernels gave wrong numbers on some cards."""
    if device.type == "cpu" and length > 64:
        pytest.skip("the kernels in question are those of a GPU: pytest --device cuda")
    config = npformer.TransformerConfig(
        11, 11, 128, 2, 64, 1, 1, max_len=720, activation="gelu", eps=1e-2
    )
    model = rounded(make_model(config, 0), dtype)
    rng = np.random.default_rng(1)
    src, tgt = rng.integers(3, 11, (2, 3, length + 1))
    for row, n in enumerate((length, length // 2 + 1, 1)):
        src[row, n:] = config.src_pad_id
        tgt[row, n + 1 :] = config.tgt_pad_id
    batch = Batch(src[:, :length], tgt, {})
    assert_within_the_rule(f"length {length}", model, batch, device, dtype)


@settings(max_examples=10)
@given(st.data(), seeds)
def test_a_device_decodes_the_tokens_of_numpy(device, data, seed):
    """In float64, where no token is a close call for any of them."""
    from npformer.testing.models import sources

    ids = {"src_pad_id": 0, "tgt_pad_id": 0, "share_embeddings": False}
    config = data.draw(configs(encoder=True, **ids))
    model, src = make_model(config, seed), data.draw(sources(config))
    import torchformer

    twin = to_torch(model).to(device).eval()
    expected = npformer.greedy(model, src, max_len=6)
    assert torchformer.greedy(twin, torch.tensor(src, device=device), max_len=6) == expected
    ours = npformer.beam_search(model, src, max_len=6, num_beams=3)
    theirs = torchformer.beam_search(twin, torch.tensor(src, device=device), max_len=6, num_beams=3)
    assert [h[0].tokens for h in ours] == [h[0].tokens for h in theirs]
