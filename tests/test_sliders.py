"""Questions and sliders show what they are given, work without a script, and are equal for equal input."""

import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup

from ilora.errors import UserError
from ilora.study import figures, model_figures
from ilora.study.sliders import question, slider

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
    pictures = {title: model_figures.gate_bars(np.full((1, 2), 0.5), [title])}
    page = BeautifulSoup(slider(pictures, [title], title, "knob", title).data, "html.parser")
    assert page.label.get_text() == page.figure["data-at"] == title
    assert page.figcaption.get_text() == f"{title}. {title}" and page.svg["aria-label"] == f"{title}, at {title}"
    assert title in [text.get_text().strip() for text in page.find_all("text")]
    assert "mathjax_ignore" in page.div["class"]
    page = BeautifulSoup(question(title, [title], [title], {title: np.ones(1)}, np.ones(1), 0), "html.parser")
    texts = [page.select_one(part).get_text() for part in ("figcaption", "li", "tbody th", "thead th + th")]
    assert texts == [title, title, f"{title} \N{CHECK MARK}", title]
    assert "mathjax_ignore" in page.figure["class"]


def test_a_question_ranks_its_candidates_and_marks_what_each_system_chooses_and_what_came_next():
    shares = {"LoRA": np.array([0.7, 0.2, 0.1]), "iLoRA": np.array([0.25, 0.7, 0.05])}
    html = question("Next?", ["a", "b"], ["x", "y", "z"], shares, np.array([0.05, 0.95]), 2)
    page = BeautifulSoup(html, "html.parser")
    assert [item.get_text() for item in page.select("li")] == ["a", "b"]
    rows = [[cell.get_text() for cell in row.select("th, td")] for row in page.select("tbody tr")]
    assert rows == [["x", "0.700", "0.250"], ["y", "0.200", "0.700"], ["z \N{CHECK MARK}", "0.100", "0.050"]]
    assert [cell.get_text() for cell in page.select("td.first")] == ["0.700", "0.700"]
    assert page.select_one("tr.target").th.get_text().startswith("z")
    assert ["70.0%" in cell.span["style"] for cell in page.select("tr:first-child td")] == [True, False]
    assert page.select_one(".gate")["aria-label"] == "Gate weights 0.05, 0.95"
    assert [bar.get_text() for bar in page.select(".gate span")] == ["", "95%"]
    assert not BeautifulSoup(question("Next?", ["a"], ["x"], {"a": np.ones(1)}, np.ones(1)), "html.parser").select(
        ".target"
    )
