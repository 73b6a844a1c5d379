"""Measure several ways to do the same thing in one run, and report ratios of their times.

The ways take turns. A round runs each of them once, and each round starts with another way, so that other work
on the machine affects all of them. A ratio compares a way with the first one in the same round. The result is the
median of the rounds, with quartiles. The first call of each way is a warm-up and is not measured.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ilora import artifacts

Ways = Mapping[str, Callable[[], Any]]
Goals = Mapping[str, Mapping[str, float]]  # way -> goal of its ratio, {"at_least": number} or {"at_most": number}
MEANING = {  # of the integer options
    "answer": "tokens of the answer",
    "batch_size": "sequences per optimiser step, or per batch",
    "clients": "users that are served at the same time",
    "events": "events per user",
    "examples": "training sequences",
    "micro_batch_size": "sequences per forward pass in training",
    "more_rows": "rows per batch in the parts with more rows",
    "questions": "test questions",
    "recbole_epochs": "epochs of RecBole's training",
    "rounds": "how often each way is measured",
    "rows": "rows per batch",
    "seeds": "number of trainings, each with another seed",
    "sequences": "sequences whose gradients are computed",
    "tokens": "tokens per row",
    "users": "users of the generated world",
}
RESULTS = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks"


def parser(description: str, **numbers: int) -> argparse.ArgumentParser:
    """The options of all benchmarks, and integer options of MEANING with their defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--out", type=Path, help="the JSON file to write (book/results/benchmarks/NAME_DEVICE.json)")
    for name, default in numbers.items():
        flag, meaning = f"--{name.replace('_', '-')}", f"{MEANING[name]} ({default})"
        parser.add_argument(flag, type=int, default=default, help=meaning)
    return parser


def start(name: str, options: argparse.Namespace, *omitted: str) -> tuple[artifacts.Run, Path]:
    """Start a run whose parameters are all options but the `omitted`; also returns the path of its JSON."""
    parameters = {option: value for option, value in vars(options).items() if option not in ("out", *omitted)}
    run = artifacts.Run(f"benchmark_{name}", parameters)
    return run, options.out or RESULTS / f"{name}_{run.device.type}.json"


def timed(way: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall time in seconds, with the device idle before and after, and the result of the call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = way()
    wait()
    return time.perf_counter() - start, result


def take_turns(ways: Ways, rounds: int, device: torch.device) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each way, one per round, and its result in the last round."""
    names, seconds, results = list(ways), {name: [] for name in ways}, {}
    turns = [(turn, name) for turn in range(-1, rounds) for name in np.roll(names, -turn)]
    for turn, name in tqdm(turns, unit="way", leave=False):
        elapsed, results[name] = timed(ways[name], device)
        if turn >= 0:
            seconds[name].append(elapsed)
    return seconds, results


def spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).round(5).tolist()
    return {"median": median, "low": low, "high": high}


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict]:
    """For each way its seconds, and their ratio to those of the first way."""
    first = next(iter(seconds.values()))
    return {
        name: {"seconds": spread(values), "time_ratio": spread(np.divide(values, first))}
        for name, values in seconds.items()
    }


def compare(
    ways: Ways, rounds: int, device: torch.device, goals: Goals | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `ratios` of ways that take turns, with their goals, and the results of the ways."""
    seconds, results = take_turns(ways, rounds, device)
    measured = ratios(seconds)
    for name in measured.keys() & (goals or {}).keys():
        measured[name] |= goals[name]
    return measured | {"rounds": rounds, "to": next(iter(ways))}, results


def show(part: str, measured: Mapping[str, Any]) -> None:
    """Print one line per way, then the number of rows and the agreement."""
    for name, value in measured.items():
        if isinstance(value, dict) and "time_ratio" in value:
            time, ratio = value["seconds"], value["time_ratio"]
            goal = "".join(f"  goal {kind} {value[kind]}" for kind in ("at_least", "at_most") if kind in value)
            columns = f"{time['median']:9.4f} s  x {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            print(f"{part:14}{name:24}{columns}{goal}", flush=True)
    print(f"{part:14}", {name: value for name, value in measured.items() if name in ("rows", "agreement")}, flush=True)
