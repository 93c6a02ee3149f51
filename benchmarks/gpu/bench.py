"""What the sections share: each is a function (bench, seconds) -> rows, called in its own process.

seconds   about how long all of it may take on a card, with compilation
"""

import pkgutil
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.shapes import Work, datasheet, settings, training_work
from benchmarks.gpu.steps import Step
from benchmarks.gpu.timing import Clock

Rows = dict[str, Any]


def run(give: Any, function: str, device: str, results: Rows, seconds: float) -> Any:
    """What `function` ("module:name") finds.   results: of the sections before"""
    return pkgutil.resolve_name(function)(Bench(give, device, results), seconds)


class Bench:
    """`give(name, rows)` hands over rows as soon as they are found, should the rest be lost."""

    def __init__(self, give: Callable[[str, Any], None], device: str, results: Rows):
        self.give, self.device, self.results = give, torch.device(device), results
        self.clock = Clock(self.device)
        self.settings = settings(self.device)

    def rows(self, name: str) -> Rows:
        """Of a section before; none where it was skipped, or failed."""
        found = self.results.get(name)
        return found if isinstance(found, dict) else {}

    def training_row(self, step: Step, measured: Rows) -> Rows:
        if "failed" in measured:
            return measured
        seconds, size = measured["seconds"], 2 if step.bf16 else 4
        row = {"tokens_per_second": step.setting.tokens / seconds, **measured}
        precision = "bf16" if step.bf16 else "float32"
        row |= self.against_the_card(training_work(step.setting, size), seconds, precision)
        return row | {"loss": float(step.first_loss)}

    def against_the_card(self, work: Work, seconds: float, precision: str = "bf16") -> Rows:
        """What of the floor was reached, and what of the FLOP/s of products, measured and said.

        of_*     with those FLOP of a causal attention that are needed, half of them
        mfu*     as the literature counts, 6 N + 12 L C T for a token, with all of them
        precision: of the products, "bf16" or "float32"; a CPU may be fifty times as fast in one.
        """
        found = {"tflops": work.flops / seconds / 1e12, "flop_per_byte": work.intensity}
        peaks = {}
        if ceilings := self.rows("ceilings"):
            peaks["measured_ceiling"] = ceilings[f"{precision}_tflops"]
            peak, copy = 1e12 * peaks["measured_ceiling"], 1e12 * ceilings["copy_tb_per_s"]
            floor = work.floor(peak, copy)
            found |= {"floor_seconds": floor, "of_the_floor": floor / seconds}
        if (sheet := datasheet(self.device)) and precision == "bf16":
            peaks["datasheet"] = sheet[0]
        for name, peak in peaks.items():
            found[f"of_{name}"] = work.flops / seconds / 1e12 / peak
            found[f"mfu_of_{name}"] = work.literature_flops / seconds / 1e12 / peak
        return found
