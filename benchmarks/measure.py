"""How every benchmark measures: ways to do one thing take turns in one run, and what is given are ratios.

A round runs every way once, each round begun by another one, so that what else the machine does meets all of them.
A ratio is taken within a round, to the first way. Of rounds the median is given, with the quartiles as its spread.
Nothing is measured in the warm-up, one call of each way.
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
Goals = Mapping[str, Mapping[str, float]]  # way -> its ratio's goal, {"at_least": number} or {"at_most": number}
RESULTS = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks"


def parser(description: str, **numbers: int) -> argparse.ArgumentParser:
    """What all benchmarks can be told, and further numbers with their defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, help="the JSON to write (book/results/benchmarks/NAME_DEVICE.json)")
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"({default})")
    return parser


def start(name: str, options: argparse.Namespace, *unnamed: str) -> tuple[artifacts.Run, Path]:
    """The run, with all options but the `unnamed` as its parameters, and where its JSON goes."""
    given = {option: value for option, value in vars(options).items() if option not in ("out", *unnamed)}
    run = artifacts.Run(f"benchmark_{name}", given)
    return run, options.out or RESULTS / f"{name}_{run.device.type}.json"


def timed(way: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds by the clock, with the device idle at both ends, and what the way returned."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    result = way()
    wait()
    return time.perf_counter() - began, result


def take_turns(ways: Ways, rounds: int, device: torch.device) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each way, one a round, and what it returned in its last one."""
    names, seconds, results = list(ways), {name: [] for name in ways}, {}
    turns = [(turn, name) for turn in range(-1, rounds) for name in np.roll(names, -turn)]
    for turn, name in tqdm(turns, unit="way", leave=False):
        taken, results[name] = timed(ways[name], device)
        if turn >= 0:
            seconds[name].append(taken)
    return seconds, results


def spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).round(5).tolist()
    return {"median": median, "low": low, "high": high}


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict]:
    """For each way its seconds, and how many times those of the first way they are."""
    first = next(iter(seconds.values()))
    return {
        name: {"seconds": spread(values), "time_ratio": spread(np.divide(values, first))}
        for name, values in seconds.items()
    }


def compare(
    ways: Ways, rounds: int, device: torch.device, goals: Goals | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`ratios` of ways that take turns, each with its goal if it has one, and what each way returned."""
    seconds, results = take_turns(ways, rounds, device)
    found = ratios(seconds)
    for name in found.keys() & (goals or {}).keys():
        found[name] |= goals[name]
    return found | {"rounds": rounds, "to": next(iter(ways))}, results


def show(part: str, found: Mapping[str, Any]) -> None:
    """A line a way, and what else was found."""
    for name, value in found.items():
        if isinstance(value, dict) and "time_ratio" in value:
            time, ratio = value["seconds"], value["time_ratio"]
            goal = "".join(f"  goal {kind} {value[kind]}" for kind in ("at_least", "at_most") if kind in value)
            columns = f"{time['median']:9.4f} s  x {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            print(f"{part:14}{name:24}{columns}{goal}", flush=True)
    print(f"{part:14}", {name: value for name, value in found.items() if name in ("rows", "agreement")}, flush=True)
