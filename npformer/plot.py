"""Pictures, where matplotlib is installed; everything works without.

A step of an answer has read a token and says the next: in all of them it is written `read → said`.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npformer import checkpoint
from npformer.tasks import Task


def draw_history(history: Mapping[str, Any], task: Task, path: str | Path) -> bool:
    """Loss and the task's score against the step, as a PNG.  False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps, evaluations = history["steps"], history["evaluations"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    losses = [entry["loss"] for entry in steps]
    xs = [entry["step"] for entry in steps]
    axes.plot(xs, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(xs, _smoothed(losses), color="tab:blue", label="training loss (smoothed)")
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    scores = axes.twinx()
    label = task.metric.replace("_", " ")
    scores.plot(
        [entry["step"] for entry in evaluations],
        [100 * entry[task.metric] for entry in evaluations],
        color="tab:orange",
        marker="o",
        markersize=3,
        label=f"held out: {label}",
    )
    scores.set(ylabel=f"{label} (%)", ylim=(0, None if task.lower_is_better else 102))
    axes.set_title(f"npformer: {task.name}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    write_figure(figure, path, dpi=150)
    return True


def write_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """Drawn in memory and then written whole; the format is that of the name, PNG without one.

    Raises ValueError for a format that there is not, CheckpointError for a place that will not do.
    """
    kinds, kind = figure.canvas.get_supported_filetypes(), Path(path).suffix[1:].lower() or "png"
    if kind not in kinds:
        raise ValueError(f"{path}: there is no picture format {kind!r}, but {', '.join(kinds)}")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=dpi)
    checkpoint.write_atomically(path, drawn.getvalue())


def _smoothed(values: list[float], keep: float = 0.95) -> list[float]:
    """An exponential running mean, corrected for its start as Adam's are."""
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth


def draw_alignment(alignment: Any, path: str | Path) -> bool:
    """Letters along, steps down, as dark as the attention.  False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    letters, phones, weights = alignment
    figure = Figure(
        figsize=(2.2 + 0.42 * len(letters), 1.3 + 0.36 * len(phones)), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(weights, cmap="Blues", vmin=0, aspect="auto")
    axes.set_xticks(range(len(letters)), letters, fontsize=13)
    axes.set_yticks(range(len(phones)), steps(["start", *phones[:-1]], phones), fontsize=11)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xlabel("letters: what is attended to")
    axes.set_ylabel("steps, read → said: who attends")
    for edge in axes.spines.values():
        edge.set_visible(False)
    write_figure(figure, path, dpi=150)
    return True


def steps(read: Sequence[str], said: Sequence[str]) -> list[str]:
    """The names of an answer's steps."""
    return [f"{before} → {after}" for before, after in zip(read, said, strict=True)]


def draw_attention(
    trace: Any, sources: list[str], targets: list[str], said: list[str], path: str | Path
) -> bool:
    """Every layer's heads as small pictures: queries down, keys along.  False without matplotlib.

    `trace` is of one sample; `sources` and `targets` are the tokens that were read, `said` what was
    to be said after each of the targets.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [
        entry
        for entry in trace
        if entry.phase == "forward"
        and entry.name.endswith("_attn.weights")
        and entry.value.ndim == 4
    ]
    n_heads = max(entry.value.shape[1] for entry in shown)
    size = 0.9 + 0.17 * max(len(sources), len(targets))
    figure = Figure(figsize=(1.5 + size * n_heads, size * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), n_heads, squeeze=False)
    for i, (row, entry) in enumerate(zip(grid, shown, strict=True)):
        queries = sources if entry.name.startswith("encoder") else steps(targets, said)
        keys = targets if entry.name.startswith("decoder") and "self" in entry.name else sources
        for head, axes in enumerate(row):
            axes.imshow(entry.value[0, head], cmap="Blues", vmin=0, vmax=1)
            axes.set_xticks(range(len(keys)), keys, fontsize=6)
            axes.set_yticks(range(len(queries)), queries, fontsize=6)
            axes.xaxis.tick_top()
            axes.tick_params(length=0, pad=1)
            if head == 0:
                axes.set_ylabel(entry.name.removesuffix(".weights"), fontsize=6)
            if i == 0:
                axes.set_title(f"head {head}", fontsize=8)
    write_figure(figure, path, dpi=130)
    return True


def draw_embeddings(
    tables: Mapping[str, tuple[np.ndarray, Sequence[str]]], positions: np.ndarray, path: str | Path
) -> bool:
    """Similarities and a projection of each table's tokens, and the similarities of positions.

    tables   side -> weight (V, C), the tokens of its rows          False without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    n = len(tables)
    figure = Figure(figsize=(5.2 * (n + 1), 9.5), layout="constrained")
    grid = figure.subplots(2, n + 1)
    for column, (side, (weight, tokens)) in enumerate(tables.items()):
        kept = [i for i, token in enumerate(tokens) if not token.startswith("<")]
        names, x = [tokens[i] for i in kept], weight[kept]
        axes = grid[0, column]
        axes.imshow(_cosines(x), cmap="RdBu_r", vmin=-1, vmax=1)
        size = 8 if len(names) < 20 else 5
        axes.set_xticks(range(len(names)), names, fontsize=size, rotation=90)
        axes.set_yticks(range(len(names)), names, fontsize=size)
        axes.set_title(f"{side} tokens: cosine of each pair")
        plane, share = _plane(x)
        axes = grid[1, column]
        axes.scatter(*plane.T, s=8, color="tab:blue", alpha=0.4)
        for name, (a, b) in zip(names, plane, strict=True):
            axes.annotate(name, (a, b), fontsize=9)
        axes.set_title(f"{side} tokens: the plane of {share:.0%} of their spread")
        axes.set(xticks=[], yticks=[])
    grid[0, n].imshow(_cosines(positions), cmap="RdBu_r", vmin=-1, vmax=1)
    grid[0, n].set(title="positions: cosine of each pair", xlabel="position", ylabel="position")
    grid[1, n].imshow(positions, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    grid[1, n].set(title="position vectors", xlabel="feature", ylabel="position")
    write_figure(figure, path, dpi=110)
    return True


def _cosines(x: np.ndarray) -> np.ndarray:
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def _plane(x: np.ndarray) -> tuple[np.ndarray, float]:
    """The rows in the plane of their two first principal components, and its share."""
    centred = x - x.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    return u[:, :2] * s[:2], float((s[:2] ** 2).sum() / (s**2).sum())
