"""One million readers of the generated world, 30 events each, in one process: seconds of each step, and peak memory.

python benchmarks/world.py

generate         the events are drawn
read             they become a data set, which is written and read again
split            every window of every split
candidates       twenty for each of these windows, a million windows at a time, as they depend on their row alone
"""

import tempfile
from collections.abc import Sequence
from functools import partial

import measure
import torch

from ilora import data
from ilora.data import World, make_world
from ilora.data.dataset import assemble, item_table

AT_ONCE = 2**20  # windows
LIMITS = {"seconds": {"at_most": 120}, "peak_gib": {"at_most": 6}}
CPU = torch.device("cpu")


def read(world: World) -> data.Dataset:
    items = item_table(world.items["title"], world.items["text"])
    source = assemble(items, *world.events[["user", "item", "time"]].to_numpy().T, range(len(world.groups)))
    with tempfile.TemporaryDirectory() as folder:
        source.save(folder)
        return data.load_dataset(folder)


def draw_candidates(windows: data.Sequences, n_items: int) -> int:
    """How many were drawn."""
    parts = range(0, len(windows), AT_ONCE)
    return sum(data.candidates(windows.take(slice(at, at + AT_ONCE)), n_items, seed=0).size for at in parts)


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.parser(__doc__, users=1_000_000, events=30).parse_args(arguments)
    options.device = "cpu"  # it has no use for another one
    run, out = measure.start("world", options)
    seconds = {}
    seconds["generate"], world = measure.timed(partial(make_world, options.users, events_per_user=options.events), CPU)
    seconds["read"], source = measure.timed(partial(read, world), CPU)
    del world
    counts = {"events": len(source.events), "windows": 0, "candidates": 0}
    seconds |= {"split": 0.0, "candidates": 0.0}
    for split in data.SPLITS:
        taken, windows = measure.timed(partial(data.sequences, source, split), CPU)
        seconds["split"] += taken
        taken, drawn = measure.timed(partial(draw_candidates, windows, len(source.items)), CPU)
        seconds["candidates"] += taken
        counts["windows"] += len(windows)
        counts["candidates"] += drawn
        del windows
    whole = {"seconds": {"value": sum(seconds.values())}, "peak_gib": {"value": run.peak_memory_mib / 2**10}}
    measured = {name: value | LIMITS[name] for name, value in whole.items()} | {"parts": seconds} | counts
    for name, value in measured.items():
        print(f"{name:14}{value}")
    run.save({"world": measured}, path=out)
    print(out)


if __name__ == "__main__":
    main()
