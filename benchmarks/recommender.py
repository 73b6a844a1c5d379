"""SASRec's training by `fit_recommender` against a straightforward loop, over as many epochs, each validated.

    python benchmarks/recommender.py --data-dir FOLDER     # of LastFM; without one it is downloaded

    pieces           `fit_recommender`: every item of a piece of a history is a target of what came before it in the
                     piece, set against --negatives items drawn in each step (0: all), the later ones with more weight
                     (--recency), steps of --batch-size pieces
    windows          a row for each target with the window before it, a DataLoader over Python lists, Adam, the
                     paper's batch of 256 and rate of 1e-3, cross entropy over all items

Both have about as many targets in an epoch (pieces are cut anew each time) and the same model. Validation chose the
pieces' settings, on LastFM. --epochs of each take turns to be timed; then each is trained with each of --seeds, for the
HitRatio that its best epoch reaches: pieces for --long epochs, windows for --windows-long, in about the same time.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from unittest import mock

import measure
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ilora import data
from ilora.draws import hit_ratios
from ilora.recommenders import SASRec
from ilora.study import sweep_results
from ilora.traditional import fit_recommender

GOALS = {"windows": {"at_least": 5}}
SPLITS = {"train": 1, "validation": data.MIN_HISTORY}  # the least history of a target, as `fit_recommender` has it


def by_pieces(source: data.Dataset, epochs: int, device: torch.device, **settings: int | float) -> list[float]:
    """Validation HitRatio@1 after each epoch."""
    with tempfile.TemporaryDirectory() as home, mock.patch.dict("os.environ", ILORA_HOME=home):  # nothing made before
        _, history = fit_recommender(source, epochs=epochs, device=str(device), **settings)
    return history["hit_ratio"].dropna().tolist()


def by_windows(source: data.Dataset, epochs: int, device: torch.device, dropout: float, seed: int = 0) -> list[float]:
    torch.manual_seed(seed)
    model = SASRec(len(source.items), dropout=dropout).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train, validation = (data.sequences(source, split, min_history=least) for split, least in SPLITS.items())
    rows = list(zip(train.history.tolist(), train.target.tolist(), strict=True))
    found = []
    for _ in range(epochs):
        model.train()
        for history, target in DataLoader(rows, batch_size=256, shuffle=True):
            loss = F.cross_entropy(model.score_all(torch.stack(history, 1).to(device)), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(float(hit_ratios(model, validation).mean()))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    sizes = {"negatives": 512, "batch_size": 256}
    parser = measure.parser(__doc__, rounds=3, epochs=4, long=500, windows_long=80, seeds=3, users=2000, **sizes)
    parser.add_argument("--recency", type=float, default=2.0, help="(2)")
    parser.add_argument("--dropout", type=float, default=0.5, help="of both (0.5)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="(5e-3)")
    parser.add_argument("--dataset", default="lastfm", help="(lastfm)")
    parser.add_argument("--data-dir", default="", help="the folder with its files")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, not {options.seeds}: a difference's interval needs as many")
    run, out = measure.start("recommender", options, "data_dir")
    source = data.load(options.dataset, options.data_dir, users=options.users)
    settings = {name: getattr(options, name) for name in (*sizes, "dropout", "recency", "learning_rate")}
    ways = {"pieces": partial(by_pieces, **settings), "windows": partial(by_windows, dropout=options.dropout)}
    epochs = {name: lambda way=way: way(source, options.epochs, run.device) for name, way in ways.items()}
    measured, _ = measure.compare(epochs, options.rounds, run.device, GOALS)
    measured["rows"] = len(data.sequences(source, "train", min_history=SPLITS["train"]))
    long = {"pieces": options.long, "windows": options.windows_long}
    for name, way in ways.items():
        measured[name]["seconds_per_epoch"] = measured[name]["seconds"]["median"] / options.epochs
        measured[name]["hit_ratio"] = [way(source, long[name], run.device, seed=seed) for seed in range(options.seeds)]
    best = {name: np.max(measured[name]["hit_ratio"], axis=1) for name in ways}  # (seeds,)
    measured["agreement"] = {
        f"{name}: largest validation HitRatio@1, mean of {options.seeds} seeds": float(own.mean())
        for name, own in best.items()
    }
    less = {"at_least": 0, **sweep_results.student_interval(best["pieces"] - best["windows"])}
    measured["HitRatio@1 of pieces less that of windows"] = less
    measure.show("SASRec", measured)
    run.save({"SASRec": measured}, path=out)
    print(out)


if __name__ == "__main__":
    main()
