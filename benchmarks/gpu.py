"""torchformer on a GPU: one command, ten minutes, and all that is worth knowing of the card."""

import argparse
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import npformer
import torchformer
from benchmarks import harness
from benchmarks.configs import Size
from benchmarks.torch_reference import TorchTransformer, to_reference
from npformer import TransformerConfig
from torchformer import fast
from torchformer.decoder import DecoderLayer
from torchformer.encoder import EncoderLayer
from torchformer.training import cross_entropy

DESCRIPTION = """\
Measure torchformer on one GPU, in this order, as far as the budget goes: the card's ceilings;
parity with the NumPy twin; training of the configurations B, A (beside torch.nn.Transformer, on
full batches and on ragged ones) and C; decoding; the attention kernels; the ladder from NumPy
float64 to a compiled bf16 step; where the GPU first wins; where a step's time goes.

bench.json is written after every section, report.md and the plots from it at the end.  With
--device cpu the same code runs on toy sizes: to see that it works, not for its figures.

  python -m benchmarks.gpu --out gpu-results
"""
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
        "A": Setting(config_of((1, 1), 64, 4, 128, 16), 4, 16),
        "B": Setting(config_of((0, 2), 64, 4, 128, 48), 4, 32),
        "C": Setting(config_of((0, 3), 96, 4, 128, 48), 2, 32),
    }


# --- Time -------------------------------------------------------------------------------------


class Clock:
    """Seconds on the device: CUDA events, or the CPU's clock."""

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"

    def seconds(self, call: Callable[[], Any], n: int) -> float:
        """Of one of n calls."""
        if not self.is_cuda:
            start = time.perf_counter()
            for _ in range(n):
                call()
            return (time.perf_counter() - start) / n
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / n

    def compare(
        self, calls: dict[str, Callable[[], Any]], seconds: float, warm_up: int = 3
    ) -> dict[str, dict[str, float]]:
        """Medians and spreads of all, in turns (A B A B), within about so many seconds."""
        n = {}
        for name, call in calls.items():
            for _ in range(warm_up):
                call()
            once = max(self.seconds(call, 1), 1e-6)
            n[name] = max(1, round(seconds / len(calls) / 5 / once))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(5):
            for name, call in calls.items():
                samples[name].append(self.seconds(call, n[name]))
        return {
            name: {
                "seconds": statistics.median(s),
                "spread": (max(s) - min(s)) / 2 / statistics.median(s),
            }
            for name, s in samples.items()
        }


# --- One training step ------------------------------------------------------------------------


Batch = tuple[Tensor, Tensor, Tensor]  # src (B, S), tgt (B, T), targets (B, T); 0 is a pad


def full_batches(setting: Setting) -> list[Batch]:
    """Four, random and without a pad."""
    ids = np.random.default_rng(0).integers(
        3, setting.config.tgt_vocab_size, (4, 3, setting.batch, setting.length)
    )
    return [as_batch(batch) for batch in ids]


def as_batch(ids: np.ndarray) -> Batch:
    src, tgt, targets = (torch.tensor(x) for x in ids)
    return src, tgt, targets


def ragged_batches(setting: Setting, by_length: bool) -> list[Batch]:
    """Four, of lengths from a quarter of the full one to all of it, one for each pair.

    by_length: pairs of like length together, padded to the longest among them (and to a multiple
    of 8, as tensor cores like it).  Else as they come, padded to the full length.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(setting.length // 4, setting.length + 1, 4 * setting.batch)
    shape = (3, len(lengths), setting.length)
    ids = rng.integers(3, setting.config.tgt_vocab_size, shape)
    ids *= np.arange(setting.length) < lengths[:, np.newaxis]
    order = np.argsort(lengths, kind="stable") if by_length else np.arange(len(lengths))
    batches = []
    for chosen in np.split(order, 4):
        longest = math.ceil(lengths[chosen].max() / 8) * 8 if by_length else setting.length
        batches.append(as_batch(ids[:, chosen, :longest]))
    return batches


class Step:
    """Forward, loss, backward, clip, optimizer; another batch each time."""

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        *,
        model: nn.Module | None = None,
        batches: list[Batch] | None = None,
        bf16: bool = True,
        compiled: bool = True,
        fused: bool = True,
    ):
        c = setting.config
        self.device, self.bf16 = device, bf16
        if model is None:
            twin = torchformer.Transformer(c, np.random.default_rng(0), device=device)
            twin.right_padded = True
            if compiled:
                for layer in twin.modules():
                    if isinstance(layer, EncoderLayer | DecoderLayer):
                        layer.compile(fullgraph=True, dynamic=False)
            model = twin
        self.model: Any = model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=fused or None)
        self.batches = [
            tuple(x.to(device) for x in batch) for batch in batches or full_batches(setting)
        ]
        self.has_source, self.i = c.n_encoder_layers > 0, 0
        self.cross_entropy = (
            torch.compile(cross_entropy, dynamic=False) if compiled else cross_entropy
        )

    def loss(self) -> Tensor:
        src, tgt, targets = self.batches[self.i]
        self.i = (self.i + 1) % len(self.batches)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(src if self.has_source else None, tgt)
        return self.cross_entropy(logits, targets)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def all_batches(self) -> None:
        """A step with each: with batches of several shapes, this is what is timed."""
        for _ in self.batches:
            self()


def flops_per_token(setting: Setting) -> float:
    """Of forward and backward: 6 for each weight that multiplies, and attention's own products."""
    c = setting.config
    C, T = c.d_model, setting.length
    layer = 4 * C * C + 2 * C * c.d_ff
    if not c.n_encoder_layers:
        weights = c.n_decoder_layers * layer + C * c.tgt_vocab_size
        return 6 * weights + 12 * c.n_decoder_layers * T * C / 2  # causal: half of the scores
    per_pair = c.n_encoder_layers * (6 * layer + 12 * T * C)
    per_pair += c.n_decoder_layers * (6 * (layer + 4 * C * C) + 12 * T * C * 1.5)
    return (per_pair + 6 * C * c.tgt_vocab_size) / 2  # of a source token and a target token


# --- The sections -----------------------------------------------------------------------------


class Bench:
    """What the sections share."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.budget, self.start = device, seconds, time.monotonic()
        self.clock = Clock(device)
        self.settings = settings(device)
        self.results: dict[str, Any] = {}

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.start)

    def train(self, name: str, seconds: float) -> dict[str, Any]:
        setting = self.settings[name]
        measured = self.clock.compare({name: Step(setting, self.device)}, seconds)[name]
        return self.row(setting, measured)

    def row(self, setting: Setting, measured: dict[str, float]) -> dict[str, Any]:
        speed = setting.tokens / measured["seconds"]
        flops = speed * flops_per_token(setting)
        found = {**measured, "tokens_per_second": speed, "tflops": flops / 1e12}
        ceiling = self.results.get("ceilings", {}).get("bf16_tflops")
        if ceiling:
            found["of_measured_ceiling"] = flops / 1e12 / ceiling
        if sheet := datasheet(self.device):
            found["of_datasheet"] = flops / 1e12 / sheet[0]
        return found


def datasheet(device: torch.device) -> tuple[float, float] | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((figures for card, figures in DATASHEET.items() if card in name), None)


def ceilings(bench: Bench, seconds: float) -> dict[str, Any]:
    """What the card can do at best: products, copies, launches."""
    n = 8192 if bench.clock.is_cuda else 256
    found: dict[str, Any] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
        took = bench.clock.compare({name: lambda a=a, b=b: a @ b}, seconds / 4)[name]["seconds"]
        found[f"{name}_tflops"] = 2 * n**3 / took / 1e12
    x = torch.empty(2**28 if bench.clock.is_cuda else 2**20, device=bench.device)
    y = torch.empty_like(x)
    took = bench.clock.compare({"copy": lambda: y.copy_(x)}, seconds / 4)["copy"]["seconds"]
    found["copy_tb_per_s"] = 2 * x.nbytes / took / 1e12
    tiny = torch.zeros(1, device=bench.device)
    took = bench.clock.compare({"launch": lambda: tiny.add_(1)}, seconds / 8)["launch"]["seconds"]
    found["launch_us"] = 1e6 * took
    return found


def parity(bench: Bench, seconds: float) -> dict[str, Any]:
    """Against the NumPy twin in float64: the largest error of logits and of any gradient."""
    rows = {}
    for kind, layers in (("encoder-decoder", (2, 2)), ("decoder-only", (0, 2))):
        config = config_of(layers, 64, 4, 96, 33)
        oracle = npformer.Transformer(config, np.random.default_rng(0), np.float64)
        rng = np.random.default_rng(1)
        src, tgt, targets = rng.integers(3, 96, (3, 4, 32))
        has_source = layers[0] > 0
        logits, backward = oracle(src if has_source else None, tgt)
        _, backward_loss = npformer.cross_entropy(logits, targets)
        backward(backward_loss(1.0))
        expected = {name: p.grad for name, p in oracle.named_parameters()}
        largest = max(float(np.abs(g).max()) for g in expected.values())
        for precision in ("float64", "float32", "bfloat16"):
            dtype = torch.float64 if precision == "float64" else torch.float32
            twin = torchformer.Transformer(config, np.random.default_rng(0), dtype, bench.device)
            twin.right_padded = True
            ids = [torch.tensor(x, device=bench.device) for x in (src, tgt, targets)]
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                found = twin(ids[0] if has_source else None, ids[1])
            found = found.float() if precision != "float64" else found
            F.cross_entropy(found.flatten(0, 1), ids[2].flatten()).backward()
            errors = {
                name: float(np.abs(p.grad.double().cpu().numpy() - expected[name]).max())
                for name, p in twin.named_parameters()
                if p.grad is not None
            }
            off = np.abs(found.detach().double().cpu().numpy() - logits).max()
            rows[f"{kind}, {precision}"] = {
                "logits": float(off / np.abs(logits).max()),
                "gradients": max(errors.values()) / largest,
                "worst": max(errors, key=lambda name: errors[name]),
                "finite": all(math.isfinite(e) for e in errors.values()),
            }
    return rows


class Reference(TorchTransformer):
    """torch.nn.Transformer with the weights of a torchformer of A, and masks for its pads."""

    def __init__(self, setting: Setting, masks: bool):
        c = setting.config
        shape = (c.d_model, c.n_encoder_layers, c.n_heads, c.d_ff, c.tgt_vocab_size)
        super().__init__(Size("A", *shape, setting.batch, setting.length), masks=masks)
        self.src_embedding = self.tgt_embedding
        self.head = nn.Linear(c.d_model, c.tgt_vocab_size, bias=False)
        self.head.weight = self.tgt_embedding.weight
        weights = npformer.Transformer(c, np.random.default_rng(0)).state_dict()
        state = {name: torch.from_numpy(w) for name, w in to_reference(weights).items()}
        missing, unexpected = self.load_state_dict(state, strict=False)
        assert set(missing) <= {"src_embedding.weight", "head.weight"}, missing  # the same weight
        assert not unexpected, unexpected


def contenders_a(
    bench: Bench, ours: list[Batch], theirs: list[Batch], masks: bool
) -> dict[str, Step]:
    """torchformer, and torch.nn.Transformer with the same weights."""
    setting = bench.settings["A"]

    def reference(bf16: bool, compiled: bool) -> Step:
        model: Any = Reference(setting, masks).to(bench.device)
        model = torch.compile(model) if compiled else model
        return Step(
            setting, bench.device, model=model, batches=theirs, bf16=bf16, compiled=compiled
        )

    steps = {"torchformer": Step(setting, bench.device, batches=ours)}
    if not masks:
        steps["nn.Transformer, eager float32"] = reference(bf16=False, compiled=False)
    steps["nn.Transformer, eager bf16"] = reference(bf16=True, compiled=False)
    steps["nn.Transformer, compiled bf16"] = reference(bf16=True, compiled=True)
    return steps


def training_a(bench: Bench, seconds: float) -> dict[str, Any]:
    """torchformer beside torch.nn.Transformer: the same weights, batches and maths."""
    setting = bench.settings["A"]
    batches = full_batches(setting)
    steps = contenders_a(bench, batches, batches, masks=False)
    losses = {name: float(step.loss().detach()) for name, step in steps.items()}
    measured = bench.clock.compare(dict(steps), seconds)
    rows = {name: bench.row(setting, m) | {"loss": losses[name]} for name, m in measured.items()}
    return with_ratios(rows)


def training_a_ragged(bench: Bench, seconds: float) -> dict[str, Any]:
    """Pairs of many lengths: torchformer on batches of like length, the other on padded ones."""
    setting = bench.settings["A"]
    ours, theirs = (ragged_batches(setting, by_length) for by_length in (True, False))
    steps = contenders_a(bench, ours, theirs, masks=True)
    n_real = sum(int((x != 0).sum()) for batch in ours for x in batch[:2])
    measured = bench.clock.compare({n: step.all_batches for n, step in steps.items()}, seconds, 1)
    rows = {n: {**m, "tokens_per_second": n_real / m["seconds"]} for n, m in measured.items()}
    return with_ratios(rows)


def with_ratios(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How many times as fast the first is."""
    ours = next(iter(rows.values()))["tokens_per_second"]
    return {
        name: row | {"ours_to_it": ours / row["tokens_per_second"]} for name, row in rows.items()
    }


def decoding(bench: Bench, seconds: float) -> dict[str, Any]:
    """New tokens per second, greedy, after a prompt of one token."""
    n_tokens = 64 if bench.clock.is_cuda else 8
    rows = {}
    for name in ("B", "C"):
        config = bench.settings[name].config
        model = torchformer.Transformer(config, np.random.default_rng(0), device=bench.device)
        model = model.to(torch.bfloat16 if bench.clock.is_cuda else torch.float32).eval()
        for batch in (1, 64):
            prompt = torch.full((batch, 1), 3, device=bench.device)

            def call(model=model, prompt=prompt) -> None:
                fast.continued(model, prompt, n_tokens)

            took = bench.clock.compare({name: call}, seconds / 4, warm_up=1)[name]["seconds"]
            rows[f"{name}, batch {batch}"] = {"tokens_per_second": batch * n_tokens / took}
        del model
    return rows


def attention(bench: Bench, seconds: float) -> dict[str, Any]:
    """The kernels behind F.scaled_dot_product_attention, forward and backward, causal, at B."""
    setting = bench.settings["B"]
    c = setting.config
    shape = (setting.batch, c.n_heads, setting.length, c.d_model // c.n_heads)
    dtype = torch.bfloat16 if bench.clock.is_cuda else torch.float32
    q, k, v = (
        torch.randn(shape, device=bench.device, dtype=dtype, requires_grad=True) for _ in range(3)
    )

    def call() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    rows: dict[str, Any] = {"default": bench.clock.compare({"": call}, seconds / 6)[""]}
    backends = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    for name in backends:
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                rows[name] = bench.clock.compare({"": call}, seconds / 6)[""]
        except RuntimeError:
            rows[name] = "not here"
    timed = {n: r["seconds"] for n, r in rows.items() if n != "default" and not isinstance(r, str)}
    rows["chosen"] = min(timed, key=lambda n: abs(timed[n] - rows["default"]["seconds"]))
    return rows


def ladder(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    """From NumPy float64 to the whole of it, a step at a time, on a small B."""
    full = bench.settings["B"]
    config = replace(full.config, n_decoder_layers=2, d_model=256, n_heads=4, d_ff=1024)
    config = replace(config, tgt_vocab_size=1024, src_vocab_size=1024)
    if not bench.clock.is_cuda:
        config = replace(config, d_model=64, d_ff=128, tgt_vocab_size=64, src_vocab_size=64)
    setting = Setting(config, 8, 128 if bench.clock.is_cuda else 16)
    cpu = torch.device("cpu")
    oracle = _gradients_numpy(setting, np.float64)
    rungs: list[tuple[str, Callable[[], Any], Callable[[], dict]]] = []

    def numpy_rung(dtype: Any) -> None:
        rungs.append(
            (
                f"NumPy {np.dtype(dtype).name}",
                _numpy_step(setting, dtype),
                lambda: _gradients_numpy(setting, dtype),
            )
        )

    def torch_rung(name: str, device: torch.device, tf32: bool = False, **how: Any) -> None:
        step = Step(setting, device, **how)

        def call() -> None:
            with _tf32(tf32):
                step()

        def gradients() -> dict:
            with _tf32(tf32):
                return _gradients_torch(Step(setting, device, **how))

        rungs.append((name, call, gradients))

    eager: dict[str, Any] = {"bf16": False, "compiled": False, "fused": False}
    numpy_rung(np.float64)
    numpy_rung(np.float32)
    torch_rung("torch float32, CPU", cpu, **eager)
    if bench.clock.is_cuda:
        torch_rung("GPU, float32", bench.device, **eager)
        torch_rung("GPU, TF32", bench.device, tf32=True, **eager)
        torch_rung("GPU, bf16", bench.device, bf16=True, compiled=False, fused=False)
        torch_rung("GPU, bf16, compiled", bench.device, bf16=True, compiled=True, fused=False)
        torch_rung("GPU, bf16, compiled, fused AdamW", bench.device)
    rows: list[dict[str, Any]] = []
    for name, call, gradients in rungs:
        clock = bench.clock if name.startswith("GPU") else Clock(cpu)
        took = clock.compare({"": call}, seconds / len(rungs) / 2, warm_up=2)[""]["seconds"]
        speed = setting.tokens / took
        found = gradients()
        largest = max(float(np.abs(g).max()) for g in oracle.values())
        error = max(float(np.abs(found[k] - g).max()) for k, g in oracle.items()) / largest
        before = rows[-1]["tokens_per_second"] if rows else speed
        rows.append(
            {
                "name": name,
                "tokens_per_second": speed,
                "factor": speed / before,
                "gradient_error": error,
            }
        )
    return rows


@contextmanager
def _tf32(allowed: bool):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _ladder_batch(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    shape = (2, setting.batch, setting.length)
    tgt, targets = np.random.default_rng(2).integers(3, setting.config.tgt_vocab_size, shape)
    return tgt, targets


def _gradients_numpy(setting: Setting, dtype: Any) -> dict[str, np.ndarray]:
    model = npformer.Transformer(setting.config, np.random.default_rng(0), dtype)
    tgt, targets = _ladder_batch(setting)
    logits, backward = model(None, tgt)
    _, backward_loss = npformer.cross_entropy(logits, targets)
    backward(backward_loss(1.0))
    return {name: p.grad.astype(np.float64) for name, p in model.named_parameters()}


def _gradients_torch(step: Step) -> dict[str, np.ndarray]:
    tgt, targets = np.random.default_rng(2).integers(
        3, step.model.config.tgt_vocab_size, (2, *step.batches[0][1].shape)
    )
    src, device = step.batches[0][0], step.device
    step.batches = [(src, torch.tensor(tgt, device=device), torch.tensor(targets, device=device))]
    step.i = 0
    step.loss().backward()
    return {
        name: p.grad.double().cpu().numpy()
        for name, p in step.model.named_parameters()
        if p.grad is not None
    }


def _numpy_step(setting: Setting, dtype: Any) -> Callable[[], None]:
    model = npformer.Transformer(setting.config, np.random.default_rng(0), dtype)
    optimizer = npformer.AdamW(model.parameters(), 1e-4)
    tgt, targets = _ladder_batch(setting)

    def step() -> None:
        logits, backward = model(None, tgt)
        _, backward_loss = npformer.cross_entropy(logits, targets)
        optimizer.zero_grad()
        backward(backward_loss(1.0))
        npformer.clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()

    return step


def crossover(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    """One step against the width, NumPy, torch on the CPU and on the GPU: where does it win?"""
    widths = (32, 64, 128, 256, 512) if bench.clock.is_cuda else (16, 32)
    rows = []
    for C in widths:
        setting = Setting(config_of((0, 2), C, 4, 256, 32), 8, 32)
        cpu = torch.device("cpu")
        eager: dict[str, Any] = {"bf16": False, "compiled": False}
        calls: dict[str, tuple[Clock, Callable[[], Any]]] = {
            "NumPy": (Clock(cpu), _numpy_step(setting, np.float32)),
            "torch, CPU": (Clock(cpu), Step(setting, cpu, **eager)),
        }
        if bench.clock.is_cuda:
            calls["torch, GPU"] = (bench.clock, Step(setting, bench.device, **eager))
        row: dict[str, Any] = {"d_model": C}
        for name, (clock, call) in calls.items():
            each = seconds / len(widths) / len(calls) / 2
            row[name] = clock.compare({"": call}, each, warm_up=2)[""]["seconds"]
        rows.append(row)
    return rows


def breakdown(bench: Bench, seconds: float) -> dict[str, float]:
    """The share of each kind of kernel in a step of B."""
    from torch.profiler import ProfilerActivity, profile

    step = Step(bench.settings["B"], bench.device)
    for _ in range(3):
        step()
    activity = ProfilerActivity.CUDA if bench.clock.is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        step()
        if bench.clock.is_cuda:
            torch.cuda.synchronize()
    shares: dict[str, float] = {}
    for event in seen.key_averages():
        took = event.self_device_time_total if bench.clock.is_cuda else event.self_cpu_time_total
        kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), "rest")
        shares[kind] = shares.get(kind, 0.0) + took
    total = sum(shares.values()) or 1.0
    return {k: s / total for k, s in sorted(shares.items(), key=lambda pair: -pair[1])}


KINDS = {
    "attention": ("fmha", "attention", "flash", "sdpa", "cudnn_generated"),
    "products": ("gemm", "addmm", "::mm", "cutlass", "nvjet", "bmm", "matmul"),
    "optimizer": ("adam", "Adam", "multi_tensor"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "embedding": ("embedding", "index_"),
}


def drift(bench: Bench, seconds: float) -> dict[str, Any]:
    """The first training row once more: has the card slowed down meanwhile?"""
    again = bench.train("B", seconds)
    first = bench.results.get("training B", {}).get("tokens_per_second")
    return again | ({"of_the_first": again["tokens_per_second"] / first} if first else {})


SECTIONS: dict[str, tuple[float, Callable[[Bench, float], Any]]] = {  # name -> share of the time
    "ceilings": (0.03, ceilings),
    "parity": (0.04, parity),
    "training B": (0.13, lambda bench, seconds: bench.train("B", seconds / 2)),
    "training A": (0.15, lambda bench, seconds: training_a(bench, seconds / 2)),
    "training A, ragged": (0.1, lambda bench, seconds: training_a_ragged(bench, seconds / 2)),
    "training C": (0.12, lambda bench, seconds: bench.train("C", seconds / 2)),
    "decoding": (0.14, lambda bench, seconds: decoding(bench, seconds / 3)),
    "attention": (0.05, lambda bench, seconds: attention(bench, seconds / 2)),
    "ladder": (0.1, lambda bench, seconds: ladder(bench, seconds / 2)),
    "crossover": (0.06, lambda bench, seconds: crossover(bench, seconds / 2)),
    "breakdown": (0.04, breakdown),
    "drift": (0.05, lambda bench, seconds: drift(bench, seconds / 3)),
}


# --- The command ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for bench.json, report.md, plots")
    add("--budget", type=float, default=540.0, metavar="S", help="seconds in all (540)")
    add("--only", metavar="NAMES", help=f"sections, of: {', '.join(SECTIONS)}")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: toy sizes (cuda)")
    options = parser.parse_args(argv)
    chosen = options.only.split(",") if options.only else list(SECTIONS)
    for name in chosen:
        if name not in SECTIONS:
            parser.exit(2, f"{parser.prog}: unknown section {name!r}, of: {', '.join(SECTIONS)}\n")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: --device cuda: torch finds no CUDA device here\n")
    try:
        harness.check_writable(options.out)
    except harness.BenchmarkError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    bench = Bench(torch.device(options.device), options.budget)
    content = {"environment": environment(bench.device), "results": bench.results}
    content["settings"] = {k: asdict(s) for k, s in bench.settings.items()}
    for name in chosen:
        share, section = SECTIONS[name]
        seconds = share * options.budget
        if bench.left < seconds:
            bench.results[name] = (
                f"skipped: {max(bench.left, 0):.0f} s were left of {options.budget:.0f}"
            )
        else:
            print(f"{name} ...", flush=True)
            try:
                bench.results[name] = section(bench, seconds)
            except Exception as error:  # one section must not cost the others
                traceback.print_exc()
                bench.results[name] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        save(options.out / "bench.json", json.dumps(content, indent=1, default=str) + "\n")
    save(options.out / "report.md", report(content))
    draw(content, options.out)
    print(report(content))
    failed = [n for n in chosen if str(bench.results[n]).startswith("failed")]
    return 1 if failed else 0


def environment(device: torch.device) -> dict[str, Any]:
    """The card, never the machine."""
    about = {"created": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "torch": torch.__version__}
    about["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, toys"
    if device.type == "cuda":
        about["cuda"] = torch.version.cuda or ""
    return about | {"numpy": np.__version__, "python": sys.version.split()[0]}


def save(path: Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def report(content: dict[str, Any]) -> str:
    """Tables of whatever there is."""
    lines = [f"# torchformer on {content['environment']['device']}", ""]
    lines += [", ".join(f"{k} {v}" for k, v in content["environment"].items()), ""]
    for name, found in content["results"].items():
        lines += [f"## {name}", ""]
        if isinstance(found, str):
            lines += [found, ""]
            continue
        if isinstance(found, dict) and not any(isinstance(v, dict) for v in found.values()):
            found = {name: found}
        rows = found if isinstance(found, list) else [{"": k, **_row(v)} for k, v in found.items()]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
        lines += [harness.table(columns, cells), ""]
    return "\n".join(lines)


def _row(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"value": value}


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(content: dict[str, Any], folder: Path) -> None:
    """The ladder and the crossover, where matplotlib is."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rungs, rows = (content["results"].get(name) for name in ("ladder", "crossover"))
    if isinstance(rungs, list):
        figure = Figure(figsize=(8, 0.5 * len(rungs) + 1.5), layout="constrained")
        axes = figure.subplots()
        axes.barh([r["name"] for r in rungs], [r["tokens_per_second"] for r in rungs])
        axes.invert_yaxis()
        axes.set(xlabel="tokens per second", xscale="log", title="The ladder")
        figure.savefig(folder / "ladder.png", dpi=120)
    if isinstance(rows, list):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name in [key for key in rows[0] if key != "d_model"]:
            axes.plot([r["d_model"] for r in rows], [1e3 * r[name] for r in rows], "o-", label=name)
        axes.set(xlabel="d_model", ylabel="one step, ms", xscale="log", yscale="log")
        axes.legend()
        figure.savefig(folder / "crossover.png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
