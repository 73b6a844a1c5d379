"""The paper's Table 1 on data of one's own choice: systems x data sets x seeds, every cell a result of its own.

    python -m ilora table --datasets movielens lastfm --data-dir DIR --seeds 0 1 2 --jobs 2 --to book/results/table

All systems are asked the same questions: each test user's last window, as in the paper, with several draws of the
candidates, and windows of all test users' histories with one draw; ChatRec, whose endpoint may cost, a random part of
these. A cell that has a result is skipped, one that fails is kept as failed with its reason and tried again the next
time. How validation chose the recommenders' L2 is a result beside them. A row is a System in SYSTEMS.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ilora import artifacts, data, evaluation
from ilora.errors import UserError
from ilora.evaluation.metrics import hit_ratios
from ilora.language import tuning
from ilora.recommenders.base import Recommender
from ilora.recommenders.popularity import Popularity
from ilora.recommenders.training import EPOCHS, GRID, choose_regularisation, fit_recommender
from ilora.study import running
from ilora.study.chat import ChatRec
from ilora.study.parameters import inputs, parse_parameters

SETTINGS = {  # the notebooks' parameters that a table has, and their values unless -p says otherwise
    "conflict": 0.5, "users": 2000, "repeats": "keep", "window": 10,
    "base_model": "embedded", "rank": 8, "alpha": 32.0, "dropout": 0.0, "experts": 4,
    "epochs": 1, "learning_rate": 3e-3, "batch_size": 32, "train_limit": 20000, "test_limit": 1000,
    "micro_batch_size": 32, "compile": "auto",
    "text_encoder": "sentence-transformers/all-MiniLM-L6-v2", "chat_url": "", "chat_model": "", "chat_limit": 100,
    "device": "auto",
}  # fmt: skip
WORLD = ("conflict", "users")
ADAPTER = ("base_model", "rank", "alpha", "dropout", "epochs", "learning_rate", "batch_size", "train_limit")
FREE = ("device", "micro_batch_size", "compile")  # what changes a result by rounding alone
KINDS_OF_WINDOWS = ("last", "all")


@dataclass(frozen=True)
class System:
    """A row of the table: `make(dataset, seed, settings)` gives what `evaluation.ask` asks.

    uses: the settings that decide its result, beside those of data and questions.
    seeds: whether it is trained, so that runs with other seeds differ.
    sample: the setting that says how many of the questions, drawn by lot, it is asked; all of them without.
    searched: the recommender in it whose dropout and L2 validation chooses.
    """

    make: Callable[[data.Dataset, int, Mapping[str, Any]], evaluation.System]
    uses: tuple[str, ...] = ()
    seeds: bool = True
    sample: str = ""
    searched: str = ""


def trained(dataset: data.Dataset, kind: str, seed: int, settings: Mapping[str, Any]) -> Recommender:
    """A recommender without language, with dropout and L2 chosen on validation with seed 0."""
    where = {"window": settings["window"], "device": settings["device"]}
    if kind == "MoRec":  # its text encoder is too large to be trained for a grid
        chosen = {"text_encoder": settings["text_encoder"]}
    else:
        chosen = choose_regularisation(dataset, kind, **where)[0]
    return fit_recommender(dataset, seed, kind=kind, epochs=EPOCHS[kind], **where, **chosen)[0]


def _recommender(kind: str) -> System:
    return System(lambda dataset, seed, settings: trained(dataset, kind, seed, settings), searched=kind)


def _tuned(encoder: str = "", experts: bool = False) -> System:
    """A language model with an adapter: on hybrid prompts with the items of an encoder, or on text alone."""

    def make(dataset: data.Dataset, seed: int, settings: Mapping[str, Any]) -> evaluation.System:
        items = trained(dataset, encoder, seed, settings) if encoder else None
        names = ("rank", "alpha", "dropout", *(["experts"] if experts else []))
        adapter = tuning.AdapterSettings(**{name: settings[name] for name in names})
        names = ("epochs", "batch_size", "learning_rate", *FREE)
        arguments = tuning.tuning_arguments(**{name: settings[name] for name in names}, seed=seed)
        limits = {name: settings[name] for name in ("window", "train_limit")}
        model, history, _ = tuning.tune(dataset, items, adapter, arguments, settings["base_model"], **limits)
        model.validation = history["hit_ratio"].dropna().tolist()
        return model

    return System(make, (*ADAPTER, "experts") if experts else ADAPTER, searched=encoder)


def _untuned(dataset: data.Dataset, seed: int, settings: Mapping[str, Any]) -> evaluation.System:
    return tuning.untuned(dataset, settings["base_model"], device=settings["device"])


def _chat(dataset: data.Dataset, seed: int, settings: Mapping[str, Any]) -> evaluation.System:
    if not settings["chat_url"] or not settings["chat_model"]:
        raise UserError("ChatRec asks an endpoint: name it with -p chat_url URL and -p chat_model NAME")
    titles = list(dataset.items["title"])
    return ChatRec(settings["chat_url"], settings["chat_model"], titles, dataset.noun, dataset.verb)


SYSTEMS = {
    "Popularity": System(lambda dataset, seed, settings: Popularity.from_dataset(dataset), seeds=False),
    "GRU4Rec": _recommender("GRU4Rec"),
    "Caser": _recommender("Caser"),
    "SASRec": _recommender("SASRec"),
    "MoRec": System(lambda dataset, seed, settings: trained(dataset, "MoRec", seed, settings), ("text_encoder",)),
    "Language model": System(_untuned, ("base_model",), seeds=False),  # the paper's Llama2
    "ChatRec": System(_chat, ("chat_url", "chat_model", "chat_limit"), seeds=False, sample="chat_limit"),
    "TALLRec": _tuned(),
    "LLaRA (GRU4Rec)": _tuned("GRU4Rec"),
    "LLaRA (Caser)": _tuned("Caser"),
    "LLaRA": _tuned("SASRec"),
    "iLoRA": _tuned("SASRec", experts=True),
}


# ---------------------------------------------------------------- cells
@dataclass(frozen=True)
class Cell:
    """One system on one data set with one seed."""

    system: str
    dataset: str
    seed: int
    draws: int = 5
    data_dir: str = ""
    settings: Mapping[str, Any] = field(default_factory=lambda: SETTINGS)

    @property
    def parameters(self) -> dict[str, Any]:
        """What decides the result beside `inputs`, and no more: a setting of other systems does not run it again."""
        world = WORLD if self.dataset == "world" else ()
        uses = {"window", "test_limit", *world, *SYSTEMS[self.system].uses}.difference(FREE)
        uses |= {"repeats"} if self.settings["repeats"] != "keep" else set()
        own = {"system": self.system, "dataset": self.dataset, "seed": self.seed, "draws": self.draws}
        if SYSTEMS[self.system].sample:  # results without the word are of questions that no other system was asked
            own["sample"] = "of the others' questions"
        return own | {name: self.settings[name] for name in sorted(uses)}

    @property
    def source(self) -> dict[str, Any]:
        """Arguments of `data.load`."""
        world = {"conflict": self.settings["conflict"], "users": self.settings["users"], "seed": self.seed}
        files = {"dataset": self.dataset, "data_dir": self.data_dir, "repeats": self.settings["repeats"]}
        return files | (world if self.dataset == "world" else {})

    @cached_property
    def inputs(self) -> dict[str, str]:
        """The data's key and the content of the models that the system is made from.  Raises UserError."""
        models = {"base_model", "text_encoder"}.intersection(self.parameters)
        return inputs(self.source | {name: self.settings[name] for name in models})

    @property
    def result(self) -> Path:
        return artifacts.result_path("table", self.parameters, self.inputs)

    @property
    def search(self) -> dict[str, Any]:
        """What decides the regularisation of the system's recommender; seed: of the models it is chosen among."""
        own = {"system": SYSTEMS[self.system].searched, "dataset": self.dataset, "window": self.settings["window"]}
        world = {name: self.settings[name] for name in WORLD} | {"world": self.seed}
        return own | {"grid": list(GRID), "seed": 0} | (world if self.dataset == "world" else {})

    @property
    def searched(self) -> Path:
        return artifacts.result_path("regularisation", self.search, {"data": self.inputs["data"]})

    def load(self) -> data.Dataset:
        dataset = data.load(**self.source)
        if dataset.key != self.inputs["data"]:
            raise UserError(f"the files of {self.dataset} changed while the table ran: start it again")
        return dataset

    @property
    def failure(self) -> Path:
        return self.result.with_name(self.result.name.replace("table-", "table-failed-"))

    def __str__(self) -> str:
        return f"{self.system} on {self.dataset}, seed {self.seed}"


def run(cell: Cell) -> Path:
    """Make the cell's system, ask it, and write its result."""
    settings = cell.settings
    timed = artifacts.Run("table", cell.parameters | {name: settings[name] for name in FREE}, cell.inputs)
    dataset = cell.load()
    system = SYSTEMS[cell.system].make(dataset, cell.seed, settings)
    sample, found = settings.get(SYSTEMS[cell.system].sample, 0), {}
    for windows in KINDS_OF_WINDOWS:
        limit, draws = (settings["test_limit"], 1) if windows == "all" else (0, cell.draws)
        asked = data.questions(dataset, "test", settings["window"], limit, windows)
        found[windows] = _answers(system, asked, draws, settings["micro_batch_size"], sample)
    metrics = {windows: {"hit_ratio": _share(own["hit"]), "valid_ratio": _share(own["valid"])}
               for windows, own in found.items()}  # fmt: skip
    metrics["notes"] = list(dataset.notes)
    if hasattr(system, "validation"):
        metrics["validation"] = system.validation  # HitRatio@1 after each epoch
    return timed.save(
        metrics, {f"{windows} {n}": v for windows, own in found.items() for n, v in own.items()}, cell.result
    )


def _answers(
    system: evaluation.System, questions: data.Questions, draws: int, at_once: int, sample: int = 0
) -> dict[str, list]:
    """Right and valid answers as one string of 0 and 1 a draw; windows: how many each user has, in order.

    With `sample` the system is asked that many of the questions, the same of each draw, and `rows` says which;
    the digests and windows are those of all questions.
    """
    rows = np.sort(np.random.default_rng(0).permutation(len(questions))[:sample]) if sample else slice(None)
    found = {"hit": [], "valid": [], "questions": []}
    for draw in range(draws):
        questions.set_epoch(draw)
        outcomes = evaluation.ask(system, questions.take(rows), at_once)
        for name in ("hit", "valid"):
            found[name].append("".join("01"[int(value)] for value in outcomes[name]))
        found["questions"].append(artifacts.digest({"candidates": evaluation.asked(questions).to_numpy().tolist()}))
    found |= {"rows": rows.tolist()} if sample else {}
    return found | {"windows": np.unique(questions.sequences.user, return_counts=True)[1].tolist()}


def _share(rows: Sequence[str]) -> float:
    return "".join(rows).count("1") / sum(map(len, rows))


def search(cell: Cell) -> Path:
    """Write how validation chose dropout and L2 for the recommender of a cell that was run; its models are kept.

    metrics: chosen; grid: for each dropout and L2 the epoch and HitRatio@1 on validation with its interval over users.
    """
    about = cell.search
    timed = artifacts.Run("regularisation", about | {"device": cell.settings["device"]}, {"data": cell.inputs["data"]})
    dataset = cell.load()
    settings = {"kind": about["system"], "window": about["window"], "device": cell.settings["device"]}
    chosen, table = choose_regularisation(dataset, grid=about["grid"], seed=about["seed"], **settings)
    validation = data.sequences(dataset, "validation", about["window"])
    grid = table[["dropout", "l2", "epoch"]].to_dict("records")
    for row, values in zip(grid, about["grid"], strict=True):
        model, _ = fit_recommender(dataset, about["seed"], epochs=EPOCHS[about["system"]], **values, **settings)
        row |= evaluation.interval(hit_ratios(model, validation), validation.user)
    return timed.save({"chosen": chosen, "grid": grid}, path=cell.searched)


# ---------------------------------------------------------------- running them
def cells(
    datasets: Sequence[str], systems: Sequence[str], seeds: Sequence[int], draws: int, data_dir: str, settings: Mapping
) -> list[Cell]:
    """The table's cells, those without language first; a system that is not trained has one.  Raises UserError."""
    for name, known in [(name, SYSTEMS) for name in systems] + [(name, data.WORDS) for name in datasets]:
        if name not in known:
            raise UserError(f"there is no {name!r} here: choose among {', '.join(known)}")
    if draws < 1 or not seeds or min(seeds) < 0:
        raise UserError("--draws must be at least 1 and --seeds whole numbers from 0 on")
    return [
        Cell(system, dataset, seed, draws, data_dir, settings)
        for system in SYSTEMS
        if system in systems
        for dataset in datasets
        for seed in (seeds if SYSTEMS[system].seeds or dataset == "world" else seeds[:1])
    ]


def attempt(cell: Cell) -> str:
    """Run a cell; nothing if it has a result then, else the reason, which is kept beside the results."""
    try:
        run(cell)
    except Exception as error:  # a failed cell is shown as failed, and the others go on
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        artifacts.write_json(cell.failure, {"name": "table", "parameters": cell.parameters, "error": reason})
        return reason
    cell.failure.unlink(missing_ok=True)
    return ""


def run_all(table: Sequence[Cell], jobs: int = 1, minutes: float = 0) -> list[tuple[Cell, str]]:
    """Run the cells that have no result yet, `jobs` at once; those that failed, each with its reason.

    minutes: when to stop, 0 for never; what then runs is stopped, and training goes on from its last checkpoint when
        the table is started again.
    """
    waiting = [cell for cell in table if not cell.result.is_file()]
    failed = []
    with tqdm(total=len(table), initial=len(table) - len(waiting), unit="cell", smoothing=0) as bar:
        for cell, reason in _attempts(waiting, jobs, minutes):
            bar.set_postfix_str(str(cell), refresh=False)
            bar.update()
            if reason:
                failed.append((cell, reason))
                bar.write(f"{cell} failed: {reason}", file=sys.stderr)
    return failed


def _attempts(waiting: Sequence[Cell], jobs: int, minutes: float) -> Iterator[tuple[Cell, str]]:
    if jobs == 1 and not minutes:
        yield from ((cell, attempt(cell)) for cell in waiting)
        return
    deadline = time.monotonic() + 60 * minutes if minutes else math.inf
    left, running = list(reversed(waiting)), {}  # running: connection -> its process and cell
    free = [_start(number) for number in range(min(jobs, len(waiting)))]
    try:
        while left or running:
            while left and free and time.monotonic() < deadline:
                connection, process = free.pop(0)
                running[connection] = process, left.pop()
                connection.send(running[connection][1])
            ready = wait(running, None if math.isinf(deadline) else max(deadline - time.monotonic(), 0))
            if not ready:  # the time is up
                return
            for connection in ready:
                process, cell = running[connection]
                yield cell, connection.recv()
                free.append((connection, running.pop(connection)[0]))
    except EOFError as error:
        raise UserError(
            "a process of the table died, as it does when memory runs out: start again with fewer --jobs; "
            "finished cells are kept"
        ) from error
    finally:
        processes = [process for process, _ in running.values()] + [process for _, process in free]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(30)
            process.kill()


def _start(number: int) -> tuple[Connection, BaseProcess]:
    """A process that attempts the cells sent to it; of several GPUs it sees one."""
    here, there = (context := multiprocessing.get_context("spawn")).Pipe()
    process = context.Process(target=_work, args=(there,))
    before = dict(os.environ)
    os.environ.update(_environment(number))  # which the new process inherits before it imports torch
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    there.close()  # so that the process's end is noticed here
    return here, process


def _environment(number: int) -> dict[str, str]:
    """Variables of the process with a number: no bars, which would write over each other, and a GPU of several."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
    return {"TQDM_DISABLE": "1"} | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if len(gpus) > 1 else {})


def _work(connection: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exit like others, which removes unfinished files
    with suppress(EOFError):  # the table's process has gone
        while True:
            connection.send(attempt(connection.recv()))


def search_all(table: Sequence[Cell]) -> None:
    """Write the searches for L2 of those cells that have results, where they are missing."""
    ran = {cell.searched: cell for cell in table if SYSTEMS[cell.system].searched and cell.result.is_file()}
    for cell in tqdm([cell for path, cell in ran.items() if not path.is_file()], desc="searches for L2", delay=1):
        search(cell)


def publish(table: Sequence[Cell], folder: Path) -> None:
    """Copy the results there are, failures and searches too, to `folder`."""
    paths = {path: None for cell in table for path in (cell.result, cell.failure, cell.searched) if path.is_file()}
    running.publish({path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}, folder, FREE)


@running.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`; return the exit code: 1 if a cell failed or is left."""
    parser = argparse.ArgumentParser(
        "python -m ilora table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--datasets", nargs="+", default=["world"], metavar="NAME", help=f"{', '.join(data.WORDS)} (world)")
    add("--data-dir", default="", metavar="DIR", help="folder with their files, see the README")
    add("--systems", nargs="+", default=[s for s in SYSTEMS if s != "ChatRec"], metavar="NAME",
        help=f"{', '.join(SYSTEMS)} (all but ChatRec, which asks an endpoint chat_limit of the questions)")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of training (0 1 2)")
    add("--draws", type=int, default=5, metavar="N", help="of candidates for the last windows (5)")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="cells at once (1), shared out among the GPUs; set OMP_NUM_THREADS to share the cores",
    )
    add("--minutes", type=float, default=0, metavar="N",
        help="stop after N minutes; started again, the table goes on from the last checkpoints (no limit)")  # fmt: skip
    add("--to", type=Path, metavar="DIR", help="copy the results there, as the book's pages read them")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
        help=f"a parameter of the notebooks: {', '.join(SETTINGS)}")  # fmt: skip
    options = parser.parse_args(arguments)
    given = parse_parameters(options.parameters)
    if unused := sorted(given.keys() - SETTINGS):
        raise UserError(f"a table has no parameter {unused[0]!r}: the ones it has are {', '.join(SETTINGS)}")
    if options.jobs < 1 or not 0 <= options.minutes < math.inf:
        raise UserError(f"--jobs must be at least 1 and --minutes 0 or more: {options.jobs}, {options.minutes}")
    table = cells(options.datasets, options.systems, options.seeds, options.draws, options.data_dir, SETTINGS | given)
    failed = run_all(table, options.jobs, options.minutes)
    missing = [cell for cell in table if not cell.result.is_file()]
    if len(missing) == len(failed):  # else the time is up
        search_all(table)
    if options.to:
        publish(table, options.to)
    print(f"{len(table) - len(missing)} of {len(table)} cells are in {artifacts.home() / 'results'}")
    return 1 if missing else 0
