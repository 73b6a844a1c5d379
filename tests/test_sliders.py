"""Sliders show their pictures, work without a script, and are equal for equal pictures."""

import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup

from ilora.errors import UserError
from ilora.study import figures, model_figures
from ilora.study.sliders import slider

pytestmark = pytest.mark.book


@pytest.fixture(autouse=True)
def style():
    with mpl.rc_context():
        mpl.use("agg")
        figures.style()
        yield
    plt.close("all")


def drawn(name="knob", start=0, says=("Low & wide.", "High.")):
    """Two heat maps, whose clip paths and images have ids, and which share all but one value."""
    pictures = {f"at {n}": model_figures.heat_maps({"a": np.eye(2) * n}, "cosine", "cluster")[0] for n in range(2)}
    return slider(pictures, says, 'the "knob"', name, "A map", start)


def test_it_is_a_labelled_input_over_figures_that_say_what_they_show():
    page = BeautifulSoup(drawn(start=1).data, "html.parser")
    control, knob = page.select_one(".slider-control"), page.input
    assert control.has_attr("hidden")  # until a script shows it
    assert page.label["for"] == knob["id"] == page.output["for"][0]
    assert page.label.get_text() == 'the "knob"'
    assert (knob["type"], knob["min"], knob["max"], knob["value"]) == ("range", "0", "1", "1")
    figures_ = page.select("figure")
    assert [figure["data-at"] for figure in figures_] == ["at 0", "at 1"]
    assert [figure.svg["aria-label"] for figure in figures_] == ["A map, at at 0", "A map, at at 1"]
    assert [figure.figcaption.get_text() for figure in figures_] == ["at 0. Low & wide.", "at 1. High."]


def test_ids_are_unique_and_every_reference_stays_in_its_own_picture():
    html = drawn().data + drawn("other").data
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 20
    for place, figure in enumerate(re.findall("<figure.*?</figure>", drawn().data, re.S)):
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', figure)
        assert used and set(used) <= set(re.findall(r'\bid="([^"]+)"', figure))
        assert all(one.startswith(f"knob-{place}-") for one in used)


def test_nothing_reaches_beyond_it():
    html = drawn().data
    assert "<style" not in html and "<script" not in html and "<metadata" not in html and "<?xml" not in html
    assert not re.search(r'(?:href|src)="(?:https?:)?//', html)


def test_the_same_pictures_give_the_same_page_and_leave_no_figure_open():
    assert drawn().data == drawn().data
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "Knob 1"}, "letters a to z and hyphens, not 'Knob 1'"),
        ({"start": 2}, "2 pictures, 2 sentences and starts at 2"),
        ({"says": ("One.",)}, "2 pictures, 1 sentences"),
    ],
)
def test_what_cannot_be_shown_is_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        drawn(**wrong)


@pytest.mark.parametrize(
    "title", ["$$", "$x$", "A_$1", "<b>", "&amp;", r"\frac", "100%", "=1", "\N{GRINNING FACE}", "'\""]
)
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_titles_are_shown_as_they_are(title):
    pictures = {title: model_figures.scored({"LoRA": np.full(2, 0.5)}, [title, "b"], 0)}
    page = BeautifulSoup(slider(pictures, [title], title, "knob", title).data, "html.parser")
    assert page.label.get_text() == page.figure["data-at"] == title
    assert page.figcaption.get_text() == f"{title}. {title}" and page.svg["aria-label"] == f"{title}, at {title}"
    assert f"{title} (read next)" in [text.get_text().strip() for text in page.find_all("text")]
    assert "mathjax_ignore" in page.div["class"]
