"""Draw the pictures of the lessons, for light and dark pages alike.

    python docs/lessons/pictures.py                  all of them, into docs/lessons/pictures
    python docs/lessons/pictures.py masks heads      these

The background is transparent and every line and letter is of a colour that stands out from white
and from black.  Needs matplotlib.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

try:
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, Rectangle
except ModuleNotFoundError:
    if __name__ == "__main__":
        sys.exit("the pictures need matplotlib: pip install 'npformer[plot]'")
    raise

import npformer
from npformer import lessons, masks

FOLDER = Path(__file__).parent / "pictures"
INK, BLUE, ORANGE, GREEN = "#747b84", "#4493f8", "#c17d10", "#35a04b"
PURPLE, GREY = "#a371f7", INK
NOTHING = f"{INK}30"  # what may not be seen, what is empty
DIVERGING = LinearSegmentedColormap.from_list("npformer", [ORANGE, f"{INK}00", BLUE])
STYLE = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.labelcolor": INK,
    "legend.frameon": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.transparent": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "npformer",  # the same file each time
}
PICTURES: dict[str, Callable[[], Figure]] = {}


def picture(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    PICTURES[draw.__name__.strip("_").replace("_", "-")] = draw
    return draw


def cells(
    axes: Any, x: float, y: float, values: np.ndarray, colours: Any, size: float = 1.0
) -> None:
    """A table of squares from its upper left corner, y downwards: what is in them, and colours."""
    for (i, j), value in np.ndenumerate(values):
        colour = colours[i][j] if isinstance(colours, list | np.ndarray) else colours
        corner = (x + j * size, y + i * size)
        axes.add_patch(Rectangle(corner, size, size, facecolor=colour, edgecolor=INK, lw=1))
        centre = (corner[0] + size / 2, corner[1] + size / 2)
        axes.text(*centre, str(value), ha="center", va="center", fontsize=11)


def drawing(width: float, height: float, unit: float = 0.42) -> tuple[Figure, Any]:
    """A page of squares, (0, 0) at its upper left."""
    figure = Figure(figsize=(width * unit, height * unit), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.1, width), ylim=(height, -0.1), aspect="equal")
    axes.axis("off")
    return figure, axes


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], **how: Any) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, **how)
    )


def faint(colour: str) -> str:
    """So that what is written on it can be read, on white and on black."""
    return f"{colour}38"


# --- The pictures -----------------------------------------------------------------------------


@picture
def broadcast() -> Figure:
    """A column and a row, each copied to the shape of both, and their sum; then backward."""
    column, row = np.array([[1], [2], [3]]), np.array([[10, 20, 30, 40]])
    figure, axes = drawing(26, 8.4)
    for y, text in ((0.4, "forward: what is missing is copied"), (4.9, "")):
        axes.text(0, y, text, va="center", fontsize=12)
    stretched = np.broadcast_to(column, (3, 4))
    copies = [[faint(BLUE)] + [NOTHING] * 3] * 3
    cells(axes, 0, 1.2, column, faint(BLUE))
    axes.text(0.5, 4.8, "(3, 1)", ha="center")
    arrow(axes, (1.3, 2.7), (2.7, 2.7))
    cells(axes, 3, 1.2, stretched, copies)
    axes.text(7.5, 2.7, "+", ha="center", va="center", fontsize=16)
    cells(axes, 8, 1.2, np.broadcast_to(row, (3, 4)), [[faint(ORANGE)] * 4] + [[NOTHING] * 4] * 2)
    axes.text(10, 4.8, "(1, 4)  or  (4,)", ha="center")
    axes.text(12.6, 2.7, "=", ha="center", va="center", fontsize=16)
    cells(axes, 13.2, 1.2, column + row, faint(GREEN))
    axes.text(15.2, 4.8, "(3, 4)", ha="center")
    axes.text(18.2, 0.4, "backward: what was copied is summed", va="center", fontsize=12)
    ones = np.ones((3, 4), int)
    cells(axes, 18.2, 1.2, ones, faint(GREEN))
    arrow(axes, (22.3, 2.7), (23.3, 2.7))
    cells(axes, 23.5, 1.2, ones.sum(axis=1, keepdims=True), faint(BLUE))
    arrow(axes, (20.2, 4.3), (20.2, 5.2))
    cells(axes, 18.2, 5.4, ones.sum(axis=0, keepdims=True), faint(ORANGE))
    return figure


@picture
def positions() -> Figure:
    """The table of sines and cosines: 50 positions, 64 features."""
    layer = npformer.SinusoidalPositions(50, 64)
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(layer.table, aspect="auto", cmap=DIVERGING, vmin=-1, vmax=1)
    axes.set(xlabel="feature: sine, cosine, sine, ... slower and slower", ylabel="position")
    bar = figure.colorbar(image, ax=axes)
    bar.outline.set_edgecolor(INK)
    return figure


@picture
def heads() -> Figure:
    """(B, T, C) -> (B, T, H, D) -> (B, H, T, D), for one sample of 3 tokens, C = 4, H = 2."""
    figure, axes = drawing(24, 9.6)
    x = np.array([[f"{t}{c}" for c in "abcd"] for t in "123"])
    both = [[faint(BLUE)] * 2 + [faint(ORANGE)] * 2] * 3
    axes.text(2, 0.3, "(T, C): tokens 1, 2, 3", ha="center")
    cells(axes, 0, 1.6, x, both)
    arrow(axes, (4.3, 3.1), (6.2, 3.1))
    axes.text(5.2, 2.6, "split", ha="center")
    axes.text(9, 0.3, "(T, H, D)", ha="center")
    for t in range(3):
        cells(axes, 7, 1 + 1.6 * t, x[t : t + 1, :2], faint(BLUE))
        cells(axes, 9.3, 1 + 1.6 * t, x[t : t + 1, 2:], faint(ORANGE))
    arrow(axes, (11.8, 3.1), (13.9, 3.1))
    axes.text(12.9, 2.6, "transpose", ha="center")
    axes.text(17, 0.3, "(H, T, D): a table for each head", ha="center")
    cells(axes, 14.5, 1.6, x[:, :2], faint(BLUE))
    cells(axes, 17.5, 1.6, x[:, 2:], faint(ORANGE))
    axes.text(2, 6.6, "reshaped to (H, T, D) at once:", ha="center")
    wrong = x.reshape(2, 3, 2)
    colours = np.array(both).reshape(2, 3, 2)
    cells(axes, 14.5, 6.3, wrong[0], colours[0])
    cells(axes, 17.5, 6.3, wrong[1], colours[1])
    arrow(axes, (5.6, 6.5), (14, 7.6))
    axes.text(20.2, 7.8, "heads and tokens\nmixed up", va="center")
    return figure


@picture
def masks_() -> Figure:
    """Padding, causal, and both, for a sentence of three tokens and a pad."""
    ids = np.array([[5, 6, 7, 0]])
    padding = np.broadcast_to(masks.padding_mask(ids, 0)[0, 0], (4, 4))
    causal = masks.causal_mask(4, 4)
    figure, axes = drawing(20, 6.2)
    tokens = ["I", "see", "it", "pad"]
    for i, (name, allowed) in enumerate(
        (("padding", padding), ("causal", causal), ("both", padding & causal))
    ):
        x = 1.9 + 6.3 * i
        axes.text(x + 2, 0.3, name, ha="center", fontsize=12)
        colours = np.where(allowed, faint(BLUE), NOTHING)
        cells(axes, x, 1.6, np.where(allowed, "✓", ""), colours)
        for j, token in enumerate(tokens):
            axes.text(x + j + 0.5, 1.4, token, ha="center", fontsize=10)
            axes.text(x - 0.15, j + 2.1, token, ha="right", va="center", fontsize=10)
    axes.text(0.1, 5.95, "a row asks, a column is asked; a row of 'both' always has something left")
    return figure


@picture
def shift() -> Figure:
    """What the decoder is given and what it has to say."""
    figure, axes = drawing(15, 5.4)
    given, wanted = ["SOS", "a", "b", "c"], ["a", "b", "c", "EOS"]
    axes.text(2.6, 1.0, "the decoder reads", ha="right", va="center")
    axes.text(2.6, 4.2, "and must say", ha="right", va="center")
    for i, (x, y) in enumerate(zip(given, wanted, strict=True)):
        left = 3 + 3 * i
        cells(axes, left, 0.3, np.array([[x]]), faint(BLUE), size=1.4)
        cells(axes, left, 3.5, np.array([[y]]), faint(GREEN), size=1.4)
        arrow(axes, (left + 0.7, 1.8), (left + 0.7, 3.4))
        if i < 3:
            arrow(axes, (left + 1.0, 3.4), (left + 3.2, 1.8), linestyle=":")
    return figure


def said_before(name: str) -> dict[str, Any]:
    """What the lesson's code has defined where it shows this picture: the picture shows that."""
    names: dict[str, Any] = {}
    (path,) = (
        path
        for path in lessons.files()
        if f"(pictures/{name}.svg)" in path.read_text(encoding="utf-8")
    )
    for piece in lessons.run(path.read_text(encoding="utf-8"), names=names):
        if f"(pictures/{name}.svg)" in piece.text:
            break
    return names


def curves(axes: Any, lines: dict[str, tuple[Any, Any]], colours: list[str], **how: Any) -> None:
    """Each with its name at its end, so that nobody has to compare colours with a legend.

    Scales and limits have to be there: names that would overlap are moved apart.
    """
    lowest = -np.inf
    for colour, (name, (x, y)) in sorted(
        zip(colours, lines.items(), strict=True), key=lambda line: line[1][1][1][-1]
    ):
        axes.plot(x, y, color=colour, **how)
        _, height = axes.transData.transform((x[-1], y[-1])) * 72 / axes.figure.dpi
        lowest = max(height, lowest + 13)  # points
        place = (8, lowest - height)
        axes.annotate(
            name, (x[-1], y[-1]), place, textcoords="offset points", va="center", color=colour
        )


@picture
def residuals() -> Figure:
    """How large a gradient of size 1 is when it has come through the layers."""
    reached = said_before("residuals")["reached"]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys(name for name, _ in reached):
        depths = [L for kind, L in reached if kind == name]
        lines[name] = (depths, [reached[name, L] for L in depths])
    axes.set(xlabel="layers", ylabel="size of the gradient at the input", yscale="log")
    axes.set(xticks=depths, xlim=(0, 32), ylim=(1e-6, 1e10))
    curves(axes, lines, [ORANGE, GREY, PURPLE, GREEN, BLUE], marker="o", markersize=4)
    axes.spines["bottom"].set_bounds(0, max(depths))
    return figure


@picture
def learning_rate() -> Figure:
    """The loss over the steps, smoothed over ten, for each rate."""
    losses = said_before("learning-rate")["CURVES"]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    window = np.full(10, 0.1)
    smooth = {rate: np.convolve(run, window, "valid") for rate, run in losses.items()}
    lines = {f"{rate:g}": (np.arange(10, 10 + len(run)), run) for rate, run in smooth.items()}
    n_steps = len(next(iter(losses.values())))
    axes.set(xlabel="step", ylabel="loss, nats per token", xlim=(10, 1.12 * n_steps))
    axes.set(yscale="log", ylim=(0.2, 50), yticks=(0.3, 1, 3, 10, 30))
    axes.set(xticks=range(30, n_steps + 1, 30))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    curves(axes, lines, [ORANGE, GREY, BLUE, GREEN, PURPLE], lw=1.6)
    axes.spines["bottom"].set_bounds(10, n_steps)
    return figure


@picture
def attention() -> Figure:
    """A trained decoder while it says "thought": whom its positions ask, back and across."""
    names = said_before("attention")
    letters, sounds, across, back = (names[n] for n in ("letters", "sounds", "across", "back"))
    read = ["SOS", *sounds[:-1]]
    figure, axes = drawing(20, 7.4)
    for x, weights, keys, name in (
        (3.4, back, read, "self-attention: what it has said"),
        (11.4, across, letters, "cross-attention: what it was given"),
    ):
        shades = [[f"{BLUE}{round(255 * w**0.7):02x}" for w in row] for row in weights.tolist()]
        cells(axes, x, 2, np.full(weights.shape, ""), shades)
        axes.text(x + len(keys) / 2, 0.6, name, ha="center", fontsize=12)
        for j, key in enumerate(keys):
            axes.text(x + j + 0.5, 1.8, key, ha="center", fontsize=10)
        for i, (token, sound) in enumerate(zip(read, sounds, strict=True)):
            said = f"{token} → {sound}" if x < 10 else sound
            axes.text(x - 0.2, i + 2.5, said, ha="right", va="center", fontsize=10)
    axes.text(
        0,
        6.9,
        "a row reads one token and says the next; the stronger the blue, the more it looks there",
    )
    return figure


def main(arguments: list[str]) -> None:
    chosen = arguments or list(PICTURES)
    FOLDER.mkdir(exist_ok=True)
    for name in chosen:
        if name not in PICTURES:
            sys.exit(f"there is no picture {name!r}, of: {', '.join(PICTURES)}")
        save(name, FOLDER)


def save(name: str, folder: Path) -> None:
    with mpl.rc_context(STYLE):
        PICTURES[name]().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
