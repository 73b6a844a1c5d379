"""Draw the pictures of the page `idea`, that of the method also tall for phones: python book/assets/idea.py."""

# ruff: noqa: RUF001 (the pictures have signs of multiplication and Greek letters)

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
EXPERTS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"]  # as the gate's bars in other figures
LOOKS = {"frozen": ("#e3e8ee", "#52606d"), "trained": ("#fdebc8", "#B36B00"), "plain": ("#ffffff", "#52606d")}
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<title>iLoRA: a history is read twice, as text by a language model and as items by SASRec</title>
<style>
text {{ font: {size}px "DejaVu Sans", Verdana, sans-serif; fill: #1f2933; }}
.small, .more {{ font-size: {small}px; }}
.name {{ font-weight: bold; }}
.more {{ font-weight: normal; }}
path {{ fill: none; stroke: #1f2933; stroke-width: 1.4; }}
</style>
<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="11" markerHeight="11" markerUnits="userSpaceOnUse"
orient="auto">
<polygon points="0 0.5 8 4 0 7.5" fill="#1f2933"/></marker>
<rect width="{width}" height="{height}" fill="white"/>
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """One line of text; kind: name, bold, or small."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def rectangle(x: float, y: float, width: float, height: float, fill: str, edge: str) -> str:
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {size} rx="3" fill="{fill}" stroke="{edge}" stroke-width="1.4"/>'


def box(x: float, y: float, width: float, height: float, look: str, name: str, detail: str = "") -> str:
    """A named part with a line of detail below its name."""
    middle, baseline = x + width / 2, y + height / 2 + (-3 if detail else 5)
    parts = [rectangle(x, y, width, height, *LOOKS[look]), text(middle, baseline, name, "name", "middle")]
    return "\n".join([*parts, *([text(middle, baseline + 19, detail, "small", "middle")] if detail else [])])


def arrow(path: str) -> str:
    """Along a path of SVG commands."""
    return f'<path d="{path}" marker-end="url(#head)"/>'


def prompt(x: float, y: float, width: float) -> str:
    """The prompt as tokens: grey ones of titles, orange behaviour tokens after them."""
    parts = [rectangle(x, y, width, 100, *LOOKS["plain"]), text(x + 10, y + 22, "prompt", "name")]
    for row, (name, tokens) in enumerate([("history", "ttbtttbttb"), ("candidates", "tbttbtttbt")]):
        top = y + 36 + 30 * row
        parts.append(text(x + 10, top + 12, name, "small"))
        for place, token in enumerate(tokens[: int((width - 122) / 16)]):
            look = LOOKS["trained" if token == "b" else "frozen"]
            parts.append(rectangle(x + 98 + 16 * place, top, 13, 13, *look))
        parts.append(text(x + width - 18, top + 12, "…", "small"))
    return "\n".join(parts)


def middle(x: float, y: float, width: float, height: float) -> str:
    """The r numbers between A and B, coloured by their expert."""
    cell = width / 8
    return "\n".join(rectangle(x + cell * n, y, cell, height, EXPERTS[n // 2], "white") for n in range(8))


def weights(x: float, y: float) -> str:
    """The gate's weights as bars that stand on y."""
    heights = [14, 34, 22, 8]
    bars = zip(heights, EXPERTS, strict=True)
    return "\n".join(
        rectangle(x + 14 * n, y - tall, 11, tall, colour, "white") for n, (tall, colour) in enumerate(bars)
    )


def model(x: float, y: float, width: float, height: float, indent: float) -> str:
    """Layers on top of each other, with a heading that is indented."""
    sheets = (rectangle(x + shift, y - shift, width, height, "#ffffff", "#7b8794") for shift in (12, 6, 0))
    heading = 'language model <tspan class="more" dx="2">(one of its layers)</tspan>'
    return "\n".join([*sheets, text(x + indent, y + 24, heading, "name")])


def legend(x: float, y: float) -> str:
    parts = []
    for shift, look in ((0, "frozen"), (82, "trained")):
        parts += [rectangle(x + shift, y - 12, 14, 14, *LOOKS[look]), text(x + shift + 20, y, look, "small")]
    return "\n".join(parts)


def drawing(width: int, height: int, size: int, parts: list[str]) -> str:
    """An SVG document; size: of names in pixels."""
    head = HEAD.format(width=width, height=height, size=size, small=size - 2)
    return "\n".join([head.rstrip(), *parts, "</svg>"]) + "\n"


def wide() -> str:
    """From left to right."""
    return drawing(900, 430, 16, [
        box(8, 176, 124, 72, "plain", "history", "ten items"),
        arrow("M70 176 V80 H156"), text(78, 112, "as text", "small"),
        arrow("M70 248 V366 H156"), text(78, 340, "as items", "small"),
        prompt(158, 30, 246),
        box(158, 336, 96, 60, "frozen", "SASRec"),
        box(158, 208, 124, 56, "trained", "projector", "64 → width"),
        arrow("M206 336 V266"), text(214, 306, "item embeddings", "small"),
        arrow("M206 208 V132"), text(214, 174, "behaviour tokens", "small"),
        arrow("M254 366 H286"), box(288, 336, 60, 60, "plain", "z", "64"),
        arrow("M348 366 H380"), box(382, 336, 128, 60, "trained", "gate", "W_g: K × 64"),
        model(436, 42, 360, 244, 12),
        arrow("M404 122 H518"), text(450, 114, "x", "name"),
        box(520, 92, 170, 60, "frozen", "W", "d_out × d_in"),
        arrow("M478 122 V228 H492"),
        box(494, 198, 84, 60, "trained", "A", "r × d_in"), arrow("M578 228 H592"),
        middle(594, 204, 96, 48), text(642, 198, "r numbers", "small", "middle"), arrow("M690 228 H704"),
        box(706, 198, 80, 60, "trained", "B", "d_out × r"),
        arrow("M690 122 H734"), arrow("M746 198 V136"), text(738, 180, "× K α / r", "small", "end"),
        '<circle cx="746" cy="122" r="11" fill="white" stroke="#1f2933" stroke-width="1.4"/>',
        text(746, 127, "+", "name", "middle"),
        arrow("M757 122 H822"), box(824, 92, 68, 60, "plain", "next", "title"),
        arrow("M510 366 H642 V256"), weights(658, 366), text(522, 386, "w = softmax(W_g z), K weights", "small"),
        text(652, 306, "× w", "small"),
        legend(740, 420),
    ])  # fmt: skip


def tall() -> str:
    """From top to bottom, for a phone."""
    return drawing(360, 820, 14, [
        box(90, 6, 180, 48, "plain", "history", "ten items"),
        arrow("M104 54 V70 H34 V304"), text(42, 100, "as text", "small"),
        arrow("M200 54 V98"), text(208, 82, "as items", "small"),
        box(110, 100, 180, 46, "frozen", "SASRec"),
        arrow("M132 146 V202"), text(126, 166, "item", "small", "end"), text(126, 181, "embeddings", "small", "end"),
        arrow("M262 146 V202"), text(270, 178, "z: 64", "small"),
        box(74, 204, 124, 52, "trained", "projector", "64 → width"),
        box(222, 204, 128, 52, "trained", "gate", "W_g: K × 64"),
        arrow("M132 256 V304"), text(140, 286, "behaviour tokens", "small"),
        prompt(8, 306, 286),
        weights(278, 300), text(336, 424, "w = softmax(W_g z)", "small", "end"),
        model(8, 462, 310, 284, 60), arrow("M344 256 V619 H302"),
        arrow("M48 406 V526"), text(56, 438, "x", "name"),
        arrow("M48 506 H240 V526"),
        box(20, 528, 120, 164, "frozen", "W", "d_out × d_in"),
        box(180, 528, 120, 46, "trained", "A", "r × d_in"), arrow("M240 574 V600"),
        middle(180, 602, 120, 34), text(174, 623, "× w", "small", "end"),
        arrow("M240 636 V656"), box(180, 658, 120, 46, "trained", "B", "d_out × r"),
        arrow("M80 692 V708"), arrow("M240 704 V720 H93"), text(300, 734, "× K α / r", "small", "end"),
        '<circle cx="80" cy="720" r="11" fill="white" stroke="#1f2933" stroke-width="1.4"/>',
        text(80, 725, "+", "name", "middle"),
        arrow("M80 731 V766"), box(20, 768, 120, 44, "plain", "next title"),
        legend(190, 800),
    ])  # fmt: skip


def gradients() -> str:
    """The gradients of two readers and their sum, in one adapter and in two experts that weigh them differently."""
    first, second = np.array([-74, 40]), np.array([74, 22])
    panels = {"one adapter": (0.75, 0.75), "expert 1": (0.75, 0.15), "expert 2": (0.15, 0.75)}
    parts = []
    for number, (name, shares) in enumerate(panels.items()):
        x, y = 66 + 132 * number, 86
        parts.append(text(x, 110, name, "name", "middle"))
        pulls = [share * pull for share, pull in zip(shares, (first, second), strict=True)]
        for pull, colour in zip(pulls, EXPERTS, strict=False):
            parts.append(line(x, y, pull, f"stroke: {colour}; stroke-width: 3"))
        parts.append(line(x, y, sum(pulls), "stroke-dasharray: 4 3"))
    labels = [text(4, 46, "reader 1", "small"), text(130, 58, "reader 2", "small", "end")]
    return drawing(400, 120, 14, [*labels, *parts])


def line(x: float, y: float, pull: np.ndarray, look: str) -> str:
    """An arrow from a point; `pull` has y upwards."""
    return f'<path d="M{x:g} {y:g} l{pull[0]:.1f} {-pull[1]:.1f}" style="{look}" marker-end="url(#head)"/>'


if __name__ == "__main__":
    (FOLDER / "idea.svg").write_text(wide(), encoding="utf-8")
    (FOLDER / "idea_tall.svg").write_text(tall(), encoding="utf-8")
    (FOLDER / "idea_gradients.svg").write_text(gradients(), encoding="utf-8")
