"""Checkpoints, from which an interrupted run resumes, and snapshots of a model's trained tensors."""

import io
import logging
import shutil
from hashlib import sha256
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ilora import artifacts
from ilora.errors import UserError

log = logging.getLogger(__name__)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, not copied: trainable parameters and buffers, by name."""
    if hasattr(model, "trainable_state"):
        return model.trainable_state()
    state = model.state_dict(keep_vars=True).items()
    return {name: value for name, value in state if value.requires_grad or not isinstance(value, nn.Parameter)}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


@torch.no_grad()
def restore(tensors: dict[str, Tensor], saved: dict[str, Tensor], path: Path | str = "") -> None:
    """Copy what `path` holds into the tensors.  Raises UserError, before any change, if it is of another model."""
    if {name: value.shape for name, value in tensors.items()} != {name: value.shape for name, value in saved.items()}:
        raise UserError(f"{path} holds other trained tensors than this model: take its own model, or another folder")
    for name, value in tensors.items():
        value.copy_(saved[name])


def load_snapshot(model: nn.Module, path: Path) -> None:
    """Load a snapshot of `fit` into the model.  Raises UserError, before any change, if it is of another model."""
    restore(trained_tensors(model), safetensors.torch.load_file(path), path)


def save_checkpoint(folder: Path, identity: dict, state: dict, history: list[dict], best: tuple | None) -> None:
    """Write step-NUMBER-SHA256.pt; keep only this checkpoint and the one before."""
    content = {"identity": identity, "history": history, "best": best, "model": copied(state["model"])}
    buffer, step = io.BytesIO(), f"step-{len(history):08d}"
    torch.save(content | {name: state[name].state_dict() for name in ("optimizer", "schedule")}, buffer)
    path = folder / f"{step}-{sha256(buffer.getvalue()).hexdigest()}.pt"
    artifacts.write_atomic(path, buffer.getvalue())
    earlier = sorted(file for file in folder.glob("step-*.pt") if file.name < step)
    for old in {*folder.glob("step-*.pt")} - {path, *earlier[-1:]}:  # also damaged ones of later steps
        old.unlink()
    for unfinished in folder.glob(".step-*"):  # what a killed process was writing
        shutil.rmtree(unfinished)


def load_checkpoint(folder: Path, identity: dict, state: dict) -> tuple[list[dict], tuple | None]:
    """Restore `state` from the newest undamaged checkpoint; return its history and best state, or ([], None)."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        content = path.read_bytes()
        if sha256(content).hexdigest() not in path.name:
            log.warning("checkpoint %s is damaged: using the one before it", path)
            continue
        saved = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        if saved["identity"] != identity:
            different = dict(saved["identity"].items() - identity.items())
            raise UserError(f"{path} is from a run with {different}: choose another folder or remove it")
        restore(state["model"], saved["model"], path)
        log.warning("continuing from %s: to train on other rows, choose another folder", path)
        for name in ("optimizer", "schedule"):
            state[name].load_state_dict(saved[name])
        return saved["history"], saved["best"]
    return [], None
