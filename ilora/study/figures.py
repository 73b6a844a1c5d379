"""Figures: arrays and frames to axes, in one style. No torch, no files.

Colours are Okabe and Ito's, which colour-blind readers tell apart; for a print without colour a marker, a line style,
a hatch or the order says the same. Every function returns the axes it drew on, for a title among others. Text is shown
as it is: a `$` in a title or in a name from the data does not start a formula.
"""

import io
import itertools
import re
import textwrap
from collections.abc import Callable
from functools import wraps

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, MaxNLocator

DASHES, HATCHES, MARKERS = ["-", "--", "-.", ":"], ["", "//", "..", "xx"], "os^Dvx*P"
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]


def style() -> None:
    """Set the style; in a notebook figures become SVG, the same for the same data, and tables show no formulas."""
    from IPython import get_ipython  # not needed outside notebooks

    if shell := get_ipython():
        shell.run_line_magic("config", "InlineBackend.figure_formats = ['svg']")
        kwargs = {"bbox_inches": "tight", "metadata": {"Date": None}}
        shell.run_line_magic("config", f"InlineBackend.print_figure_kwargs = {kwargs}")
    plt.rcParams.update({
        "figure.figsize": (6.4, 3.4), "figure.constrained_layout.use": True, "figure.facecolor": "white",
        "axes.prop_cycle": plt.cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "font.size": 10,
        "axes.titlesize": "medium", "axes.titlelocation": "left", "hatch.linewidth": 0.6,
        "svg.hashsalt": "ilora", "svg.fonttype": "path", "text.parse_math": False,
    })  # fmt: skip
    pd.set_option("display.html.use_mathjax", False)


def _literal(draw: Callable) -> Callable:
    """The function, which draws all text as it is: `$` starts no formula, with or without `style`."""

    @wraps(draw)
    def drawn(*args, **kwargs) -> Axes | np.ndarray:
        axes = draw(*args, **kwargs)
        for text in np.ravel(axes)[0].figure.findobj(Text):
            text.set_parse_math(False)
        return axes

    return drawn


def _one_line(names: list[str]) -> list[str]:
    """Names from the data without line breaks and control characters, which would run into other rows."""
    return [re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(name)) for name in names]


@_literal
def intervals(table: pd.DataFrame, label: str, chance: float | None = None, ax: Axes | None = None) -> Axes:
    """A point with its 95 % interval for each row of `comparisons.metric_table`, first row on top."""
    ax = ax or plt.subplots(figsize=(6.4, 0.9 + 0.36 * len(table)))[1]
    place = np.arange(len(table))[::-1]
    error = [table["value"] - table["low"], table["high"] - table["value"]]
    ax.errorbar(table["value"], place, xerr=error, fmt="o", capsize=3, color=COLOURS[0])
    if chance is not None:
        ax.axvline(chance, color="0.4", linestyle="--", linewidth=1)
        ax.annotate("chance", (chance, len(table) - 0.6), xytext=(4, 0), textcoords="offset points", color="0.4")
    ax.set(yticks=place, yticklabels=table.index, xlabel=f"{label}, with 95 % interval", ylim=(-0.6, len(table) - 0.2))
    return ax


@_literal
def panels(tables: dict[str, pd.DataFrame], label: str, mark: str, at: float) -> np.ndarray:
    """`intervals` of several tables side by side, an axes each, with a marked line; rows are the systems of all.

    Tables without rows are left out.
    """
    tables = {name: table for name, table in tables.items() if len(table)}
    if not tables:
        return _nothing()
    rows = list(dict.fromkeys(row for table in tables.values() for row in table.index))
    size = (2.2 + 2.4 * len(tables), 1.1 + 0.3 * len(rows))
    figure, axes = plt.subplots(1, len(tables), figsize=size, squeeze=False, sharey=True)
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        intervals(table.reindex(rows), "", at, ax)
        ax.texts[-1].set_text(mark)
        fewer = "".join(f"\n({row}: {n})" for row, n in table["n"].items() if n != table["n"].max())
        ax.set(title=f"{name}, n = {table['n'].max():.0f}{fewer}", xlabel="")
    figure.supxlabel(f"{label}, with 95 % interval", fontsize=10)
    return axes[0]


@_literal
def error_parts(tables: dict[str, pd.DataFrame]) -> np.ndarray:
    """Standard errors by cause, for each system of each table of `table_results.system_means`, an axes a table."""
    if not tables:
        return _nothing()
    causes = {"error_users": "users", "error_seeds": "seeds", "error_draws": "draws of candidates"}
    size = (2.2 + 2.4 * len(tables), 1.3 + 0.42 * max(map(len, tables.values())))
    figure, axes = plt.subplots(1, len(tables), figsize=size, squeeze=False, sharex=True)
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        place = np.arange(len(table))
        for index, (cause, meaning) in enumerate(causes.items()):
            look = {"color": COLOURS[index], "hatch": HATCHES[index], "edgecolor": "white"}
            label = meaning if ax is axes[0, 0] else None
            ax.barh(place + 0.27 * (index - 1), table[cause].astype(float).fillna(0), 0.27, label=label, **look)
        ax.set(yticks=place, yticklabels=table.index if ax is axes[0, 0] else [], title=name)
        ax.invert_yaxis()
    figure.supxlabel("standard error of HitRatio@1", fontsize=10)
    figure.legend(loc="outside upper center", ncols=len(causes))
    return axes[0]


@_literal
def ratios(table: pd.DataFrame, label: str) -> Axes:
    """Ratios with their quartiles on a logarithmic scale, each with its goal as a bar (`benchmark_results.ratios`).

    A ratio that misses its goal is an open square in another colour, one without a goal a grey point.
    """
    ax = plt.subplots(figsize=(6.4, 0.9 + 0.3 * len(table)))[1]
    place = np.arange(len(table))[::-1]
    for met, colour, marker, meaning in (
        (True, 0, "o", "goal met"),
        (False, 5, "s", "goal missed"),
        (None, 7, ".", "no goal"),
    ):
        own = np.array([found is met for found in table["met"]], bool)
        if own.any():
            found = table[own]
            error = [found["value"] - found["low"], found["high"] - found["value"]]
            look = {"color": COLOURS[colour], "fmt": marker, "capsize": 3, "label": meaning}
            ax.errorbar(found["value"], place[own], xerr=error, mfc="white" if met is False else None, **look)
    ax.plot(table["aim"], place, "|", color="0.2", markersize=13, markeredgewidth=2, label="goal")
    ax.axvline(1, color="0.4", linewidth=1)
    runs = [benchmark.partition("_")[2].replace("_", ", ") for benchmark in table.index.get_level_values(0)]
    names = [f"{part}: {way} ({run})" for run, (_, part, way) in zip(runs, table.index, strict=True)]
    ax.set(yticks=place, yticklabels=names, xscale="log", xlabel=label, ylim=(-0.6, len(table) - 0.4))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # without formulas
    ax.figure.legend(loc="outside upper center", ncols=4)
    return ax


@_literal
def losses(histories: dict[str, pd.DataFrame], span: int = 20, ax: Axes | None = None) -> Axes:
    """Training loss against sequences seen, one line a run: the mean of the last `span` steps."""
    ax, drawn = ax or plt.subplots()[1], []
    for index, history in enumerate(histories.values()):
        smooth = history["loss"].rolling(span, min_periods=1).mean()
        drawn += ax.plot(history["examples"], smooth, DASHES[index % len(DASHES)])
    ax.set(xlabel="training sequences seen", ylabel="loss, nats per title")
    if len(histories) > 1:
        ax.legend(drawn, histories)
    return ax


@_literal
def lines(table: pd.DataFrame, x: str, y: str, ax: Axes | None = None) -> Axes:
    """One labelled line for each column of a frame, against its index, past its gaps; whole numbers get whole ticks."""
    ax, drawn = ax or plt.subplots()[1], []
    if pd.api.types.is_integer_dtype(table.index):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for column, marker in zip(table.columns, itertools.cycle(MARKERS), strict=False):
        own = table[column].dropna()
        drawn += ax.plot(own.index, own, marker=marker)
    ax.set(xlabel=x, ylabel=y)
    ax.legend(drawn, map(str, table.columns))  # by name: a label that begins with "_" would be left out
    return ax


@_literal
def trend(table: pd.DataFrame, x: str, y: str, by: str | None = None, title: str = "") -> np.ndarray:
    """Means with 95 % intervals over seeds against `x`, one line a system, a small grey point for each seed.

    A table of `sweep_results.means_over_seeds`; `by` names a column for each value of which there is an axes.
    """
    parts = dict(list(table.groupby(by, sort=False))) if by and len(table) else {"": table}
    figure, axes = _panels(len(parts), (6.4, 3.2, 3.2 if len(parts) > 2 else 3.6))
    systems, drawn = list(table["system"].unique()), {}
    step = 0.015 * np.ptp(table[x]) if len(table) else 0  # beside each other, so that nothing hides another
    for ax, (part, own) in zip(axes, parts.items(), strict=True):
        lines = list(own.groupby("system", sort=False))
        for index, (system, line) in enumerate(lines):
            number = systems.index(system)
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            place = line[x] + (index - (len(lines) - 1) / 2) * step
            error = [line["value"] - line["low"], line["high"] - line["value"]]
            dash = DASHES[number % len(DASHES)]
            drawn[system] = ax.errorbar(place, line["value"], yerr=error, linestyle=dash, capsize=3, **look)
            for at, values in zip(place + step / 2, line["runs"], strict=True):
                ax.scatter([at] * len(values), values, s=7, color="0.4", linewidths=0, zorder=3)
        named = part if isinstance(part, str) else f"{by} {part:g}"
        ax.set(title=textwrap.fill(named, 30), xlabel=x, xticks=sorted(table[x].unique()))
    axes[0].set_ylabel(y)
    if len(systems) > 1:
        handles = [drawn[system] for system in systems]
        figure.legend(handles, systems, loc="outside lower center", ncols=min(len(systems), 3))
    _finish(axes[0], table, f"{title}\nmeans with 95 % intervals{_seeds(table)}".strip())
    return axes


@_literal
def differences(table: pd.DataFrame, what: str, title: str) -> np.ndarray:
    """Differences from the default with 95 % intervals over seeds, a small grey point for each seed.

    A table of `sweep_results.differences_from_default`: a row for each variant, an axes for each setting.
    """
    settings, variants = table["setting"].unique(), list(table["variant"].unique())
    figure, axes = _panels(len(settings), (6.4, 3.2, 1.4 + 0.4 * len(variants)))
    for ax, setting in zip(axes, settings, strict=False):
        own = table[table["setting"] == setting]
        place = np.array([variants.index(variant) for variant in own["variant"]])
        error = [own["value"] - own["low"], own["high"] - own["value"]]
        ax.axvline(0, color="0.4", linewidth=1)
        ax.errorbar(own["value"], place, xerr=error, fmt="o", capsize=3, color=COLOURS[0])
        for at, values in zip(place, own["runs"], strict=True):
            ax.scatter(values, [at + 0.22] * len(values), s=10, color="0.4", linewidths=0)
        ax.set_title(textwrap.fill(f"{setting}{_seeds(own)}", 34), fontsize=9)
        ax.locator_params("x", nbins=4)
    axes[0].set(yticks=range(len(variants)), yticklabels=variants, ylim=(len(variants) - 0.4, -0.6))
    figure.supxlabel(f"{what} less that of the default, by seed, with 95 % interval", fontsize=10)
    _finish(axes[0], table, title)
    return axes


def _panels(count: int, size: tuple[float, float, float]) -> tuple[Figure, np.ndarray]:
    """Axes that share their scales, at most two in a row; size: least width of the figure, axes' width and height."""
    least, wide, high = size
    columns, rows = min(max(count, 1), 2), -(-max(count, 1) // 2)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(least, wide * columns), high * rows), squeeze=False, sharex=True, sharey=True
    )
    for surplus in axes.flat[max(count, 1) :]:
        surplus.remove()
    for ax in axes.flat[: max(count, 1)]:
        ax.xaxis.set_tick_params(labelbottom=True)
    return figure, axes.flat[: max(count, 1)]


def _finish(ax: Axes, table: pd.DataFrame, title: str) -> None:
    """A title over all axes of a figure, wrapped to its width; in a small one where there is nothing to show."""
    figure, wrapped = ax.figure, [textwrap.fill(line, int(13 * ax.figure.get_figwidth())) for line in title.split("\n")]
    figure.suptitle("\n".join(wrapped), fontsize="medium", x=0.01, ha="left")
    if table.empty:
        figure.set_size_inches(6.4, 1.2)
        ax.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1), ylabel="")
        ax.text(0.5, 0.5, "no such runs in the results", ha="center", va="center")


def _nothing() -> np.ndarray:
    """The axes of a figure of no table."""
    _finish(ax := plt.subplots()[1], pd.DataFrame(), "")
    return np.array([ax])


def _seeds(table: pd.DataFrame) -> str:
    """ ", n = 3 seeds", or "2 to 3", of means over seeds."""
    counts = sorted(table["n"].unique())
    return f", n = {' to '.join(str(n) for n in dict.fromkeys([counts[0], counts[-1]]))} seeds" if counts else ""


@_literal
def long_tail(counts: np.ndarray, what: str, ax: Axes | None = None) -> Axes:
    """Events of each item, most popular first."""
    ax = ax or plt.subplots()[1]
    ax.fill_between(np.arange(1, len(counts) + 1), np.sort(counts)[::-1], step="mid", alpha=0.7)
    ax.set(xlabel=f"{what}, by popularity", ylabel="events in train", ylim=(0, None))
    return ax


@_literal
def agreement(matrix: np.ndarray, what: str, ax: Axes | None = None) -> Axes:
    """A square matrix of shares between 0 and 1, each written into its cell."""
    ax = ax or plt.subplots(figsize=(4.4, 3.6))[1]
    ax.grid(visible=False)
    image = ax.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
    for (row, column), value in np.ndenumerate(matrix):
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=_ink(image.to_rgba(value)))
    ax.set(xticks=range(len(matrix)), yticks=range(len(matrix)), xlabel="group", ylabel="group")
    ax.figure.colorbar(image, label=textwrap.fill(what, 30))
    return ax


@_literal
def state_map(points: np.ndarray, labels: np.ndarray, what: str, ax: Axes | None = None) -> Axes:
    """Points (n, 2) coloured and marked by label."""
    ax = ax or plt.subplots(figsize=(5, 4))[1]
    for index, label in enumerate(np.unique(labels)):
        chosen = labels == label
        marker, colour = MARKERS[index % len(MARKERS)], COLOURS[index % len(COLOURS)]
        ax.scatter(*points[chosen].T, s=12, marker=marker, alpha=0.7, color=colour, label=f"{what} {label}")
    ax.set(xlabel="first principal component", ylabel="second principal component")
    ax.legend(markerscale=1.5)
    return ax


@_literal
def gate_bars(weights: np.ndarray, names: list[str], ax: Axes | None = None) -> Axes:
    """Gate weights (n, K) as stacked horizontal bars, one a sequence (the paper's Fig. 3c)."""
    ax = ax or plt.subplots(figsize=(6.4, 0.9 + 0.32 * len(weights)))[1]
    place, left = np.arange(len(weights)), np.zeros(len(weights))
    for expert, width in enumerate(weights.T):
        colour = COLOURS[expert % len(COLOURS)]
        bars = ax.barh(place, width, left=left, label=f"expert {expert + 1}", color=colour, edgecolor="white")
        shares = [f"{value:.0%}" if value >= 0.08 else "" for value in width]
        ax.bar_label(bars, shares, label_type="center", fontsize=8, color=_ink(colour))
        left += width
    ax.set(xlim=(0, 1), xlabel="gate weight", yticks=place, yticklabels=_one_line(names))
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.figure.legend(loc="outside upper center", ncols=weights.shape[1])
    return ax


@_literal
def gate_by_label(weights: np.ndarray, labels: np.ndarray, what: str, ax: Axes | None = None) -> Axes:
    """Mean gate weight (n, K) of each expert within each label, with a line at the uniform 1/K."""
    ax = ax or plt.subplots()[1]
    kinds, experts = np.unique(labels), weights.shape[1]
    for expert in range(experts):
        means = [weights[labels == kind, expert].mean() for kind in kinds]
        place = np.arange(len(kinds)) + (expert - (experts - 1) / 2) * 0.8 / experts
        look = {"color": COLOURS[expert % len(COLOURS)], "hatch": HATCHES[expert % len(HATCHES)], "edgecolor": "white"}
        ax.bar(place, means, 0.8 / experts, label=f"expert {expert + 1}", **look)
    ax.axhline(1 / experts, color="0.4", linestyle="--", linewidth=1, label="uniform")
    ax.set(xticks=range(len(kinds)), xticklabels=[f"{what} {kind}" for kind in kinds], ylabel="mean gate weight")
    ax.figure.legend(loc="outside upper center", ncols=min(experts + 1, 5))
    return ax


@_literal
def heat_maps(matrices: dict[str, np.ndarray], what: str, label: str, rows: int = 1) -> np.ndarray:
    """Symmetric matrices (G, G) with values from -1 to 1 under one colour scale, an axes each (Fig. 3).

    Brown is above 0, purple below, white is 0. Up to three in a row have their values in the cells; of more, which are
    smaller, the colours span what is off the diagonal, and the diagonal is grey.
    """
    if not matrices:
        return _nothing()
    columns = -(-len(matrices) // rows)
    small = columns > 3
    wide, high = (1.2, 1.3) if small else (3.1, 3.4)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.2 + wide * columns, high * rows), squeeze=False, sharex=True, sharey=True
    )
    off = {name: np.where(np.eye(len(matrix)), np.nan, matrix) for name, matrix in matrices.items()}
    limit = max(np.nanmax(np.abs(matrix)) for matrix in off.values()) if small else 1
    colours = plt.get_cmap("PuOr_r").with_extremes(bad="0.8")
    for ax, (name, matrix) in zip(axes.flat, (off if small else matrices).items(), strict=True):
        image = ax.imshow(matrix, vmin=-limit, vmax=limit, cmap=colours)
        for (row, column), value in np.ndenumerate(np.round(matrix, 2) + 0.0):  # no -0.00
            if not small:
                ink = _ink(image.to_rgba(value))
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=56 / len(matrix))
        ticks = [] if small else range(len(matrix))
        ax.set(xticks=ticks, yticks=ticks, xticklabels=[t + 1 for t in ticks])
        ax.set_title(name, fontsize=8 if small else None)
        ax.set_yticklabels([t + 1 for t in ticks])
        ax.grid(visible=False)
    for ax in axes[-1]:
        ax.set_xlabel("" if small else label)
    axes[0, 0].set_ylabel("" if small else label)
    figure.colorbar(image, ax=axes, label=textwrap.fill(what, 30), fraction=0.05)
    return axes.ravel()


@_literal
def relation(
    distance: np.ndarray, similarity: dict[str, np.ndarray], tests: dict[str, dict[str, float]], x: str, y: str
) -> np.ndarray:
    """Pairs' similarity against their distance, an axes for each name, rank correlation and p in its title."""
    figure, axes = plt.subplots(
        1, len(similarity), figsize=(3.4 * len(similarity), 3.3), squeeze=False, sharex=True, sharey=True
    )
    many = len(distance) > 2000  # as vectors they would fill megabytes
    for index, (ax, (name, value)) in enumerate(zip(axes[0], similarity.items(), strict=True)):
        dots = {"s": 3, "alpha": 0.25, "rasterized": True} if many else {"s": 22, "alpha": 0.7}
        ax.scatter(distance, value, color=COLOURS[index], linewidths=0, **dots)
        ax.axhline(0, color="0.4", linewidth=1)
        test = tests[name]
        ax.set_title(f"{name}: rank correlation {test['value']:.2f}, p = {test['p']:.2g}", fontsize=10)
    axes[0, 0].set_ylabel(y)
    figure.supxlabel(x, fontsize=10)
    return axes[0]


def idea() -> Figure:
    """The method in one picture; on the page `idea` stands what this prints into book/assets/idea.svg:

    python -c "from ilora.study import figures as f; f.style(); print(f.svg(f.idea()), end='')"
    """
    figure, ax = plt.subplots(figsize=(7.6, 4.6))
    ax.set(xlim=(0, 100), ylim=(0, 64))
    ax.axis("off")
    frozen, trained = {"facecolor": "#d9e6f2", "edgecolor": "#0072B2"}, {"facecolor": "#fdebc8", "edgecolor": "#B36B00"}
    plain = {"facecolor": "white", "edgecolor": "0.4"}
    boxes = {
        "history": (1, 27, 17, 12, "history\nof ten titles", plain),
        "prompt": (27, 50, 21, 11, "prompt: history\nand 20 candidates", plain),
        "SASRec": (27, 6, 14, 10, "SASRec", frozen),
        "z": (46, 6, 8, 10, "z", plain),
        "gate": (59, 6, 14, 10, "gate", trained),
        "W": (60, 45, 12, 16, "W", frozen),
        "A": (60, 28, 12, 6, "A", trained),
        "middle": (75, 28, 11, 6, "K w times", trained),
        "B": (88, 28, 11, 6, "B", trained),
        "title": (85, 50, 14, 11, "next title", plain),
    }
    for x, y, width, height, text, look in boxes.values():
        ax.add_patch(plt.Rectangle((x, y), width, height, linewidth=1.4, **look))
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center")
    for expert in range(1, 4):  # A, the middle and B are cut into four experts
        for x, y, width, *_ in (boxes[name] for name in ("A", "middle", "B")):
            ax.plot([x + width * expert / 4] * 2, [y, y + 1.2], color="#B36B00", linewidth=1.2)
    arrows = [
        ((18, 36), (27, 53)), ((18, 30), (27, 13)), ((48, 55.5), (60, 55.5)), ((72, 55.5), (85, 55.5)),
        ((41, 11), (46, 11)), ((54, 11), (59, 11)), ((73, 11), (80.5, 28)), ((52, 55.5), (60, 31)),
        ((72, 31), (75, 31)), ((86, 31), (88, 31)), ((93.5, 34), (79, 55)),
    ]  # fmt: skip
    for start, end in arrows:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.3", "linewidth": 1.2})
    ax.text(66, 63, "each projection of the language model", ha="center", va="center", fontsize=9)
    ax.text(79.5, 18, "K weights", ha="left", va="center", fontsize=9)
    ax.text(80, 42, "+", ha="center", va="center", fontsize=14)
    ax.text(1, 2, "blue is frozen, orange is trained", fontsize=9)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an SVG document whose text stays text, which keeps it small; closes it. Equal for equal figures."""
    text = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ilora", "font.sans-serif": ["DejaVu Sans"]}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


@_literal
def scored(scores: dict[str, np.ndarray], titles: list[str], right: int, ax: Axes | None = None) -> Axes:
    """Shares of each system for the titles on offer, bars side by side, in the order given; `right` is the answer's."""
    ax = ax or plt.subplots(figsize=(6.4, 0.9 + 0.26 * len(titles)))[1]
    place, height, drawn = np.arange(len(titles)), 0.8 / len(scores), []
    for index, share in enumerate(scores.values()):
        look = {"color": COLOURS[index], "hatch": HATCHES[index], "edgecolor": "white"}
        drawn.append(ax.barh(place + (index - (len(scores) - 1) / 2) * height, share, height, **look))
    names = [f"{title} (read next)" if index == right else title for index, title in enumerate(_one_line(titles))]
    ax.set(xlim=(0, 1), xlabel="share of the probability of the twenty titles", yticks=place, yticklabels=names)
    ax.get_yticklabels()[right].set_fontweight("bold")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.figure.legend(drawn, scores, loc="outside upper center", ncols=len(scores))
    return ax


@_literal
def experts_at(trend: pd.DataFrame, experts: int, weights: np.ndarray | None, names: list[str]) -> np.ndarray:
    """HitRatio@1 against the number of experts with `experts` marked, beside gate weights (n, experts) where known."""
    width = [1, 1.4] if weights is not None else [1]
    axes = plt.subplots(1, len(width), figsize=(7.4, 3.6), width_ratios=width, squeeze=False)[1][0]
    error = [trend["value"] - trend["low"], trend["high"] - trend["value"]]
    axes[0].errorbar(trend["experts"], trend["value"], yerr=error, fmt="o-", capsize=3, color="0.5")
    here = trend[trend["experts"] == experts]
    axes[0].plot(here["experts"], here["value"], "o", markersize=11, color=COLOURS[5])
    axes[0].set(xticks=trend["experts"], xlabel="experts K", ylabel="HitRatio@1, mean with 95 % interval")
    if weights is not None:
        gate_bars(weights, names, axes[1])
    return axes


def _ink(colour: str | tuple[float, ...]) -> str:
    """Black or white, whichever is easier to read on a colour (the luminance that gives both equal contrast)."""
    red, green, blue = (np.array(to_rgb(colour)) ** 2.2).tolist()
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"
