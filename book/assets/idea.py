"""Draw the picture of the page `idea`: python book/assets/idea.py > book/assets/idea.svg."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ilora.study import figures


def idea() -> Figure:
    """The method in one picture."""
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


if __name__ == "__main__":
    figures.style()
    print(figures.svg(idea()), end="")
