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
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import npformer
import torchformer
from benchmarks import gpu_report, harness
from benchmarks.configs import Size
from benchmarks.gpu_shapes import (
    Setting,
    Work,
    config_of,
    datasheet,
    decoding_work,
    settings,
    training_work,
)
from benchmarks.torch_reference import TorchTransformer, to_reference
from npformer import TransformerConfig, streams
from torchformer import fast
from torchformer.decoder import DecoderLayer
from torchformer.encoder import EncoderLayer
from torchformer.training import check_precision, cross_entropy

DESCRIPTION = """\
Measure torchformer on one GPU, in this order, as far as the budget goes: the card's ceilings;
parity with the NumPy twin; training of the configurations B, A (beside torch.nn.Transformer, on
full batches and on ragged ones) and C; decoding; the attention kernels; the ladder from NumPy
float64 to a compiled bf16 step; where the GPU first wins; where a step's time goes.

bench.json is written after every section, report.md and the plots from it at the end: the ladder,
where the GPU first wins, the roofline, where a step's time goes.  To have the results in the
README, copy bench.json to benchmarks/results/DATE-gpu.json and draw: python -m benchmarks.tables
--readme.  With --device cpu the same code runs on toy sizes, where torch.compile takes the graph
and generates nothing: to see that it works, not for its figures.

  python -m benchmarks.gpu --out gpu-results
"""
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


def compiler(device: torch.device) -> str:
    """Of torch.compile.  On a CPU it only takes the graph: C++ would take longer than the rest."""
    return "inductor" if device.type == "cuda" else "eager"


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
        capturable: bool = False,
    ):
        c = setting.config
        self.setting, self.device, self.bf16 = setting, device, bf16
        if model is None:
            twin = torchformer.Transformer(c, np.random.default_rng(0), device=device)
            twin.right_padded = True
            if compiled:
                for layer in twin.modules():
                    if isinstance(layer, EncoderLayer | DecoderLayer):
                        layer.compile(fullgraph=True, dynamic=False, backend=compiler(device))
            model = twin
        self.model: Any = model.to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), 1e-4, fused=fused or None, capturable=capturable
        )
        self.batches = [
            tuple(x.to(device) for x in batch) for batch in batches or full_batches(setting)
        ]
        self.has_source, self.i = c.n_encoder_layers > 0, 0
        self.cross_entropy: Any = cross_entropy
        if compiled:
            self.cross_entropy = torch.compile(
                cross_entropy, dynamic=False, backend=compiler(device)
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

    def row(
        self, setting: Setting, measured: dict[str, float], precision: str = "bf16"
    ) -> dict[str, Any]:
        """Of a training step."""
        seconds = measured["seconds"]
        about = {**measured, "tokens_per_second": setting.tokens / seconds}
        return about | self.against_the_card(training_work(setting), seconds, precision)

    def against_the_card(
        self, work: Work, seconds: float, precision: str = "bf16"
    ) -> dict[str, Any]:
        """What of the floor was reached, and what of the FLOP/s of products, measured and said.

        precision: of the products, "bf16" or "float32"; a CPU may be fifty times as fast in one.
        """
        found = {"tflops": work.flops / seconds / 1e12, "flop_per_byte": work.intensity}
        ceilings = self.results.get("ceilings")
        if isinstance(ceilings, dict):
            peak = ceilings[f"{precision}_tflops"] * 1e12
            copy = ceilings["copy_tb_per_s"] * 1e12
            floor = work.floor(peak, copy)
            found |= {"floor_seconds": floor, "of_the_floor": floor / seconds}
            found["of_measured_ceiling"] = work.flops / seconds / peak
        if sheet := datasheet(self.device):
            found["of_datasheet"] = work.flops / seconds / 1e12 / sheet[0]
        return found


def ceilings(bench: Bench, seconds: float) -> dict[str, Any]:
    """What the card can do at best: products, copies, launches."""
    n = 8192 if bench.clock.is_cuda else 256
    found: dict[str, Any] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
        # As a layer calls it: a CPU has a faster bf16 kernel for a transposed right side.
        product = partial(F.linear, a, b)
        took = bench.clock.compare({name: product}, seconds / 4)[name]["seconds"]
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
    """Against the NumPy twin in float64, as far off as a peer may be (DESIGN: the peer rule).

    The peer does the same maths on the CPU in the same precision, eager, with attention written
    out.  Of each tensor the largest error may be twice the peer's (bf16 gradients: three times) and
    n roundings of its largest entry, gradients of the largest entry of all; n is 1 in bf16, which
    is rounded once for each product, and the length of the longest sum elsewhere.  GELU, not ReLU:
    a rounding must not change a sign.
    """
    rows = {}
    cpu = torch.device("cpu")
    for kind, layers in (("encoder-decoder", (2, 2)), ("decoder-only", (0, 2))):
        config = replace(config_of(layers, 64, 4, 96, 33), activation="gelu_tanh")
        ids = np.random.default_rng(1).integers(3, 96, (3, 4, 32))
        oracle = _oracle(config, ids)
        gradients = [name for name in oracle if name != "logits"]
        largest = max(float(np.abs(oracle[name]).max()) for name in gradients)
        for precision in ("float64", "float32", "bfloat16"):
            found = _twin(config, ids, precision, bench.device)
            with written_out_attention():
                peer = _twin(config, ids, precision, cpu)
            eps = torch.finfo(getattr(torch, precision)).eps
            n = 1 if precision == "bfloat16" else config.d_model + config.d_ff + ids.shape[-1]
            errors, used = {}, {}
            for name, expected in oracle.items():
                scale = float(np.abs(expected).max()) if name == "logits" else largest
                factor = 3 if precision == "bfloat16" and name != "logits" else 2
                allowed = factor * np.abs(peer[name] - expected).max() + n * eps * scale
                off = float(np.abs(found[name] - expected).max())  # NaN where it is not finite
                errors[name], used[name] = off / scale, off / float(allowed)
            worst = max(gradients, key=lambda name: errors[name])
            rows[f"{kind}, {precision}"] = {
                "logits": errors["logits"],
                "gradients": errors[worst],
                "worst": worst,
                "of_allowed": max(used.values()),
                "ok": all(u <= 1 for u in used.values()),
            }
    return rows


def _oracle(config: TransformerConfig, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Logits and every gradient, by npformer in float64."""
    model = npformer.Transformer(config, np.random.default_rng(0), np.float64)
    src, tgt, targets = ids
    logits, backward = model(src if config.n_encoder_layers else None, tgt)
    _, backward_loss = npformer.cross_entropy(logits, targets)
    backward(backward_loss(1.0))
    return {"logits": logits} | {name: p.grad for name, p in model.named_parameters()}


def _twin(
    config: TransformerConfig, ids: np.ndarray, precision: str, device: torch.device
) -> dict[str, np.ndarray]:
    """The same by torchformer; bfloat16 is by autocast."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = torchformer.Transformer(config, np.random.default_rng(0), dtype, device)
    model.right_padded = True
    src, tgt, targets = (torch.tensor(x, device=device) for x in ids)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(src if config.n_encoder_layers else None, tgt)
    loss_of = logits if precision == "float64" else logits.float()
    F.cross_entropy(loss_of.flatten(0, 1), targets.flatten()).backward()
    found = {"logits": logits} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }
    return {name: x.detach().double().cpu().numpy() for name, x in found.items()}


@contextmanager
def written_out_attention():
    """torchformer without the fused kernels: scores, softmax and a second product."""
    fused = torchformer.ops.attention

    def attention(q, k, v, mask=None, p=0.0, rng=None):
        return F.dropout(torchformer.ops.attention_weights(q, k, mask), p) @ v

    torchformer.ops.attention = attention
    try:
        yield
    finally:
        torchformer.ops.attention = fused


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
        if compiled:
            model = torch.compile(model, backend=compiler(bench.device))
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
    rows = {}
    for name, m in measured.items():
        precision = "bf16" if steps[name].bf16 else "float32"
        rows[name] = bench.row(setting, m, precision) | {"loss": losses[name]}
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
    """New tokens per second, greedy, after a prompt of one token; to record the graph included."""
    n_tokens = 256 if bench.clock.is_cuda else 8
    dtype, precision = torch.float32, "float32"
    if bench.clock.is_cuda:
        dtype, precision = torch.bfloat16, "bf16"
    rows = {}
    for name in ("B", "C"):
        config = bench.settings[name].config
        model = torchformer.Transformer(config, np.random.default_rng(0), device=bench.device)
        model = model.to(dtype).eval()
        for batch in (1, 64):
            torch.compiler.reset()  # else the second batch size is compiled for all sizes
            prompt = torch.full((batch, 1), 3, device=bench.device)

            def call(model=model, prompt=prompt) -> None:
                fast.continued(model, prompt, n_tokens)

            took = bench.clock.compare({name: call}, seconds / 4, warm_up=1)[name]["seconds"]
            work = decoding_work(config, batch, n_tokens / 2, dtype.itemsize)
            row = {"seconds": took, "tokens_per_second": batch * n_tokens / took}
            row |= bench.against_the_card(work, took / n_tokens, precision)
            rows[f"{name}, batch {batch}"] = row
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
    rows["default"]["backend"] = backend_of(call)
    for name in BACKENDS:
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                rows[name] = bench.clock.compare({"": call}, seconds / 6)[""]
        except RuntimeError:
            rows[name] = "not here"
    return rows


BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def backend_of(call: Callable[[], Any]) -> str:
    """Which of them PyTorch chose: each has an operator of its own, which the profiler sees."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    names = " ".join(event.key for event in seen.key_averages())
    for backend in BACKENDS:
        if f"_scaled_dot_product_{backend.split('_')[0].lower()}" in names:
            return backend
    return "MATH"


# --- The ladder -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """One line of the ladder: what makes a step, and its gradients on one fixed batch."""

    name: str
    clock: Clock
    make: Callable[[], Callable[[], Any]]
    gradients: Callable[[], dict[str, np.ndarray]]


def ladder(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    """From NumPy float64 to the whole of it, one thing at a time, on a small B."""
    full = bench.settings["B"]
    if bench.clock.is_cuda:
        sizes = {"d_model": 256, "n_heads": 4, "d_ff": 1024, "vocab": 1024}
    else:
        sizes = {"d_model": 64, "n_heads": 4, "d_ff": 128, "vocab": 64}
    vocab = sizes.pop("vocab")
    sizes |= {"tgt_vocab_size": vocab, "src_vocab_size": vocab, "n_decoder_layers": 2}
    setting = Setting(replace(full.config, **sizes), 8, 128 if bench.clock.is_cuda else 16)
    oracle = _gradients_numpy(setting, np.float64)
    largest = max(float(np.abs(g).max()) for g in oracle.values())
    steps = rungs(setting, bench.device)
    rows: list[dict[str, Any]] = []
    for rung in steps:
        row: dict[str, Any] = {"name": rung.name}
        rows.append(row)
        try:
            call = rung.make()
            took = rung.clock.compare({"": call}, seconds / len(steps) / 2, warm_up=2)[""]
            found = rung.gradients()
        except Exception as error:  # one rung must not cost the others
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        speed = setting.tokens / took["seconds"]
        before = next((r for r in reversed(rows[:-1]) if "tokens_per_second" in r), None)
        row["tokens_per_second"] = speed
        row["factor"] = speed / before["tokens_per_second"] if before else 1.0
        off = max(float(np.abs(found[k] - g).max()) for k, g in oracle.items())
        row["gradient_error"] = off / largest
    return rows


def rungs(setting: Setting, device: torch.device) -> list[Rung]:
    """Each has what those before it have; those that only a GPU has are left out on a CPU."""
    cpu = torch.device("cpu")
    found = []
    for dtype in (np.float64, np.float32):
        step, gradients = (
            partial(_numpy_step, setting, dtype),
            partial(_gradients_numpy, setting, dtype),
        )
        found.append(Rung(f"NumPy {np.dtype(dtype).name}", Clock(cpu), step, gradients))

    def add(
        name: str,
        where: torch.device = device,
        fused_attention: bool = True,
        tf32: bool = False,
        graph: bool = False,
        **how: Any,
    ) -> None:
        @contextmanager
        def so():
            written_out = nullcontext() if fused_attention else written_out_attention()
            with _tf32(tf32), written_out:
                yield

        def make() -> Callable[[], None]:
            step = GraphStep(setting, where) if graph else Step(setting, where, **how)

            def call() -> None:
                with so():
                    step()

            return call

        def gradients() -> dict[str, np.ndarray]:
            with so():
                return _gradients_torch(Step(setting, where, **how))

        found.append(Rung(name, Clock(where), make, gradients))

    plain: Any = {"bf16": False, "compiled": False, "fused": False}
    add("torch float32, CPU", where=cpu, fused_attention=False, **plain)
    kind = "GPU" if device.type == "cuda" else "CPU"
    if device.type == "cuda":
        add("GPU, float32", fused_attention=False, **plain)
        add("+ TF32", fused_attention=False, tf32=True, **plain)
    plain["bf16"] = True
    add(f"{kind}, bf16, eager", fused_attention=False, **plain)
    add("+ fused attention (SDPA)", **plain)
    if device.type == "cuda":
        add("+ compiled", fused=False)
        add("+ fused AdamW")
        add("+ one CUDA graph a step", graph=True)
    else:  # compiled to a graph only, there is no more to see
        add("+ fused AdamW", compiled=False)
    return found


class GraphStep:
    """A whole training step as one CUDA graph: recorded once, then launched at once."""

    def __init__(self, setting: Setting, device: torch.device):
        step = Step(setting, device, capturable=True)
        self.batches, self.i = step.batches, 0
        self.read = tuple(x.clone() for x in self.batches[0])  # where the graph reads its batch
        step.batches = [self.read]
        self.graph, _ = fast.record(step)

    def __call__(self) -> None:
        for there, x in zip(self.read, self.batches[self.i], strict=True):
            there.copy_(x)
        self.i = (self.i + 1) % len(self.batches)
        self.graph.replay()


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
    tgt, targets = (torch.tensor(x, device=step.device) for x in _ladder_batch(step.setting))
    step.batches, step.i = [(tgt, tgt, targets)], 0
    step.loss().backward()
    return {n: p.grad.double().cpu().numpy() for n, p in step.model.named_parameters()}


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
    add("--budget", type=float, metavar="S", help="seconds in all (540, on a CPU 100)")
    add("--only", metavar="NAMES", help=f"sections, of: {', '.join(SECTIONS)}")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: toy sizes (cuda)")
    return streams.program(parser, argv, partial(_run, parser))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    chosen = options.only.split(",") if options.only else list(SECTIONS)
    for name in chosen:
        if name not in SECTIONS:
            parser.exit(2, f"{parser.prog}: unknown section {name!r}, of: {', '.join(SECTIONS)}\n")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: --device cuda: torch finds no CUDA device here\n")
    try:
        check_precision("bfloat16", torch.device(options.device))
        harness.check_writable(options.out)
    except (ValueError, harness.BenchmarkError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if options.budget is None:
        options.budget = 540.0 if options.device == "cuda" else 100.0
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
            torch.compiler.reset()  # dynamo has room for eight shapes of a layer, and we have more
            if not bench.clock.is_cuda:
                seconds /= 10  # toys are timed only to see that it works
            try:
                bench.results[name] = section(bench, seconds)
            except Exception as error:  # one section must not cost the others
                traceback.print_exc()
                bench.results[name] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        save(options.out / "bench.json", json.dumps(content, indent=1, default=str) + "\n")
    report = gpu_report.report(content)
    save(options.out / "report.md", report)
    gpu_report.draw(content, options.out)
    print(report)
    failed = [n for n in chosen if str(bench.results[n]).startswith("failed")]
    return 1 if failed else 0


def environment(device: torch.device) -> dict[str, Any]:
    """The card, never the machine."""
    about = {"created": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "torch": torch.__version__}
    toys = "CPU, toy sizes, traced and not compiled"
    about["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else toys
    if device.type == "cuda":
        about["cuda"] = torch.version.cuda or ""
    return about | {"numpy": np.__version__, "python": sys.version.split()[0]}


def save(path: Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
