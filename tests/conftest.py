"""What several test files share: the book, built once from a copy, as a reader of the repository would build it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JUPYTER_BOOK = Path(sys.executable).with_name("jupyter-book")
LONGEST = ["pages", "notebooks", "training", "tuning", "smollm2", "adapter", "table", "language_recommender"]
LONGEST += ["benchmarks", "chat", "figures", "sweep", "adapter_as_lora", "keys"]


def pytest_collection_modifyitems(items):
    """Start the longest files first, so that no process is left with one of them at the end."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def build(book, *options):
    """Build a copy of the book with warnings as errors; returns the finished process."""
    command = [JUPYTER_BOOK, "build", book, "-W", "-n", "--keep-going", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="session")
def book_copy(tmp_path_factory):
    """A copy of book/, whose links into the package are files now."""
    folder = tmp_path_factory.mktemp("book") / "book"
    return shutil.copytree(ROOT / "book", folder, ignore=shutil.ignore_patterns("_build"))


@pytest.fixture(scope="session")
def html(book_copy):
    """The folder with the built pages."""
    done = build(book_copy)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return book_copy / "_build" / "html"
