"""Draw the pictures of the page `forty_lines` from its code: python book/assets/forty_lines.py."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ilora.study import figures

FOLDER = Path(__file__).parent
ORANGE = figures.COLOURS[1]


def run_page() -> dict:
    """The names that the page's code blocks leave, run in order."""
    page, names = FOLDER.parent / "forty_lines.md", {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        exec(block, names)
    return names


def factors(names: dict) -> Figure:
    """What the middle of LoRA is multiplied by, for each history of section 3."""
    weights = names["w"].detach().numpy()
    figure, axes = plt.subplots(3, 1, figsize=(4.6, 3.5), sharex=True, sharey=True)
    rows = {"A uniform gate: LoRA": np.full(4, 0.25), "One history": weights[0], "Another history": weights[1]}
    for ax, (name, w) in zip(axes, rows.items(), strict=True):
        colours = np.repeat(figures.COLOURS[:4], 2)
        ax.bar(np.arange(1, 9), np.repeat(4 * w, 2).round(2), color=colours, edgecolor="white")
        ax.axhline(1, color="0.3", linewidth=1, linestyle="--")
        ax.set(title=name, ylabel="factor", ylim=(0, 2.2), xticks=range(1, 9), yticks=[0, 1, 2])
        ax.grid(False)
    for expert in range(4):
        axes[0].text(1.5 + 2 * expert, 1.55, f"expert {expert + 1}", ha="center")
    axes[-1].set_xlabel("number in the middle of LoRA, of r = 8")
    return figure


def updates(names: dict) -> Figure:
    """What the layer of section 3 adds to W, for a uniform gate and for two histories."""
    A, B = (part.weight.detach().numpy() for part in (names["layer"].A, names["layer"].B))
    weights = [np.full(4, 0.25), *names["w"].detach().numpy()[:2]]
    deltas = [4 * 32 / 8 * B @ np.diag(np.repeat(w, 2)) @ A for w in weights]
    figure, axes = plt.subplots(1, 3, figsize=(4.6, 1.9), sharey=True)
    for ax, delta, name in zip(axes, deltas, ["LoRA", "One history", "Another history"], strict=True):
        shown = ax.imshow(delta, cmap="RdBu_r", vmin=-6, vmax=6, interpolation="nearest")
        ax.grid(False)
        ax.set(title=name, xticks=[], yticks=[])
    axes[0].set(xlabel="16 inputs", ylabel="12 outputs")
    figure.colorbar(shown, ax=axes, label="change of W", ticks=[-6, 0, 6])
    return figure


def tokens(names: dict) -> Figure:
    """The prompt of section 6: token ids of titles, and item embeddings in the places of the placeholder."""
    ids, items = names["ids"][0].tolist(), iter(names["history"][0].tolist())
    figure, ax = plt.subplots(figsize=(4.6, 1.1))
    ax.set(xlim=(0, len(ids)), ylim=(-0.75, 1))
    ax.axis("off")
    for place, token in enumerate(ids):
        item = token == names["ITEM"]
        colour = "#fdebc8" if item else "#e3e8ee"
        ax.add_patch(plt.Rectangle((place + 0.05, 0), 0.9, 1, facecolor=colour, edgecolor="0.4"))
        label = f"{next(items)}" if item else "next" if token == names["NEXT"] else f"{token}"
        ax.text(place + 0.5, 0.5, label, ha="center", va="center", fontsize=9)
    for first in range(0, 9, 3):
        ax.text(first + 1, -0.15, "title", ha="center", va="top", fontsize=9)
        ax.text(first + 2.5, -0.15, "item", ha="center", va="top", fontsize=9)
    return figure


def curriculum(names: dict) -> Figure:
    """The probability of a hybrid prompt, and what was drawn."""
    steps, hybrid = names["steps"], np.array(names["hybrid"])
    figure, ax = plt.subplots(figsize=(4.6, 2.3))
    ax.plot([0, steps], [0, 1], color="0.3")
    for value, label, place in ((True, "hybrid", (0.3 * steps, 0.8)), (False, "text only", (0.55 * steps, 0.12))):
        at = np.flatnonzero(hybrid == value)
        ax.scatter(at, np.full(len(at), float(value)), marker="|", s=60, color=ORANGE if value else figures.COLOURS[0])
        ax.text(*place, label)
    ax.set(xlabel="step", ylabel="probability", title="The behaviour tokens come in slowly")
    return figure


def ranking(names: dict) -> Figure:
    """The candidates of the last question by log-likelihood."""
    scores, offered = names["scores"].numpy(), names["offered"].numpy()
    order = np.argsort(scores)
    figure, ax = plt.subplots(figsize=(4.6, 3.6))
    colours = [figures.COLOURS[5] if offered[place] == names["target"] else "0.5" for place in order]
    ax.hlines(np.arange(20), scores.min().round(1) - 0.1, scores[order].round(2), color="0.85", linewidth=1)
    ax.scatter(scores[order].round(2), np.arange(20), color=colours, zorder=3)
    place = int(np.flatnonzero(offered[order] == names["target"])[0])
    ax.set(yticks=np.arange(20), yticklabels=[f"item {item}" for item in offered[order]], xlabel="log-likelihood")
    ax.set_title(f"The item that came next is number {20 - place} of 20")
    ax.tick_params("y", labelsize=9)
    return figure


def draw() -> dict[str, str]:
    """Name of each picture -> its SVG."""
    figures.style()
    names = run_page()
    parts = (factors, updates, tokens, curriculum, ranking)
    return {f"forty_{part.__name__}.svg": figures.svg(part(names)) for part in parts}


if __name__ == "__main__":
    for name, picture in draw().items():
        (FOLDER / name).write_text(picture, encoding="utf-8")
