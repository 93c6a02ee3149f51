"""What the GPU benchmark has found, as a report, as plots and as the README's table."""

from pathlib import Path
from typing import Any

from benchmarks import harness, plots
from npformer.plot import write_figure

NOT_MEASURED = "not measured"
OURS = "torchformer"  # how the names of our rows begin


def report(content: dict[str, Any]) -> str:
    """Tables of whatever there is."""
    about = content["environment"]
    lines = [f"# torchformer on {about['device']}", ""]
    lines += [", ".join(f"{k} {v}" for k, v in about.items() if k != "device"), ""]
    for name, found in content["results"].items():
        lines += [f"## {name}", ""]
        if isinstance(found, str):
            lines += [found, ""]
            found = content.get("unfinished", {}).get(name, [])
        lines += [line for rows in _tables(name, found) if rows for line in (_table(rows), "")]
    return "\n".join(lines)


def _tables(name: str, found: Any) -> list[list[dict[str, Any]]]:
    """The rows of a section: a list, a dict of rows, one row alone, or shares and kernels."""
    if isinstance(found, list):
        return [found]
    if "shares" in found:
        shares = [{"kind": kind, "share": share} for kind, share in found["shares"].items()]
        return [shares, found["kernels"]]
    if found and not any(isinstance(v, dict) for v in found.values()):
        found = {name: found}
    return [[{"": k, **_row(v)} for k, v in found.items()]]


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return harness.table(columns, [[_cell(row.get(c, "")) for c in columns] for row in rows])


def _row(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"value": value}


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- The README -------------------------------------------------------------------------------

ROWS = (  # what, the section, the row in it where it has several
    ("A, training: encoder-decoder, 6+6 layers of 512, 256 pairs of 128 + 128", "training A", OURS),
    ("B, training: decoder-only, 124M, 32 x 1024", "training B", None),
    ("C, training: decoder-only, 1.3B, 8 x 2048", "training C", None),
    ("B, decoding, one by one", "decoding", "B, batch 1"),
    ("B, decoding, 64 at once", "decoding", "B, batch 64"),
    ("C, decoding, one by one", "decoding", "C, batch 1"),
    ("C, decoding, 64 at once", "decoding", "C, batch 64"),
)
AGAINST = (  # A, as many times as fast as nn.Transformer
    ("full batches, against eager float32", "training A", "nn.Transformer, eager float32"),
    ("full batches, against eager bf16", "training A", "nn.Transformer, eager bf16"),
    ("full batches, against compiled bf16", "training A", "nn.Transformer, compiled bf16"),
    ("ragged, against padded eager bf16", "training A ragged", "nn.Transformer, eager bf16"),
    ("ragged, against padded compiled bf16", "training A ragged", "nn.Transformer, compiled bf16"),
)
COLUMNS = {  # of the first table: the key in a row, and how it is shown
    "tokens/s": ("tokens_per_second", ",.0f"),
    "floor / measured": ("of_the_floor", ".0%"),
    "of the card's FLOP/s": ("of_datasheet", ".0%"),
    "by 6N + 12LCT": ("mfu_of_datasheet", ".0%"),
}


def summary(content: dict[str, Any] | None) -> str:
    """The README's tables; without results they say so in every cell."""
    results = content["results"] | content.get("unfinished", {}) if content else {}

    def found(section: str, name: Any, key: str, form: str) -> str:
        row = row_of(results, section, name)
        return format(row[key], form) if isinstance(row.get(key), float) else NOT_MEASURED

    speeds = [
        [what, *(found(section, name, key, form) for key, form in COLUMNS.values())]
        for what, section, name in ROWS
    ]
    times = [[what, found(section, name, "ours_to_it", ".2f")] for what, section, name in AGAINST]
    tables = [
        harness.table(["bf16, dropout 0", *COLUMNS], speeds),
        harness.table(["A beside torch.nn.Transformer, same weights", "times as fast"], times),
    ]
    if content:
        about = content["environment"]
        tables.append(
            f"<sub>{about['created'][:10]}, {about['device']}, torch {about['torch']}.</sub>"
        )
    return "\n\n".join(tables)


def row_of(results: dict[str, Any], section: str, name: str | None = None) -> dict[str, Any]:
    """A row; none where the section was skipped, has failed, or has no such row.

    name   None: the section is one row;  OURS: the fastest of ours
    """
    rows = results.get(section)
    if not isinstance(rows, dict):
        return {}
    if name == OURS:
        ours = [row for key, row in rows.items() if key.startswith(OURS) and isinstance(row, dict)]
        return max(ours, key=lambda row: row.get("tokens_per_second", 0.0), default={})
    row = rows if name is None else rows.get(name)
    return row if isinstance(row, dict) else {}


# --- Plots ------------------------------------------------------------------------------------


def draw(content: dict[str, Any], folder: Path) -> None:
    """The ladder, the crossover, the roofline and the breakdown of B, where matplotlib is."""
    if not harness.is_installed("matplotlib"):
        return
    results = content["results"] | content.get("unfinished", {})
    for name, drawn in (
        ("ladder", ladder(results.get("ladder"))),
        ("crossover", crossover(results.get("crossover"))),
        ("roofline", roofline(results)),
        ("breakdown", breakdown(results.get("breakdown B"))),
    ):
        if drawn is not None:
            write_figure(drawn, folder / f"{name}.png", dpi=130)


def ladder(rungs: Any) -> Any:
    """Tokens per second, one thing at a time, with the factor over the line before."""
    rungs = [r for r in rungs if "gradient_error" in r] if isinstance(rungs, list) else []
    if not rungs:
        return None
    figure, axes = plots.new_figure(8, 0.42 * len(rungs) + 1)
    speeds = [rung["tokens_per_second"] for rung in rungs]
    bars = axes.barh([rung["name"] for rung in rungs], speeds, color=plots.COLOURS[0])
    labels = [
        f"{rung['tokens_per_second']:,.0f}   x {rung['factor']:.2f}   "
        f"gradient error {rung['gradient_error']:.0e}"
        for rung in rungs
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="tokens per second", xscale="log", xlim=(min(speeds) / 3, max(speeds) * 60))
    return figure


def crossover(rows: Any) -> Any:
    """One step against the width."""
    if not isinstance(rows, list) or not rows:
        return None
    figure, axes = plots.new_figure(7, 4.2)
    widths = [row["d_model"] for row in rows]
    for colour, name in zip(plots.COLOURS, [k for k in rows[0] if k != "d_model"], strict=False):
        axes.plot(widths, [1e3 * row[name] for row in rows], "o-", color=colour, label=name)
    axes.set(xlabel="d_model", ylabel="one step, ms", xscale="log", yscale="log")
    axes.set_xticks(widths, map(str, widths))
    axes.xaxis.minorticks_off()
    axes.legend(frameon=False)
    return figure


def roofline(results: dict[str, Any]) -> Any:
    """FLOP/s against FLOP per byte: what the card allows, and what was reached."""
    ceilings = row_of(results, "ceilings")
    rows = {f"{name}, training": row_of(results, f"training {name}") for name in "BC"}
    rows["A, training"] = row_of(results, "training A", OURS)
    for name in row_of(results, "decoding"):
        rows[name.replace(", batch", ", decoding") + " at once"] = row_of(results, "decoding", name)
    points = {name: row for name, row in rows.items() if "tflops" in row}
    if not ceilings or not points:
        return None
    figure, axes = plots.new_figure(7.5, 4.6)
    copy = ceilings["copy_tb_per_s"]
    peaks = {name: ceilings[f"{name}_tflops"] for name in ("bf16", "float32")}
    ridges = {name: peak / copy for name, peak in peaks.items()}  # TFLOP/s / TB/s: FLOP per byte
    places = [*ridges.values(), *(row["flop_per_byte"] for row in points.values())]
    left, right = min(places) / 3, max(places) * 10
    for name, style in (("bf16", "-"), ("float32", "--")):
        corners = [left, ridges[name], right], [left * copy, peaks[name], peaks[name]]
        axes.plot(*corners, style, color=plots.COLOURS[-1], lw=1.5)
        axes.annotate(
            name, (right, peaks[name]), (-4, 4), textcoords="offset points", ha="right", fontsize=8
        )
    for colour, (name, row) in zip(plots.COLOURS * 2, points.items(), strict=False):
        place = (row["flop_per_byte"], row["tflops"])
        axes.plot(*place, "o", color=colour)
        axes.annotate(name, place, (6, -3), textcoords="offset points", fontsize=8, color=colour)
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set(xlabel="FLOP per byte, by the shapes", ylabel="TFLOP/s")
    axes.set_title("Measured products and copies (lines), and what was reached", fontsize=10)
    return figure


def breakdown(found: Any) -> Any:
    """Which kinds of kernels a step of B is made of."""
    shares = found.get("shares") if isinstance(found, dict) else None
    if not shares:
        return None
    figure, axes = plots.new_figure(7, 0.42 * len(shares) + 1)
    percent = [100 * share for share in shares.values()]
    bars = axes.barh(list(shares), percent, color=plots.COLOURS[0])
    axes.bar_label(bars, [f"{share:.0f} %" for share in percent], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="percent of a step of B", xlim=(0, 1.1 * max(percent)))
    return figure
