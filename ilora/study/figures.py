"""Figures of results in one style, with Okabe and Ito's colours for colour-blind readers. Functions return axes."""

import io
import itertools
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

MARKERS = "os^Dvx*P"
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]
WIDTH = 5.2  # inches: with text of 10 points, the widest figure that a phone shows whole and legible
LOOKS = list(plt.cycler(color=COLOURS, marker=list(MARKERS), linestyle=["-", "--", "-.", ":"] * 2))
literal = plt.rc_context({"text.parse_math": False})  # a decorator: `$` starts no formula, even without `style`


def style() -> None:
    """Set the style; in a notebook figures become SVG, equal for equal data, and tables show no formulas."""
    from IPython import get_ipython  # not needed outside notebooks

    if shell := get_ipython():
        shell.run_line_magic("matplotlib", "inline")  # now: within `literal` its interactive mode would be undone
        shell.run_line_magic("config", "InlineBackend.figure_formats = ['svg']")
        shell.run_line_magic("config", "InlineBackend.print_figure_kwargs = {'metadata': {'Date': None}}")
    plt.rcParams.update({
        "figure.figsize": (WIDTH, 3.2), "figure.constrained_layout.use": True, "figure.facecolor": "white",
        "axes.prop_cycle": plt.cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "font.size": 10,
        "axes.titlesize": 10, "axes.titlelocation": "left", "svg.hashsalt": "ilora", "text.parse_math": False,
    })  # fmt: skip
    pd.set_option("display.html.use_mathjax", False, "display.max_colwidth", None, "styler.format.precision", 3)


def wrapped(names: Iterable[str], characters: int) -> list[str]:
    """Names in lines of at most so many characters, with their line breaks and control characters removed."""
    return [textwrap.fill(re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(name)), characters) for name in names]


def legend(figure: Figure, handles: Sequence | Mapping, names: Iterable[str], side: str = "upper") -> None:
    """A legend above or below all axes, with as many entries in a row as fit."""
    columns = int(11 * figure.get_figwidth() / (6 + max(len(str(name)) for name in names)))
    figure.legend(handles, names, loc=f"outside {side} center", ncols=max(1, min(columns, len(handles))))


def errors(table: pd.DataFrame) -> list[pd.Series]:
    """Lengths of the error bars below and above `value`."""
    return [table["value"] - table["low"], table["high"] - table["value"]]


def ink(colour: str | tuple[float, ...]) -> str:
    """Black or white, whichever is easier to read on a colour (the luminance that gives both equal contrast)."""
    red, green, blue = (np.array(to_rgb(colour)) ** 2.2).tolist()
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"


def nothing() -> np.ndarray:
    """The axes of a figure without data."""
    ax = plt.subplots(figsize=(WIDTH, 1.2))[1]
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, "no such runs in the results", ha="center", va="center")
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
    """A point with its 95% interval for each row (value, low, high), first row on top; grey points for `runs`."""
    ax = ax or plt.subplots(figsize=(WIDTH, 0.9 + 0.36 * len(table)))[1]
    y = np.arange(len(table))[::-1]
    ax.errorbar(table["value"], y, xerr=errors(table), fmt="o", capsize=3, color=COLOURS[0])
    if "runs" in table:
        runs = pd.Series(table["runs"].tolist(), y - 0.22).explode()
        ax.scatter(runs, runs.index, s=10, color="0.4", linewidths=0)
    if chance is not None:
        ax.axvline(chance, color="0.4", linestyle="--", linewidth=1)
        ax.annotate("chance", (chance, len(table) - 0.6), xytext=(4, 0), textcoords="offset points", color="0.4")
    ax.set(yticks=y, yticklabels=wrapped(table.index, 24), ylim=(-0.6, len(table) - 0.2))
    ax.set_xlabel(f"{label}, with 95% interval")
    ax.set_title("", wrap=True)
    return ax


@literal
def panels(tables: dict[str, pd.DataFrame], label: str, mark: str, at: float, title: str = "") -> np.ndarray:
    """`intervals` of several tables in axes with shared rows, and a line `at` a value that is named `mark`."""
    tables = {name: table for name, table in tables.items() if len(table)}
    if not tables:
        return nothing()
    rows = list(dict.fromkeys(row for table in tables.values() for row in table.index))
    figure, axes = _grid(len(tables), 1.1 + 0.36 * len(rows), sharex=False)
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        intervals(table.reindex(rows), "", at, ax)
        ax.texts[-1].set_text(mark)
        fewer = "".join(f"\n({row}: {n})" for row, n in table["n"].items() if n != table["n"].max())
        ax.set(title=f"{textwrap.fill(name, 22)}\nn = {table['n'].max():.0f}{fewer}", xlabel="")
        ax.locator_params("x", nbins=3)
    figure.supxlabel(f"{label}, with 95% interval", fontsize=10)
    _title(figure, title)
    return axes


def differences(table: pd.DataFrame, what: str, title: str) -> np.ndarray:
    """`panels` of `sweep_results.differences_from_default`, one for each setting; n are seeds."""
    settings = dict(list(table.set_index("variant").groupby("setting", sort=False)))
    return panels(settings, f"{what} minus that of the default", "default", 0, title)


@literal
def lines(table: pd.DataFrame, x: str, y: str) -> Axes:
    """One labelled line for each column of a frame against its index, across gaps; whole numbers get whole ticks."""
    ax = plt.subplots()[1]
    drawn = [ax.plot(table[name].dropna(), marker=marker)[0] for name, marker in zip(table, itertools.cycle(MARKERS))]
    ax.locator_params("x", integer=pd.api.types.is_integer_dtype(table.index))
    ax.set(xlabel=x, ylabel=y)
    ax.legend(drawn, map(str, table.columns))  # by name: a label that begins with "_" would be left out
    ax.set_title("", wrap=True)
    return ax


@literal
def trend(table: pd.DataFrame, x: str, y: str, by: str | None = None, title: str = "") -> np.ndarray:
    """`sweep_results.means_over_seeds` against `x`: axes by values of `by`, lines by system, points by seed."""
    if table.empty:
        return nothing()
    parts = dict(list(table.groupby(by, sort=False))) if by else {"": table}
    figure, axes = _grid(len(parts), 3.2 if len(parts) > 2 else 3.6)
    systems, drawn = list(table["system"].unique()), {}
    step = 0.015 * np.ptp(table[x])  # lines are shifted so that none hides another
    for ax, (name, part) in zip(axes, parts.items(), strict=True):
        for index, (system, line) in enumerate(part.groupby("system", sort=False)):
            number, at = systems.index(system), line[x] + (index - (part["system"].nunique() - 1) / 2) * step
            drawn[system] = ax.errorbar(at, line["value"], yerr=errors(line), capsize=3, **LOOKS[number % len(LOOKS)])
            runs = pd.Series(line["runs"].tolist(), at + step / 2).explode()
            ax.scatter(runs.index, runs, s=7, color="0.4", linewidths=0, zorder=3)
        named = name if isinstance(name, str) else f"{by} {name:g}"
        ax.set(title=textwrap.fill(named, 26), xlabel=x, xticks=sorted(table[x].unique()))
    axes[0].set_ylabel(y)
    if len(systems) > 1:
        legend(figure, list(drawn.values()), drawn, "lower")
    counts = " to ".join(map(str, sorted({table["n"].min(), table["n"].max()})))
    _title(figure, f"{title}\nmeans with 95% intervals, n = {counts} seeds".strip())
    return axes


def _grid(count: int, height: float, sharex: bool = True) -> tuple[Figure, np.ndarray]:
    """Axes of this height with one scale, at most three in a row, four as two by two."""
    columns = 2 if count == 4 else min(count, 3)
    size = (WIDTH if columns < 3 else 4 / 3 * WIDTH, height * (rows := -(-count // columns)))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=sharex, sharey=True)
    for surplus in axes.flat[count:]:
        surplus.remove()
    for ax in axes.flat[:count]:
        ax.xaxis.set_tick_params(labelbottom=True)
    return figure, axes.flat[:count]


def _title(figure: Figure, title: str) -> None:
    """A title over all axes, wrapped to the width of the figure."""
    lines = [textwrap.fill(line, int(12 * figure.get_figwidth())) for line in title.split("\n")]
    figure.suptitle("\n".join(lines), fontsize="medium", x=0.01, ha="left")
