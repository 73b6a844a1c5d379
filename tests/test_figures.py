"""Figures show what they are given, and nothing is cut off."""

import xml.etree.ElementTree as ET

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from ilora.study import figures, model_figures

pytestmark = pytest.mark.book

RNG = np.random.default_rng(0)
TABLE = pd.DataFrame({"value": [0.5, 0.1], "low": [0.4, 0.0], "high": [0.7, 0.2], "n": [9, 9]}, index=["a", "b"])
RUNS = [[0.4, 0.5, 0.6]] * 4
TREND = pd.DataFrame({"system": list("aabb"), "conflict": [0, 1, 0, 1], "value": 0.5, "low": 0.4, "high": 0.7})
TREND = TREND.assign(n=3, runs=RUNS, setting=["world", "world", "movielens, epochs 2, train_limit 40000", "lastfm"])
PAIRED = TREND.assign(variant=["random", "token", "random", "random"], value=[-0.1, 0.1, 0.2, 0.3])
PAIRED = PAIRED.assign(low=PAIRED["value"] - 0.1, high=PAIRED["value"] + 0.1)
MAPS = {f"LoRA {kind}": np.corrcoef(RNG.normal(size=(8, 20))) for kind in "abcdefgh"}
GATES = RNG.dirichlet([1, 1, 1, 1], size=12)


@pytest.fixture(autouse=True)
def style():
    with mpl.rc_context():
        mpl.use("agg")
        figures.style()
        yield
    plt.close("all")


DRAW = {
    "intervals": lambda: figures.intervals(TABLE, "HitRatio@1", chance=0.05),
    "lines": lambda: figures.lines(pd.DataFrame(RNG.random((5, 10))), "knob", "share"),
    "trend": lambda: figures.trend(TREND, "conflict", "HitRatio@1", title="the gain grows with conflict: a lot")[0],
    "trends": lambda: figures.trend(TREND, "conflict", "HitRatio@1", by="setting")[0],
    "no maps": lambda: model_figures.heat_maps({}, "cosine", "cluster")[0],
    "no trend": lambda: figures.trend(TREND[:0], "conflict", "HitRatio@1", by="setting", title="nothing")[0],
    "differences": lambda: figures.differences(PAIRED, "HitRatio@1", "1 of 4 intervals excludes zero")[0],
    "no differences": lambda: figures.differences(PAIRED[:0], "HitRatio@1", "")[0],
    "no panels": lambda: figures.panels({"MovieLens": TABLE[:0]}, "HitRatio@1", "chance", 0.05)[0],
    "heat_maps": lambda: model_figures.heat_maps({"LoRA": np.eye(8), "iLoRA": np.eye(8)}, "cosine", "cluster")[0],
    "small heat_maps": lambda: model_figures.heat_maps(MAPS, "cosine off the diagonal", "cluster", rows=2)[0],
    "gate_bars": lambda: model_figures.gate_bars(GATES, [f"user {n}" for n in range(12)]),
    "many experts": lambda: model_figures.gate_bars(RNG.dirichlet([1] * 8, size=3), ["a", "b", "c"]),
    "long names": lambda: figures.trend(TREND.replace({"a": "iLoRA, random guidance"}), "conflict", "y")[0],
}


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_cut_off_even_with_a_title(name):
    figure = DRAW[name]().figure
    if name in ("intervals", "lines", "gate_bars", "many experts"):  # whose titles the chapters set
        figure.axes[0].set_title("the difference between iLoRA and LoRA is not significant: 0.012 [-0.010, 0.034]")
    figure.canvas.draw()
    inside = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert inside.x0 >= 0 and inside.y0 >= 0 and inside.x1 <= width and inside.y1 <= height


def test_intervals_are_in_the_order_of_the_table_with_the_first_on_top():
    ax = DRAW["intervals"]()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert list(ax.lines[0].get_xdata()) == [0.5, 0.1] and list(ax.lines[0].get_ydata()) == [1, 0]
    (bars,) = ax.containers[0].lines[2]
    np.testing.assert_allclose([bar[:, 0] for bar in bars.get_segments()], [[0.4, 0.7], [0.0, 0.2]])


def test_a_trend_has_a_line_with_intervals_for_each_system():
    ax = DRAW["trend"]()
    assert len(ax.containers) == 2
    (bars,) = ax.containers[0].lines[2]
    np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], [[0.4, 0.7]] * 2)


def test_a_trend_names_its_seeds_and_shows_each_of_them():
    ax = DRAW["trend"]()
    assert "n = 3 seeds" in ax.figure.get_suptitle()
    points = np.vstack([dots.get_offsets() for dots in ax.collections if len(dots.get_offsets()) > 1])
    np.testing.assert_allclose(points[:, 1].reshape(-1, 3), RUNS)
    assert "n = 2 to 3 seeds" in figures.trend(TREND.assign(n=[2, 3, 3, 3]), "conflict", "y")[0].figure.get_suptitle()


def test_panels_are_of_one_scale_and_named():
    axes = figures.trend(TREND, "conflict", "HitRatio@1", by="setting")
    assert [ax.get_title("left").replace("\n", " ") for ax in axes] == list(dict.fromkeys(TREND["setting"]))
    assert len({ax.get_ylim() for ax in axes}) == 1
    four = TREND.assign(conflict=[0.0, 0.5, 0.75, 1.0])
    axes = figures.trend(four, "value", "HitRatio@1", by="conflict")
    assert [ax.get_title("left") for ax in axes] == ["conflict 0", "conflict 0.5", "conflict 0.75", "conflict 1"]
    assert len(axes[0].figure.axes) == 4  # in two rows, and no empty ones


def test_differences_have_a_row_for_each_variant_and_a_panel_for_each_setting():
    axes = figures.differences(PAIRED, "HitRatio@1", "a title")
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["random", "token"]
    values = [ax.containers[0].lines[0].get_xdata() for ax in axes]
    np.testing.assert_array_equal(np.array(values, float), [[-0.1, 0.1], [0.2, np.nan], [0.3, np.nan]])
    assert all("n = 3" in ax.get_title("left").replace("\n", " ") for ax in axes)
    assert {tuple(place) for place in axes[1].collections[-1].get_offsets().tolist()} >= {(0.4, 0.78), (0.6, 0.78)}


def test_a_panel_names_its_systems_with_fewer_questions():
    whole = TABLE.assign(n=[100, 40])
    axes = figures.panels({"LastFM": whole, "empty": TABLE[:0], "Steam": whole.assign(n=100)}, "y", "equal", 0)
    assert [ax.get_title("left") for ax in axes] == ["LastFM\nn = 100\n(b: 40)", "Steam\nn = 100"]


@pytest.mark.parametrize("name", ["no trend", "no differences", "no panels"])
def test_a_figure_without_runs_says_so(name):
    ax = DRAW[name]()
    assert [text.get_text() for text in ax.texts] == ["no such runs in the results"]


@pytest.mark.parametrize("rows", [1, 2])
def test_the_scale_of_heat_maps_ends_at_their_largest_value_off_the_diagonal(rows):
    maps = dict(list(MAPS.items())[: 4 * rows])
    axes = model_figures.heat_maps(maps, "cosine", "cluster", rows=rows)
    off = np.concatenate([matrix[~np.eye(8, dtype=bool)] for matrix in maps.values()])
    for ax in axes:
        assert ax.images[0].get_clim() == pytest.approx((-np.abs(off).max(), np.abs(off).max()))
        assert np.isnan(np.diag(ax.images[0].get_array().filled(np.nan))).all()
    assert len(axes) == 4 * rows
    assert model_figures.heat_maps(maps, "cosine", "cluster", limit=0.25)[0].images[0].get_clim() == (-0.25, 0.25)


@pytest.mark.parametrize("name", DRAW)
def test_a_figure_can_be_read_on_a_phone_and_fits_on_a_page(name):
    figure = DRAW[name]().figure
    texts = [text for text in figure.findobj(mpl.text.Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 10
    assert figure.get_figwidth() <= 7.3


def test_bars_are_the_gates_weights():
    ax = model_figures.gate_bars(GATES, ["user 7"] * 12)  # of one user, and still a bar each
    widths = [[bar.get_width() for bar in bars] for bars in ax.containers]
    np.testing.assert_allclose(np.array(widths).T, GATES)
    assert len({bar.get_y() for bar in ax.containers[0]}) == 12


@pytest.mark.parametrize(("colour", "ink"), [("#0072B2", "white"), ("#E69F00", "black"), ("white", "black")])
def test_text_can_be_read_on_its_background(colour, ink):
    assert figures.ink(colour) == ink


def test_a_line_crosses_gaps():
    ax = figures.lines(pd.DataFrame({"a": [1, None, 3], "b": [None, 2, None]}), "x", "y")
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[0, 1], [2, 3]], [[1, 2]]]
    plt.close("all")


def test_lines_differ_in_more_than_colour():
    assert len({line.get_marker() for line in DRAW["lines"]().lines[:8]}) == 8


# ---------------------------------------------------------------- titles are data

TITLES = [
    "$$", "$x$", "A_$1", "$\\frac$", r"\frac{1}{2}", r"\$5 and $6", "x^2", "_hidden", "<b>", "&amp;", "100%", "{x}",
    "=1+1", "#1", "'\"", "\N{GRINNING FACE}", "\N{CJK UNIFIED IDEOGRAPH-6771}", "two  blanks",
]  # fmt: skip
WITH_NAMES = {
    "intervals": lambda a, b: figures.intervals(TABLE.set_axis([a, b]), a),
    "panels": lambda a, b: figures.panels({a: TABLE, b: TABLE.set_axis([b, a])}, a, b, 0.05),
    "lines": lambda a, b: figures.lines(pd.DataFrame(RNG.random((5, 2)), columns=[a, b]), a, b),
    "trend": lambda a, b: figures.trend(TREND.replace({"a": a, "b": b}), "conflict", a, title=b),
    "trends": lambda a, b: figures.trend(TREND.assign(setting=[a, a, b, b]), "conflict", b, by="setting"),
    "differences": lambda a, b: figures.differences(PAIRED.assign(variant=[a, b, a, a]), b, b),
    "gate_bars": lambda a, b: model_figures.gate_bars(GATES[:2], [a, b]),
    "heat_maps": lambda a, b: model_figures.heat_maps({a: np.eye(3), b: np.eye(3)}, a, b),
    "relation": lambda a, b: model_figures.relation(np.arange(3), {a: np.ones(3)}, {a: {"value": 1, "p": 0.5}}, a, b),
}


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("styled", [True, False])
@pytest.mark.parametrize("name", WITH_NAMES)
def test_names_from_the_data_are_shown_as_they_are(name, styled, tmp_path):
    if not styled:
        mpl.rcdefaults()
        mpl.use("agg")
    for title, other in list(zip(TITLES[::2], TITLES[1::2], strict=True))[: None if styled else 2]:
        axes = WITH_NAMES[name](title, other)
        figure = plt.gcf()
        figure.savefig(tmp_path / "figure.png")
        written = ET.fromstring(figures.svg(figure))
        words = " ".join("".join(text.itertext()) for text in written.iter("{http://www.w3.org/2000/svg}text"))
        assert axes is not None
        for text in (title, other):
            assert " ".join(text.split()) in " ".join(words.split()), (text, words)


def test_a_title_of_several_lines_takes_one():
    WITH_NAMES["gate_bars"]("Alien\r\nResurrection\x07", "b")
    labels = [label.get_text() for ax in plt.gcf().axes for label in ax.get_yticklabels()]
    assert any(label.startswith("Alien Resurrection") for label in labels)


def test_a_table_of_titles_shows_no_formulas_and_no_html():
    shown = pd.DataFrame({"title": ["$x$", "<b>", "&amp;"]})._repr_html_()
    assert "mathjax_ignore" in shown and "&lt;b&gt;" in shown and "&amp;amp;" in shown


def test_text_that_a_notebook_adds_is_shown_as_it_is():
    ax = pd.Series([5, 1]).plot.area()
    added = [ax.set_title("$$"), ax.figure.suptitle("$$"), ax.text(0, 0, "$$")]
    ax.figure.canvas.draw()
    assert not any(text.get_parse_math() for text in added)
