"""The states of a training run on disk: checkpoints to go on from, snapshots to look at."""

import io
import logging
from hashlib import sha256
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ilora import artifacts
from ilora.errors import UserError

log = logging.getLogger(__name__)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors that training changes, by name."""
    if hasattr(model, "trainable_state"):
        return model.trainable_state()
    state = model.state_dict(keep_vars=True).items()
    return {name: value for name, value in state if value.requires_grad or not isinstance(value, nn.Parameter)}


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def load_snapshot(model: nn.Module, path: Path) -> None:
    """Put what `fit` kept of `model` in a snapshot, or in best.safetensors, back into it.

    Raises UserError for the file of a model with other trained tensors; then nothing has changed.
    """
    live, saved = _trainable(model), safetensors.torch.load_file(path)
    if {name: value.shape for name, value in live.items()} != {name: value.shape for name, value in saved.items()}:
        raise UserError(f"{path} is of a model with other trained tensors: load the model that it was kept of")
    _restore(live, saved)


@torch.no_grad()
def _restore(live: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    for name, value in live.items():
        value.copy_(saved[name])


def _write(path: Path, content: bytes) -> None:
    try:
        artifacts.write_atomic(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}): make room and start again") from error


class Checkpoints:
    """The last two states of a run, files step-NUMBER-SHA256.pt, each there as a whole or not at all."""

    def __init__(self, folder: Path, identity: dict) -> None:
        self.folder, self.identity = folder, identity
        self.good: list[Path] = []  # newest first

    def save(self, step: int, live: dict, history: list[dict], best: tuple | None) -> None:
        """Write the state after `step`; then remove all but the newest two."""
        state = {"identity": self.identity, "history": history, "best": best, "model": _copy(live["model"])}
        buffer = io.BytesIO()
        torch.save(state | {name: live[name].state_dict() for name in ("optimizer", "schedule")}, buffer)
        path = self.folder / f"step-{step:08d}-{sha256(buffer.getvalue()).hexdigest()}.pt"
        _write(path, buffer.getvalue())
        self.good = [path, *self.good][:2]
        for old in self.folder.glob("*step-*.pt*"):  # damaged ones too, and what a killed process began
            if old not in self.good:
                old.unlink()

    def load(self, live: dict) -> tuple[list[dict], tuple | None]:
        """Restore the newest undamaged state into `live`; its history and best, or those of a new run."""
        for path in sorted(self.folder.glob("step-*.pt"), reverse=True):
            content = path.read_bytes()
            if sha256(content).hexdigest() not in path.name:
                log.warning("checkpoint %s is damaged: using the one before it", path)
                continue
            state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            if state["identity"] != self.identity:
                other = dict(state["identity"].items() - self.identity.items())
                raise UserError(f"{path} is of a run with {other}: choose another folder or remove it")
            _restore(live["model"], state["model"])
            live["optimizer"].load_state_dict(state["optimizer"])
            live["schedule"].load_state_dict(state["schedule"])
            self.good = [path]
            return state["history"], state["best"]
        return [], None
