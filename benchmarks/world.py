"""Measure time and peak memory for one million users of the generated world, with 30 events each.

    python benchmarks/world.py

The steps are timed in this order:

    generate         sample the events
    read             make a data set of them, save it and load it
    split            cut the windows of all splits
    candidates       sample 20 candidates for each window, a million windows at a time
"""

import tempfile
from collections.abc import Sequence
from functools import partial

import measure
import torch

from ilora import data, devices
from ilora.data import World, make_world
from ilora.data.dataset import assemble, item_table

WINDOWS_AT_ONCE = 2**20
LIMITS = {"seconds": {"at_most": 120}, "peak_gib": {"at_most": 6}}
CPU = torch.device("cpu")


def read(world: World) -> data.Dataset:
    items = item_table(world.items["title"], world.items["text"])
    source = assemble(items, *world.events[["user", "item", "time"]].to_numpy().T, range(len(world.groups)))
    with tempfile.TemporaryDirectory() as folder:
        source.save(folder)
        return data.load_dataset(folder)


def sample_candidates(windows: data.Sequences, n_items: int) -> int:
    """Sample candidates for all windows; returns their number."""
    parts = (windows.take(slice(at, at + WINDOWS_AT_ONCE)) for at in range(0, len(windows), WINDOWS_AT_ONCE))
    return sum(data.candidates(part, n_items, seed=0).size for part in parts)


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.parser(__doc__, users=1_000_000, events=30).parse_args(arguments)
    options.device = "cpu"  # nothing runs on a GPU
    run, out = measure.start("world", options)
    seconds = {}
    seconds["generate"], world = measure.timed(partial(make_world, options.users, events_per_user=options.events), CPU)
    seconds["read"], source = measure.timed(partial(read, world), CPU)
    del world
    counts = {"events": len(source.events), "windows": 0, "candidates": 0}
    seconds |= {"split": 0.0, "candidates": 0.0}
    for split in data.SPLITS:
        elapsed, windows = measure.timed(partial(data.sequences, source, split), CPU)
        seconds["split"] += elapsed
        elapsed, count = measure.timed(partial(sample_candidates, windows, len(source.items)), CPU)
        seconds["candidates"] += elapsed
        counts["windows"] += len(windows)
        counts["candidates"] += count
        del windows
    whole = {
        "seconds": {"value": sum(seconds.values())},
        "peak_gib": {"value": devices.peak_memory_mib(run.device) / 2**10},
    }
    measured = {name: value | LIMITS[name] for name, value in whole.items()} | {"parts": seconds} | counts
    for name, value in measured.items():
        print(f"{name:14}{value}")
    run.save({"world": measured}, path=out)
    print(out)


if __name__ == "__main__":
    main()
