"""For learners: one thing at a time from NumPy float64 to the whole of it, and where a GPU wins."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

import npformer
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import Setting, config_of
from benchmarks.gpu.steps import Step, written_out_attention
from benchmarks.gpu.timing import Clock, reason
from torchformer.convert import to_torch

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
    oracle = gradients_numpy(setting, np.float64)
    largest = max(float(np.abs(g).max()) for g in oracle.values())
    steps = rungs(setting, bench.device)
    rows: list[dict[str, Any]] = []
    for rung in steps:
        row: dict[str, Any] = {"name": rung.name}
        rows.append(row)
        try:
            row |= rung.clock.time(rung.make(), seconds / len(steps) / 2, warm_up=2)
            found = rung.gradients()
        except Exception as error:  # one rung must not cost the others
            row["failed"] = reason(error)
            bench.clock.check_sound()
            continue
        speed = setting.tokens / row["seconds"]
        before = next((r for r in reversed(rows[:-1]) if "tokens_per_second" in r), None)
        row["tokens_per_second"] = speed
        row["factor"] = speed / before["tokens_per_second"] if before else 1.0
        off = max(float(np.abs(found[k] - g).max()) for k, g in oracle.items())
        row["gradient_error"] = off / largest
        bench.give("ladder", rows)
    return rows


def rungs(setting: Setting, device: torch.device) -> list[Rung]:
    """Each has what those before it have; those that only a GPU has are left out on a CPU."""
    cpu = torch.device("cpu")
    found = []
    for dtype in (np.float64, np.float32):
        step = partial(numpy_step, setting, dtype)
        gradients = partial(gradients_numpy, setting, dtype)
        found.append(Rung(f"NumPy {np.dtype(dtype).name}", Clock(cpu), step, gradients))

    def add(
        name: str,
        where: torch.device = device,
        fused_attention: bool = True,
        tf32: bool = False,
        **how: Any,
    ) -> None:
        @contextmanager
        def so():
            written_out = nullcontext() if fused_attention else written_out_attention()
            with _tf32(tf32), written_out:
                yield

        def make() -> Callable[[], None]:
            step = step_of(setting, where, **how)

            def call() -> None:
                with so():
                    step()

            return call

        def gradients() -> dict[str, np.ndarray]:
            with so():
                tgt = torch.tensor(batch_of(setting), device=where)
                return step_of(setting, where, **how).gradients(tgt, tgt)

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
        add("+ one CUDA graph a step", captured=True)
    else:  # compiled to a graph only, there is no more to see
        add("+ fused AdamW", compiled=False)
    return found


def step_of(setting: Setting, device: torch.device, **how: Any) -> Step:
    """With NumPy's weights, so that its gradients can be compared."""
    model = npformer.Transformer(setting.config, np.random.default_rng(0), np.float32)
    return Step(setting, device, model=to_torch(model), **how)


@contextmanager
def _tf32(allowed: bool):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def batch_of(setting: Setting) -> np.ndarray:
    shape = (setting.batch, setting.length + 1)
    return np.random.default_rng(2).integers(3, setting.config.tgt_vocab_size, shape)  # (B, T + 1)


def gradients_numpy(setting: Setting, dtype: Any) -> dict[str, np.ndarray]:
    model = npformer.Transformer(setting.config, np.random.default_rng(0), dtype)
    numpy_gradients(model, batch_of(setting))
    return {name: p.grad.astype(np.float64) for name, p in model.named_parameters()}


def numpy_gradients(model: npformer.Transformer, tgt: np.ndarray) -> None:
    logits, backward = model(None, tgt[:, :-1])
    _, backward_loss = npformer.cross_entropy(logits, tgt[:, 1:])
    backward(backward_loss(1.0))


def numpy_step(setting: Setting, dtype: Any) -> Callable[[], None]:
    model = npformer.Transformer(setting.config, np.random.default_rng(0), dtype)
    optimizer = npformer.AdamW(model.parameters(), 1e-4)
    tgt = batch_of(setting)

    def step() -> None:
        optimizer.zero_grad()
        numpy_gradients(model, tgt)
        npformer.clip_grad_norm(optimizer.parameters, 1.0)
        optimizer.step()

    return step


# --- Where a GPU wins -------------------------------------------------------------------------


def crossover(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    """One step against the width, NumPy, torch on the CPU and on the GPU: where does it win?"""
    widths = (32, 64, 128, 256, 512) if bench.clock.is_cuda else (16, 32)
    rows = []
    for C in widths:
        setting = Setting(config_of((0, 2), C, 4, 256, 32), 8, 32)
        cpu = torch.device("cpu")
        eager: dict[str, Any] = {"bf16": False, "compiled": False}
        calls: dict[str, tuple[Clock, Callable[[], Any]]] = {
            "NumPy": (Clock(cpu), numpy_step(setting, np.float32)),
            "torch, CPU": (Clock(cpu), Step(setting, cpu, **eager)),
        }
        if bench.clock.is_cuda:
            calls["torch, GPU"] = (bench.clock, Step(setting, bench.device, **eager))
            graph = Step(setting, bench.device, captured=True, **eager)
            calls["torch, GPU, one CUDA graph"] = (bench.clock, graph)
        row: dict[str, Any] = {"d_model": C}
        for name, (clock, call) in calls.items():
            each = seconds / len(widths) / len(calls) / 2
            row[name] = clock.time(call, each, warm_up=2)["seconds"]
        rows.append(row)
        bench.give("crossover", rows)
    return rows
