"""Training: one `fit` for recommenders and language models, built on accelerate.

All randomness of a step is derived from (seed, step, micro-batch), so a resumed run repeats an uninterrupted one.
"""

import heapq
import math
import time
from collections.abc import Callable, Sized
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from accelerate import Accelerator, utils
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm
from transformers import get_scheduler

from ilora import artifacts, devices
from ilora.errors import UserError
from ilora.training.checkpoints import copied, load_checkpoint, restore, save_checkpoint, trained_tensors

POSITIVE = ("epochs", "batch_size", "learning_rate", "floor", "clip", "save_every")
CHOICES = {"schedule": ("cosine", "constant"), "precision": ("no", "bf16"), "compile": ("auto", "yes", "no")}


@dataclass(frozen=True)
class TrainingArguments:
    """Settings of `fit`.  A resumed run may change the last five: they affect only rounding and dropout masks."""

    epochs: int
    batch_size: int  # rows of one optimizer step, over all processes and micro-batches
    learning_rate: float  # at the peak of the schedule
    weight_decay: float = 0.0
    warmup: float = 0.05  # share of all steps in which the learning rate rises linearly
    schedule: str = "cosine"  # or "constant", after the warm-up
    floor: float = 0.01  # learning rate at the start and at the end, as a share of the peak
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    snapshots: int = 0  # number of evenly spaced snapshots; the last one is taken after the last step
    precision: str = "no"  # or "bf16": autocast
    micro_batch_size: int | None = None  # rows at once in one process; None: its share of the batch; 0: what fits
    save_every: int = 200  # steps between checkpoints
    device: str = "auto"  # of a single process; `accelerate launch` sets those of several
    compile: str = "auto"  # "yes" or "no": call the model's `compile_layers`; auto: only on a GPU
    gradient_checkpointing: bool = False  # call the model's `checkpoint_layers`: less memory, more time

    def __post_init__(self) -> None:
        for name, kind in ((each.name, each.type) for each in fields(self) if each.type not in (str, bool)):
            value, least = getattr(self, name), "above" if name in POSITIVE else "of at least"
            kinds, must = (int | float, "a number") if kind is float else (kind, "a whole number")
            value = value.item() if isinstance(value, np.generic) else value  # no checkpoint with such would load
            if not isinstance(value, kinds) or not 0 <= (value or 0) < math.inf or (name in POSITIVE and not value):
                raise UserError(f"training argument {name} must be {must} {least} 0, not {value!r}")
            object.__setattr__(self, name, value)
        if wrong := [name for name, choices in CHOICES.items() if getattr(self, name) not in choices]:
            raise UserError(f"training argument {wrong[0]} must be one of {CHOICES[wrong[0]]}")

    def identity(self) -> dict:
        """The fields that decide the result; a checkpoint is resumed only if they are the same."""
        settings = asdict(replace(self, micro_batch_size=None, save_every=1, device="", compile="auto"))
        return {name: value for name, value in settings.items() if name != "gradient_checkpointing"}


def fit(
    model: nn.Module, train: Sized, arguments: TrainingArguments, folder: str | Path, validate: Callable | None = None,
    try_validation: Callable = lambda: None,
) -> pd.DataFrame:  # fmt: skip
    """Train `model` in place and return its history, one row per step.  Raises UserError.

    model: `collate([train[i], ...])` makes a batch; `model(batch, progress=, step_seed=)` returns its mean loss, where
        `progress` is step / all steps and `step_seed` is the same for all micro-batches of a step. Optional:
        `parameter_groups(weight_decay)` for AdamW, where a group may have "lr_scale"; `length(row)`, by which a batch
        is sorted before it is split; `trainable_state()`, see `trained_tensors`; `compile_layers()`,
        `checkpoint_layers()`, `forget_passes()`. Its `batch_size` becomes the number of rows of one forward pass.
    train: has `len(train)`, `train[i]` and optionally `set_epoch(epoch)`.
    folder: receives checkpoints/, from which an interrupted run resumes, and snapshots/, see `load_snapshot`.
    validate: returns HitRatio@1 after each epoch, in eval mode and in every process; the best epoch's state is kept.
    try_validation: called before the first step on a GPU, or to find what fits, with a trial step that changes nothing.
    """
    run = _Run(model, train, arguments, folder)
    run.prepare(try_validation)
    for epoch in range(len(run.history) // run.steps_per_epoch, arguments.epochs):
        getattr(train, "set_epoch", lambda epoch: None)(epoch)
        order = np.random.default_rng([arguments.seed, epoch]).permutation(len(train))
        batches = np.split(order, range(arguments.batch_size, len(train), arguments.batch_size))
        for row_numbers in batches[len(run.history) % run.steps_per_epoch :]:  # all, unless resumed within an epoch
            with devices.memory_for(model.batch_size):
                run.train_step(epoch, row_numbers)
            if validate and len(run.history) % run.steps_per_epoch == 0:
                run.validate(validate)
            run.save()
    run.bar.close()
    if run.best:
        restore(run.state["model"], run.best[1])
    getattr(model, "forget_passes", lambda: None)()  # which belong to this training
    model.eval()
    return pd.DataFrame(run.history)


class _Run:
    """A run in progress: model, optimizer and schedule, history (a row per finished step), and the best state."""

    def __init__(self, model: nn.Module, train: Sized, arguments: TrainingArguments, folder: str | Path) -> None:
        if not len(train):
            raise UserError("there are no rows to train on: take a larger data set or a smaller limit")
        self.accelerator = Accelerator(device_placement=False)
        if self.accelerator.distributed_type in (utils.DistributedType.FSDP, utils.DistributedType.DEEPSPEED):
            raise UserError("each training process needs the whole model: launch it without FSDP and DeepSpeed")
        self.train, self.arguments, self.folder = train, arguments, Path(folder)
        self.main, several = self.accelerator.is_main_process, self.accelerator.num_processes > 1
        self.model = model.to(self.accelerator.device if several else devices.pick_device(arguments.device))
        self.steps_per_epoch = math.ceil(len(train) / arguments.batch_size)
        self.total_steps = arguments.epochs * self.steps_per_epoch
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer, self.schedule = _optimizer(self.model, arguments, self.total_steps)
        self.state = {"model": trained_tensors(self.model), "optimizer": self.optimizer, "schedule": self.schedule}
        self.identity = arguments.identity() | {"rows": len(train)}
        self.history, self.best = load_checkpoint(self.folder / "checkpoints", self.identity, self.state)
        utils.broadcast([value.detach() for value in self.state["model"].values()])  # all processes start from the same
        self.started = time.monotonic() - (self.history[-1]["seconds"] if self.history else 0.0)
        self.unread = []  # records whose loss may still be on the GPU, with row numbers, values and an event
        self.bar = tqdm(total=self.total_steps, initial=len(self.history), unit="step", disable=not self.main)
        self.device = next(self.model.parameters()).device
        self.share = math.ceil(arguments.batch_size / self.accelerator.num_processes)  # rows of a step in one process
        self.model.eval()  # until a step trains

    def prepare(self, try_validation: Callable) -> None:
        """Set the model's `batch_size` and compile; on a GPU, or to find what fits, try a step before the first."""
        chosen, size = self.arguments.micro_batch_size == 0, self.arguments.micro_batch_size or self.share
        tried = (chosen or self.device.type != "cpu") and len(self.history) < self.total_steps
        if self.arguments.gradient_checkpointing:
            getattr(self.model, "checkpoint_layers", lambda: None)()
        rows = (self.train[i] for i in range(len(self.train))) if tried else ()
        longest = heapq.nlargest(self.share + 1, rows, getattr(self.model, "length", lambda row: 0))
        while chosen and tried and size > 1 and not self._fits(longest[: size + 1]):  # one more leaves some room
            size = math.ceil(size / 2)
        if self.arguments.compile == "yes" or (self.arguments.compile == "auto" and self.device.type == "cuda"):
            getattr(self.model, "compile_layers", lambda: None)()
        while tried and not self._fits(longest[:size], try_validation):
            with devices.memory_for(size):
                if size == 1 or not chosen:
                    raise torch.OutOfMemoryError
            size = math.ceil(size / 2)
        self.model.batch_size = min(utils.gather_object([size]))
        self.bar.set_description(f"{self.model.batch_size} rows at once" if chosen else None, refresh=False)

    def _fits(self, rows: list, try_validation: Callable = lambda: None) -> bool:
        """Whether memory suffices for gradients of these rows, AdamW's moments and validation; nothing is changed."""
        utils.memory.clear_device_cache(garbage_collection=True)
        before, self.model.batch_size = copied(self.state["model"]), len(rows)
        self.model.train()
        try:
            _room = [torch.empty_like(value) for value in 3 * self.trained]
            self._loss(rows, progress=1.0, step_seed=0).backward()
            self.model.eval()
            torch.no_grad()(try_validation)()
            return True
        except (torch.OutOfMemoryError, UserError) as error:
            if torch.OutOfMemoryError not in (type(error), type(error.__cause__)):
                raise
            return False
        finally:
            self.optimizer.zero_grad()
            restore(self.state["model"], before)
            self.model.eval()

    def train_step(self, epoch: int, row_numbers: np.ndarray) -> None:
        rows = sorted((self.train[i] for i in row_numbers), key=getattr(self.model, "length", lambda row: 0))
        if not self.model.training:  # train() visits every module: a good part of a small model's step
            self.model.train()
        loss, chosen = None, self.arguments.micro_batch_size == 0
        while loss is None:
            try:
                loss = self._backward(rows)
            except torch.OutOfMemoryError:  # there is less room than at the trial
                if not chosen or self.model.batch_size == 1 or self.accelerator.num_processes > 1:
                    raise
                self.model.batch_size = math.ceil(self.model.batch_size / 2)
                self.optimizer.zero_grad()
        norm = self.accelerator.clip_grad_norm_(self.trained, self.arguments.clip)
        record = {"step": len(self.history) + 1, "epoch": epoch + 1, "loss": math.nan}
        record |= {"learning_rate": self.schedule.get_last_lr()[0], "gradient_norm": math.nan, "seconds": 0.0}
        self.history.append(record | {"examples": len(rows) + (self.history[-1]["examples"] if self.history else 0)})
        values = torch.stack([loss, norm]).to("cpu", non_blocking=norm.is_cuda)  # float() waits for all queued work
        copied_now = torch.cuda.current_stream(norm.device).record_event() if norm.is_cuda else None
        self.unread.append((self.history[-1], row_numbers, values, copied_now))
        self._read_losses(lag=1 if norm.is_cuda else 0)  # a GPU need not wait for Python before it goes on
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.bar.update()

    def _backward(self, rows: list) -> Tensor:
        """Add the gradient of the mean loss over `rows`; return that loss, the same in every process."""
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        step, local = len(self.history), rows[index::processes]  # of all lengths
        parts = math.ceil(self.share / self.model.batch_size)  # the same in every process and step
        cuts, losses = np.linspace(0, len(local), parts + 1).round().astype(int), torch.zeros((), device=self.device)
        for part in range(parts):
            micro_batch = local[cuts[part] : cuts[part + 1]]
            share = len(micro_batch) / len(rows)
            utils.set_seed(combined_seed(self.arguments.seed, step, part * processes + index))
            # A small last batch can leave a part empty: one row with weight 0 keeps the processes in step.
            curriculum = {"progress": step / self.total_steps, "step_seed": combined_seed(self.arguments.seed, step)}
            loss = self._loss(micro_batch or rows[:1], **curriculum)
            (loss * share).backward()
            losses += loss.detach() * share
        if processes > 1:  # not by DDP, whose hooks CUDA graphs cannot hold
            gradients = [each.grad for each in self.trained if each.grad is not None]  # of the same in all processes
            vector_to_parameters(self.accelerator.reduce(parameters_to_vector(gradients), reduction="sum"), gradients)
            utils.broadcast([value for value in self.state["model"].values() if not value.requires_grad])
        return self.accelerator.reduce(losses, reduction="sum")

    def _loss(self, rows: list, **curriculum: float) -> Tensor:
        batch = self.model.collate(rows)
        if self.device.type == "cuda":  # which copies pinned memory while the CPU goes on
            batch = utils.recursively_apply(Tensor.pin_memory, batch)
        batch = utils.send_to_device(batch, self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.precision == "bf16"):
            if (loss := self.model(batch, **curriculum)).requires_grad:
                return loss
        raise UserError("the loss depends on no trainable parameter: give the language model an adapter")

    def _read_losses(self, lag: int = 0) -> None:
        """Read losses and gradient norms from the device, except the last `lag`.  Raises UserError if not finite."""
        while len(self.unread) > lag:
            record, row_numbers, values, copied_now = self.unread.pop(0)
            if copied_now:
                copied_now.synchronize()
            loss, norm = values.tolist()
            record |= {"loss": loss, "gradient_norm": norm, "seconds": time.monotonic() - self.started}
            if not math.isfinite(loss + norm):
                where = f"at step {record['step']}, learning rate {record['learning_rate']:.3g}"
                remedy = f"lower it or correct training rows {row_numbers.tolist()}; checkpoints stay in {self.folder}"
                raise UserError(f"loss {loss}, gradient norm {norm} {where}: {remedy}")
            self.bar.set_postfix(loss=f"{loss:.3f}", rate=f"{record['learning_rate']:.1e}", refresh=False)

    def validate(self, validate: Callable[[], float]) -> None:
        """Add the validation result to the last record, and remember the best state."""
        self._read_losses()
        self.model.eval()
        hit_ratio = utils.broadcast_object_list([float(torch.no_grad()(validate)())])[0]  # the main process decides
        if math.isnan(hit_ratio):
            raise UserError(f"validation after step {len(self.history)} gave nan: correct what it computes")
        self.history[-1]["hit_ratio"] = hit_ratio
        if self.best is None or hit_ratio > self.best[0]:
            self.best = hit_ratio, copied(self.state["model"])

    def save(self) -> None:
        done, parts = len(self.history), self.arguments.snapshots
        snapshot = done in {math.ceil(self.total_steps * part / parts) for part in range(1, parts + 1)}
        checkpoint = done % self.arguments.save_every == 0 or done == self.total_steps
        if not snapshot and not checkpoint:
            return
        self._read_losses()
        if self.main and snapshot:  # before the checkpoint: a run that resumes from it would skip this snapshot
            content = safetensors.torch.save(copied(self.state["model"]))
            artifacts.write_atomic(self.folder / "snapshots" / f"step-{done:08d}.safetensors", content)
        if self.main and checkpoint:
            save_checkpoint(self.folder / "checkpoints", self.identity, self.state, self.history, self.best)
        self.accelerator.wait_for_everyone()


def combined_seed(*numbers: int) -> int:
    """One 32-bit seed computed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _optimizer(model: nn.Module, arguments: TrainingArguments, total_steps: int) -> tuple:
    """AdamW and its schedule: linear warm-up from floor * peak, then a cosine to floor * peak, or a constant peak."""
    usual = [{"params": list(model.parameters()), "weight_decay": arguments.weight_decay}]
    groups = model.parameter_groups(arguments.weight_decay) if hasattr(model, "parameter_groups") else usual
    groups = [group | {"lr": arguments.learning_rate * group.get("lr_scale", 1.0)} for group in groups]
    warmup, optimizer = round(arguments.warmup * total_steps), torch.optim.AdamW(groups, fused=True)
    if arguments.schedule == "constant":
        return optimizer, LinearLR(optimizer, arguments.floor if warmup else 1.0, total_iters=max(warmup, 1))
    rates = {"min_lr_rate": arguments.floor, "warmup_lr_rate": arguments.floor}  # as in LLaRA
    return optimizer, get_scheduler("cosine_warmup_with_min_lr", optimizer, warmup, total_steps, rates)
