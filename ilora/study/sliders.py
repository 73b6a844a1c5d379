"""Sliders for pages without a kernel: one picture for each position, drawn beforehand, and a sentence under it.

The HTML is a list of figures, and stays one where no script runs or the page is printed. book/assets/slider.js puts a
range input above them and shows one at a time. Nothing is computed in the browser and nothing is fetched.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ilora.errors import UserError
from ilora.study import figures


@dataclass(frozen=True)
class Slider:
    """What a notebook shows as HTML."""

    name: str
    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html


def slider(
    pictures: Mapping[str, Axes | Figure], says: Sequence[str], label: str, name: str, alt: str, start: int = 0
) -> Slider:
    """A slider over pictures; closes their figures.

    pictures: what a position is called ("K = 4") -> its figure, or axes of it; says: what each picture shows, as a
    sentence; label: what the knob is; name: letters and hyphens, unique on the page; alt: what all pictures show, to
    which the position is added; start: the first position shown. Equal figures give equal HTML. Raises UserError for
    a name that cannot be an id, a sentence too few or too many, and a start beyond the pictures.
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
    rows = zip(pictures.items(), says, strict=True)
    shown = [
        f'<figure data-at="{escape(at)}">{_svg(picture.figure, f"{name}-{place}", f"{alt}, at {at}")}'
        f"<figcaption><strong>{escape(at)}.</strong> {escape(says_)}</figcaption></figure>"
        for place, ((at, picture), says_) in enumerate(rows)
    ]
    return Slider(
        name,
        f'<div class="slider mathjax_ignore tex2jax_ignore" id="{name}">\n{control}\n' + "\n".join(shown) + "\n</div>",
    )


def _svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an SVG element whose ids begin with `prefix`: several may stand on one page.

    Matplotlib's style element, which would hold for the whole page, becomes
    attributes of the element itself.
    """
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", figures.svg(figure), flags=re.S)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg[svg.index("<svg") :])
    look = 'stroke-linejoin="round" stroke-linecap="butt"'
    return svg.strip().replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" {look} ', 1)
