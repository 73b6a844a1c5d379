"""How recommenders without language are trained: rows of training, recipe, L2 by validation."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ilora import runs
from ilora.data import Dataset, Sequences, sequences
from ilora.draws import hit_ratios
from ilora.morec import MoRec
from ilora.recommenders import Caser, GRU4Rec, SASRec, SequenceModel
from ilora.training import TrainingArguments, fit

KINDS = {kind.__name__: kind for kind in (GRU4Rec, Caser, SASRec, MoRec)}
L2_GRID = (0.0, 1e-6, 1e-5, 1e-4)
TARGETS = 256  # of a step, in Table 1's recipe
EPOCHS = {"GRU4Rec": 40, "Caser": 20, "SASRec": 20, "MoRec": 5}  # the first three rise no more then on MovieLens


class Windows:
    """Training rows of a recommender with one state a window: every window and what came after it.

    A row is (window + 1,) item ids. sequences: every window of the users, `data.sequences(min_history=1)`.
    """

    def __init__(self, sequences: Sequences) -> None:
        self.rows = np.column_stack([sequences.history, sequences.target])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.rows[row]


class Pieces(Windows):
    """Training rows of a recommender with a state after each item: histories cut into pieces, anew each epoch.

    A row is (window + 1,) item ids, `window` items and what came after the last; each item in it is a target
    of what came before it in the row.
    """

    def __init__(self, sequences: Sequences, seed: int) -> None:
        super().__init__(sequences)
        self.seed = seed
        self.window = sequences.history.shape[1]
        _, self.first, count = np.unique(sequences.user, return_index=True, return_counts=True)
        pieces = -(-(count + self.window - 1) // self.window)  # of each user, enough at every offset
        self.user = np.repeat(np.arange(len(count)), pieces)
        back = np.arange(len(self.user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self.last = count[self.user] - 1
        self.end = self.last + self.window - 1 - back * self.window  # latest row of the user's to end at
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shift every cut back by 0 to window - 1 items, at random."""
        shift = np.random.default_rng([self.seed, epoch]).integers(self.window, size=len(self.end))
        self.row = self.first[self.user] + np.clip(self.end - shift, 0, self.last)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, piece: int) -> np.ndarray:
        return self.rows[self.row[piece]]


def fit_recommender(
    dataset: Dataset,
    seed: int = 0,
    epochs: int = 20,
    window: int = 10,
    device: str = "auto",
    *,
    kind: str = "SASRec",
    learning_rate: float = 5e-3,
    batch_size: int = 128,
    l2: float = 0.0,
    dropout: float = 0.2,
    text_encoder: str = "",
    negatives: int = 0,
    recency: float = 0.0,
) -> tuple[SequenceModel, pd.DataFrame]:
    """A recommender trained on the train split, and its history; made once and kept under home()/recommenders.

    kind: a name in KINDS. batch_size: rows of a step, Windows for Caser, else Pieces. l2: see
    `Recommender.parameter_groups`. text_encoder: MoRec's, see `MoRec.from_dataset`. negatives: items, drawn uniformly
    in each step, that the loss sets a target against; 0: all items. recency: how much more a piece's later states,
    which have longer histories, count in the loss: the one after the i-th of n items counts (i / n)**recency.
    Validation chooses the epoch: `hit_ratio` is HitRatio@1 over all windows and all draws of candidates.
    """
    if kind not in KINDS:
        raise runs.UserError(f"there is no recommender {kind!r} to train: choose among {', '.join(KINDS)}")
    if (kind == "MoRec") != bool(text_encoder):
        raise runs.UserError(f"{kind} with text_encoder {text_encoder!r}: MoRec needs a text encoder, no other has one")
    _check_loss(kind, negatives, recency, len(dataset.items))
    arguments = TrainingArguments(epochs, batch_size, learning_rate, l2, seed=seed, save_every=1000, device=device)
    windows = sequences(dataset, "train", window, min_history=1)
    rows = Windows(windows) if kind == "Caser" else Pieces(windows, seed)
    validation = sequences(dataset, "validation", window)
    config = {"window": window, "dropout": dropout}
    loss = {name: value for name, value in (("negatives", negatives), ("recency", recency)) if value}
    settings = {"model": kind, **config, **arguments.identity(), **loss}
    inputs = {"data": dataset.key}
    if text_encoder:
        inputs["text_encoder"] = runs.model_content(str(text_encoder))

    work = runs.home() / "training" / runs.key(settings, inputs)

    def make(folder: Path) -> None:
        runs.seed_all(seed)
        if kind == "MoRec":
            model = MoRec.from_dataset(dataset, text_encoder, **config)
        else:
            model = KINDS[kind](len(dataset.items), **config)
        for name, value in loss.items():
            setattr(model, name, value)

        def validate() -> dict[str, float]:
            return {"hit_ratio": hit_ratios(model, validation).mean()}

        with _for_small_models() if kind != "MoRec" else nullcontext():
            history = fit(model, rows, arguments, work, validate, "hit_ratio")
        history.to_csv(folder / "history.csv", index=False)
        model.save_pretrained(folder)

    folder = runs.cached("recommenders", settings, inputs, make, note=f"{kind} on {dataset.name}")
    shutil.rmtree(work, ignore_errors=True)
    return KINDS[kind].from_pretrained(folder), pd.read_csv(folder / "history.csv")


def _check_loss(kind: str, negatives: int, recency: float, n_items: int) -> None:
    """Raise UserError for what the loss of this kind cannot do."""
    for name, value, most, kinds in (
        ("negatives", negatives, n_items, ("GRU4Rec", "Caser", "SASRec")),
        ("recency", recency, 10, ("GRU4Rec", "SASRec")),
    ):
        if value and kind not in kinds:
            raise runs.UserError(f"{kind} has no {name} to choose: leave {name} at 0, or take {' or '.join(kinds)}")
        if not 0 <= value <= most:
            raise runs.UserError(f"{name} must be 0 to {most}, not {value!r}")


def table_1(kind: str, window: int = 10) -> dict[str, int | float]:
    """Settings of `fit_recommender` for the paper's Table 1: Adam, rate 1e-3, batches of 256, embeddings of 64.

    The batch counts targets, of which a window has one and a piece `window`. MoRec, which encodes the titles of a
    batch, has eight times as many, each title encoded once for all of them. Epochs are what validation needs; MoRec's
    are what a CPU affords.
    """
    targets = 8 * TARGETS if kind == "MoRec" else TARGETS
    batch = targets if kind == "Caser" else round(targets / window)
    return {"kind": kind, "window": window, "learning_rate": 1e-3, "batch_size": batch, "epochs": EPOCHS[kind]}


def choose_l2(
    dataset: Dataset, kind: str, grid: Sequence[float] = L2_GRID, seed: int = 0, **settings: int | float | str
) -> tuple[float, pd.DataFrame]:
    """The L2 regularisation with the highest validation HitRatio@1, the smallest of equals, and the table of them.

    settings: others of `fit_recommender`, by default those of `table_1`. Table: l2, hit_ratio, epoch.
    """
    settings = table_1(kind, settings.get("window", 10)) | settings
    found = []
    for l2 in tqdm(sorted(grid), desc=f"L2 of {kind}", delay=1):
        _, history = fit_recommender(dataset, seed, l2=l2, **settings)
        best = history.loc[history["hit_ratio"].idxmax()]
        found.append({"l2": l2, "hit_ratio": best["hit_ratio"], "epoch": int(best["epoch"])})
    table = pd.DataFrame(found)
    return float(table["l2"][table["hit_ratio"].idxmax()]), table


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
