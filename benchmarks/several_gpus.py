"""Compare training of iLoRA on two GPUs with training on one, and a run that was killed with one that was not.

    python benchmarks/several_gpus.py --base-models FOLDER ... --data-dir FOLDER
    python benchmarks/several_gpus.py --base-models FOLDER --data-dir FOLDER --kill

large.py makes folders with base models. Each training is a process of its own: this script with --to, on one GPU, or
started by `accelerate launch --num_processes 2`. Data, seed, batch and micro-batch are the same, so the losses are, up
to rounding. A ratio of times compares the same steps, from the second half of the training, in which nothing compiles
and nothing is saved.
With --kill, a training on one GPU is killed by SIGKILL after its first checkpoint, and started again.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import measure
import pandas as pd
import psutil
import torch
from accelerate import PartialState

from ilora import data, language
from ilora.language import adapter_config
from ilora.recommenders import SASRec
from ilora.training import fit

ONE, TWO = "one process", "two processes"
PROCESSES = {TWO: 2, ONE: 1}
LOSSES = 10  # the first ones are compared


def train(options: Namespace) -> None:
    """Train on this process's share and write FOLDER/history.csv."""
    state = PartialState(cpu=options.device == "cpu")  # sets the GPU of this process
    source = data.load(options.dataset, options.data_dir)
    torch.manual_seed(0)
    encoder, adapter = SASRec(len(source.items)), adapter_config(experts=4, dropout=0.0)
    model = language.untuned(source, options.base_models[0], encoder, options.device, adapter=adapter)
    arguments = language.tuning_arguments(
        1, options.batch_size, 1e-4, options.device, micro_batch_size=options.micro_batch_size, snapshots=0,
        save_every=options.save_every,
    )  # fmt: skip
    rows = data.questions(source, "train", limit=options.steps * options.batch_size)
    history = fit(model, rows, arguments, options.to)
    if state.is_main_process:
        history.to_csv(options.to / "history.csv", index=False)
    state.wait_for_everyone()
    state.destroy_process_group()


def start(base_model: str, way: str, folder: Path, options: Namespace) -> subprocess.Popen:
    """Start a training, whose output goes to FOLDER/log."""
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--num_machines", "1", "--main_process_port", "0", "--multi_gpu"]
    arguments = [Path(__file__), "--to", folder, "--base-models", base_model]
    for name in ("device", "dataset", "data_dir", "batch_size", "micro_batch_size", "steps", "save_every"):
        arguments += [f"--{name.replace('_', '-')}", getattr(options, name)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log", "a", encoding="utf-8") as log:
        command = [sys.executable, *(launch if PROCESSES[way] > 1 else []), *map(str, arguments)]
        variables = os.environ | ({"ACCELERATE_USE_CPU": "true"} if options.device == "cpu" else {})
        return subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, folder: Path) -> pd.DataFrame:
    """Wait for a training and return its history."""
    if process.wait():
        lines = (folder / "log").read_text(encoding="utf-8").strip().splitlines()
        raise RuntimeError(f"exit status {process.returncode}: {' / '.join(lines[-3:])}")
    return pd.read_csv(folder / "history.csv")


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all that it started."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait()


def history_of(base_model: str, way: str, home: Path, options: Namespace) -> pd.DataFrame:
    """The history of a training, which starts unless the folder has its result."""
    folder = home / Path(base_model).name / str(PROCESSES[way])
    if (folder / "history.csv").is_file():
        return pd.read_csv(folder / "history.csv")
    return finish(start(base_model, way, folder, options), folder)


def compare(base_model: str, home: Path, options: Namespace) -> dict:
    """Seconds of the same steps in both ways, their ratio, and how far the first losses are apart."""
    histories = {way: history_of(base_model, way, home, options) for way in PROCESSES}
    seconds = {way: history["seconds"].diff()[len(history) // 2 :].tolist() for way, history in histories.items()}
    two, one = (history["loss"] for history in histories.values())
    apart = ((two - one).abs() / one)[:LOSSES].max()
    result = measure.ratios(seconds) | {"to": TWO, "rows": options.batch_size}
    result[ONE]["at_least"] = 1.8
    losses = {way: history["loss"][:LOSSES].round(5).tolist() for way, history in histories.items()}
    return result | {"agreement": {"largest difference of losses": apart}, "losses": losses}


def interrupt(base_model: str, home: Path, options: Namespace) -> dict:
    """Kill a training after its first checkpoint, start it again, and compare it with an uninterrupted one."""
    expected, folder = history_of(base_model, ONE, home, options)["loss"], home / "killed"
    process = start(base_model, ONE, folder, options)
    while process.poll() is None and not list(folder.glob("checkpoints/step-*.pt")):
        time.sleep(0.01)
    kill(process)
    if (folder / "history.csv").is_file():
        raise RuntimeError("the training ended before it was killed: give it more --steps")
    checkpoint = max(folder.glob("checkpoints/step-*.pt")).name
    resumed = finish(start(base_model, ONE, folder, options), folder)["loss"]
    apart = ((resumed - expected).abs() / expected).max()
    report = {"resumed_after": int(checkpoint.split("-")[1]), "steps": len(resumed), "last_loss": resumed.iloc[-1]}
    return report | {"agreement": {"largest difference of losses": apart, "equal losses": (resumed == expected).mean()}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__, batch_size=128, micro_batch_size=16)
    parser.add_argument("--base-models", nargs="+", required=True, help="folders of base models")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of a training (20)")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints (100, as in `tune`; with --kill 5)")
    parser.add_argument("--dataset", default="movielens", help="the data set (movielens)")
    parser.add_argument("--data-dir", default="", help="the folder with its files (download)")
    parser.add_argument("--folder", type=Path, help="where trainings are kept and looked for (nowhere)")
    parser.add_argument("--kill", action="store_true", help="kill a training and resume it, instead")
    parser.add_argument("--to", type=Path, help="train here, in this process, into this folder")
    options = parser.parse_args(arguments)
    options.save_every = options.save_every or (5 if options.kill else 100)
    if options.to:
        train(options)
        return
    name, measured = ("killed", interrupt) if options.kill else ("several_gpus", compare)
    run, out = measure.start(name, options, "base_models", "data_dir", "to", "folder", "kill")
    metrics = {}
    with tempfile.TemporaryDirectory() as temporary:
        for base_model in options.base_models:
            part = Path(base_model).name
            try:
                metrics[part] = measured(base_model, options.folder or Path(temporary), options)
            except Exception as error:  # report it and continue with the next part
                metrics[part] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            measure.show(part, metrics[part])
            run.save(metrics, path=out)
    print(out)


if __name__ == "__main__":
    main()
