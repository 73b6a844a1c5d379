"""How recommenders without language are trained: rows of training, recipe, L2 by validation."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ilora import artifacts, devices
from ilora.data.dataset import Dataset
from ilora.data.windows import Questions, Sequences, sequences
from ilora.errors import UserError
from ilora.evaluation import evaluate
from ilora.evaluation.metrics import hit_ratios
from ilora.recommenders.base import SequenceModel
from ilora.recommenders.caser import Caser
from ilora.recommenders.gru4rec import GRU4Rec
from ilora.recommenders.morec import MoRec
from ilora.recommenders.popularity import Popularity
from ilora.recommenders.sasrec import SASRec
from ilora.training.loop import TrainingArguments, fit

KINDS = {kind.__name__: kind for kind in (GRU4Rec, Caser, SASRec, MoRec)}
GRID = tuple({"dropout": dropout, "l2": l2} for dropout in (0.2, 0.3, 0.5) for l2 in (0.0, 1e-4))
EPOCHS = {"GRU4Rec": 20, "Caser": 20, "SASRec": 25, "MoRec": 5}  # on real data; MoRec: what a CPU can afford


class Windows:
    """Training rows of a recommender, anew each epoch: windows of histories and the item that came next.

    A row is (window + 1,) item ids. sequences: every window of the users, `data.sequences(min_history=1)`. With
    `every` above 1 an epoch has only each `every`-th of them, beginning at random.
    """

    def __init__(self, sequences: Sequences, every: int = 1, seed: int = 0) -> None:
        self.rows = np.column_stack([sequences.history, sequences.target])
        self.every, self.seed = every, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.first = int(np.random.default_rng([self.seed, epoch]).integers(self.every))

    def __len__(self) -> int:
        return len(self.rows) // self.every

    def __getitem__(self, row: int) -> np.ndarray:
        return self.rows[self.first + row * self.every]


def fit_recommender(
    dataset: Dataset,
    seed: int = 0,
    epochs: int = 20,
    window: int = 10,
    device: str = "auto",
    *,
    kind: str = "SASRec",
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    l2: float = 0.0,
    dropout: float = 0.2,
    text_encoder: str = "",
) -> tuple[SequenceModel, pd.DataFrame]:
    """A recommender trained on the train split, and its history; trained once and kept under home()/recommenders.

    Adam with a constant learning rate; one row for each target. kind: a name in KINDS. batch_size: rows of a step.
    l2: see `Recommender.parameter_groups`. text_encoder: MoRec's, see `MoRec.from_dataset`.
    Validation chooses the epoch: `hit_ratio` is HitRatio@1 over all windows and all draws of candidates.
    """
    if kind not in KINDS:
        raise UserError(f"there is no recommender {kind!r} to train: choose among {', '.join(KINDS)}")
    if (kind == "MoRec") != bool(text_encoder):
        raise UserError(f"{kind} with text_encoder {text_encoder!r}: MoRec needs a text encoder, no other has one")
    constant = {"schedule": "constant", "warmup": 0.0}
    arguments = TrainingArguments(
        epochs, batch_size, learning_rate, l2, **constant, seed=seed, save_every=1000, device=device
    )
    # MoRec has a loss at every state: it reads each title once for all of a row's states.
    rows = Windows(sequences(dataset, "train", window, min_history=1), window if kind == "MoRec" else 1, seed)
    validation = sequences(dataset, "validation", window)
    config = {"window": window, "dropout": dropout}
    settings = {"model": kind, **config, **arguments.identity()}
    inputs = {"data": dataset.key}
    if text_encoder:
        inputs["text_encoder"] = artifacts.model_content(str(text_encoder))

    work = artifacts.home() / "training" / artifacts.key(settings, inputs)

    def make(folder: Path) -> None:
        devices.seed_all(seed)
        if kind == "MoRec":
            model = MoRec.from_dataset(dataset, text_encoder, **config)
        else:
            model = KINDS[kind](len(dataset.items), **config)

        def validate() -> dict[str, float]:
            return {"hit_ratio": hit_ratios(model, validation).mean()}

        with _for_small_models() if kind != "MoRec" else nullcontext():
            history = fit(model, rows, arguments, work, validate, "hit_ratio")
        history.to_csv(folder / "history.csv", index=False)
        model.save_pretrained(folder)

    folder = artifacts.cached("recommenders", settings, inputs, make, note=f"{kind} on {dataset.name}")
    shutil.rmtree(work, ignore_errors=True)
    return KINDS[kind].from_pretrained(folder), pd.read_csv(folder / "history.csv")


def choose_regularisation(
    dataset: Dataset, kind: str, grid: Sequence[Mapping[str, float]] = GRID, seed: int = 0, **settings: int | str
) -> tuple[dict[str, float], pd.DataFrame]:
    """The dropout and L2 of a grid with the highest validation HitRatio@1, the first of equals, and the table of all.

    settings: other arguments of `fit_recommender`, by default EPOCHS. Table: dropout, l2, hit_ratio, epoch.
    """
    settings = {"epochs": EPOCHS[kind]} | settings
    rows = []
    for values in tqdm(grid, desc=f"dropout and L2 of {kind}", delay=1):
        _, history = fit_recommender(dataset, seed, kind=kind, **settings, **values)
        best = history.loc[history["hit_ratio"].idxmax()]
        rows.append(dict(values) | {"hit_ratio": best["hit_ratio"], "epoch": int(best["epoch"])})
    table = pd.DataFrame(rows)
    return dict(grid[table["hit_ratio"].idxmax()]), table


@contextmanager
def _for_small_models() -> Iterator[None]:
    """One CPU thread, because several would wait for each other longer than they work; and subnormal numbers are zero.

    L2 leaves such numbers in those of Caser's filters that never answer; they slow a step down.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def baselines(dataset: Dataset, encoder: SequenceModel, asked: Questions) -> dict[str, pd.DataFrame]:
    """Outcomes of the recommenders without language, on the same questions and candidates."""
    return {
        "popularity": evaluate(Popularity.from_dataset(dataset), asked),
        type(encoder).__name__: evaluate(encoder, asked),
    }
