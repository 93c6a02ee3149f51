"""What is measured, section by section; see bench.py."""

import statistics
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gpu import kernels
from benchmarks.gpu.bench import Bench, Rows
from benchmarks.gpu.environment import environment
from benchmarks.gpu.shapes import Setting, decoding_work, settings
from benchmarks.gpu.steps import Step, contenders_a, full_batches, make_model, ragged_batches
from benchmarks.gpu.timing import ROUNDS, reason
from npformer import compare
from torchformer import fast
from torchformer.transformer import Transformer


def probe(give: Any, device: str) -> tuple[Rows, Rows] | str:
    """The environment, and the settings by name; or what is wrong with the device."""
    where = torch.device(device)
    try:
        return environment(where), {name: asdict(s) for name, s in settings(where).items()}
    except ValueError as error:
        return str(error)


# --- Does it run at all? ----------------------------------------------------------------------


def smoke(bench: Bench, seconds: float) -> Rows:
    """What the other sections need, each once and small: does it work, and how long is it?"""
    rows: Rows = {}
    small = settings(torch.device("cpu"))

    def product() -> str:
        x = torch.ones(8, 8, device=bench.device)
        total = float((x @ x).sum())
        assert total == 8**3, f"ones times ones sum up to {total}, not to {8**3}"
        return "right"

    def train(name: str, **how: Any) -> str:
        step = Step(small[name], bench.device, **how)
        for _ in range(6):
            step()
        first, last = step.first_loss, step.update(*first_batch(step))
        assert last < first, f"the loss does not fall: {float(first)}, {float(last)}"
        return f"loss {float(first):.3f}, {float(last):.3f}"

    def decode() -> str:
        model = make_model(small["B"].config, bench.device).eval()
        prompt = torch.full((2, 3), 3, device=bench.device)
        same = check_tokens(model, prompt, fast.continued(model, prompt, 6))
        return f"{same:.0%} of the tokens are the eager decoder's"

    def profiled(setting: Setting) -> list[Any]:
        return kernels.profiled(Step(setting, bench.device, compiled=False))[1]

    checks = {
        "product": product,
        "eager step": partial(train, "A", compiled=False),
        "compiled step": partial(train, "B"),
        "decoding": decode,
        "profiler": lambda: f"{len(profiled(small['B']))} kernels",
    }
    if bench.clock.is_cuda:
        checks["step as a graph"] = partial(train, "A", compiled=False, captured=True)
    for name, check in checks.items():
        started = time.monotonic()
        try:
            row = {"found": check()}
        except Exception as error:
            row = {"failed": reason(error)}
            bench.clock.check_sound()
        rows[name] = row | {"wall_seconds": time.monotonic() - started}
        bench.give("smoke", rows)
    return rows


def first_batch(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    src, tgt = (torch.tensor(ids, device=step.device) for ids in step.batches[0])
    return src, tgt


# --- The card ---------------------------------------------------------------------------------


def ceilings(bench: Bench, seconds: float) -> Rows:
    """What the card can do at best: products, copies, launches."""
    n = 8192 if bench.clock.is_cuda else 256
    found: Rows = {}
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
        # As a layer calls it: a CPU has a faster bf16 kernel for a transposed right side.
        took = bench.clock.time(partial(F.linear, a, b), seconds / 6)["seconds"]
        found[f"{name}_tflops"] = 2 * n**3 / took / 1e12
    x = torch.empty(2**28 if bench.clock.is_cuda else 2**20, device=bench.device)
    y = torch.empty_like(x)
    took = bench.clock.time(lambda: y.copy_(x), seconds / 6)["seconds"]
    found["copy_tb_per_s"] = 2 * x.nbytes / took / 1e12
    tiny = torch.zeros(1, device=bench.device)
    took = bench.clock.time(lambda: tiny.add_(1), seconds / 12)["seconds"]
    found["launch_us"] = 1e6 * took
    return found


# --- Training ---------------------------------------------------------------------------------


def training(name: str, bench: Bench, seconds: float) -> Rows:
    """torchformer alone; and while it is compiled, what its time is spent on."""
    step = Step(bench.settings[name], bench.device)
    row = bench.training_row(step, bench.clock.time(step, seconds / 4)) | peak(bench)
    bench.give(f"training {name}", row)
    also_breakdown(bench, name, step)
    return row


def also_breakdown(bench: Bench, name: str, step: Step) -> None:
    """While it is compiled; without costing the row that is there."""
    try:
        found: Any = breakdown(step)
    except Exception as error:
        found = f"failed: {reason(error)}"
    bench.give(f"breakdown {name}", found)


training_b, training_c = partial(training, "B"), partial(training, "C")


def peak(bench: Bench) -> Rows:
    if not bench.clock.is_cuda:
        return {}
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def training_a(bench: Bench, seconds: float) -> Rows:
    """torchformer beside torch.nn.Transformer: the same weights, batches and maths."""
    batches = full_batches(bench.settings["A"])
    steps = contenders_a(
        bench.settings["A"], bench.device, {"torchformer": batches}, batches, masks=False
    )

    def rows_of(calls: dict[str, Step], seconds: float) -> Rows:
        measured = bench.clock.compare(calls, seconds)
        return {name: bench.training_row(steps[name], m) for name, m in measured.items()}

    ours = {name: step for name, step in steps.items() if step.is_ours}
    rows = rows_of(ours, seconds / 20)  # to compile another takes longest, and may not end
    bench.give("training A", rows)
    if "failed" not in rows["torchformer"]:
        also_breakdown(bench, "A", steps["torchformer"])
    compiling = {name: row.get("compile_seconds") for name, row in rows.items()}
    others = {name: step for name, step in steps.items() if not step.is_ours}
    *eager, compiled = others
    for names in (eager, [compiled]):
        chosen = ours | {name: others[name] for name in names}
        rows |= with_ratios(rows_of(chosen, seconds / 12))
        for name, took in compiling.items():
            rows[name]["compile_seconds"] = took
        bench.give("training A", rows)
    return rows


def training_a_ragged(bench: Bench, seconds: float) -> Rows:
    """Pairs of many lengths: torchformer on batches of like length, the other on padded ones."""
    setting = bench.settings["A"]
    ours = {"torchformer": "by length", "torchformer, by tokens": "by tokens"}
    steps = contenders_a(
        setting,
        bench.device,
        {name: ragged_batches(setting, how) for name, how in ours.items()},
        ragged_batches(setting, "padded"),
        masks=True,
    )
    batches = steps["torchformer"].batches
    n_real = sum(int((ids != 0).sum()) for b in batches for ids in (b.src, b.tgt_in))
    calls = {name: step.all_batches for name, step in steps.items()}
    rows = bench.clock.compare(calls, seconds / 3, warm_up=2)
    for row in rows.values():
        if "seconds" in row:
            row["tokens_per_second"] = n_real / row["seconds"]
    return with_ratios(rows)


def with_ratios(rows: dict[str, Rows]) -> dict[str, Rows]:
    """How many times as fast the best of ours is."""
    speeds = {name: row.get("tokens_per_second", 0.0) for name, row in rows.items()}
    ours = max(speed for name, speed in speeds.items() if name.startswith("torchformer"))
    return {
        name: row | {"ours_to_it": ours / speeds[name]} if speeds[name] and ours else row
        for name, row in rows.items()
    }


def breakdown(step: Step) -> Rows:
    shares, top = kernels.profiled(step)
    return {"shares": shares, "kernels": top}


def breakdown_of(name: str, bench: Bench, seconds: float) -> Rows:
    step = Step(bench.settings[name], bench.device)
    for _ in range(3):
        step()
    return breakdown(step)


breakdown_a, breakdown_b, breakdown_c = (partial(breakdown_of, name) for name in "ABC")


def drift(bench: Bench, seconds: float) -> Rows:
    """The first training row once more: has the card slowed down meanwhile?"""
    step = Step(bench.settings["B"], bench.device)
    again = bench.training_row(step, bench.clock.time(step, seconds / 4))
    first = bench.rows("training B").get("tokens_per_second")
    return again | ({"of_the_first": again["tokens_per_second"] / first} if first else {})


# --- Decoding ---------------------------------------------------------------------------------


PROMPT, N_NEW, N_COMPARED = 512, 256, 16  # tokens


def decoding(bench: Bench, seconds: float) -> Rows:
    """New tokens per second, greedy, after a prompt; the decoder with its graph is made once.

    tokens_per_second     of the replays alone
    recording_seconds     to compile and to record, once
    prefill_seconds       to read the prompts of the batch
    same_tokens           of the first tokens, those that the eager cached decoder chooses, too
    """
    P, n = (PROMPT, N_NEW) if bench.clock.is_cuda else (16, 8)
    dtype, precision = torch.float32, "float32"
    if bench.clock.is_cuda:
        dtype, precision = torch.bfloat16, "bf16"
    rows: Rows = {}
    for name in "BC":
        config = bench.settings[name].config
        model = make_model(config, bench.device, dtype).eval()
        for batch in (1, 64):
            torch.compiler.reset()  # else the second batch size is compiled for all sizes
            prompt = torch.tensor(
                np.random.default_rng(batch).integers(3, config.tgt_vocab_size, (batch, P)),
                device=bench.device,
            )
            try:
                row = decoded(bench, model, prompt, n, seconds / 16)
                work = decoding_work(config, batch, P + n / 2, dtype.itemsize)
                row |= bench.against_the_card(work, row["seconds"] / n, precision)
            except Exception as error:
                row = {"failed": reason(error)}
                bench.clock.check_sound()
            rows[f"{name}, batch {batch}"] = row
            bench.give("decoding", rows)
        del model
    return rows


def decoded(
    bench: Bench, model: Transformer, prompt: torch.Tensor, n_tokens: int, seconds: float
) -> Rows:
    room, pad_id = prompt.shape[1] + n_tokens, model.config.tgt_pad_id
    decoder = fast.FastDecoder(model, len(prompt), room, never=[pad_id])
    first = decoder.prefill(prompt)
    chosen = torch.cat([first[:, None], decoder.decode(min(n_tokens, N_COMPARED))], dim=1)
    row: Rows = {"same_tokens": check_tokens(model, prompt, chosen)}
    row["recording_seconds"] = decoder.recording_seconds
    samples: dict[str, list[float]] = {"prefill_seconds": [], "seconds": []}
    started = time.monotonic()
    while len(samples["seconds"]) < ROUNDS and time.monotonic() - started < max(seconds, 0.01):
        took = bench.clock.seconds(lambda: decoder.prefill(prompt), 1)
        samples["prefill_seconds"].append(took)
        samples["seconds"].append(bench.clock.seconds(lambda: decoder.decode(n_tokens), 1))
    row |= {name: statistics.median(s) for name, s in samples.items()}
    row["samples"] = len(samples["seconds"])
    return {"tokens_per_second": len(prompt) * n_tokens / row["seconds"]} | row


@torch.no_grad()
def check_tokens(model: Transformer, prompt: torch.Tensor, chosen: torch.Tensor) -> float:
    """Which part of the tokens the eager cached decoder chooses, too.   chosen (B, n)

    In half precision the best two may be the same number.  So it reads what was chosen, and each of
    that must be as good as its own choice, up to the roundings of both.  Raises RuntimeError.
    """
    logits, cache = model.step(prompt, model.start(None))  # (B, P, V)
    same, at_stake, precision = [], [], str(logits.dtype).removeprefix("torch.")
    for token in chosen.T:  # (B,)
        last = logits[:, -1].float()  # (B, V)
        largest = last.abs().amax(dim=-1)
        last[:, model.config.tgt_pad_id] = -torch.inf  # is not chosen
        best = last.max(dim=-1)
        same.append(token == best.indices)
        lost = best.values - last.gather(1, token[:, None])[:, 0]
        at_stake.append(lost / largest)
        logits, cache = model.step(token[:, None], cache)
    n = compare.roundings_of_a_step(model.config, cache.length, precision)
    worst, allowed = float(torch.stack(at_stake).max()), n * compare.eps(precision)
    if not worst <= allowed:
        raise RuntimeError(
            f"decodes other tokens than the eager decoder: their logits are {worst:.3g} of the "
            f"largest below the best, {allowed:.3g} is rounding"
        )
    return float(torch.stack(same).double().mean())
