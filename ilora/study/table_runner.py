"""The paper's Table 1 on data of your choice: systems x data sets x seeds, one result per cell.

    python -m ilora table --datasets movielens lastfm --data-dir DIR --seeds 0 1 2 --jobs 2 --to book/results/table

All systems have the same questions: each test user's last window, as in the paper, with several draws of candidates,
and windows of all test users' histories with one draw, which trained systems also get in random order; ChatRec, which
sends them to an endpoint, has a random sample.
A cell with a result is not run again; a failed one is recorded with its reason and tried again the next time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ilora import artifacts, data, evaluation
from ilora.errors import UserError
from ilora.evaluation.metrics import hit_ratios
from ilora.recommenders.training import EPOCHS, GRID, choose_regularisation, fit_recommender
from ilora.study import runner
from ilora.study.parameters import inputs, stored
from ilora.study.systems import ROUNDING_ONLY, SETTINGS, SYSTEMS


@dataclass(frozen=True)
class Cell:
    """One system on one data set with one seed."""

    system: str
    dataset: str
    seed: int
    draws: int = 5
    data_dir: str = ""
    settings: Mapping[str, Any] = field(default_factory=SETTINGS.copy)

    @property
    def world(self) -> dict[str, Any]:
        """The settings of a generated data set; none for one from files."""
        return {name: self.settings[name] for name in ("conflict", "users") if self.dataset == "world"}

    @property
    def parameters(self) -> dict[str, Any]:
        """What decides the result besides `inputs`, and no more: other systems' settings do not make it run again."""
        uses = {"window", "test_limit", *SYSTEMS[self.system].uses}
        uses |= {"repeats"} if self.settings["repeats"] != "keep" else set()
        cell = {"system": self.system, "dataset": self.dataset, "seed": self.seed, "draws": self.draws} | self.world
        cell |= {"sample": "of the others' questions"} if SYSTEMS[self.system].sample else {}
        return stored(cell | {name: self.settings[name] for name in sorted(uses)})

    @property
    def source(self) -> dict[str, Any]:
        """Arguments of `data.load`."""
        files = {"dataset": self.dataset, "data_dir": self.data_dir, "repeats": self.settings["repeats"]}
        return files | (self.world | {"seed": self.seed} if self.world else {})

    @cached_property
    def inputs(self) -> dict[str, str]:
        """The data's key and the content of the system's models. Raises UserError."""
        models = {"base_model", "text_encoder"}.intersection(self.parameters)
        return inputs(self.source | {name: self.settings[name] for name in models})

    @property
    def result(self) -> Path:
        return artifacts.result_path("table", self.parameters, self.inputs)

    @property
    def failure(self) -> Path:
        """Where the reason is written if the cell fails."""
        return self.result.with_name(self.result.name.replace("table-", "table-failed-"))

    @property
    def search_parameters(self) -> dict[str, Any]:
        """What decides the dropout and L2 of the system's recommender; seed: that of the search."""
        search = {"system": SYSTEMS[self.system].recommender, "dataset": self.dataset, "grid": list(GRID), "seed": 0}
        return search | {"window": self.settings["window"]} | (self.world | {"world": self.seed} if self.world else {})

    @property
    def search_result(self) -> Path:
        return artifacts.result_path("regularisation", self.search_parameters, {"data": self.inputs["data"]})

    def load(self) -> data.Dataset:
        dataset = data.load(**self.source)
        if dataset.key != self.inputs["data"]:
            raise UserError(f"the files of {self.dataset} changed while the table ran: start it again")
        return dataset

    def run(self) -> None:
        """Make the system, evaluate it, and write its result."""
        about = self.parameters | {name: self.settings[name] for name in ROUNDING_ONLY}
        timed = artifacts.Run("table", about, self.inputs)
        dataset = self.load()
        system = SYSTEMS[self.system].make(dataset, self.seed, self.settings)
        sample = self.settings.get(SYSTEMS[self.system].sample, 0)
        metrics, outcomes = {"notes": list(dataset.notes)}, {}
        for windows in ("last", "all", *["shuffled"] * SYSTEMS[self.system].seeds):  # the last of trained systems
            last, shuffled = windows == "last", windows == "shuffled"
            limit, draws = (0, self.draws) if last else (self.settings["test_limit"], 1)
            questions = data.questions(dataset, "test", self.settings["window"], limit, "last" if last else "all")
            columns = outcome_strings(system, questions, draws, self.settings["micro_batch_size"], sample, shuffled)
            digits = {name: "".join(columns[name]) for name in ("hit", "valid")}
            metrics[windows] = {f"{name}_ratio": text.count("1") / len(text) for name, text in digits.items()}
            outcomes |= {f"{windows} {name}": column for name, column in columns.items()}
        if hasattr(system, "validation"):
            metrics["validation"] = system.validation  # HitRatio@1 after each epoch
        timed.save(metrics, outcomes, self.result)

    def __str__(self) -> str:
        return f"{self.system} on {self.dataset}, seed {self.seed}"


def outcome_strings(
    system: evaluation.System, questions: data.Questions, draws: int, batch_size: int, sample: int = 0,
    shuffled: bool = False,
) -> dict[str, list]:  # fmt: skip
    """Outcomes of a system: for each draw of the candidates strings of 0 and 1 (hit, valid) and a digest (questions).

    windows: number of each user's questions. With `sample` the system is evaluated on that many of them, `rows`.
    """
    rows = np.sort(np.random.default_rng(0).permutation(len(questions))[:sample]) if sample else slice(None)
    columns = {"hit": [], "valid": [], "questions": []}
    for draw in range(draws):
        questions.set_epoch(draw)
        part = questions.take(rows)
        if shuffled:
            part.sequences = replace(part.sequences, history=shuffled_histories(part))
        outcomes = evaluation.evaluate(system, part, batch_size)
        for name in ("hit", "valid"):
            columns[name].append("".join("01"[int(value)] for value in outcomes[name]))
        ids = evaluation.question_ids(questions).to_numpy().tolist()
        columns["questions"].append(artifacts.digest({"candidates": ids}))
    columns |= {"rows": rows.tolist()} if sample else {}
    return columns | {"windows": np.unique(questions.sequences.user, return_counts=True)[1].tolist()}


def shuffled_histories(questions: data.Questions) -> np.ndarray:
    """(n, window) each question's history in a random order, with its padding still on the left."""
    history = questions.sequences.history
    place = np.random.default_rng(0).random(history.shape) + (history < questions.n_items)
    return np.take_along_axis(history, place.argsort(1), 1)


def cells(datasets: list, systems: list, seeds: list, draws: int, data_dir: str, settings: Mapping) -> list[Cell]:
    """The table's cells, each once, without language first; an untrained system has one seed. Raises UserError."""
    for names, known in ((systems, SYSTEMS), (datasets, data.WORDS)):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"there is no {unknown[0]!r} here: choose among {'; '.join(known)}")
    if draws < 1 or not seeds or min(seeds) < 0:
        raise UserError("--draws must be at least 1 and --seeds whole numbers from 0 on")
    return [
        Cell(system, dataset, seed, draws, data_dir, settings)
        for system in SYSTEMS
        if system in systems
        for dataset in dict.fromkeys(datasets)
        for seed in dict.fromkeys(seeds if SYSTEMS[system].seeds or dataset == "world" else seeds[:1])
    ]


def run_all(cells: Sequence[Cell], jobs: int = 1, minutes: float = 0) -> list[tuple[Cell, str]]:
    """Run the cells and record failures next to the results; returns the failed cells with their reasons."""
    failed = []
    for cell, reason in runner.run_cells(cells, jobs, minutes):
        cell.failure.unlink(missing_ok=True)
        if reason:
            artifacts.write_json(cell.failure, {"name": "table", "parameters": cell.parameters, "error": reason})
            failed.append((cell, reason))
    return failed


def search(cell: Cell) -> None:
    """Write how HitRatio@1 on validation chose dropout and L2 for the recommender of a finished cell."""
    if not SYSTEMS[cell.system].recommender or cell.search_result.is_file():
        return
    about, device = cell.search_parameters, cell.settings["device"]
    timed = artifacts.Run("regularisation", about | {"device": device}, {"data": cell.inputs["data"]})
    dataset = cell.load()
    settings = {"kind": about["system"], "window": about["window"], "device": device}
    chosen, trials = choose_regularisation(dataset, **settings)
    validation = data.sequences(dataset, "validation", about["window"])
    grid = trials[["dropout", "l2", "epoch"]].to_dict("records")
    for row, values in zip(grid, GRID, strict=True):
        model, _ = fit_recommender(dataset, epochs=EPOCHS[about["system"]], **values, **settings)
        row |= evaluation.interval(hit_ratios(model, validation), validation.user)
    timed.save({"chosen": chosen, "grid": grid}, path=cell.search_result)


def publish(cells: Sequence[Cell], folder: Path) -> None:
    """Copy the existing results, failures and searches to `folder`."""
    paths = {path for cell in cells for path in (cell.result, cell.failure, cell.search_result)}
    runner.publish(paths, folder, ROUNDING_ONLY)
