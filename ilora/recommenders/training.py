"""Training of recommenders on item ids: rows, optimisation, and the choice of dropout and L2 by validation."""

from collections import UserList
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ilora import artifacts
from ilora.data import Dataset, Sequences, sequences
from ilora.errors import UserError
from ilora.evaluation.metrics import hit_ratios
from ilora.recommenders.base import SequenceModel
from ilora.recommenders.morec import MoRec
from ilora.training.loop import TrainingArguments, fit

EPOCHS = {"GRU4Rec": 20, "Caser": 20, "SASRec": 25, "MoRec": 5}  # on real data; MoRec: what a CPU can afford
GRID = tuple({"dropout": dropout, "l2": l2} for dropout in (0.2, 0.3, 0.5) for l2 in (0.0, 1e-4))


class TrainingRows(UserList):
    """Rows of window + 1 item ids, a history and its target; an epoch uses every `step`-th, from a random start."""

    def __init__(self, sequences: Sequences, step: int = 1, seed: int = 0) -> None:
        self.every_row, self.step, self.seed = np.column_stack([sequences.history, sequences.target]), step, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        start = np.random.default_rng([self.seed, epoch]).integers(self.step)
        self.data = self.every_row[start :: self.step][: len(self.every_row) // self.step]


def fit_recommender(
    dataset: Dataset, seed: int = 0, epochs: int = 20, window: int = 10, device: str = "auto", *,
    kind: str = "SASRec", text_encoder: str = "", dropout: float = 0.2, l2: float = 0.0,
    learning_rate: float = 1e-3, batch_size: int = 256,
) -> tuple[SequenceModel, pd.DataFrame]:  # fmt: skip
    """Train a recommender, or load it if trained before, in its best epoch on validation; also returns the history."""
    if kind not in EPOCHS:
        raise UserError(f"there is no recommender {kind!r} to train: choose among {', '.join(EPOCHS)}")
    if (kind == "MoRec") != bool(text_encoder):
        raise UserError(f"{kind} with text_encoder {text_encoder!r}: MoRec needs a text encoder, the others have none")
    constant = {"schedule": "constant", "warmup": 0.0, "save_every": 1000}
    arguments = TrainingArguments(epochs, batch_size, learning_rate, l2, **constant, seed=seed, device=device)
    config = {"window": window, "dropout": dropout}
    settings = {"model": kind, **config, **arguments.identity()}
    inputs = {"data": dataset.content}
    inputs |= {"text_encoder": artifacts.model_content(text_encoder)} if text_encoder else {}

    def train(folder: Path, work: Path) -> None:
        torch.manual_seed(seed)
        morec, n, threads = kind == "MoRec", len(dataset.items), torch.get_num_threads()
        model = MoRec.from_dataset(dataset, text_encoder, **config) if morec else SequenceModel.kinds[kind](n, **config)
        validation = sequences(dataset, "validation", window)
        # MoRec learns from every state of a row: one row covers `window` targets and encodes their titles once.
        rows = TrainingRows(sequences(dataset, "train", window, min_history=1), window if morec else 1, seed)
        # Small models are faster on one thread, and without the subnormal numbers that L2 leaves in Caser's filters.
        torch.set_num_threads(threads if morec else 1)
        torch.set_flush_denormal(not morec)
        try:
            history = fit(model, rows, arguments, work, lambda: hit_ratios(model, validation).mean())
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(threads)
        history.to_csv(folder / "history.csv", index=False)
        model.save_pretrained(folder)

    folder = artifacts.cached("recommenders", settings, inputs, train, note=f"{kind} on {dataset.name}")
    return SequenceModel.from_pretrained(folder), pd.read_csv(folder / "history.csv")


def choose_regularisation(
    dataset: Dataset, kind: str, grid: Sequence[Mapping[str, float]] = GRID, seed: int = 0, **settings: int | str
) -> tuple[dict[str, float], pd.DataFrame]:
    """Choose dropout and L2 by validation HitRatio@1; returns them and a table.  settings: of `fit_recommender`."""
    rows = []
    for values in tqdm(grid, desc=f"dropout and L2 of {kind}", delay=1):
        _, history = fit_recommender(dataset, seed, kind=kind, **{"epochs": EPOCHS[kind], **settings, **values})
        best = history.loc[history["hit_ratio"].idxmax()]
        rows.append({**values, "hit_ratio": best["hit_ratio"], "epoch": int(best["epoch"])})
    table = pd.DataFrame(rows)
    return dict(grid[table["hit_ratio"].idxmax()]), table
