"""The built book in a real browser: nothing leaves the page, everything on it can be read, reached and operated."""

import functools
import http.server
import itertools
import json
import os
import re
import shutil
import subprocess
import threading
import unicodedata
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import axe_playwright_python
import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from conftest import JUPYTER_BOOK, ROOT
from playwright.sync_api import sync_playwright
from pypdf import PdfReader

CONTENTS = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [CONTENTS["root"], *(chapter["file"] for part in CONTENTS["parts"] for chapter in part["chapters"])]
NOTEBOOKS = [name for name in PAGES if name[0].isdigit()]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
# What docutils writes and no style sheet can fix: rule -> the element it is about.
NOT_OURS = {
    "aria-deprecated-role": '[role="doc-biblioentry"]',  # of DPUB-ARIA 1.0, which screen readers still know
    "aria-required-children": ".citation-list",  # a list whose items are those entries and links back
}
MEGABYTE = 1024**2
A4 = 680  # pixels between the margins of book.css

pytestmark = pytest.mark.book
pages = pytest.mark.parametrize("name", PAGES)
chapters = pytest.mark.parametrize("name", NOTEBOOKS)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say("no chromium, chromium-browser or google-chrome on the PATH: the pages are not tested in a browser")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def window(browser):
    return browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")


@pytest.fixture(scope="module")
def served(html):
    """The address of the pages under a sub-path of a server."""
    handler = functools.partial(Quiet, directory=str(html.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{html.name}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def look(window, address):
    """Open a page and wait for its scripts, MathJax among them.

    Its `problems` are console errors and failed requests, its `requests` all addresses.  Each page gets a new tab,
    because leaving a page cancels its open requests, which then fail.
    """
    for old in window.pages:
        old.close()
    tab = window.new_page()
    tab.problems, tab.requests = [], []
    tab.on("console", lambda message: tab.problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: tab.problems.append(str(error)))
    tab.on("requestfailed", lambda request: tab.problems.append(f"failed: {request.url}"))
    tab.on("response", lambda response: tab.problems.append(response.url) if response.status >= 400 else None)
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.goto(address)
    tab.evaluate("window.MathJax && MathJax.startup.promise")
    tab.add_style_tag(content="*, *::before, *::after { transition: none !important }")
    return tab


@functools.cache
def soup(html, name):
    return BeautifulSoup((html / f"{name}.html").read_text(encoding="utf-8"), "html.parser")


# ---------------------------------------------------------------- what a browser sees


@functools.cache
def visited(window, html, name):
    """What one visit to a page shows: each page is opened and laid out once for all tests that only look at it.

    axe-core's violations are in the light and the dark theme; `sizes` are those of MEASURE, by width of the window.
    """
    tab = look(window, (html / f"{name}.html").as_uri())
    seen = {"problems": list(tab.problems), "requests": list(tab.requests)}
    seen["formulas"], seen["typeset"] = tab.locator(".math").count(), tab.locator(".math:has(mjx-container)").count()
    seen["text"] = tab.locator("article").inner_text().replace(code(tab), "")
    theme = tab.evaluate("document.documentElement.dataset.theme")
    seen["light"] = violations(tab)
    tab.evaluate("document.documentElement.dataset.theme = 'dark'")
    seen["dark"] = violations(tab, "color-contrast")
    tab.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
    tab.set_viewport_size({"width": 390, "height": 844})  # a phone
    seen["width on a phone"] = tab.evaluate("document.documentElement.scrollWidth")
    seen["sizes"] = {}
    for width in (1280, 390):
        tab.set_viewport_size({"width": width, "height": 844})
        seen["sizes"][width] = tab.evaluate(MEASURE)
    return seen


@pages
def test_a_page_opened_as_a_file_is_whole_and_reaches_everybody(window, html, name):
    seen = visited(window, html, name)
    assert not seen["problems"]
    assert not [url for url in seen["requests"] if urlsplit(url).scheme not in ("file", "data")]
    assert seen["formulas"] == seen["typeset"]
    assert not re.search(r"\\\(|\\\[|\\begin\{", seen["text"])
    assert not seen["light"]
    assert not seen["dark"]
    assert seen["width on a phone"] <= 390


def code(tab):
    return "\n".join(tab.locator("article pre").all_inner_texts())


# Of thousands of table cells and code tokens, one of each style on a page is enough.  The others are hidden, because
# axe-core is slow with a long list of what to exclude.
HIDE_REPEATS = """() => {
    const seen = new Set(), isNew = style => !seen.has(style) && seen.add(style);
    const tokens = [...document.querySelectorAll("pre span[class]")].filter(token => !isNew(token.className));
    const rows = document.querySelectorAll("table.dataframe tbody tr:nth-child(n + 4)");
    for (const element of [...tokens, ...rows]) element.style.visibility = "hidden";
}"""
AUDIT = """async ([run, notOurs]) => {
    const found = await axe.run({runOnly: run, preload: false});
    const ours = (rule, node) => !document.querySelector(node.target[0]).matches(notOurs[rule.id] ?? "nothing");
    return [found.passes.length, found.violations.flatMap(rule => rule.nodes.filter(node => ours(rule, node))
        .map(node => `${rule.id} ${node.target}: ${node.failureSummary}`))];
}"""


def violations(tab, *rules):
    """Violations that axe-core finds of WCAG 2 A and AA, or of single rules, except those of NOT_OURS."""
    if tab.evaluate("typeof axe") == "undefined":
        tab.evaluate(AXE)
        tab.evaluate(HIDE_REPEATS)
    run = {"type": "rule", "values": rules} if rules else {"type": "tag", "values": ["wcag2a", "wcag2aa"]}
    passes, violations = tab.evaluate(AUDIT, [run, NOT_OURS])
    assert passes
    return violations


@pytest.mark.parametrize("name", ["intro", "04_ilora", "11_play"])
def test_a_page_served_under_a_sub_path_requests_nothing_outside_it(window, served, name):
    tab = look(window, f"{served}/{name}.html")
    assert not tab.problems
    assert not [url for url in tab.requests if not url.startswith((f"{served}/", "data:"))]


@pytest.fixture(scope="module")
def sliders(html):
    ids = {name: [slider["id"] for slider in soup(html, name).select(".slider")] for name in PAGES}
    return [(name, slider) for name, sliders in ids.items() for slider in sliders]


def test_each_slider_is_moved_by_keys_and_shows_another_picture(window, html, sliders):
    assert len(sliders) >= 2
    tabs = {}
    for name, slider in sliders:  # page after page
        tab = tabs[name] = tabs.get(name) or look(window, (html / f"{name}.html").as_uri())
        knob = tab.locator(f"#{slider} input")
        last = int(knob.get_attribute("max"))
        label = tab.locator(f"#{slider} label").inner_text()
        assert tab.get_by_label(label, exact=True).and_(knob).count() == 1
        seen, widths = {}, set()
        for key, place in [("Home", 0), ("ArrowRight", 1), ("End", last), ("ArrowLeft", last - 1)]:
            knob.press(key)
            (shown,) = tab.locator(f"#{slider} figure:visible").all()
            assert knob.input_value() == str(place)
            assert tab.locator(f"#{slider} output").inner_text() == shown.get_attribute("data-at")
            assert knob.get_attribute("aria-valuetext") == shown.locator("figcaption").inner_text()
            seen[place] = shown.screenshot()
            widths.add(knob.bounding_box()["width"])
        assert len(set(seen.values())) == len(seen)
        assert len(widths) == 1  # what it says does not move what is pulled
        assert not tab.problems


def test_without_scripts_a_slider_is_a_list_of_figures(browser, html, sliders):
    tab = browser.new_context(java_script_enabled=False).new_page()
    name, slider = sliders[0]
    tab.goto((html / f"{name}.html").as_uri())
    figures = tab.locator(f"#{slider} figure")
    assert tab.locator(f"#{slider} figure:visible").count() == figures.count() > 1
    assert not tab.locator(f"#{slider} input").is_visible()


@pytest.fixture
def play(window, html):
    """The page Play, with a function that reads what is shown: verdict, ranking and gates."""
    tab = look(window, (html / "11_play.html").as_uri())
    parts = ("figcaption", "tbody", "section")
    tab.shown = lambda: [tab.locator(f".play {part}").inner_html() for part in parts]
    return tab


def test_each_control_of_a_question_changes_what_is_shown_by_keys(play):
    seen = [play.shown()]
    for label, key in [("Reader", "ArrowDown"), ("Titles in view", "ArrowLeft"), ("New candidates", "Enter")]:
        play.locator(".play").get_by_text(label, exact=True).first.scroll_into_view_if_needed()
        role = play.locator(".play").get_by_role("button") if "New" in label else play.get_by_label(label, exact=True)
        role.press(key)
        seen.append(play.shown())
    play.get_by_label("iLoRA", exact=True).press("ArrowLeft")
    assert play.get_by_label("LoRA", exact=True).is_checked()
    seen.append(play.shown())
    assert all(old != new for old, new in itertools.pairwise(seen))
    assert play.locator(".play figcaption").inner_text().startswith("LoRA puts")
    assert "no gate" in play.locator(".play section").inner_text()
    play.get_by_label("iLoRA", exact=True).click()
    assert play.locator(".play figcaption").inner_text().startswith("iLoRA puts")
    assert not play.problems


def test_the_readers_are_of_every_kind_and_what_is_shown_agrees_with_their_kind(play):
    counts = [int(count) for count in re.findall(r" (\d+)[,.]", play.locator(".play-controls p").first.inner_text())]
    assert len(counts) == 4 and sum(counts) == int(play.locator(".play-controls p").first.inner_text().split()[1])
    options = play.locator(".play option").all_inner_texts()
    assert len(options) == 12 and len({option.split("(")[1] for option in options}) == 4
    for option in options:
        play.get_by_label("Reader", exact=True).select_option(option)
        says = play.locator(".play figcaption").inner_text()
        verdict = dict(re.findall(r"(i?LoRA) puts [^:]+ first: (right|wrong)", says))
        right = {system for system in verdict if verdict[system] == "right"}
        name = {"both": {"LoRA", "iLoRA"}, "neither": set()}.get(option.split("(")[1].split()[0])
        assert len(verdict) == 2 and right == (name if name is not None else {option.split()[-2]})
        values = [float(cell) for cell in play.locator(".play td.chosen").all_inner_texts()]
        assert len(values) == 20 and values == sorted(values, reverse=True)
        assert play.locator(".play tr.target").count() == 1
        assert play.locator(".play li .gate").count() == play.locator(".play li").count() == 10


def test_a_question_is_operated_by_touch_on_a_phone(browser, html):
    phone = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).new_page()
    phone.goto((html / "11_play.html").as_uri())
    body = phone.locator(".play tbody")
    seen = [body.inner_html()]
    for target in (phone.get_by_role("button", name="New candidates"), phone.get_by_label("LoRA", exact=True)):
        target.tap()
        seen.append(body.inner_html())
    assert len(set(seen)) == 3
    for control in phone.locator(".play-controls :is(button, select, label:has(input))").all():
        assert control.bounding_box()["height"] >= 24  # WCAG 2.2, target size
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390


def test_new_candidates_come_round_again_and_the_number_of_titles_is_said(play):
    first = play.shown()
    button = play.locator(".play").get_by_role("button")
    draws = []
    while not draws or play.shown() != first:
        button.click()
        draws.append(play.shown())
    assert len(draws) == 4
    range_ = play.get_by_label("Titles in view", exact=True)
    range_.press("Home")
    assert range_.get_attribute("aria-valuetext") == "the last 1 of 10"
    assert play.locator(".play li.unseen").count() == 9


def test_the_results_are_filtered_by_data_set_and_sorted_by_any_column(play):
    rows = play.locator("#play-results tbody tr:visible")
    every = rows.count()
    play.get_by_label("data", exact=True).select_option("LastFM")
    assert 1 < rows.count() < every
    assert set(play.locator("#play-results tbody tr:visible td:first-child").all_inner_texts()) == {"LastFM"}
    head = play.locator("#play-results thead th").nth(2)
    orders = {}
    for order in ("ascending", "descending"):
        head.get_by_role("button").press("Enter")
        assert head.get_attribute("aria-sort") == order
        cells = play.locator("#play-results tbody tr:visible td:nth-child(3)").all_inner_texts()
        orders[order] = [float(cell.split()[0]) for cell in cells]
    assert orders["ascending"] == sorted(orders["descending"])
    assert orders["descending"] == orders["ascending"][::-1] or len(set(orders["ascending"])) < len(cells)


def test_without_scripts_a_question_and_all_results_are_there(browser, html):
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto((html / "11_play.html").as_uri())
    assert tab.locator(".play figcaption").inner_text().startswith("What does ")
    assert tab.locator(".play tbody tr:visible").count() == 20 and tab.locator(".play li:visible").count() == 10
    assert tab.locator(".play td.first").count() == 2
    assert tab.locator("#play-results tbody tr").count() > 10
    assert not tab.locator(".play select").count()


def test_the_headline_fits_a_phone(browser, html):
    """Data sets are rows, so that no system is hidden at the right."""
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto((html / "intro.html").as_uri())
    table = tab.locator(".headline table")
    assert table.locator("thead th").all_inner_texts()[1:] == ["SASRec", "TALLRec", "LLaRA", "iLoRA"]
    assert tab.evaluate("document.querySelector('.headline').scrollWidth <= 390")
    box = table.bounding_box()
    assert box["x"] + box["width"] <= 390


# ---------------------------------------------------------------- what the pages hold


def test_the_book_builds_without_a_warning_and_its_source_loads_nothing_from_the_network(html):
    loads = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["'](?:https?:)?//|<link[^>]*\shref=["']https?:""")
    for page in PAGES:
        text = (html / f"{page}.html").read_text(encoding="utf-8")
        assert not loads.findall(text), page
    assert "_static/mathjax/tex-mml-chtml.js" in (html / "intro.html").read_text(encoding="utf-8")
    assert (html / "_static/mathjax/tex-mml-chtml.js").is_file()


@pages
def test_links_and_anchors_resolve(html, name):
    for link in soup(html, name).select("a[href]"):
        target, anchor = urldefrag(link["href"])
        where = urlsplit(target)
        if where.scheme:
            assert (where.scheme == "https" and "." in where.netloc) or where.scheme in ("mailto", "data"), link
            continue
        path = html / unquote(where.path) if where.path else html / f"{name}.html"
        assert path.is_file(), link
        if anchor and path.suffix == ".html":
            assert soup(html, path.stem).find(id=unquote(anchor)), link


@pages
def test_every_picture_says_what_it_shows_and_no_id_comes_twice(html, name):
    page = soup(html, name)
    for picture in page.select("article img"):
        assert len(picture.get("alt", "")) > 15, picture
    for picture in page.select("article figure svg"):
        assert picture["role"] == "img" and len(picture["aria-label"]) > 15
    ids = [element["id"] for element in page.select("[id]")]
    assert len(ids) == len(set(ids))


@pages
def test_a_page_with_its_pictures_is_small(html, name):
    pictures = {picture["src"] for picture in soup(html, name).select("article img[src]")}
    files = [html / f"{name}.html", *(html / src for src in pictures if not src.startswith("data:"))]
    assert sum(file.stat().st_size for file in files) < 1.5 * MEGABYTE


@pages
def test_a_page_has_a_short_title_and_no_right_sidebar(html, name):
    assert len(soup(html, name).select_one("article h1").get_text().removesuffix("#")) <= 45
    assert not soup(html, name).select(".bd-sidebar-secondary .page-toc")


@chapters
def test_a_chapter_begins_with_a_question_and_has_takeaways_with_numbers(html, name):
    article = soup(html, name).select_one("article")
    subtitle = article.h1.find_next_sibling("p")
    assert subtitle.em and subtitle.get_text() == subtitle.em.get_text()
    assert subtitle.get_text().endswith("?")
    titles = [title for title in article.select("h2, .admonition-title") if "Takeaways" in title.get_text()]
    (takeaways,) = (title.find_parent(["section", "div"]).select("li") for title in titles)
    assert len([item for item in takeaways if re.search(r"\d", item.get_text())]) >= 3


# ---------------------------------------------------------------- what can be measured

# Height of a page, tops of its figures, pictures with their widths, sizes of text in inline SVG, and code that is cut.
MEASURE = """() => {
    const box = element => element.getBoundingClientRect(), wide = element => box(element).width > 150;
    const pixels = (svg, text) =>
        parseFloat(getComputedStyle(text).fontSize) * box(svg).width / svg.viewBox.baseVal.width;
    const find = selector => [...document.querySelectorAll(`article ${selector}`)].filter(wide);
    const height = document.documentElement.scrollHeight;
    const shown = find(":is(img, svg, figure)").filter(picture => box(picture).height > 60);
    const tops = shown.map(picture => box(picture).top + scrollY);
    document.querySelectorAll(".slider figure[hidden]").forEach(figure => { figure.hidden = false; });
    const pictures = find("img").map(picture => [picture.getAttribute("src"), box(picture).width]);
    const texts = find("figure svg").flatMap(svg => [...svg.querySelectorAll("text")].map(text => pixels(svg, text)));
    const cut = [...document.querySelectorAll("article pre")].filter(code => code.scrollWidth - code.clientWidth > 4);
    return {height, tops, pictures, texts, cut: cut.map(code => code.innerText)};
}"""


def smallest_text(path, width):
    """Pixels of the smallest text in an SVG file that is shown with this width; Matplotlib's paths are 100 high."""
    svg = path.read_text(encoding="utf-8")
    paths = [100 * float(scale) for scale in re.findall(r"scale\(([\d.]+) -\1\)", svg)]
    texts = [float(size) for size in re.findall(r"font(?:-size)?: ?(?:[a-z]+ |\d+ )*([\d.]+)px", svg)]
    return min(paths + texts) * width / float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])


@pages
def test_a_page_is_at_most_8000_pixels_high(window, html, name):
    assert visited(window, html, name)["sizes"][1280]["height"] <= 8000


@pages
def test_no_code_is_cut_off_at_the_right(window, html, name):
    assert not visited(window, html, name)["sizes"][1280]["cut"]


@chapters
def test_the_first_screen_of_a_chapter_has_a_figure(window, html, name):
    assert min(visited(window, html, name)["sizes"][1280]["tops"]) <= 800


@pages
def test_text_in_figures_can_be_read_on_a_phone(window, html, name):
    on_a_phone = visited(window, html, name)["sizes"][390]
    sizes = {src: smallest_text(html / src, width) for src, width in on_a_phone["pictures"]}
    assert not {src: size for src, size in sizes.items() if size < 9}
    assert min(on_a_phone["texts"], default=9) >= 9


@chapters
def test_every_figure_with_a_caption_is_on_the_page(html, name):
    """Except those that a cell draws only if there are results for it."""
    cells = nbformat.read(ROOT / "book" / f"{name}.ipynb", 4).cells
    captioned = [cell for cell in cells if "figure" in cell.metadata.get("mystnb", {})]
    drawn = {cell.metadata["mystnb"]["image"]["alt"] for cell in captioned if not re.search("^if ", cell.source, re.M)}
    assert drawn <= {picture["alt"] for picture in soup(html, name).select("figure img")}


@pages
def test_tables_have_at_most_six_columns_and_something_in_them(html, name):
    for table in soup(html, name).select("article table"):
        rows = [row.find_all(["th", "td"]) for row in table.select("tr")]
        assert max(sum(int(cell.get("colspan", 1)) for cell in row) for row in rows) <= 6, table
        cells = [cell.get_text().strip() for cell in table.select("tbody :is(td, th)")]
        assert set(cells) - {"", "NaN", "None"}, table


@pages
def test_numbers_in_tables_are_written_in_one_way(html, name):
    """At most three decimals, except in what the paper prints; intervals as 0.541 [0.520, 0.562], or 2.1 [2.0, 2.2]."""
    cells = {cell.get_text().strip() for cell in soup(html, name).select("article td")}
    files = [ROOT / "ilora" / "study" / file for file in ("table_1.csv", "paper.py")]
    printed = re.findall(r"[\d.]+", "".join(file.read_text(encoding="utf-8") for file in files))
    long = {cell for cell in cells if re.fullmatch(r"-?\d+\.\d{4,}", cell)}
    assert not [cell for cell in long - set(printed) if float(f"{float(cell):.1e}") != float(cell)]
    allowed = ({1}, {3}) if name == "09_speed" else ({3},)
    for cell in cells:
        interval = re.match(r"-?[\d,]+\.?(\d*) \[-?[\d,]+\.?(\d*), -?[\d,]+\.?(\d*)\]", cell)
        assert not interval or {len(decimals) for decimals in interval.groups()} in allowed, cell
        assert interval or not re.match(r"-?[\d.]+ [\[(]", cell), cell


@chapters
def test_no_output_is_a_raw_object(html, name):
    outputs = [output.get_text() for output in soup(html, name).select(".cell_output .text_plain pre")]
    assert not [output for output in outputs if re.match(r"[\[{(<]|\w+\(", output)]


@pages
def test_commits_and_dates_of_runs_are_those_of_the_results(html, name):
    """Chapter 10 shows only the run that made the book, which made all chapters from one commit."""
    folder = ROOT / "book" / "results"
    own = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("[0-9]*.json")]
    assert len({result["commit"] for result in own}) == 1
    shown = own if name.startswith("10_") else [json.loads(path.read_text("utf-8")) for path in folder.rglob("*.json")]
    commits = {result["commit"] for result in shown if "commit" in result}
    text = soup(html, name).select_one("article").get_text(" ")
    words = re.findall(r"(?<![\w-])(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,40}\b", text)
    assert not [word for word in words if not any(commit.startswith(word) for commit in commits)]
    if name in NOTEBOOKS:
        dates = set(re.findall(r"\b20\d\d-\d\d-\d\d\b", text))
        assert dates <= {result["date"][:10] for result in shown if "date" in result}


# ---------------------------------------------------------------- launching and printing


def test_launch_buttons_open_files_that_exist_once_the_repository_has_an_address(book_copy, tmp_path):
    """In a book of two chapters, whose links to the others are missing."""
    book = shutil.copytree(book_copy, tmp_path / "book", ignore=shutil.ignore_patterns("_build"))
    names = ["04_ilora", "11_play"]
    (book / "_toc.yml").write_text(
        yaml.safe_dump({"format": "jb-book", "root": names[0], "chapters": [{"file": names[1]}]})
    )
    settings = (book / "_config.yml").read_text(encoding="utf-8")
    assert settings.count('\n  url: ""\n') == 1
    (book / "_config.yml").write_text(settings.replace('  url: ""', "  url: https://github.com/owner/name"))
    done = subprocess.run([JUPYTER_BOOK, "build", book], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in names:
        links = [link["href"] for link in soup(book / "_build" / "html", name).select("a[href]")]
        binder, colab = ([link for link in links if host in link] for host in ("mybinder.org", "colab."))
        assert binder and colab, name
        for link in binder:
            assert (ROOT / link.split("?urlpath=lab/tree/")[1]).is_file(), link
        for link in colab:
            assert (ROOT / link.split("/blob/main/")[1]).is_file(), link
    assert (ROOT / "environment.yml").is_file()  # what Binder installs


def test_without_an_address_no_page_has_a_launch_button(html):
    assert not [name for name in PAGES if "mybinder" in (html / f"{name}.html").read_text(encoding="utf-8")]


def test_the_pdf_holds_all_chapters_with_their_formulas(browser, book_copy, html):
    shutil.copy(ROOT / "Makefile", book_copy.parent)
    command = ["make", "--old-file=.venv/installed", f"BIN={JUPYTER_BOOK.parent}", "pdf"]
    done = subprocess.run(command, cwd=book_copy.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    pdf = PdfReader(book_copy / "_build" / "ilora.pdf")
    text = squeezed("".join(page.extract_text() for page in pdf.pages))
    for name in PAGES:
        title = soup(html, name).select_one("article h1").get_text()
        assert squeezed(title.removesuffix("#")) in text, name
    assert r"\operatorname" not in text
    assert len(pdf.pages) > len(PAGES)
    with browser.new_page(viewport={"width": A4, "height": 1000}) as paper:
        paper.emulate_media(media="print")
        paper.goto((book_copy / "_build" / "singlehtml" / "intro.html").as_uri())
        assert paper.evaluate("document.documentElement.scrollWidth") <= A4  # no table is cut off


def squeezed(text):
    """Without spaces and ligatures."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text))
