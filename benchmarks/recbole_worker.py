"""Train a recommender of RecBole 1.2.1 on given windows; started by recommender.py.

    PYTHONPATH=FOLDER python benchmarks/recbole_worker.py WINDOWS.npz MODEL EPOCHS SEED OUT.npz

RecBole's model, data loader and training step are unchanged, with default settings and batches of 256. The expected
HitRatio@1 on validation is computed after each epoch; the model of the best epoch scores the test windows.
OUT.npz holds both, and the seconds from the start of training to the end of each epoch.
RecBole predates NumPy 2 and pandas 3 and imports packages that training does not need; this file works around both.
"""

import copy
import importlib
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch

from ilora.evaluation import expected_hit_ratio

REMOVED = {"float": float, "int": int, "bool": bool, "object": object, "str": str, "float_": np.float64,
           "complex_": np.complex128, "unicode_": np.str_, "string_": np.bytes_}  # fmt: skip
for name, type_ in REMOVED.items():
    if name not in np.__dict__:
        setattr(np, name, type_)
aggregate = pd.Series.agg
pd.Series.agg = lambda series, how, *more: series.map(len) if how is len else aggregate(series, how, *more)
for package in ("ray", "thop", "torch.utils.tensorboard", "sklearn", "sklearn.metrics", "tabulate", "texttable"):
    try:
        importlib.import_module(package)
    except ImportError:
        sys.modules[package] = mock.MagicMock()

from recbole.config import Config  # noqa: E402
from recbole.data import create_dataset  # noqa: E402
from recbole.data.interaction import Interaction  # noqa: E402
from recbole.data.utils import get_dataloader  # noqa: E402
from recbole.utils import get_model, get_trainer, init_seed  # noqa: E402


def write_files(folder: Path, windows: dict[str, np.ndarray]) -> None:
    """Write the windows as RecBole's atomic files: user, history without padding, target."""
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    for split in ("train", "validation", "test"):
        lines = [header]
        columns = [windows[f"{split}_{name}"] for name in ("user", "history", "target")]
        for user, history, target in zip(*columns, strict=True):
            items = " ".join(str(item) for item in history if item != windows["n_items"])
            lines.append(f"{user}\t{items}\t{target}\n")
        (folder / f"windows.{split}.inter").write_text("".join(lines))


def main() -> None:
    source, model_name, epochs, seed, out = sys.argv[1:]
    torch.set_num_threads(1)
    windows = dict(np.load(source))
    n_items, padding = int(windows["n_items"]), int(windows["n_items"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "windows").mkdir()
        write_files(Path(folder) / "windows", windows)
        settings = {
            "data_path": folder, "checkpoint_dir": folder, "benchmark_filename": ["train", "validation", "test"],
            "load_col": {"inter": ["user_id", "item_id_list", "item_id"]}, "alias_of_item_id": ["item_id_list"],
            "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "ITEM_LIST_LENGTH_FIELD": "item_length",
            "LIST_SUFFIX": "_list", "MAX_ITEM_LIST_LENGTH": 10, "train_neg_sample_args": None,
            "train_batch_size": 256, "epochs": int(epochs), "seed": int(seed), "use_gpu": torch.cuda.is_available(),
            "show_progress": False, "state": "ERROR",
        }  # fmt: skip
        sys.argv = sys.argv[:1]  # RecBole would parse the arguments
        config = Config(model=model_name, dataset="windows", config_dict=settings)
        logging.disable(logging.WARNING)
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        train, *_ = dataset.build()
        loader = get_dataloader(config, "train")(config, train, None, shuffle=True)
        model = get_model(model_name)(config, train).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], model_name)(config, model)
        torch.autograd.set_detect_anomaly(False)  # switched on by the import of one of RecBole's models

        ids = np.zeros(n_items + 1, dtype=np.int64)  # our item id -> RecBole's; 0 for items in no window
        tokens = dataset.field2token_id["item_id"]
        for item in range(n_items):
            ids[item] = tokens.get(str(item), 0)
        missing = ids[:n_items] == 0

        @torch.no_grad()
        def scores(split: str) -> np.ndarray:
            model.eval()
            parts = []
            for history in np.array_split(windows[f"{split}_history"].astype(np.int64), 20):
                length = (history != padding).sum(1)
                shift = (np.arange(10) + 10 - length[:, None]) % 10  # moves the padding to the right
                history = ids[np.take_along_axis(history, shift, 1)]
                batch = {"item_id_list": torch.tensor(history), "item_length": torch.tensor(length)}
                batch["user_id"] = torch.zeros(len(history), dtype=torch.long)  # the unknown user
                values = model.full_sort_predict(Interaction(batch).to(config["device"])).cpu().numpy()
                values = values[:, ids[:n_items]]
                values[:, missing] = -1e9
                parts.append(values)
            return np.concatenate(parts)

        def hit_ratio(split: str) -> np.ndarray:
            history, target = (windows[f"{split}_{x}"].astype(np.int64) for x in ("history", "target"))
            return expected_hit_ratio(scores(split), history, target)

        validation, seconds, start = [], [], time.perf_counter()
        for epoch in range(int(epochs)):
            trainer._train_epoch(loader, epoch)
            validation.append(hit_ratio("validation").mean())
            seconds.append(time.perf_counter() - start)
            if validation[-1] == max(validation):
                best = copy.deepcopy(model.state_dict())
            print(f"RecBole's {model_name}, epoch {epoch + 1}: {validation[-1]:.4f}, {seconds[-1]:.0f} s", flush=True)
        model.load_state_dict(best)
        np.savez(out, validation=validation, test=hit_ratio("test"), seconds=seconds)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
