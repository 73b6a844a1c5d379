"""Figures of models: gates and similarity of gradients."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ilora.study.figures import COLOURS, ink, literal, nothing, one_line


@literal
def gate_bars(weights: np.ndarray, names: list[str], ax: Axes | None = None) -> Axes:
    """Gate weights (n, K) as stacked horizontal bars, one for each sequence (the paper's Fig. 3c)."""
    ax = ax or plt.subplots(figsize=(6.4, 0.9 + 0.32 * len(weights)))[1]
    y, left = np.arange(len(weights)), np.zeros(len(weights))
    for expert, width in enumerate(weights.T):
        colour = COLOURS[expert % len(COLOURS)]
        bars = ax.barh(y, width, left=left, label=f"expert {expert + 1}", color=colour, edgecolor="white")
        shares = [f"{value:.0%}" if value >= 0.08 else "" for value in width]
        ax.bar_label(bars, shares, label_type="center", fontsize=8, color=ink(colour))
        left += width
    ax.set(xlim=(0, 1), xlabel="gate weight", yticks=y, yticklabels=one_line(names))
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.figure.legend(loc="outside upper center", ncols=weights.shape[1])
    return ax


@literal
def heat_maps(matrices: dict[str, np.ndarray], what: str, label: str, rows: int = 1) -> np.ndarray:
    """Symmetric matrices (G, G) with values from -1 to 1 under one colour scale, one axes for each (Fig. 3).

    Brown is above 0, purple below. More than three in a row are small: without numbers, and with a grey diagonal.
    """
    if not matrices:
        return nothing()
    columns = -(-len(matrices) // rows)
    small, limit = columns > 3, 1
    size = (1.2 + 1.2 * columns, 1.3 * rows) if small else (1.2 + 3.1 * columns, 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    if small:
        matrices = {name: np.where(np.eye(len(matrix)), np.nan, matrix) for name, matrix in matrices.items()}
        limit = max(np.nanmax(np.abs(matrix)) for matrix in matrices.values())
    colours = plt.get_cmap("PuOr_r").with_extremes(bad="0.8")
    for ax, (name, matrix) in zip(axes.flat, matrices.items(), strict=True):
        image = ax.imshow(matrix, vmin=-limit, vmax=limit, cmap=colours)
        for (row, column), value in np.ndenumerate([] if small else np.round(matrix, 2) + 0.0):  # no -0.00
            text = {"ha": "center", "va": "center", "fontsize": 56 / len(matrix)}
            ax.text(column, row, f"{value:.2f}", color=ink(image.to_rgba(value)), **text)
        ticks = [] if small else np.arange(len(matrix))
        ax.set(xticks=ticks, yticks=ticks, xticklabels=[t + 1 for t in ticks], yticklabels=[t + 1 for t in ticks])
        ax.set_title(name, fontsize=8 if small else None)
        ax.grid(visible=False)
    axes[0, 0].set_ylabel("" if small else label)
    figure.supxlabel("" if small else label, fontsize=10)
    figure.colorbar(image, ax=axes, label=textwrap.fill(what, 30), fraction=0.05)
    return axes.ravel()


@literal
def relation(distance: np.ndarray, similarity: dict, tests: dict[str, dict], x: str, y: str) -> np.ndarray:
    """Similarity of pairs against their distance, one axes for each name, rank correlation and p in its title."""
    size = (3.4 * len(similarity), 3.3)
    figure, axes = plt.subplots(1, len(similarity), figsize=size, squeeze=False, sharex=True, sharey=True)
    many = len(distance) > 2000  # as vectors they would fill megabytes
    for ax, (name, value), colour in zip(axes[0], similarity.items(), COLOURS, strict=False):
        ax.scatter(distance, value, 3 if many else 22, colour, alpha=0.5, linewidths=0, rasterized=many)
        ax.axhline(0, color="0.4", linewidth=1)
        title = f"{name}: rank correlation {tests[name]['value']:.2f}, p = {tests[name]['p']:.2g}"
        ax.set_title(title, fontsize=10)
    axes[0, 0].set_ylabel(y)
    figure.supxlabel(x, fontsize=10)
    return axes[0]
