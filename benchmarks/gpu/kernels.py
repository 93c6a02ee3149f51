"""Single kernels: where the time of a step goes, and how fast each kernel of attention is."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import shapes
from benchmarks.gpu.bench import Bench, Rows
from benchmarks.gpu.shapes import Setting
from benchmarks.gpu.steps import Step
from benchmarks.gpu.timing import is_out_of_memory, reason
from torchformer import ops
from torchformer.masks import CAUSAL

# --- Where the time goes ----------------------------------------------------------------------

# By what a kernel's name has in it, the first that fits: Triton's say all that was fused into one.
KINDS = {
    "optimizer": ("adam", "multi_tensor", "lpnorm", "linalg_vector_norm", "clip"),
    "attention": ("fmha", "attention", "flash", "sdpa", "cudnn_generated"),
    "products": ("gemm", "addmm", "::mm", "cutlass", "nvjet", "bmm", "matmul", "splitk"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "embedding": ("embedding", "index_", "indexing"),
    "norms": ("layer_norm", "layernorm", "rms_norm"),
    "activation": ("gelu", "relu", "threshold", "tanh"),
    "sums": ("sum", "reduce"),  # of a bias's gradient
    "residuals": ("add",),
    "casts and copies": ("copy", "_to", "memcpy", "memset", "fill", "zero"),
}
N_TOP = 20


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(w in name for w in words)), "rest")


def profiled(step: Step) -> tuple[Rows, list[Rows]]:
    """The share of each kind of kernel in a step, and the kernels that take longest, by name."""
    is_cuda = step.device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        step()
        if is_cuda:
            torch.cuda.synchronize()
    took: dict[str, tuple[float, int]] = {}
    for event in seen.key_averages():
        us = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if us > 0:
            took[event.key] = us, event.count
    total = sum(us for us, _ in took.values())
    if not total:
        raise RuntimeError("the profiler saw no kernel")
    shares: dict[str, float] = {}
    for name, (us, _) in took.items():
        shares[kind_of(name)] = shares.get(kind_of(name), 0.0) + us / total
    longest = sorted(took.items(), key=lambda pair: -pair[1][0])[:N_TOP]
    top = [
        {"kernel": name[:120], "kind": kind_of(name), "share": us / total, "calls": count}
        for name, (us, count) in longest
    ]
    return dict(sorted(shares.items(), key=lambda pair: -pair[1])), top


# --- Attention --------------------------------------------------------------------------------

BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def attention(bench: Bench, seconds: float) -> Rows:
    """Forward and backward, with heads as they lie in a layer, as the model calls it ("default")
    and by each kernel.  A's encoder with a mask of no pads, and with none: what the mask costs.
    """
    cases = {
        "B, causal": (bench.settings["B"], CAUSAL),
        "A, no mask": (bench.settings["A"], None),
        "A, pads masked": (bench.settings["A"], "pads"),
    }
    rows: Rows = {}
    for case, (setting, mask) in cases.items():
        if mask == "pads":
            mask = torch.ones((setting.batch, 1, 1, setting.length), device=bench.device) > 0
        for name in ("default", *(BACKENDS if mask is CAUSAL else ())):
            call = attention_call(setting, bench.device, mask, name)
            row: Rows
            try:
                row = bench.clock.time(call, seconds / 14)
            except Exception as error:  # there is no such kernel here, or not for these arrays
                bench.clock.check_sound()
                is_missing = isinstance(error, RuntimeError) and not is_out_of_memory(error)
                row = {"backend": "not here"} if is_missing else {"failed": reason(error)}
            else:
                work = shapes.attention("", 1, setting, 2, causal=mask is CAUSAL)
                row["tflops"] = sum(op.flops for op in work) / row["seconds"] / 1e12
                row["backend"] = backend_of(call)
            rows[f"{case}, {name}"] = row
        bench.give("attention", rows)
    return rows


def attention_call(
    setting: Setting, device: torch.device, mask: Any, kernel: str
) -> Callable[[], Any]:
    c = setting.config
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (setting.batch, setting.length, c.n_heads, c.d_model // c.n_heads)
    q, k, v, dy = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]  # (B, H, T, D)

    def call() -> tuple[Tensor, ...]:
        with nullcontext() if kernel == "default" else sdpa_kernel(getattr(SDPBackend, kernel)):
            return torch.autograd.grad(ops.attention(q, k, v, mask), inputs, dy)

    return call


def backend_of(call: Callable[[], Any]) -> str:
    """Which of them PyTorch chose: each has an operator of its own, which the profiler sees."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    names = " ".join(event.key for event in seen.key_averages())
    for backend in BACKENDS:
        if f"_scaled_dot_product_{backend.split('_')[0].lower()}" in names:
            return backend
    return "MATH"
