"""Seconds on the device, in turns, and no contender may take more than its part of them."""

import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.gpu.results import NO_ROOM

ROUNDS = 5


class Clock:
    """CUDA events, or the CPU's clock."""

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

    def first(self, call: Callable[[], Any]) -> float:
        """Seconds of the wall for a first call: whatever is compiled is compiled in it."""
        start = time.perf_counter()
        call()
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def compare(
        self,
        calls: Mapping[str, Callable[[], Any]],
        seconds: float,
        warm_up: int = 3,
        caught: Any = Exception,
    ) -> dict[str, dict[str, Any]]:
        """Medians and spreads of all, in turns (A B A B), within about so many seconds.

        Each has an equal part of them.  One that is too slow for all of its rounds has fewer, and
        at the least one call.  What a first call takes longer than the next is `compile_seconds`.
        One that fails has a row that says so, and the others go on.
        """
        rows: dict[str, dict[str, Any]] = {}
        samples: dict[str, list[float]] = {}
        part = seconds / len(calls)
        n = {}
        for name, call in calls.items():
            try:
                took = self.first(call)
                once = max(self.seconds(call, 1), 1e-6)
                for _ in range(min(warm_up - 2, int(part / 4 / once))):
                    once = max(self.seconds(call, 1), 1e-6)
            except caught as error:  # one contender must not cost the others
                rows[name] = {"failed": reason(error)}
                self.check_sound()
                continue
            rows[name] = {"compile_seconds": max(took - once, 0.0)}
            rounds = min(ROUNDS, int(part / once))
            samples[name] = [] if rounds else [once]
            n[name] = (rounds, max(1, int(part / rounds / once)) if rounds else 0)
        for i in range(ROUNDS):
            for name, (rounds, times) in n.items():
                if i < rounds:
                    samples[name].append(self.seconds(calls[name], times))
        for name, s in samples.items():
            middle = statistics.median(s)
            spread = (max(s) - min(s)) / 2 / middle
            rows[name] |= {"seconds": middle, "spread": spread, "samples": len(s)}
        return rows

    def time(self, call: Callable[[], Any], seconds: float, warm_up: int = 3) -> dict[str, Any]:
        """Of one alone; raises what it raises."""
        return self.compare({"": call}, seconds, warm_up, caught=())[""]

    def check_sound(self) -> None:
        """After some errors nothing can be done on the card any more, in this process: raises."""
        if self.is_cuda:
            torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """In one line."""
    traceback.print_exception(error)
    if is_out_of_memory(error):
        return NO_ROOM
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def is_out_of_memory(error: BaseException) -> bool:
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "_ALLOC_FAILED" in said
