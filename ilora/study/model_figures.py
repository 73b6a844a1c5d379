"""Figures of models: gates and similarity of gradients."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ilora.study.figures import COLOURS, WIDTH, ink, legend, literal, nothing, wrapped


@literal
def gate_bars(weights: np.ndarray, names: list[str], ax: Axes | None = None) -> Axes:
    """Gate weights (n, K) as stacked horizontal bars, one for each sequence (the paper's Fig. 3c)."""
    ax = ax or plt.subplots(figsize=(WIDTH, 1.1 + 0.34 * len(weights)))[1]
    y, left, drawn = np.arange(len(weights)), np.zeros(len(weights)), []
    for expert, width in enumerate(weights.T):
        colour, fmt = COLOURS[expert % len(COLOURS)], lambda share: f"{share:.0%}" if share >= 0.12 else ""
        drawn.append(ax.barh(y, width, left=left, color=colour, edgecolor="white"))
        ax.bar_label(drawn[-1], fmt=fmt, label_type="center", color=ink(colour))
        left += width
    ax.set(xlim=(0, 1), xlabel="gate weight", yticks=y, yticklabels=wrapped(names, 24))
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.set_title("", wrap=True)
    legend(ax.figure, drawn, [f"expert {expert + 1}" for expert in range(len(drawn))])
    return ax


@literal
def heat_maps(matrices: dict[str, np.ndarray], what: str, label: str, rows: int = 1, limit: float = 0) -> np.ndarray:
    """Symmetric matrices (G, G) under one colour scale, one axes for each (Fig. 3), with a grey diagonal.

    Brown is above 0, purple below; the scale ends at `limit` or the largest absolute value off the diagonals.
    """
    if not matrices:
        return nothing()
    columns = -(-len(matrices) // rows)
    off = {name: np.where(np.eye(len(matrix)), np.nan, matrix) for name, matrix in matrices.items()}
    limit = limit or max(np.nanmax(np.abs(matrix)) for matrix in off.values()) or 1
    size = (WIDTH, 2.6 * rows) if columns < 3 else (4 / 3 * WIDTH, 1.5 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    for ax, (name, matrix) in zip(axes.flat, off.items(), strict=True):
        image = ax.imshow(matrix, vmin=-limit, vmax=limit, cmap=plt.get_cmap("PuOr_r").with_extremes(bad="0.8"))
        ticks = np.arange(len(matrix)) if columns < 3 else []
        ax.set(xticks=ticks, yticks=ticks, xticklabels=[t + 1 for t in ticks], yticklabels=[t + 1 for t in ticks])
        ax.set(title=textwrap.fill(name, 26 // min(columns, 3) + 1), xlabel=label, ylabel=label)
        ax.label_outer()
        ax.grid(visible=False)
    figure.colorbar(image, ax=axes, label=textwrap.fill(what, 26), fraction=0.05)
    return axes.ravel()


@literal
def relation(distance: np.ndarray, similarity: dict, tests: dict[str, dict], x: str, y: str) -> np.ndarray:
    """Similarity of pairs against their distance, one axes for each name, rank correlation and p in its title."""
    figure, axes = plt.subplots(1, len(similarity), figsize=(WIDTH, 3.3), squeeze=False, sharex=True, sharey=True)
    many = len(distance) > 2000  # as vectors they would fill megabytes
    for ax, (name, value), colour in zip(axes[0], similarity.items(), COLOURS, strict=False):
        ax.scatter(distance, value, 3 if many else 22, colour, alpha=0.5, linewidths=0, rasterized=many)
        ax.axhline(0, color="0.4", linewidth=1)
        rho, p = tests[name]["value"], tests[name]["p"]
        ax.set_title(textwrap.fill(f"{name}: rank correlation {rho:.2f}, p = {p:.2g}", 26))
    axes[0, 0].set_ylabel(y)
    figure.supxlabel(x, fontsize=10)
    return axes[0]
