"""Is what is timed the function that it should be?  Against the NumPy twin, before any figure."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

import npformer
from benchmarks.gpu.bench import Bench, Rows
from benchmarks.gpu.shapes import Setting, config_of
from benchmarks.gpu.steps import compile_layers, written_out_attention
from npformer import TransformerConfig, compare
from npformer.tasks import Batch
from torchformer.captured import options_of
from torchformer.convert import to_torch
from torchformer.training import add_gradients, count_targets
from torchformer.transformer import as_numpy

Tensors = dict[str, np.ndarray]
OUTPUTS = ("logits", "loss")
N_NUDGED = 4


class Case(NamedTuple):
    config: TransformerConfig
    batch: Batch
    precision: str
    compiled: bool
    change: Callable[[Any], None] | None = None  # of the model on the device: a lever


def parity(bench: Bench, seconds: float) -> Rows:
    """By the peer rule (compare.peer_bounds), from the NumPy twin in float64.

    The peer does the same on the CPU in the same precision, eager, with attention written out.
    Small models in every precision, then one layer of each kind as A, B and C have them, compiled
    as they are timed, at lengths where fused kernels have been wrong (128 k + 64), with pads.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    rows: Rows = {}
    for name, case in cases(bench).items():
        rows[name] = compared(case, bench.device)
        bench.give("parity", rows)
    return rows


def cases(bench: Bench) -> dict[str, Case]:
    found = {}
    for kind, layers in (("encoder-decoder", (2, 2)), ("decoder-only", (0, 2))):
        config = without_kink(config_of(layers, 64, 4, 96, 33))
        for precision in ("float64", "float32", "bfloat16"):
            found[f"{kind}, {precision}"] = Case(config, padded(config, 4, 32), precision, False)
    lengths = {"A": 128 + 64, "B": 8 * 128 + 64, "C": 2 * 128 + 64}
    for name, setting in bench.settings.items():
        T = lengths[name] if bench.clock.is_cuda else 64
        config = one_layer(setting, T)
        found[f"layers of {name}, compiled, {T}"] = Case(
            config, padded(config, 3, T), "bfloat16", True
        )
    return found


def without_kink(config: TransformerConfig) -> TransformerConfig:
    """GELU, not ReLU: a rounding must not change a sign, and with it everything after."""
    return replace(config, activation="gelu_tanh")


def one_layer(setting: Setting, length: int) -> TransformerConfig:
    """Of the encoder, where there is one, and of the decoder; with a small vocabulary."""
    c = setting.config
    few = {"n_encoder_layers": min(c.n_encoder_layers, 1), "n_decoder_layers": 1}
    few |= {"src_vocab_size": 128, "tgt_vocab_size": 128, "max_len": length}
    return without_kink(replace(c, **few))


def padded(config: TransformerConfig, B: int, T: int) -> Batch:
    """Sources and targets of all lengths from one token to T."""
    rng, lengths = np.random.default_rng(1), np.linspace(T, 1, B).astype(int)[:, np.newaxis]
    src = rng.integers(3, config.src_vocab_size, (B, T)) * (np.arange(T) < lengths)
    tgt = rng.integers(3, config.tgt_vocab_size, (B, T + 1)) * (np.arange(T + 1) <= lengths)
    return Batch(src, tgt)


def compared(case: Case, device: torch.device) -> Rows:
    model = rounded(case)
    oracle = oracle_of(model, case.batch)
    found = twin(model, case, device)
    with written_out_attention():
        peer = twin(model, case._replace(compiled=False, change=None), torch.device("cpu"))
    others = [oracle_of(off_by_a_rounding(model, case, i), case.batch) for i in range(N_NUDGED)]
    nudged = {name: np.stack([other[name] for other in others]) for name in oracle}
    n = compare.roundings_of_a_step(case.config, case.batch.src.shape[1], case.precision)
    bounds = compare.peer_bounds(peer, oracle, nudged, n, OUTPUTS, case.precision)
    used = {row.name: row.tolerances for row in compare.compare_tensors(found, oracle, bounds)}
    largest = max(float(np.abs(x).max()) for name, x in oracle.items() if name not in OUTPUTS)
    errors = {name: float(np.abs(found[name] - x).max()) for name, x in oracle.items()}
    worst = max(used, key=lambda name: used[name])
    return {
        "logits": errors["logits"] / float(np.abs(oracle["logits"]).max()),
        "gradients": max(e for name, e in errors.items() if name not in OUTPUTS) / largest,
        "worst": worst,
        "of_allowed": used[worst],
        "ok": all(u <= 1 for u in used.values()),
    }


def rounded(case: Case) -> npformer.Transformer:
    """In float64, with weights that the precision has."""
    model = npformer.Transformer(case.config, np.random.default_rng(0), np.float64)
    for p in model.parameters():
        p.data[...] = torch.from_numpy(p.data).to(getattr(torch, case.precision)).double().numpy()
    return model


def off_by_a_rounding(model: npformer.Transformer, case: Case, seed: int) -> npformer.Transformer:
    rng = np.random.default_rng(seed)
    other = npformer.Transformer(case.config, np.random.default_rng(0), np.float64)
    other.load_state_dict(model.state_dict())
    for p in other.parameters():
        p.data *= 1 + compare.eps(case.precision) / 2 * rng.choice([-1, 1], p.data.shape)
    return other


def oracle_of(model: npformer.Transformer, batch: Batch) -> Tensors:
    """Loss, logits where they count, and every gradient, by npformer."""
    src = batch.src if model.config.n_encoder_layers else None
    logits, backward = model(src, batch.tgt_in)
    loss, backward_loss = npformer.cross_entropy(logits, batch.tgt_out, 0)
    backward(backward_loss(1.0))
    asked = (batch.tgt_out != 0)[..., np.newaxis]
    found = {"loss": np.asarray(loss), "logits": logits * asked}
    return found | {name: p.grad for name, p in model.named_parameters()}


def twin(model: npformer.Transformer, case: Case, device: torch.device) -> Tensors:
    """The same by torchformer; bfloat16 is by autocast, as it is timed."""
    dtype = torch.float64 if case.precision == "float64" else torch.float32
    twin = to_torch(model).to(device, dtype)
    twin.right_padded = True
    if case.change:
        case.change(twin)
    if case.compiled:
        compile_layers(twin, device)
    src, tgt = (torch.tensor(ids, device=device) for ids in case.batch)
    has_source = case.config.n_encoder_layers > 0
    kept: dict[str, Any] = {}
    hook = twin.register_forward_hook(lambda module, args, y: kept.update(logits=y.detach()))
    precision = "bfloat16" if case.precision == "bfloat16" else "float32"
    loss = add_gradients(
        twin,
        (src if has_source else None, tgt),
        count_targets(tgt),
        precision=precision,
        **(options_of(case.batch) if has_source else {}),
    )
    hook.remove()
    asked = (tgt[:, 1:] != 0)[..., None]
    found = {"loss": loss, "logits": kept["logits"] * asked}
    found |= {name: p.grad for name, p in twin.named_parameters()}
    return {name: as_numpy(x.double()) for name, x in found.items()}
