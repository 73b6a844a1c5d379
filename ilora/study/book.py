"""The book's pages: executed notebooks and their results, without traces of this machine, and the build."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ilora import artifacts
from ilora.errors import UserError
from ilora.study import notebooks, runner
from ilora.study.notebooks import Job

JUPYTER_BOOK = Path(sys.executable).with_name("jupyter-book")
WIDGET = "application/vnd.jupyter.widget-view+json"


def check_folder(book: Path, given: dict[str, Any], jobs: list[Job]) -> None:
    """Raise UserError if the jobs, run with `given` parameters, cannot become a book in this folder."""
    if not JUPYTER_BOOK.is_file():
        raise UserError("there is no jupyter-book: pip install -e '.[notebooks,book]', or add --no-book")
    if given and book == notebooks.ROOT / "book":
        raise UserError("book/ is for runs with default parameters: name another folder with --book")
    if book.exists() and not (book / "intro.md").is_file() and any(book.iterdir()):
        raise UserError(f"{book} holds other files than a book: name a new or empty folder with --book")
    executed = {job.source.name for job in jobs}
    pages = (path.name for path in notebooks.sources())
    if missing := [page for page in pages if page not in executed and not (book / page).is_file()]:
        raise UserError(f"the book would lack {', '.join(missing)}: leave out --only, or add --no-book")


def make(book: Path, jobs: list[Job]) -> None:
    """Run the notebooks for the book; one that reads the results of all others there runs after they are in place."""
    here = {"results": os.path.relpath(book / "results", notebooks.ROOT)}
    last = [job for job in jobs if job.parameters.get("results") == "book/results"]
    first = [job for job in jobs if job not in last]
    if here["results"] != "book/results":
        last = [replace(job, given=job.given | here, parameters=job.parameters | here) for job in last]
    for part in (first, last):
        notebooks.run_all(part)
        refresh(book, part)


def refresh(book: Path, jobs: list[Job]) -> None:
    """Put the executed notebooks and their results into the book."""
    if elsewhere := book != notebooks.ROOT / "book":
        chapters = [f"{path.stem}.json" for path in notebooks.sources()]
        ignore = shutil.ignore_patterns("_build", "*.ipynb", *chapters)
        shutil.copytree(notebooks.ROOT / "book", book, ignore=ignore, dirs_exist_ok=True)
    for job in jobs:
        executed, source = (path.read_text(encoding="utf-8") for path in (job.executed, job.source))
        executed = executed.replace("](../book/", "](") if elsewhere else executed  # links to pages
        artifacts.write_json(book / job.source.name, normalised(json.loads(executed), json.loads(source)))
        result = book / "results" / f"{job.source.stem}.json"
        result.unlink(missing_ok=True)
        if job.result.is_file():
            artifacts.write_json(result, portable(json.loads(job.result.read_bytes())))


def normalised(executed: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """The executed notebook without timings, folders of this machine, stderr and widgets: the same for equal runs."""
    metadata = {cell["id"]: cell["metadata"] for cell in source["cells"]}
    injected = {"id": "injected-parameters", "metadata": {"tags": ["injected-parameters"]}}  # papermill's cell
    cells = []
    for cell in executed["cells"]:
        cell |= {"metadata": metadata[cell["id"]]} if cell["id"] in metadata else injected
        outputs = cell.get("outputs", [])
        shown = [out for out in outputs if out.get("name") != "stderr" and WIDGET not in out.get("data", {})]
        cells.append(cell | {"outputs": portable(shown)} if cell["cell_type"] == "code" else cell)
    language = {name: value for name, value in executed["metadata"]["language_info"].items() if name != "version"}
    return executed | {"cells": cells, "metadata": source["metadata"] | {"language_info": language}}


def portable(value: Any) -> Any:
    """JSON without this machine's folders (`artifacts`, `.`, `~`; data_dir's last name) and addresses (0x0)."""
    if isinstance(value, dict):
        absolute = {"data_dir"} if os.path.isabs(str(value.get("data_dir"))) else set()
        return {name: Path(item).name if name in absolute else portable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if isinstance(value, str):
        for folder, name in ((artifacts.home(), "artifacts"), (notebooks.ROOT, "."), (Path.home(), "~")):
            if len(folder.parts) > 1:  # a home of `/` is in every path
                value = re.sub(rf"(?<![\w.]){re.escape(str(folder))}(?![\w.-])", name, value)
        return re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x0", value)
    return value


def publish(jobs: Sequence[Job], folder: Path) -> None:
    """Copy a sweep's results to `folder`, without outcomes of users of real data, which may not be redistributed."""

    def public(result: dict[str, Any]) -> dict[str, Any]:
        private = result["parameters"].get("dataset", "world") != "world"
        return portable(result | {"outcomes": {}} if private else result)

    runner.publish({job.result for job in jobs}, folder, change=public)


def build(book: Path) -> None:
    """Build all HTML again, because pages of an earlier build would hide their warnings. Raises UserError."""
    print("building the book", file=sys.stderr)
    command = [JUPYTER_BOOK, "build", book, "--all", "-W", "-n", "--keep-going"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise UserError("the book did not build; its warnings are above")
    print("the book:", book / "_build" / "html" / "index.html")
