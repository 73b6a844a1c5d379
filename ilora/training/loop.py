"""Training: one `fit` for recommenders and the language model, on accelerate.

A step cuts a global batch of rows into micro-batches, deals them to the processes, and weights each by its
rows. All that is random in a step follows from (seed, step, micro-batch), not from what ran before. So a
resumed run repeats the uninterrupted one bit for bit on the CPU, and two processes equal one.
"""

import math
import time
from collections.abc import Callable, Sized
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, broadcast_object_list, recursively_apply, send_to_device
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, LRScheduler
from tqdm import tqdm
from transformers import get_scheduler

from ilora import artifacts, devices
from ilora.errors import UserError
from ilora.training.checkpoints import Checkpoints, _copy, _restore, _trainable, _write

KNOWN = {"schedule": ("cosine", "constant"), "precision": ("no", "bf16"), "compile": ("auto", "yes", "no")}


@dataclass(frozen=True)
class TrainingArguments:
    """How to train. A resumed run may change the last four, which change the result by rounding and dropout alone."""

    epochs: int
    batch_size: int  # rows of one optimiser step, over all processes and micro-batches
    learning_rate: float  # at the peak of the schedule
    weight_decay: float = 0.0
    warmup: float = 0.05  # share of all steps in which the learning rate rises linearly
    schedule: str = "cosine"  # or "constant", after the warm-up
    floor: float = 0.01  # learning rate at the start and at the end, as a share of the peak
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    snapshots: int = 0  # states kept on the way, evenly spaced; the last one is that of the last step
    precision: str = "no"  # or "bf16": autocast
    micro_batch_size: int | None = None  # rows at once in one process; None: its whole share
    save_every: int = 200  # steps between checkpoints
    device: str = "auto"  # of a single process; several get theirs from `accelerate launch`
    compile: str = "auto"  # "yes" or "no": a model's `compile_layers`; auto: on a GPU

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "floor", "clip", "save_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"training argument {name} must be above 0, not {getattr(self, name)!r}")
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise UserError(f"training argument {name} must be one of {known}")
        if self.snapshots < 0:
            raise UserError(f"training argument snapshots must be at least 0, not {self.snapshots!r}")

    def identity(self) -> dict:
        """The fields that decide the result: a checkpoint is continued only under the same ones."""
        return asdict(replace(self, micro_batch_size=None, save_every=1, device="", compile="auto"))

    def snapshot_steps(self, total: int) -> set[int]:
        """The steps, of `total`, after which a snapshot is kept; fewer where there are fewer steps."""
        return {math.ceil(total * part / self.snapshots) for part in range(1, self.snapshots + 1)}


def fit(
    model: nn.Module,
    train: Sized,
    arguments: TrainingArguments,
    folder: Path,
    validate: Callable[[], dict[str, float]] | None = None,
    monitor: str = "",
) -> pd.DataFrame:
    """Train `model` in place and return its history, one row per step.

    model: `model.collate([train[i], ...])` makes a batch; `model(batch, progress=, step_seed=)` returns its
        rows' mean loss; `progress` is step / all steps, `step_seed` one for all micro-batches of a step.
        Optional: `parameter_groups(weight_decay)`, each may have "lr_scale"; `length(row)`, sorts a batch,
        so that micro-batches hold rows of like length; `trainable_state()`, the tensors to keep (default:
        parameters that train, and buffers); `compile_layers()`, called before training, see `arguments.compile`.
    train: anything with `len(train)` and `train[i]`; `train.set_epoch(epoch)` is called if there.
    folder: gets checkpoints/step-*.pt, best.safetensors and history.csv, and with `arguments.snapshots` also
        snapshots/step-*.safetensors, see `load_snapshot`. A run found here is continued.
    validate: called after each epoch, in eval mode, without gradients, in every process. The model ends in
        the state with the largest `metrics[monitor]`; without `validate` in the last one.

    History: step and epoch (from 1), loss, learning_rate, gradient_norm, seconds (over all sittings),
    examples (so far), and at an epoch's end the metrics. Raises UserError when loss or gradient is not
    finite, when a checkpoint cannot be written, and for a folder of another run; its checkpoints stay.
    """
    if not len(train):
        raise UserError("there are no rows to train on: take a larger data set or a smaller limit")
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)  # text-only steps skip the projector
    accelerator = Accelerator(device_placement=False, kwargs_handlers=[handler])
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError("training keeps the model whole in each process: launch it without FSDP and DeepSpeed")
    main, several = accelerator.is_main_process, accelerator.num_processes > 1
    inner = model.to(accelerator.device if several else devices.pick_device(arguments.device))
    batches = Batches(train, arguments)
    total = arguments.epochs * batches.per_epoch
    optimizer = torch.optim.AdamW(_groups(inner, arguments), fused=True)
    schedule = _schedule(optimizer, arguments, total)
    model = accelerator.prepare(inner)  # its optimizer would look for packages in every step, and has no other use here
    trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    live = {"model": _trainable(inner), "optimizer": optimizer, "schedule": schedule}
    checkpoints = Checkpoints(folder / "checkpoints", arguments.identity() | {"rows": len(train)})
    history, best = checkpoints.load(live)
    last = history[-1] if history else {"step": 0, "examples": 0, "seconds": 0.0}
    seen, began = last["examples"], time.monotonic() - last["seconds"]
    if arguments.compile == "yes" or (arguments.compile == "auto" and next(inner.parameters()).is_cuda):
        getattr(inner, "compile_layers", lambda: None)()
    inner.eval()  # until a step trains
    bar = tqdm(total=arguments.epochs * len(train), initial=seen, unit="row", mininterval=1, disable=not main)
    unread = []  # a GPU's loss is read in the next step, or before anything is kept: it need not wait for Python
    for step in range(last["step"], total):
        rows, rate = batches.of(step), schedule.get_last_lr()[0]
        content = [train[i] for i in rows]
        if hasattr(inner, "length"):
            content.sort(key=inner.length)
        if not inner.training:  # train() walks over all modules: a good part of a small model's step
            model.train()
        loss = _backward(accelerator, model, content, arguments, step, total)
        norm = accelerator.clip_grad_norm_(trained, arguments.clip)
        done, seen = step + 1, seen + len(rows)
        record = {"step": done, "epoch": step // batches.per_epoch + 1, "loss": loss, "learning_rate": rate}
        history.append(record | {"gradient_norm": norm, "seconds": 0.0, "examples": seen})
        unread.append((history[-1], rows))
        save, snapshot = done == total or done % arguments.save_every == 0, done in arguments.snapshot_steps(total)
        now = save or snapshot or done % batches.per_epoch == 0 or not norm.is_cuda
        while len(unread) > (not now):
            read = _read(*unread.pop(0), began, folder)
            bar.set_postfix(loss=f"{read['loss']:.3f}", rate=f"{read['learning_rate']:.1e}", refresh=False)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update(len(rows))
        if validate and done % batches.per_epoch == 0:
            history[-1] |= _validated(inner, validate, monitor)
            if best is None or history[-1][monitor] > best[0]:
                best = history[-1][monitor], _copy(live["model"])
        if main and snapshot:  # before a checkpoint from which it would be passed over
            _write(folder / "snapshots" / f"step-{done:08d}.safetensors", safetensors.torch.save(_copy(live["model"])))
        if save:
            if main:
                checkpoints.save(done, live, history, best)
            accelerator.wait_for_everyone()
    bar.close()
    if best:
        _restore(live["model"], best[1])
    if main:
        artifacts.write_atomic(folder / "best.safetensors", safetensors.torch.save(_copy(live["model"])))
        artifacts.write_atomic(folder / "history.csv", pd.DataFrame(history).to_csv(index=False))
    inner.eval()
    return pd.DataFrame(history)


def _read(record: dict, rows: np.ndarray, began: float, folder: Path) -> dict:
    """A step's record, with loss and gradient norm copied from the GPU.  Raises UserError if they are not finite."""
    record |= {name: float(record[name]) for name in ("loss", "gradient_norm")} | {"seconds": time.monotonic() - began}
    if not math.isfinite(record["loss"]) or not math.isfinite(record["gradient_norm"]):
        raise UserError(
            f"loss {record['loss']}, gradient norm {record['gradient_norm']} at step {record['step']}, learning rate "
            f"{record['learning_rate']:.3g}: lower it or correct training rows {rows.tolist()}; checkpoints stay in "
            f"{folder}"
        )
    return record


def _backward(accelerator: Accelerator, model: nn.Module, rows: list, arguments: TrainingArguments,
              step: int, total: int) -> Tensor:  # fmt: skip
    """Add the gradient of the mean loss over a global batch; return that loss, the same in every process."""
    world = accelerator.num_processes
    inner = model.module if world > 1 else model
    at_once = world * (arguments.micro_batch_size or arguments.batch_size)
    parts = world * math.ceil(arguments.batch_size / at_once)  # the same number in every process and step
    cuts = np.linspace(0, len(rows), parts + 1).round().astype(int)
    mine = range(accelerator.process_index, parts, world)
    losses = torch.zeros((), device=(device := next(inner.parameters()).device))
    for part in mine:
        own = rows[cuts[part] : cuts[part + 1]]
        share = len(own) / len(rows)
        devices.seed_all(_mix(arguments.seed, step, part))
        # A small last batch can leave a part empty: one row runs with weight 0, to keep processes in step.
        batch = _move(inner.collate(own or rows[:1]), device)
        with accelerator.no_sync(model) if part != mine[-1] else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
                loss = model(batch, progress=step / total, step_seed=_mix(arguments.seed, step))
            accelerator.backward(loss * (share * world))  # DDP divides by `world` again
        losses += loss.detach() * share
    return accelerator.reduce(losses, reduction="sum")


def _move(batch: Any, device: torch.device) -> Any:
    """A batch of tensors on the device; a GPU copies it while the CPU goes on."""
    if device.type == "cuda":
        batch = recursively_apply(Tensor.pin_memory, batch)
    return send_to_device(batch, device, non_blocking=True)


def _mix(*numbers: int) -> int:
    """One 32-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _validated(model: nn.Module, validate: Callable[[], dict[str, float]], monitor: str) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        metrics = {name: float(value) for name, value in validate().items()}
    if not math.isfinite(metrics.get(monitor, math.nan)):
        raise ValueError(f"validation must give a finite {monitor!r} to choose by, it gave {metrics}")
    return broadcast_object_list([metrics])[0]  # one process decides for all


class Batches:
    """Global batches of shuffled row numbers, by (seed, step) alone; an epoch's last one may be smaller."""

    def __init__(self, train: Sized, arguments: TrainingArguments) -> None:
        self.train, self.size, self.seed = train, arguments.batch_size, arguments.seed
        self.per_epoch = math.ceil(len(train) / self.size)
        self.epoch, self.cut = -1, []

    def of(self, step: int) -> np.ndarray:
        """Row numbers of the batch of `step` (from 0), at most (batch_size,)."""
        if step // self.per_epoch != self.epoch:
            self.epoch = step // self.per_epoch
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.train))
            self.cut = np.split(order, range(self.size, len(order), self.size))
            if hasattr(self.train, "set_epoch"):
                self.train.set_epoch(self.epoch)
        return self.cut[step % self.per_epoch]


def _groups(model: nn.Module, arguments: TrainingArguments) -> list[dict]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "weight_decay": arguments.weight_decay}]
    if hasattr(model, "parameter_groups"):
        groups = model.parameter_groups(arguments.weight_decay)
    return [group | {"lr": arguments.learning_rate * group.get("lr_scale", 1.0)} for group in groups]


def _schedule(optimizer: torch.optim.Optimizer, arguments: TrainingArguments, total: int) -> LRScheduler:
    """Linear warm-up from floor * peak; then a cosine to floor * peak, as in LLaRA, or the peak for ever."""
    warm = round(arguments.warmup * total)
    if arguments.schedule == "constant":
        return LinearLR(optimizer, arguments.floor if warm else 1.0, total_iters=max(warm, 1))
    rates = {"min_lr_rate": arguments.floor, "warmup_lr_rate": arguments.floor}
    return get_scheduler("cosine_warmup_with_min_lr", optimizer, warm, total, scheduler_specific_kwargs=rates)
