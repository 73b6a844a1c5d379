"""HTML for pages without a kernel: a question with predictions, and a slider over figures (book/assets/slider.js)."""

import re
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from IPython.display import HTML
from matplotlib.figure import Figure

from ilora.errors import UserError
from ilora.study import figures

CELL = '<td{}>{:.3f}<span style="display: block; height: 4px; width: {:.1%}; background: {}"></span></td>'
EXPERT = '<span style="display: inline-block; width: {:.2%}; background: {}; color: {}">{}</span>'
QUESTION = """<figure class="question mathjax_ignore tex2jax_ignore"><figcaption>{}</figcaption><div>
<section><p>History, oldest first</p><ol>{}</ol><p>Gate: weights of the experts</p>
<div class="gate" role="img" aria-label="Gate weights {}">{}</div></section>
<table><thead><tr><th scope="col">Candidate</th>{}</tr></thead><tbody>{}</tbody></table></div></figure>"""


def question(
    says: str, history: Sequence[str], titles: Sequence[str], shares: Mapping[str, np.ndarray], gate: np.ndarray,
    right: int = -1,
) -> str:  # fmt: skip
    """A question: titles read, candidates by falling share of the probability, gate weights (K,), as HTML.

    shares: system -> (candidates,); right: the place of the title that came next, which gets a tick.
    """
    rows, bars, firsts = "", "", [share.argmax() for share in shares.values()]
    for place in np.argsort(-sum(shares.values()), kind="stable"):
        bold = [' class="first"' if place == first else "" for first in firsts]
        values = [share[place] for share in shares.values()]
        cells = map(CELL.format, bold, values, values, figures.COLOURS)
        tag, tick = ('<tr class="target">', " ✓") if place == right else ("<tr>", "")
        rows += f'{tag}<th scope="row">{escape(titles[place])}{tick}</th>{"".join(cells)}</tr>'
    for weight, colour in zip(gate, figures.COLOURS, strict=False):
        bars += EXPERT.format(weight, colour, figures.ink(colour), f"{weight:.0%}" if weight >= 0.1 else "")
    read = "".join(f"<li>{escape(title)}</li>" for title in history)
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in shares)
    weights = ", ".join(f"{weight:.2f}" for weight in gate)
    return QUESTION.format(escape(says), read, weights, bars, names, rows)


def slider(pictures: Mapping, says: Sequence[str], label: str, name: str, alt: str, start: int = 0) -> HTML:
    """A slider over pictures, position ("K = 4") -> figure or its axes; closes the figures.

    says: a sentence for each picture; label: of the range input; name: an id, unique on the page; alt: what all
    pictures show; start: the position shown first. Raises UserError for what does not fit.
    """
    if not re.fullmatch(r"[a-z][a-z-]*", name):
        raise UserError(f"a slider's name is letters a to z and hyphens, not {name!r}")
    if len(says) != len(pictures) or not 0 <= start < len(pictures):
        raise UserError(f"slider {name!r} has {len(pictures)} pictures, {len(says)} sentences and starts at {start}")
    control = (
        f'<p class="slider-control" hidden><label for="{name}-at">{escape(label)}</label>'
        f'<input type="range" id="{name}-at" min="0" max="{len(pictures) - 1}" step="1" value="{start}">'
        f'<output for="{name}-at"></output></p>'
    )
    shown = [
        f'<figure data-at="{escape(at)}">{_svg(picture.figure, f"{name}-{number}", f"{alt}, at {at}")}'
        f"<figcaption><strong>{escape(at)}.</strong> {escape(sentence)}</figcaption></figure>"
        for number, ((at, picture), sentence) in enumerate(zip(pictures.items(), says, strict=True))
    ]
    lines = [f'<div class="slider mathjax_ignore tex2jax_ignore" id="{name}">', control, *shown, "</div>"]
    return HTML("\n".join(lines))


def _svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an SVG element whose ids begin with `prefix`, without Matplotlib's style of the whole page."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", figures.svg(figure), flags=re.S)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg[svg.index("<svg") :])
    style = 'stroke-linejoin="round" stroke-linecap="butt"'
    return svg.strip().replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" {style} ', 1)
