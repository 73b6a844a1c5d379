"""Figures of results, in one style: means with intervals, trends, differences and ratios of times.

Colours are Okabe and Ito's, which colour-blind readers can distinguish; without colour, markers, line styles, hatches
or the order show the same. Every function returns its axes, to which a title can be added. Text is shown literally: a
`$` in a title or in a name from the data does not start a formula.
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
    """Set the style; in a notebook figures become SVG, equal for equal data, and tables show no formulas."""
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


def literal(draw: Callable) -> Callable:
    """Decorate a function whose text is drawn literally: `$` starts no formula, with or without `style`."""

    @wraps(draw)
    def drawn(*args, **kwargs) -> Axes | np.ndarray:
        axes = draw(*args, **kwargs)
        for text in np.ravel(axes)[0].figure.findobj(Text):
            text.set_parse_math(False)
        return axes

    return drawn


def one_line(names: list[str]) -> list[str]:
    """Names without line breaks and control characters, which would run into other rows."""
    return [re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(name)) for name in names]


def bar_look(number: int) -> dict[str, str]:
    """Colour and hatch of a kind of bars."""
    return {"color": COLOURS[number % len(COLOURS)], "hatch": HATCHES[number % len(HATCHES)], "edgecolor": "white"}


def errors(table: pd.DataFrame) -> list[pd.Series]:
    """Lengths of the error bars below and above `value`."""
    return [table["value"] - table["low"], table["high"] - table["value"]]


def ink(colour: str | tuple[float, ...]) -> str:
    """Black or white, whichever is easier to read on a colour (the luminance that gives both equal contrast)."""
    red, green, blue = (np.array(to_rgb(colour)) ** 2.2).tolist()
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"


def finish(ax: Axes, table: pd.DataFrame, title: str) -> None:
    """Add a title over all axes of a figure, wrapped to its width; make it small if there is nothing to show."""
    figure, wrapped = ax.figure, [textwrap.fill(line, int(13 * ax.figure.get_figwidth())) for line in title.split("\n")]
    figure.suptitle("\n".join(wrapped), fontsize="medium", x=0.01, ha="left")
    if table.empty:
        figure.set_size_inches(6.4, 1.2)
        ax.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1), ylabel="")
        ax.text(0.5, 0.5, "no such runs in the results", ha="center", va="center")


def nothing() -> np.ndarray:
    """The axes of a figure without data."""
    finish(ax := plt.subplots()[1], pd.DataFrame(), "")
    return np.array([ax])


def svg(figure: Figure) -> str:
    """The figure as an SVG document in which text is text, which keeps it small; closes it. Equal for equal figures."""
    text = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ilora", "font.sans-serif": ["DejaVu Sans"]}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


@literal
def intervals(table: pd.DataFrame, label: str, chance: float | None = None, ax: Axes | None = None) -> Axes:
    """A point with its 95 % interval for each row (value, low, high), first row on top."""
    ax = ax or plt.subplots(figsize=(6.4, 0.9 + 0.36 * len(table)))[1]
    y = np.arange(len(table))[::-1]
    ax.errorbar(table["value"], y, xerr=errors(table), fmt="o", capsize=3, color=COLOURS[0])
    if chance is not None:
        ax.axvline(chance, color="0.4", linestyle="--", linewidth=1)
        ax.annotate("chance", (chance, len(table) - 0.6), xytext=(4, 0), textcoords="offset points", color="0.4")
    ax.set(yticks=y, yticklabels=table.index, xlabel=f"{label}, with 95 % interval", ylim=(-0.6, len(table) - 0.2))
    return ax


@literal
def panels(tables: dict[str, pd.DataFrame], label: str, mark: str, at: float) -> np.ndarray:
    """`intervals` of several tables in one row of axes, with a marked line; the rows are the systems of all tables.

    Tables without rows are left out.
    """
    tables = {name: table for name, table in tables.items() if len(table)}
    if not tables:
        return nothing()
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


@literal
def error_parts(tables: dict[str, pd.DataFrame]) -> np.ndarray:
    """Standard errors by cause for each system, one axes for each table of `table_results.system_means`."""
    if not tables:
        return nothing()
    causes = {"error_users": "users", "error_seeds": "seeds", "error_draws": "draws of candidates"}
    size = (2.2 + 2.4 * len(tables), 1.3 + 0.42 * max(map(len, tables.values())))
    figure, axes = plt.subplots(1, len(tables), figsize=size, squeeze=False, sharex=True)
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        y = np.arange(len(table))
        for index, (cause, meaning) in enumerate(causes.items()):
            width = table[cause].astype(float).fillna(0)
            ax.barh(y + 0.27 * (index - 1), width, 0.27, label=meaning if ax is axes[0, 0] else None, **bar_look(index))
        ax.set(yticks=y, yticklabels=table.index if ax is axes[0, 0] else [], title=name)
        ax.invert_yaxis()
    figure.supxlabel("standard error of HitRatio@1", fontsize=10)
    figure.legend(loc="outside upper center", ncols=len(causes))
    return axes[0]


@literal
def ratios(table: pd.DataFrame, label: str) -> Axes:
    """Ratios with their quartiles on a logarithmic scale, each with its goal as a bar (`benchmark_results.ratios`).

    A ratio that misses its goal is an open square in another colour; one without a goal is a point.
    """
    ax = plt.subplots(figsize=(6.4, 0.9 + 0.3 * len(table)))[1]
    y = np.arange(len(table))[::-1]
    kinds = ((True, 0, "o", "goal met"), (False, 5, "s", "goal missed"), (None, 7, ".", "no goal"))
    for met, colour, marker, meaning in kinds:
        rows = np.array([value is met for value in table["met"]], bool)
        if rows.any():
            point = {"color": COLOURS[colour], "fmt": marker, "mfc": "white" if met is False else None}
            ax.errorbar(table["value"][rows], y[rows], xerr=errors(table[rows]), capsize=3, label=meaning, **point)
    ax.plot(table["aim"], y, "|", color="0.2", markersize=13, markeredgewidth=2, label="goal")
    ax.axvline(1, color="0.4", linewidth=1)
    runs = [benchmark.partition("_")[2].replace("_", ", ") for benchmark in table.index.get_level_values(0)]
    names = [f"{part}: {way} ({run})" for run, (_, part, way) in zip(runs, table.index, strict=True)]
    ax.set(yticks=y, yticklabels=names, xscale="log", xlabel=label, ylim=(-0.6, len(table) - 0.4))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # without formulas
    ax.figure.legend(loc="outside upper center", ncols=4)
    return ax


@literal
def lines(table: pd.DataFrame, x: str, y: str) -> Axes:
    """One labelled line for each column of a frame against its index, across gaps; whole numbers get whole ticks."""
    ax, drawn = plt.subplots()[1], []
    if pd.api.types.is_integer_dtype(table.index):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for column, marker in zip(table.columns, itertools.cycle(MARKERS), strict=False):
        values = table[column].dropna()
        drawn += ax.plot(values.index, values, marker=marker)
    ax.set(xlabel=x, ylabel=y)
    ax.legend(drawn, map(str, table.columns))  # by name: a label that begins with "_" would be left out
    return ax


@literal
def trend(table: pd.DataFrame, x: str, y: str, by: str | None = None, title: str = "") -> np.ndarray:
    """Means with 95 % intervals over seeds against `x`, one line for each system, a small grey point for each seed.

    table: of `sweep_results.means_over_seeds`; by: a column, for each value of which there is an axes.
    """
    parts = dict(list(table.groupby(by, sort=False))) if by and len(table) else {"": table}
    figure, axes = _grid(len(parts), (6.4, 3.2, 3.2 if len(parts) > 2 else 3.6))
    systems, drawn = list(table["system"].unique()), {}
    step = 0.015 * np.ptp(table[x]) if len(table) else 0  # lines are shifted so that none hides another
    for ax, (name, part) in zip(axes, parts.items(), strict=True):
        of_systems = list(part.groupby("system", sort=False))
        for index, (system, line) in enumerate(of_systems):
            at = line[x] + (index - (len(of_systems) - 1) / 2) * step
            number = systems.index(system)
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            look["linestyle"] = DASHES[number % len(DASHES)]
            drawn[system] = ax.errorbar(at, line["value"], yerr=errors(line), capsize=3, **look)
            for seeds_at, values in zip(at + step / 2, line["runs"], strict=True):
                ax.scatter([seeds_at] * len(values), values, s=7, color="0.4", linewidths=0, zorder=3)
        named = name if isinstance(name, str) else f"{by} {name:g}"
        ax.set(title=textwrap.fill(named, 30), xlabel=x, xticks=sorted(table[x].unique()))
    axes[0].set_ylabel(y)
    if len(systems) > 1:
        handles = [drawn[system] for system in systems]
        figure.legend(handles, systems, loc="outside lower center", ncols=min(len(systems), 3))
    finish(axes[0], table, f"{title}\nmeans with 95 % intervals{_seeds(table)}".strip())
    return axes


@literal
def differences(table: pd.DataFrame, what: str, title: str) -> np.ndarray:
    """Differences from the default with 95 % intervals over seeds, a small grey point for each seed.

    table: of `sweep_results.differences_from_default`: a row for each variant, an axes for each setting.
    """
    settings, variants = table["setting"].unique(), list(table["variant"].unique())
    figure, axes = _grid(len(settings), (6.4, 3.2, 1.4 + 0.4 * len(variants)))
    for ax, setting in zip(axes, settings, strict=False):
        part = table[table["setting"] == setting]
        y = np.array([variants.index(variant) for variant in part["variant"]])
        ax.axvline(0, color="0.4", linewidth=1)
        ax.errorbar(part["value"], y, xerr=errors(part), fmt="o", capsize=3, color=COLOURS[0])
        for at, values in zip(y, part["runs"], strict=True):
            ax.scatter(values, [at + 0.22] * len(values), s=10, color="0.4", linewidths=0)
        ax.set_title(textwrap.fill(f"{setting}{_seeds(part)}", 34), fontsize=9)
        ax.locator_params("x", nbins=4)
    axes[0].set(yticks=range(len(variants)), yticklabels=variants, ylim=(len(variants) - 0.4, -0.6))
    figure.supxlabel(f"{what} less that of the default, by seed, with 95 % interval", fontsize=10)
    finish(axes[0], table, title)
    return axes


def _grid(count: int, size: tuple[float, float, float]) -> tuple[Figure, np.ndarray]:
    """Axes with shared scales, at most two in a row; size: least width of the figure, width and height of an axes."""
    (least, wide, high), count = size, max(count, 1)
    columns, rows = min(count, 2), -(-count // 2)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(least, wide * columns), high * rows), squeeze=False, sharex=True, sharey=True
    )
    for surplus in axes.flat[count:]:
        surplus.remove()
    for ax in axes.flat[:count]:
        ax.xaxis.set_tick_params(labelbottom=True)
    return figure, axes.flat[:count]


def _seeds(table: pd.DataFrame) -> str:
    """ ", n = 3 seeds", or "2 to 3", of means over seeds."""
    counts = sorted(table["n"].unique())
    return f", n = {' to '.join(str(n) for n in dict.fromkeys([counts[0], counts[-1]]))} seeds" if counts else ""
