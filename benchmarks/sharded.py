"""Train iLoRA over a base model that is split over the GPUs of a machine by FSDP; save it, and load it again.

    accelerate launch --num_processes 2 benchmarks/sharded.py --base-model FOLDER --data-dir FOLDER --to FOLDER

Each process reads the base into the memory of the CPU and keeps its share of every layer on its GPU. Before a layer
computes, its parts are gathered. The adapter is saved as a usual recommender: here on a GPU that holds the whole base.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import measure
import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ilora import artifacts, data, devices
from ilora.language import LanguageRecommender, Prompts, adapter_config
from ilora.recommenders import SASRec
from ilora.training import load_snapshot
from ilora.training.checkpoints import copied


def recommender(folder: str, source: data.Dataset, device: torch.device) -> LanguageRecommender:
    """iLoRA of 4 experts over the base model in `folder`, in bfloat16."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval().requires_grad_(False)
    prompts = Prompts(AutoTokenizer.from_pretrained(folder), list(source.items["title"]), source.noun, source.verb)
    torch.manual_seed(0)
    encoder = SASRec(len(source.items))  # in earnest: fit_recommender(source)[0]
    return LanguageRecommender(base, prompts, encoder, adapter_config(experts=4, dropout=0.0))


def split(model: LanguageRecommender, device: torch.device, processes: int) -> LanguageRecommender:
    """Split each layer, and what remains, over the processes."""
    mesh = init_device_mesh(device.type, (processes,))
    for layer in model.language_model.get_base_model().get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def loss_of(model: LanguageRecommender, batch: dict, progress: float = 1.0, step: int = 0) -> torch.Tensor:
    batch = send_to_device(batch, batch_device(model))
    with torch.autocast(batch_device(model).type, torch.bfloat16):
        return model(batch, progress=progress, step_seed=step)


def batch_device(model: LanguageRecommender) -> torch.device:
    return model.placeholder.device


def main(arguments: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__, batch_size=32)
    parser.add_argument("--base-model", required=True, help="the folder of the base model")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps (10)")
    parser.add_argument("--dataset", default="movielens", help="the data set (movielens)")
    parser.add_argument("--data-dir", default="", help="the folder with its files (download)")
    parser.add_argument("--to", type=Path, help="the folder for the trained recommender (none)")
    options = parser.parse_args(arguments)
    accelerator = Accelerator(cpu=options.device == "cpu")
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    run, out = measure.start("sharded", options, "base_model", "data_dir", "to")
    source = data.load(options.dataset, options.data_dir)
    rows = data.questions(source, "train", limit=options.steps * options.batch_size)
    model = split(recommender(options.base_model, source, torch.device("cpu")), device, processes).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay=1e-5), lr=1e-4)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses, seconds = [], []
    for step in range(options.steps):
        started = time.perf_counter()
        numbers = range(step * options.batch_size + rank, (step + 1) * options.batch_size, processes)
        loss = loss_of(model, model.collate([rows[i] for i in numbers]), step / options.steps, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
        seconds.append(time.perf_counter() - started)
    peak = devices.peak_memory_mib(device) / 2**10
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.trainable_state().items()}
    batch = model.collate([rows[i] for i in range(8)])
    with torch.no_grad():
        expected = loss_of(model.eval(), batch).item()
    if accelerator.is_main_process:
        with tempfile.TemporaryDirectory() as temporary:
            file, folder = Path(temporary, "trained.safetensors"), options.to or Path(temporary, "recommender")
            safetensors.torch.save_file(copied(state), file)
            plain = recommender(options.base_model, source, device).to(device)
            load_snapshot(plain, file)
            plain.save_pretrained(folder, options.base_model)
            del plain
            set_seed(0)
            loaded = LanguageRecommender.from_pretrained(folder, options.base_model, str(device))
            with torch.no_grad():
                after = loss_of(loaded, batch).item()
        result = {"processes": processes, "seconds": measure.spread(seconds[len(seconds) // 2 :]), "gib": peak}
        result |= {"losses": np.round(losses, 5).tolist(), "loss": expected, "loss_after_loading": after}
        print(result, run.save({"sharded": result}, path=out), artifacts.commit())
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
