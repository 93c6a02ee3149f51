"""Where npformer's step goes, op by op: python -m benchmarks.training --profile

The public functions of npformer.ops, and the backward that each returns, are wrapped in timers in
this process alone.  A function's time is its own: that of the functions it calls is theirs.
"""

import argparse
import functools
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks import contenders, harness
from benchmarks.configs import Size
from benchmarks.contenders import Floor, NumpyStep, Problem, describe, title
from benchmarks.harness import Measurement, Run, numpy_threads, pinned
from npformer import attention, feedforward, layers, ops, optim

STEP, REST = "step", "residual sums and wiring"
FORWARD, BACKWARD, PRODUCTS = "forward", "backward", "products"


class Stopwatch:
    """Seconds by (label, direction), each without those of the labels inside it."""

    def __init__(self):
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.inner = [0.0]  # seconds already given to others, for each level of nesting

    @contextmanager
    def time(self, label: str, direction: str) -> Iterator[None]:
        self.inner.append(0.0)
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.seconds[label, direction] += elapsed - self.inner.pop()
        self.inner[-1] += elapsed

    def wrap(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args, **kwargs):
            with self.time(label, FORWARD):
                result = function(*args, **kwargs)
            if not (isinstance(result, tuple) and callable(result[-1])):
                return result
            y, backward = result

            def timed_backward(*dy):
                with self.time(label, BACKWARD):
                    return backward(*dy)

            return y, timed_backward

        return timed


@contextmanager
def timed_ops(watch: Stopwatch) -> Iterator[None]:
    """Every public function of ops, wherever a module of npformer has imported it, and the rest."""
    with ExitStack() as stack:
        modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "npformer"]
        functions = {
            name: f
            for name, f in vars(ops).items()
            if isinstance(f, types.FunctionType) and f.__module__ == ops.__name__ and name[0] != "_"
        }
        for name, function in functions.items():
            timed = watch.wrap(name, function)
            for module in modules:
                if vars(module).get(name) is function:
                    stack.enter_context(patch.object(module, name, timed))
            for key, activation in list(feedforward.ACTIVATIONS.items()):
                if activation is function:
                    stack.enter_context(patch.dict(feedforward.ACTIVATIONS, {key: timed}))
        for owner, name, label in (
            (layers.Linear, "forward", "grad +="),  # what a leaf does besides its op
            (layers.Embedding, "forward", "grad +="),
            (layers.LayerNorm, "forward", "grad +="),
            (attention, "merge_heads", "merge_heads"),
            (layers.Module, "zero_grad", "zero_grad"),
            (contenders, "clip_grad_norm", "clip"),
            (optim.Optimizer, "step", "optimizer"),
        ):
            timed = watch.wrap(label, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, timed))
        yield


def measure_ops(size: Size, dropout: float, options: argparse.Namespace) -> Run:
    """A run with one measurement for each op and direction, in seconds of a step."""
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    watch, problem, floor = Stopwatch(), Problem(size, dropout, options.clip), Floor(size)
    with pinned(options.threads), timed_ops(watch):
        step = NumpyStep(problem)
        timed_step = watch.wrap(REST, step)
        repeats = max(1, round(0.2 / harness.seconds_per_call(timed_step, 3)))
        for i in range(options.rounds):
            harness.progress(f"{size.name}: round {i + 1} of {options.rounds}")
            watch.seconds.clear()
            total = harness.seconds_per_call(timed_step, repeats)
            samples[STEP, FORWARD].append(total)
            for key, seconds in watch.seconds.items():
                samples[key].append(seconds / repeats)
            for op in floor.products:
                run_products = functools.partial(floor.run, op)
                seconds = harness.seconds_per_call(run_products, repeats)
                samples[op, PRODUCTS].append(seconds)
        threads = numpy_threads()
    run = Run(describe("breakdown", problem), [])
    run.measurements = [
        Measurement("|".join(key), run.id, threads, s) for key, s in samples.items()
    ]
    return run


def draw(run: Run) -> str:
    """Percent of the step by op, the costly ones first, beside the matrix products they contain."""
    columns = FORWARD, BACKWARD, PRODUCTS
    total = run[f"{STEP}|{FORWARD}"].median
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for m in run.measurements:
        label, column = m.name.split("|")
        spent[label][columns.index(column)] = m.median

    def row(label: str, seconds: list[float]) -> list[str]:
        own = seconds[0] + seconds[1]
        cells = [f"{1e3 * s:.2f}" if s else "" for s in (own, *seconds)]
        return [label, f"{100 * own / total:.1f} %", *cells]

    del spent[STEP]
    rows = [row(*item) for item in sorted(spent.items(), key=lambda kv: -sum(kv[1][:2]))]
    rows.append(row("the step", [total, 0, sum(seconds[2] for seconds in spent.values())]))
    header = ["npformer", "of the step", "ms", *columns]
    return "\n".join([title(run), "", harness.table(header, rows)])
