import importlib
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ilora.devices import memory_for
from ilora.errors import UserError
from ilora.training import TrainingArguments, fit, load_snapshot, loop

ARGUMENTS = TrainingArguments(epochs=3, batch_size=16, learning_rate=1e-2, weight_decay=0.1, save_every=3)
ROWS = list(range(90))  # 6 batches per epoch, the last one of 10 rows
BITS = {"rtol": 0, "atol": 0}


class Toy(nn.Module):
    """Regression on random inputs; a curriculum leaves `late` out of some steps, `frozen` never learns."""

    def __init__(self, dropout=0.0, pause=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.early, self.late, self.frozen = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(4, 4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        self.frozen.requires_grad_(False)
        self.dropout, self.pause = nn.Dropout(dropout), pause
        self.x = torch.randn(len(ROWS), 4, generator=generator)
        self.collated, self.seeds = [], []  # the rows and the step's seed of each micro-batch

    def collate(self, rows):
        self.collated.append(list(rows))
        x = self.x[torch.tensor(rows)]
        return {"x": x, "y": x.sum(1).sin()}

    def forward(self, batch, progress, step_seed):
        time.sleep(self.pause)
        self.seeds.append(step_seed)
        hidden = self.dropout(self.early(self.frozen(batch["x"])).relu())
        if np.random.default_rng(step_seed).random() < progress:
            hidden = self.late(hidden)
        return ((hidden.sum(1) - batch["y"]) ** 2).mean()

    def score(self):
        with torch.no_grad():
            return -float(self(self.collate(ROWS), 1.0, 0))


class Interrupted(Exception):
    pass


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(folder, dropout=0.1, **changes):
    model = Toy(dropout)
    history = fit(model, ROWS, replace(ARGUMENTS, **changes), folder)
    return model, history


def checkpoints(folder):
    return sorted((folder / "checkpoints").iterdir())


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("micro_batch_size", [None, 5, 1])
def test_fit_equals_a_plain_loop(tmp_path, micro_batch_size):
    recorded, _ = trained(tmp_path / "whole batches", dropout=0.0)
    model, history = trained(tmp_path / "micro-batches", dropout=0.0, micro_batch_size=micro_batch_size)
    plain, losses = Toy(), []
    parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for step, (rows, seed) in enumerate(zip(recorded.collated, recorded.seeds, strict=True)):
        optimizer.param_groups[0]["lr"] = history["learning_rate"][step]
        loss = plain(plain.collate(rows), step / 18, seed)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-5)
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)


def test_history_has_one_row_a_step(tmp_path):
    _, history = trained(tmp_path)
    assert history["step"].tolist() == list(range(1, 19))
    assert history["epoch"].tolist() == [1] * 6 + [2] * 6 + [3] * 6
    assert history["examples"].iloc[-1] == 3 * len(ROWS)
    assert history["loss"].iloc[-3:].mean() < history["loss"].iloc[:3].mean()


@pytest.mark.parametrize(("name", "end"), [("cosine", 0.01), ("constant", 1.0)])
def test_schedule_warms_up_then_falls_or_stays(tmp_path, name, end):
    _, history = trained(tmp_path, schedule=name, warmup=0.2, epochs=10, learning_rate=1.0, save_every=100)
    rates = history["learning_rate"].to_numpy()  # 60 steps, 12 of them warm-up
    np.testing.assert_allclose([rates[0], max(rates), rates[-1]], [0.01, 1.0, end], rtol=1e-6)
    np.testing.assert_allclose(np.diff(rates[:12]), 0.99 / 12, rtol=0.1)  # in 11 or 12 equal rises
    assert np.ptp(np.diff(rates[:12])) < 1e-9
    assert (np.diff(rates[12:]) <= 0).all()


def test_a_group_has_its_own_rate(tmp_path):
    model = Toy()
    model.parameter_groups = lambda decay: [
        {"params": model.early.parameters(), "weight_decay": decay},
        {"params": model.late.parameters(), "lr_scale": 0.0},
    ]
    late, early = model.late.weight.clone(), model.early.weight.clone()
    fit(model, ROWS, ARGUMENTS, tmp_path)
    torch.testing.assert_close(model.late.weight, late, **BITS)
    assert not torch.equal(model.early.weight, early)


def test_each_epoch_shuffles_all_rows(tmp_path):
    batches = trained(tmp_path)[0].collated
    epochs = [np.concatenate(batches[first : first + 6]).tolist() for first in (0, 6, 12)]
    assert [len(batch) for batch in batches] == [16, 16, 16, 16, 16, 10] * 3
    assert all(sorted(epoch) == ROWS for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_micro_batches_hold_rows_of_similar_length(tmp_path):
    model = Toy()
    model.length = lambda row: row % 10
    fit(model, ROWS, replace(ARGUMENTS, micro_batch_size=4), tmp_path)
    for step in range(0, len(model.collated), 4):
        lengths = [row % 10 for micro_batch in model.collated[step : step + 4] for row in micro_batch]
        assert lengths == sorted(lengths)


def test_the_data_is_told_each_epoch(tmp_path):
    class Rows(list):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs += (epoch,)

    rows = Rows(ROWS)
    fit(Toy(), rows, ARGUMENTS, tmp_path)
    assert rows.epochs == (0, 1, 2)


def test_the_best_state_on_validation_is_the_result(tmp_path):
    model, scores, states = Toy(), iter([1.0, 3.0, 2.0]), []

    def validate():
        assert not model.training
        assert not torch.is_grad_enabled()
        states.append(weights(model).clone())
        return next(scores)

    history = fit(model, ROWS, ARGUMENTS, tmp_path, validate)
    torch.testing.assert_close(weights(model), states[1], **BITS)
    assert history["hit_ratio"].dropna().tolist() == [1.0, 3.0, 2.0]
    again = Toy()
    fit(again, ROWS, ARGUMENTS, tmp_path, validate)  # finished: nothing is trained or validated again
    torch.testing.assert_close(weights(again), states[1], **BITS)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"learning_rate": -1.0}, {"schedule": "linear"}, {"precision": "fp16"}]
)
def test_impossible_arguments_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        replace(ARGUMENTS, **wrong)


def test_a_model_in_shards_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Accelerator, "distributed_type", loop.utils.DistributedType.FSDP)
    with pytest.raises(UserError, match="without FSDP"):
        fit(Toy(), ROWS, ARGUMENTS, tmp_path)


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        fit(Toy(), [], ARGUMENTS, tmp_path)


# ---------------------------------------------------------------- memory


class Small(Toy):
    """On a device whose memory has room for some rows at once."""

    def __init__(self, room, **options):
        super().__init__(**options)
        self.room = room

    def length(self, row):
        return row % 10

    def forward(self, batch, progress, step_seed):
        if len(batch["x"]) > self.room:
            raise torch.OutOfMemoryError("as a GPU would")
        return super().forward(batch, progress, step_seed)


def without_time(history):
    return history.drop(columns="seconds")


@pytest.mark.parametrize(("room", "size"), [(100, 16), (17, 16), (16, 8), (8, 4), (5, 4), (1, 1)])
def test_the_largest_micro_batch_that_fits_trains_as_if_it_were_given(tmp_path, room, size):
    model, given = Small(room, dropout=0.1), Toy(dropout=0.1)
    given.length = model.length
    history = fit(model, ROWS, replace(ARGUMENTS, micro_batch_size=0), tmp_path / "chosen", lambda: 1.0)
    assert model.batch_size == size
    expected = fit(given, ROWS, replace(ARGUMENTS, micro_batch_size=size), tmp_path / "given", lambda: 1.0)
    assert sorted(row % 10 for row in model.collated[0])[0] >= 8  # the longest of 90 rows were tried
    pd.testing.assert_frame_equal(without_time(history), without_time(expected))
    torch.testing.assert_close(weights(model), weights(given), **BITS)


def test_compiled_layers_and_validation_that_need_more_memory_get_fewer_rows(tmp_path):
    model = Small(17)
    model.compile_layers = lambda: setattr(model, "room", 9)

    def validate():
        with memory_for(model.batch_size):
            if model.batch_size > 4:
                raise torch.OutOfMemoryError

    arguments = replace(ARGUMENTS, micro_batch_size=0)
    fit(model, ROWS, replace(arguments, compile="yes"), tmp_path / "0", try_validation=validate)
    assert model.batch_size == 4
    wrong = UserError("not of memory")
    with pytest.raises(UserError, match="not of memory"):
        fit(Small(17), ROWS, arguments, tmp_path / "1", try_validation=Mock(side_effect=wrong))


def test_less_room_than_at_the_trial_halves_a_chosen_micro_batch_and_repeats_the_step(tmp_path):
    model, expected = Small(17), Toy()
    expected.length = model.length
    steps = []

    def collate(rows):
        steps.append(len(rows))
        model.room = 17 if len(steps) < 5 else 5  # the second step is in two parts
        return Toy.collate(model, rows)

    model.collate = collate
    history = fit(model, ROWS, replace(ARGUMENTS, micro_batch_size=0), tmp_path / "chosen")
    assert steps[3:8] == [16, 16, 8, 4, 4] and model.batch_size == 4
    pd.testing.assert_frame_equal(
        without_time(history), without_time(fit(expected, ROWS, ARGUMENTS, tmp_path / "given")), rtol=1e-5
    )
    with pytest.raises(UserError, match="a batch of 16: choose"):
        fit(model, ROWS, replace(ARGUMENTS, micro_batch_size=16), tmp_path / "not chosen")


def test_a_run_with_a_chosen_micro_batch_resumes_with_the_same_bits(tmp_path):
    class Breaking(Small):
        def collate(self, rows):
            if self.interrupt and self.training and len(self.collated) > 40:
                raise Interrupted
            return super().collate(rows)

    model, whole, again = (Breaking(5, dropout=0.1) for _ in range(3))
    model.interrupt, whole.interrupt, again.interrupt = True, False, False
    arguments = replace(ARGUMENTS, micro_batch_size=0)
    with pytest.raises(Interrupted):
        fit(model, ROWS, arguments, tmp_path / "broken")
    assert checkpoints(tmp_path / "broken")
    resumed = fit(again, ROWS, arguments, tmp_path / "broken")
    expected = fit(whole, ROWS, arguments, tmp_path / "whole")
    pd.testing.assert_frame_equal(without_time(resumed), without_time(expected))
    torch.testing.assert_close(weights(again), weights(whole), **BITS)


def test_a_row_that_does_not_fit_is_one_sentence_before_the_first_step(tmp_path):
    for size, rows in ((0, 1), (1, 1), (4, 4)):
        with pytest.raises(UserError, match=f"memory.*batch of {rows}: .*gradient_check.*quantize.*window") as error:
            fit(Small(0), ROWS, replace(ARGUMENTS, micro_batch_size=size), tmp_path / str(size))
        assert "\n" not in str(error.value)
        assert ("micro_batch_size (0: the largest that fits)" in str(error.value)) == (size > 1)


def test_on_a_cpu_nothing_is_tried_unless_the_micro_batch_is_chosen(tmp_path):
    model, calls = Toy(), []
    fit(model, ROWS, ARGUMENTS, tmp_path / "given", try_validation=lambda: calls.append(1))
    assert len(model.collated) == 18 and not calls


def test_layers_are_checkpointed_if_wanted_and_a_checkpoint_may_change_it(tmp_path):
    calls = []
    for wanted in (False, True):
        model = Toy()
        model.checkpoint_layers = lambda: calls.append(1)
        fit(model, ROWS, replace(ARGUMENTS, gradient_checkpointing=wanted), tmp_path)
    assert calls == [1]


# ---------------------------------------------------------------- checkpoints


def test_two_checkpoints_are_kept_and_hold_plain_tensors_only(tmp_path):
    trained(tmp_path, device="cpu")
    steps = [path.name[:13] for path in checkpoints(tmp_path)]
    assert steps == ["step-00000015", "step-00000018"]
    state = torch.load(checkpoints(tmp_path)[-1], weights_only=True)
    assert state["history"][-1]["step"] == 18
    assert set(state["model"]) == {"early.weight", "early.bias", "late.weight", "late.bias"}


@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_a_damaged_checkpoint_is_named_and_replaced_by_the_one_before(tmp_path, caplog, damage):
    whole, history = trained(tmp_path)
    newest = checkpoints(tmp_path)[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content if damage == "changed" else content[:100])
    with caplog.at_level(logging.WARNING):
        resumed, again = trained(tmp_path)
    assert str(newest) in caplog.text
    torch.testing.assert_close(weights(resumed), weights(whole), **BITS)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), history.drop(columns="seconds"))
    assert [path.name[:13] for path in checkpoints(tmp_path)] == ["step-00000015", "step-00000018"]
    assert newest not in checkpoints(tmp_path)


def test_checkpoints_of_other_arguments_are_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(UserError, match=r"'learning_rate': 0\.01.*choose another folder"):
        trained(tmp_path, learning_rate=0.02)
    trained(tmp_path, micro_batch_size=4, save_every=5)  # these may change


@pytest.mark.parametrize("change", ["shape", "frozen", "other name"])
def test_checkpoints_of_another_model_are_refused_before_any_change(tmp_path, change):
    """A weight of shape (1, 8) would spread over all rows of (8, 8) without a word."""
    first = Toy()
    first.late = nn.Linear(8, 1)
    fit(first, ROWS, ARGUMENTS, tmp_path)
    other = Toy()
    if change != "shape":
        other.late = nn.Linear(8, 1)
    if change == "frozen":
        other.late.requires_grad_(False)
    if change == "other name":
        other.later = nn.Linear(8, 1)
    before = weights(other)
    with pytest.raises(UserError, match=r"step-00000018.*holds other trained tensors than this model"):
        fit(other, ROWS, ARGUMENTS, tmp_path)
    torch.testing.assert_close(weights(other), before, **BITS)


def test_arguments_of_numpy_resume(tmp_path):
    """As np.logspace and np.arange give them: no checkpoint with them would load."""
    for _ in range(2):
        trained(tmp_path, learning_rate=np.float64(0.01), clip=np.float32(1), seed=np.int64(3))


def test_a_continued_run_says_so(tmp_path, caplog):
    """Rows that were corrected in place, of the same number, would otherwise seem to be trained on."""
    with caplog.at_level(logging.WARNING):
        trained(str(tmp_path))
        assert "continuing" not in caplog.text
        trained(str(tmp_path))
    assert f"continuing from {checkpoints(tmp_path)[-1]}" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    model = Toy()
    model.x[77] = value
    with pytest.raises(UserError) as error:
        fit(model, ROWS, replace(ARGUMENTS, save_every=1), tmp_path)
    bad = len(model.collated)  # the step of row 77
    assert 77 in model.collated[-1]
    assert f"at step {bad}, learning rate " in str(error.value)
    assert str(model.collated[-1]) in str(error.value)
    assert torch.isfinite(weights(model)).all()
    assert [int(path.name[5:13]) for path in checkpoints(tmp_path)] == [bad - 2, bad - 1][1 - bad :]


def test_a_full_disk_leaves_the_checkpoints_intact(tmp_path, monkeypatch):
    whole, _ = trained(tmp_path / "whole")
    synchronise, calls = os.fsync, []

    def full_at_the_third(file):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        synchronise(file)

    monkeypatch.setattr(os, "fsync", full_at_the_third)
    with pytest.raises(UserError, match=r"step-00000009.*No space left.*make room"):
        trained(tmp_path / "full")
    assert [path.name[:13] for path in checkpoints(tmp_path / "full")] == ["step-00000003", "step-00000006"]
    resumed, _ = trained(tmp_path / "full")
    torch.testing.assert_close(weights(resumed), weights(whole), **BITS)


# ---------------------------------------------------------------- snapshots


SNAPSHOTS = replace(ARGUMENTS, snapshots=4)  # of 18 steps; checkpoints after every third


def snapshots(folder):
    return {path.name: path.read_bytes() for path in folder.glob("snapshots/*")}


def test_snapshots_hold_the_states_after_their_steps(tmp_path):
    class Watched(Toy):
        states = ()

        def forward(self, *arguments, **keywords):
            self.states += (weights(self).clone(),)
            return super().forward(*arguments, **keywords)

    model = Watched()
    fit(model, ROWS, SNAPSHOTS, tmp_path)
    assert sorted(snapshots(tmp_path)) == [f"step-{step:08d}.safetensors" for step in (5, 9, 14, 18)]
    other = Toy()
    for step, state in ((5, model.states[5]), (14, model.states[14]), (18, weights(model))):
        load_snapshot(other, tmp_path / "snapshots" / f"step-{step:08d}.safetensors")
        torch.testing.assert_close(weights(other), state, **BITS)


@pytest.mark.parametrize("after", [4, 5, 8, 9, 13])  # snapshots after 5, 9, 14; checkpoints after 3, 6, 9, 12
def test_snapshots_survive_a_resume(tmp_path, after):
    class Breaking(Toy):
        passes = 0

        def forward(self, *arguments, **keywords):
            self.passes += 1
            if self.passes > after:
                raise Interrupted
            return super().forward(*arguments, **keywords)

    with pytest.raises(Interrupted):
        fit(Breaking(dropout=0.1), ROWS, SNAPSHOTS, tmp_path / "broken")
    assert len(snapshots(tmp_path / "broken")) < 4
    fit(Toy(dropout=0.1), ROWS, SNAPSHOTS, tmp_path / "broken")
    fit(Toy(dropout=0.1), ROWS, SNAPSHOTS, tmp_path / "whole")
    assert len(snapshots(tmp_path / "whole")) == 4
    assert snapshots(tmp_path / "broken") == snapshots(tmp_path / "whole")


def test_snapshots_are_optional_and_do_not_change_training(tmp_path):
    plain, _ = trained(tmp_path / "plain")
    kept, _ = trained(tmp_path / "kept", snapshots=4)
    torch.testing.assert_close(weights(kept), weights(plain), **BITS)
    assert not (tmp_path / "plain/snapshots").exists()


def test_few_steps_have_few_snapshots(tmp_path):
    fit(Toy(), ROWS, replace(SNAPSHOTS, epochs=2, batch_size=len(ROWS)), tmp_path)
    assert sorted(snapshots(tmp_path)) == [f"step-{step:08d}.safetensors" for step in (1, 2)]


def test_a_snapshot_of_another_model_is_refused(tmp_path):
    fit(Toy(), ROWS, SNAPSHOTS, tmp_path)
    other = Toy()
    other.late = nn.Linear(8, 9)
    before = weights(other).clone()
    with pytest.raises(UserError, match="other trained tensors"):
        load_snapshot(other, tmp_path / "snapshots" / f"step-{18:08d}.safetensors")
    torch.testing.assert_close(weights(other), before, **BITS)


# ---------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def server():
    """Starts processes that need not import anything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "ilora.training"])
    return context


LONG = replace(ARGUMENTS, epochs=30, save_every=2)  # 180 steps


def train_slowly(folder, started):
    model = Toy(dropout=0.1, pause=0.008)
    collate = model.collate
    model.collate = lambda rows: started.set() or collate(rows)  # tells that training has started
    fit(model, ROWS, LONG, folder, model.score)


@pytest.mark.slow
def test_a_run_killed_ten_times_gives_the_same_bits(tmp_path, server):
    chance, killed = random.Random(0), 0
    while killed < 10:
        started = server.Event()
        process = server.Process(target=train_slowly, args=(tmp_path / "killed", started))
        process.start()
        assert started.wait(60)
        time.sleep(chance.uniform(0, 0.12))  # the 180 steps take 1.4 s or more
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    partly = [int(path.name[5:13]) for path in (tmp_path / "killed/checkpoints").glob("step-*.pt")]
    assert 0 < max(partly) < 180
    resumed, whole = Toy(dropout=0.1), Toy(dropout=0.1)
    again = fit(resumed, ROWS, LONG, tmp_path / "killed", resumed.score)
    history = fit(whole, ROWS, LONG, tmp_path / "whole", whole.score)
    torch.testing.assert_close(weights(resumed), weights(whole), **BITS)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), history.drop(columns="seconds"))
    assert len(checkpoints(tmp_path / "killed")) == 2  # and no half-written file


def test_each_process_gets_every_second_of_the_sorted_rows(tmp_path):
    """So that none waits for another one with longer rows."""
    dealt = []
    for index in (0, 1):
        run = loop._Run(Toy(), ROWS, replace(ARGUMENTS, device="cpu", batch_size=8), tmp_path / str(index))
        run.accelerator = Mock(num_processes=2, process_index=index, reduce=lambda value, reduction: value)
        run.share, run.model.batch_size = 4, 3
        run._backward(list(range(8)))
        dealt.append(run.model.collated)
    assert dealt == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]


@pytest.mark.slow
def test_two_launched_processes_equal_one(tmp_path, monkeypatch, request):
    """With `accelerate launch`: losses, weights and, if the micro-batches are the same, even dropout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("training_two_processes.py")
    launch = [Path(sys.executable).with_name("accelerate"), "launch", *LAUNCH, "--dynamo_backend", "no"]
    environment = {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    (tmp_path / "two").mkdir()
    done = subprocess.run(
        [*launch, "--main_process_port", str(port), script, tmp_path / "two"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "one").mkdir()
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "one" / "home"))
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)  # as in the two processes, so that sums round alike
    importlib.import_module(script.stem).main(tmp_path / "one")
    one = torch.load(tmp_path / "one" / "0-of-1.pt", weights_only=True)
    assert set(one) == {"toy", "toy in parts", "iLoRA", "pipeline"}
    for rank in (0, 1):
        two = torch.load(tmp_path / "two" / f"{rank}-of-2.pt", weights_only=True)
        for name, (weight, loss) in one.items():
            torch.testing.assert_close(two[name][1], loss, rtol=1e-5, atol=0, msg=name)
            # Adam's first steps are as large as the learning rate, even where a gradient is only a rounding error.
            tolerance = 1e-6 if name.startswith("toy") else 2e-4
            torch.testing.assert_close(
                two[name][0], weight, rtol=1e-5, atol=tolerance, msg=lambda text, name=name: name + text
            )
            assert len(loss.unique()) == len(loss)  # every step had other weights or rows


def test_recorded_passes_end_with_the_training_that_recorded_them(tmp_path):
    model, ended = Toy(), []
    model.forget_passes = lambda: ended.append(model.training)
    fit(model, ROWS, ARGUMENTS, tmp_path)
    assert len(ended) == 1


def test_a_validation_that_gives_nan_stops_the_run(tmp_path):
    """No later epoch is above nan: the first one would be kept as the best."""
    results = iter([0.1, float("nan"), 0.9])
    with pytest.raises(UserError, match="validation after step 12 gave nan"):
        fit(Toy(), ROWS, ARGUMENTS, tmp_path, lambda: next(results))


@pytest.mark.parametrize("wrong", [{"epochs": 1.5}, {"batch_size": 2.5}, {"seed": 0.5}, {"micro_batch_size": 0.5}])
def test_a_fraction_of_a_row_or_an_epoch_is_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} must be a whole number"):
        TrainingArguments(**{"epochs": 1, "batch_size": 2, "learning_rate": 0.1} | wrong)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate must be a number above 0, not '1e-3'"),  # so YAML reads it
        ({"micro_batch_size": -1}, "micro_batch_size must be a whole number of at least 0, not -1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"epochs": None}, "epochs must be a whole number"),
        ({"save_every": 0}, "save_every must be a whole number above 0, not 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number of at least 0, not nan"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainingArguments(**{"epochs": 1, "batch_size": 2, "learning_rate": 0.1} | wrong)
