"""What both twins compute, as hashes: equal before and after a change, or the change is not a move.

    python tests/guard.py > before.json      # at one commit
    python tests/guard.py before.json        # at another, on the same machine: says what differs

Fifty configurations, drawn by a seed, in float64: logits, loss, every gradient, the parameters
after two steps of Adam with dropout, greedy answers and beams of npformer; the same of torchformer
but for dropout, whose random numbers are torch's own.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import npformer
import torchformer
from npformer import TransformerConfig
from torchformer.convert import to_torch

N_CONFIGS = 50


def main() -> int:
    found = {
        f"{i:02d} {name}": digest(value)
        for i in range(N_CONFIGS)
        for name, value in (*numpy_results(i), *torch_results(i))
    }
    if len(sys.argv) < 2:
        print(json.dumps(found, indent=0))
        return 0
    with open(sys.argv[1], encoding="utf-8") as file:
        expected = json.load(file)
    differ = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    for name in differ:
        print(name)
    print(f"{len(found) - len(differ)} of {len(found)} results are the same, bit for bit")
    return 1 if differ else 0


def digest(value: Any) -> str:
    data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def drawn(i: int) -> tuple[TransformerConfig, np.ndarray | None, np.ndarray]:
    """A configuration and a batch, of every kind there is."""
    rng = np.random.default_rng(i)
    heads = int(rng.integers(1, 4))
    has_encoder = bool(rng.integers(4))
    config = TransformerConfig(
        11,
        11,
        d_model=heads * 2 * int(rng.integers(1, 4)),
        n_heads=heads,
        d_ff=int(rng.integers(3, 17)),
        n_encoder_layers=int(rng.integers(1, 3)) if has_encoder else 0,
        n_decoder_layers=int(rng.integers(1, 3)),
        max_len=16,
        activation=str(rng.choice(["relu", "gelu", "gelu_tanh"])),
        norm_first=bool(rng.integers(2)),
        positions=str(rng.choice(["sinusoidal", "learned"])),
        share_embeddings=bool(rng.integers(2)) and has_encoder,
        tie_head=bool(rng.integers(2)),
        embedding_dropout=0.1,
        attention_dropout=0.2,
        activation_dropout=0.1,
        sublayer_dropout=0.1,
    )
    B, S, T = rng.integers(1, 5), rng.integers(2, 9), rng.integers(2, 9)
    src, tgt = rng.integers(3, 11, (B, S)), rng.integers(3, 11, (B, T + 1))
    for ids in (src, tgt):
        for row in ids:
            row[rng.integers(1, len(row) + 1) :] = 0
    return config, src if has_encoder else None, tgt


def numpy_results(i: int) -> Iterator[tuple[str, Any]]:
    config, src, tgt = drawn(i)
    model = npformer.Transformer(config, np.random.default_rng(i), np.float64)
    logits, backward = model(src, tgt[:, :-1])
    loss, backward_loss = npformer.cross_entropy(logits, tgt[:, 1:], 0, 0.1)
    backward(backward_loss(1.0))
    yield from (("numpy logits", logits), ("numpy loss", np.asarray(loss)))
    for name, p in model.named_parameters():
        yield f"numpy d {name}", p.grad
    optimizer, rng = npformer.Adam(model.parameters(), 1e-2), np.random.default_rng(i)
    for _ in range(2):
        logits, backward = model(src, tgt[:, :-1], rng=rng)
        _, backward_loss = npformer.cross_entropy(logits, tgt[:, 1:], 0)
        optimizer.zero_grad()
        backward(backward_loss(1.0))
        npformer.clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()
    for name, p in model.named_parameters():
        yield f"numpy stepped {name}", p.data
    if src is not None:
        yield "numpy greedy", npformer.greedy(model, src, max_len=8)
        beams = npformer.beam_search(model, src, max_len=8, num_beams=3)
        yield "numpy beams", [[h.tokens for h in sample] for sample in beams]


def torch_results(i: int) -> Iterator[tuple[str, Any]]:
    config, source, target = drawn(i)
    twin = to_torch(npformer.Transformer(config, np.random.default_rng(i), np.float64)).eval()
    src = None if source is None else torch.tensor(source)
    tgt = torch.tensor(target)
    logits = twin(src, tgt[:, :-1])
    loss = F.cross_entropy(logits.mT, tgt[:, 1:], ignore_index=0, label_smoothing=0.1)
    loss.backward()
    yield from (("torch logits", logits.detach().numpy()), ("torch loss", loss.detach().numpy()))
    for name, p in twin.named_parameters():
        if p.grad is not None:
            yield f"torch d {name}", p.grad.numpy()
    if src is not None:
        yield "torch greedy", torchformer.greedy(twin, src, max_len=8)


if __name__ == "__main__":
    sys.exit(main())
