"""Sliders for pages without a kernel: a list of figures, of which book/assets/slider.js shows one at a time."""

import re
from collections.abc import Mapping, Sequence
from html import escape

from IPython.display import HTML
from matplotlib.figure import Figure

from ilora.errors import UserError
from ilora.study import figures


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
