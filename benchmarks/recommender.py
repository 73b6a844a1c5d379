"""Compare our recommenders with those of RecBole 1.2.1: HitRatio@1 and training time.

    pip install --no-deps --target FOLDER recbole==1.2.1 colorlog colorama texttable
    python benchmarks/recommender.py --recbole FOLDER --dataset lastfm --data-dir DIR --kind SASRec

`fit_recommender` uses its defaults with --dropout and --l2. RecBole uses its defaults with batches of 256 and
--recbole-epochs. Both train on all windows of the training users, choose the epoch by the expected validation
HitRatio@1, and are evaluated on all test windows. On a CPU they train at the same time, on one core each.
Training time, in seconds, includes validation.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure
import numpy as np

from ilora import data, evaluation
from ilora.evaluation import hit_ratios
from ilora.recommenders import EPOCHS, fit_recommender

WORKER = Path(__file__).with_name("recbole_worker.py")
SHORTEST_HISTORY = {"train": 1, "validation": data.MIN_HISTORY, "test": data.MIN_HISTORY}


def train_ours(source: data.Dataset, test: data.Sequences, **settings: int | float | str) -> dict[str, np.ndarray]:
    """Train and evaluate ours: HitRatio@1 on validation (epochs,) and of each test window (n,), seconds (epochs,)."""
    with tempfile.TemporaryDirectory() as home:  # so that no earlier training is reused
        os.environ["ILORA_HOME"] = home
        model, history = fit_recommender(source, **settings)
    epochs = history.dropna(subset="hit_ratio")
    scores = {"validation": epochs["hit_ratio"].to_numpy(), "test": hit_ratios(model, test)}
    return scores | {"seconds": epochs["seconds"].to_numpy()}


def train_recbole(
    folder: Path, windows: dict[str, np.ndarray], kind: str, epochs: int, seed: int
) -> dict[str, np.ndarray]:
    """Train and evaluate RecBole in a separate process, because it changes NumPy, pandas and torch."""
    with tempfile.TemporaryDirectory() as work:
        source, result = Path(work, "windows.npz"), Path(work, "result.npz")
        np.savez(source, **windows)
        paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
        command = [sys.executable, "-W", "ignore", WORKER, source, kind, epochs, seed, result]
        subprocess.run([str(part) for part in command], check=True, env=os.environ | {"PYTHONPATH": paths})
        return dict(np.load(result))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__, seeds=1, recbole_epochs=20, users=2000)
    parser.add_argument("--recbole", type=Path, required=True, help="the folder with the installed RecBole")
    parser.add_argument("--kind", default="SASRec", choices=("SASRec", "GRU4Rec", "Caser"), help="the model (SASRec)")
    parser.add_argument("--epochs", type=int, help="epochs of our training (EPOCHS in ilora.recommenders)")
    parser.add_argument("--dropout", type=float, default=0.2, help="dropout of our model (0.2)")
    parser.add_argument("--l2", type=float, default=0.0, help="L2 penalty of our training (0)")
    parser.add_argument("--dataset", default="lastfm", help="the data set (lastfm)")
    parser.add_argument("--data-dir", default="", help="the folder with its files")
    options = parser.parse_args(arguments)
    if not (options.recbole / "recbole").is_dir():
        parser.error(f"{options.recbole} has no RecBole: run the first command of this file's docstring")
    options.epochs = options.epochs or EPOCHS[options.kind]
    run, out = measure.start(f"recommender_{options.dataset}_{options.kind}", options, "data_dir", "recbole")
    source = data.load(options.dataset, options.data_dir, users=options.users)
    splits = {split: data.sequences(source, split, min_history=least) for split, least in SHORTEST_HISTORY.items()}
    windows = {f"{split}_{name}": getattr(rows, name) for split, rows in splits.items()
               for name in ("user", "history", "target")}  # fmt: skip
    windows["n_items"] = len(source.items)
    settings = {name: getattr(options, name) for name in ("kind", "epochs", "dropout", "l2")}
    results: dict[str, list] = {"ilora": [], "RecBole": []}
    for seed in range(options.seeds):
        with ThreadPoolExecutor(1) as pool:
            theirs = pool.submit(train_recbole, options.recbole, windows, options.kind, options.recbole_epochs, seed)
            results["ilora"].append(train_ours(source, splits["test"], seed=seed, device=str(run.device), **settings))
        results["RecBole"].append(theirs.result())
    users, metrics = splits["test"].user, {}
    mean = {name: np.mean([result["test"] for result in runs], axis=0) for name, runs in results.items()}  # (n,)
    for name, runs in results.items():
        metrics[name] = {
            "test": evaluation.interval(mean[name], users),
            "validation": [result["validation"].tolist() for result in runs],
            "seconds": [float(result["seconds"][-1]) for result in runs],
        }
        print(name, {key: metrics[name][key] for key in ("test", "seconds")}, flush=True)
    metrics["difference"] = {"at_least": 0, **evaluation.interval(mean["ilora"] - mean["RecBole"], users)}
    print("ilora minus RecBole, paired by user:", metrics["difference"])
    run.save({options.kind: metrics}, path=out)
    print(out)


if __name__ == "__main__":
    main()
