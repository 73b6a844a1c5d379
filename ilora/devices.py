"""Compute devices and their memory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ilora.errors import UserError


def pick_device(device: str = "auto") -> torch.device:
    """The torch device with this name; `auto` is the GPU if there is one, else the CPU.  Raises UserError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in counts or not (device == kind or index.isdecimal()):
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, not {device!r}")
    if int(index or 0) >= counts[kind]:
        raise UserError(f"device {device!r} is not on this machine: choose 'auto' or 'cpu'")
    return torch.device(device)


@contextmanager
def memory_for(rows: int) -> Iterator[None]:
    """Raise UserError where the memory of the device is too small for the model and so many rows at once."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fewer = "a smaller micro_batch_size (0: the largest that fits), " if rows > 1 else ""
        remedy = f"{fewer}gradient_checkpointing=True, quantize='8bit' or '4bit', or a smaller window"
        raise UserError(f"the device's memory cannot hold the model and a batch of {rows}: choose {remedy}") from error


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that torch allocated on the GPU; on a CPU, the most that the process ever used."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows; macOS counts in bytes, Linux in KiB

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
