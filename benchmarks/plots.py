"""The pictures of the results: python -m benchmarks.tables --readme

White ground, so that they can be read on a dark page as well.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import breakdown, roofline
from benchmarks.contenders import NPFORMER
from benchmarks.harness import BenchmarkError, Result, Run, is_installed
from npformer.plot import write_figure

COLOURS = ["#1f6feb", "#d1603d", "#2f9e6e", "#8a5cc2", "#b8860b", "#5b6770"]


def draw_all(newest: dict[str, Result], folder: Path) -> Iterator[Path]:
    """Those for which there is a result.  Raises BenchmarkError without matplotlib."""
    if not is_installed("matplotlib"):
        raise BenchmarkError("plots need matplotlib: pip install 'npformer[plot]'")
    for kind, draw in (
        ("sweep", draw_sweep),
        ("breakdown", draw_breakdown),
        ("roofline", draw_roofline),
    ):
        if kind in newest:
            path = folder / f"{kind}.png"
            write_figure(draw(newest[kind]), path, dpi=130)
            yield path


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, columns)
    for a in [axes] if columns == 1 else axes:
        a.spines[["top", "right"]].set_visible(False)
        a.tick_params(which="both", labelsize=9)
    return figure, axes


def draw_sweep(result: Result) -> Any:
    """Time of a step against the width; where one line begins to win is marked."""
    figure, axes = new_figure(7, 4.2)
    widths = [run.about["config"]["d_model"] for run in result.runs]
    names = [m.name for m in result.runs[0].measurements]
    times = {name: [1e3 * run[name].median for run in result.runs] for name in names}
    for colour, name in zip(COLOURS, names, strict=False):
        label = f"{name} (NumPy)" if name == NPFORMER else name
        axes.plot(widths, times[name], marker="o", color=colour, label=label, linewidth=1.8)
    for name in names[1:]:
        crossing = first_win(times[name], times[NPFORMER])
        if crossing is not None:
            axes.axvline(widths[crossing], color="#5b6770", linewidth=0.8, linestyle=":")
            axes.annotate(
                f"{name} is faster from here",
                (widths[crossing], times[NPFORMER][crossing]),
                xytext=(6, -14),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_xlabel("d_model (3+3 layers, batch 32, length 32)")
    axes.set_ylabel("one training step, ms")
    has_gpu = any("cuda" in name for name in names)
    axes.set_title(
        f"Time against size, {result.runs[0].measurements[0].threads} CPU thread"
        + ("" if has_gpu else " (GPU: not measured)"),
        fontsize=11,
        loc="left",
    )
    axes.grid(axis="y", color="#e5e8eb", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9)
    return figure


def first_win(times: list[float], reference: list[float]) -> int | None:
    """The first size from which `times` stay below `reference`; None where they never do."""
    wins = [t < r for t, r in zip(times, reference, strict=True)]
    for i in range(len(wins)):
        if all(wins[i:]):
            return i
    return None


def draw_breakdown(result: Result) -> Any:
    """A bar for each size: the share of the step that each op takes."""
    runs = [run for run in result.runs if run.about["dropout"] > 0] or result.runs
    figure, axes = new_figure(8.5, 1.1 + 0.75 * len(runs))
    shares = [shares_of(run) for run in runs]
    total: dict[str, float] = defaultdict(float)
    for share in shares:
        for name, part in share.items():
            total[name] += part
    order = sorted(total, key=lambda name: -total[name])
    shown, rest = order[:9], order[9:]
    palette = [*COLOURS, "#7fb2ff", "#e9a58d", "#8fd3b6", "#9aa3ab"]
    left = [0.0] * len(runs)
    number: dict[str, Any] = {"fontsize": 8.5, "color": "white", "weight": "bold"}
    for colour, name in zip(palette, [*shown, "everything else"], strict=False):
        parts = [
            100 * (sum(share.get(n, 0) for n in rest) if name not in shown else share.get(name, 0))
            for share in shares
        ]
        axes.barh(range(len(runs)), parts, left=left, color=colour, label=name, height=0.62)
        for i, part in enumerate(parts):
            if part > 4.5:
                axes.text(left[i] + part / 2, i, f"{part:.0f}", ha="center", va="center", **number)
        left = [a + b for a, b in zip(left, parts, strict=True)]
    axes.set_yticks(range(len(runs)), [run.about["config"]["name"] for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent of npformer's training step")
    axes.set_title(
        f"Where a step's time goes (dropout {runs[0].about['dropout']:g})", fontsize=11, loc="left"
    )
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    return figure


def shares_of(run: Run) -> dict[str, float]:
    step = run[f"{breakdown.STEP}|{breakdown.FORWARD}"].median
    spent: dict[str, float] = defaultdict(float)
    for m in run.measurements:
        label, column = m.name.split("|")
        if label != breakdown.STEP and column != breakdown.PRODUCTS:
            spent[label] += m.median / step
    return spent


def draw_roofline(result: Result) -> Any:
    """Each op of a step under the ceilings, for the sizes side by side.

    The arrays of a step may lie in a cache, which is faster than the memory: what is above the roof
    of the memory has read them from there, and says how fast.
    """
    figure, axes = new_figure(3.6 * len(result.runs), 4.2, len(result.runs))
    for a, run in zip(axes if len(result.runs) > 1 else [axes], result.runs, strict=True):
        top, copying, found = roofline.points(run)
        cached = roofline.moved(run, roofline.COPY_CACHED)
        for slope, style, label in (
            (copying, "-", "roof: large products, copying from memory"),
            (cached, "--", "the same, copying in the cache"),
        ):
            if not math.isnan(slope):
                xs = sorted([2.0**-4, top / slope, 2.0**8])
                ys = [min(top, x * slope) for x in xs]
                a.plot(xs, ys, style, color="#24292f", linewidth=1.4, label=label)
        for colour, (name, (intensity, rate)) in zip(
            [*COLOURS, "#e9a58d"], found.items(), strict=False
        ):
            a.plot([intensity], [rate], "o", color=colour, markersize=7, label=name)
            if rate > 1.05 * intensity * copying and math.isnan(cached):
                mib, speed = run.about["bytes"][name] / 2**20, roofline.moved(run, name)
                a.annotate(
                    f"{name} moves {mib:.2g} MiB\nin the cache,\n{speed:.0f} GB/s",
                    (intensity, rate),
                    xytext=(0.03, 0.72),
                    textcoords="axes fraction",
                    arrowprops={"arrowstyle": "-", "color": colour},
                    fontsize=8,
                )
        a.set_xscale("log", base=2)
        a.set_yscale("log")
        a.set_ylim(1, 2 * top)
        a.set_xticks(
            [2.0**i for i in range(-4, 9, 2)], ["1/16", "1/4", "1", "4", "16", "64", "256"]
        )
        a.set_title(run.about["config"]["name"], fontsize=11, loc="left")
        a.set_xlabel("FLOP per byte")
        a.grid(color="#eef0f2", linewidth=0.8)
    first = axes[0] if len(result.runs) > 1 else axes
    first.set_ylabel("GFLOP/s, one thread")
    figure.legend(
        *first.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5 if len(result.runs) > 1 else 2,
        frameon=False,
        fontsize=8.5,
    )
    return figure
