"""Measure the time and memory of the adapter: variants of one model take turns in one run.

    python benchmarks/adapter.py                 # on the GPU if torch sees one, else on the CPU
    python benchmarks/adapter.py --shape calls --device cpu --tokens 16

On a CPU the model is a Llama with two layers and hidden size 1,024 in float32. On a GPU it has the shape of
Llama-2-7B, in bfloat16 under autocast, and the benchmark takes less than eight minutes. The shape `calls` is so small
that it measures the time in Python and in kernel calls, which a GPU waits for when it has few rows; it can be
measured on a CPU, in bfloat16 under autocast. Weights are random, frozen and shared by all variants. LoRA and iLoRA
have rank 8 on all seven projections, and iLoRA has 4 experts. PARTS lists the comparisons, the most important first.
A part that fails is reported, and the next one starts.

Time is that of a forward and a backward pass. Memory is the peak of one such step minus the memory before it: on a
GPU from torch.cuda.max_memory_allocated, on a CPU from the allocations that torch's profiler records (exact and
repeatable, but without the work space of matrix libraries). Recorded passes (CUDA graphs) keep their memory from step
to step, so that they have none here.

The share of the matrix rate compares operations per second of a step (those of LoRA with answer logits, counted by
FlopCounterMode) with those of a large square matrix product of the same type on the same device. Recomputation
lowers it.

Packing several prompts into one row without padding is not measured, because a gate has one weight per row.
padding.py measures how much it could save.
"""

import argparse
import copy
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import measure
import numpy as np
import torch
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from ilora import devices
from ilora.adapter import ILoraVariant
from ilora.language import adapter_config
from ilora.language.graphs import record_passes

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SHAPES = {  # the sizes of the model, and the side of the matrix product
    "smoke": ((32, 64, 2, 4, 100), 64),
    "calls": ((32, 32, 16, 2, 64), 64),
    "cpu": ((1024, 2816, 2, 16, 32000), 2048),
    "cuda": ((4096, 11008, 32, 32, 32000), 8192),  # Llama-2-7B
}
EAGER = {"LoRA": {"experts": 1}, "iLoRA": {}, "a gate per layer": {"per_layer": True}}
COMPILED = {f"{name}, compiled": how | {"compiled": True} for name, how in EAGER.items()} | {"iLoRA": {}}
RECORDED = {f"{name}, recorded": how | {"recorded": True} for name, how in EAGER.items()}
PARTS = {  # part -> variant -> arguments of Bench.step; ratios are to the first variant
    "adapter": EAGER,
    "compile": COMPILED,
    "recorded": RECORDED,
    "adapter, more rows": EAGER,
    "compile, more rows": COMPILED,
    "experts": {"LoRA": {"experts": 1}, "iLoRA": {}, "every expert's output": {"written_out": True}},
    "checkpointing": {"iLoRA": {}, "checkpointed": {"checkpointed": True}},
    "largest batch": {"LoRA": {"experts": 1}, "iLoRA": {}, "checkpointed": {"checkpointed": True}},
    "logits": {"all logits": {"all_logits": True}, "answer logits": {}},
}
GPU_ONLY = {  # unless --parts names them
    "compile", "recorded", "compile, more rows", "adapter, more rows", "largest batch",
}  # fmt: skip
MOST = {"iLoRA": {"at_most": 1.02}, "a gate per layer": {"at_most": 1.05}}
GOALS = {"adapter": MOST, "compile": {f"{name}, compiled": goal for name, goal in MOST.items()}}
GOALS |= {"recorded": {f"{name}, recorded": goal for name, goal in MOST.items()}}
GOALS |= {f"{part}, more rows": goal for part, goal in GOALS.items()}
SHARE = 0.5  # the goal for the share of the matrix rate


class PerExpert(ILoraVariant):
    """Eq. 12 literally, as in the released code: the weighted sum of the outputs of all experts."""

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        w = module.conditioning.weights_of(module, active_adapter)  # (b, K)
        K = w.shape[1]
        factor = K * module.scaling[active_adapter] * w[:, :, None, None]
        x = module.lora_dropout[active_adapter](x)
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        for k, (A_k, B_k) in enumerate(zip(A.chunk(K, dim=0), B.chunk(K, dim=1), strict=True)):
            output = F.linear(F.linear(x, A_k), B_k)
            result = result + factor[:, k].to(output) * output
        return result


class Bench:
    """The frozen model, a batch, and the steps that the parts compare."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = devices.pick_device(options.device)
        self.rows, self.tokens, self.answer, self.rounds = options.rows, options.tokens, options.answer, options.rounds
        self.rows_of = {"experts": max(1, self.rows // 2)}  # every expert's output takes the most memory
        self.rows_of |= {part: options.more_rows for part in PARTS if part.endswith("more rows")}
        name = options.shape or self.device.type
        self.compiler = "eager" if name == "smoke" else "inductor"  # "eager" needs no C++ compiler
        self.dtype = torch.bfloat16 if name in ("cuda", "calls") else torch.float32
        shape, self.side = SHAPES[name]
        config = LlamaConfig(**dict(zip(SIZES, shape, strict=True)), max_position_embeddings=4096, use_cache=False)
        set_seed(0)
        with torch.device(self.device):
            self.base = AutoModelForCausalLM.from_config(config, dtype=self.dtype).requires_grad_(False)
            self.ids = torch.randint(1, config.vocab_size, (self.rows, self.tokens))
            self.z = torch.randn(self.rows, 64)  # repeated if a step has more rows
        self.matrix_rate = self.flops = None

    def model(self, experts: int = 4, written_out: bool = False, checkpointed: bool = False, compiled: bool = False,
              per_layer: bool = False, recorded: bool = False) -> PeftModel:  # fmt: skip
        """The model with LoRA (experts 1) or iLoRA, in training mode; all models share the frozen weights."""
        gate = {"gate_per_layer": True} if per_layer else {}
        modules = copy.deepcopy(self.base, {id(weight): weight for weight in self.base.parameters()})
        model = get_peft_model(modules, adapter_config(8, dropout=0.0, experts=experts, **gate)).train()
        if written_out:
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    layer.lora_variant["default"] = PerExpert()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if compiled or recorded:
            options = {"options": {"combo_kernels": True}} if self.compiler == "inductor" else {}  # as `fit` has it
            for layer in modules.model.layers:  # all alike: one compilation serves every layer
                layer.compile(backend=self.compiler, dynamic=False, **options)
        if recorded:
            record_passes(model)
        return model

    def step(self, rows: int, all_logits: bool = False, **how: int | bool) -> Callable[[], None]:
        """Forward and backward pass of the mean -log P(answer); the answer is the last tokens of each row."""
        model, repeated = self.model(**how), torch.arange(rows) % self.rows
        ids, z = self.ids[repeated], self.z[repeated]
        given = {"inputs_embeds": self.base.get_input_embeddings()(ids)} if "recorded" in how else {"input_ids": ids}
        keep = self.tokens if all_logits else self.answer + 1
        labels = F.pad(ids[:, -self.answer :], (self.tokens - self.answer, 0), value=-100)
        guidance = {"sequence_embeds": z} if how.get("experts", 4) > 1 else {}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def run() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                logits = model(**given, logits_to_keep=keep, **guidance).logits[:, :-1]
                loss = F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1 - keep :].flatten())
            loss.backward()
            for parameter in trained:  # as an optimizer does: the next step starts from the same memory
                parameter.grad = None

        return run

    def matmul(self) -> dict:
        """Operations per second of a square matrix product on random data, and operations of a step of LoRA."""
        a, b = torch.randn(2, self.side, self.side, device=self.device, dtype=self.dtype)
        product = partial(torch.mm, a, b)
        seconds = float(np.median([measure.timed(product, self.device)[0] for _ in range(self.rounds + 3)][3:]))
        self.matrix_rate = 2 * self.side**3 / seconds
        step = self.step(self.rows, experts=1)
        with FlopCounterMode(display=False) as counter:
            step()
        self.flops = counter.get_total_flops()
        rates = {"per_second": self.matrix_rate, "of_a_step": self.flops}
        return {"side": self.side, "goal": SHARE} | {
            f"tera_{name}": round(value / 1e12, 6) for name, value in rates.items()
        }

    def compare(self, part: str) -> dict:
        """Seconds, MiB, their ratios to the first variant, and rates of each variant, after three warm-up steps."""
        rows = self.rows_of.get(part, self.rows)
        steps = {name: self.step(rows, **how) for name, how in PARTS[part].items()}
        for step in steps.values():
            step()
        mib = {} if part == "recorded" else {name: self.memory(step) for name, step in steps.items()}
        result, _ = measure.compare(steps, self.rounds, self.device, GOALS.get(part))
        held = torch.cuda.memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else math.nan
        for name in steps:
            if mib:
                ratio = mib[name] / next(iter(mib.values()))
                result[name] |= {"step_mib": round(mib[name], 1), "memory_ratio": round(ratio, 4)}
            result[name]["tokens_per_second"] = round(rows * self.tokens / result[name]["seconds"]["median"], 1)
            if self.flops:  # unless that part failed
                per_second = self.flops * rows / self.rows / result[name]["seconds"]["median"]
                result[name]["share_of_matrix_rate"] = round(per_second / self.matrix_rate, 4)
            result[name] |= {"peak_mib": round(held + mib[name], 1)} if held > 0 and mib else {}
        return result | {"rows": rows}

    def largest(self, part: str) -> dict:
        """The largest number of rows that fits, to 3%, starting from free memory divided by that of a row."""
        result = {}
        for name, how in PARTS[part].items():
            step = self.step(self.rows, **how)
            step()
            rows = int(room(self.device) / (self.memory(step) / self.rows))
            del step
            if self.fits(rows, how):
                while self.fits(longer := math.ceil(1.03 * rows), how):
                    rows = longer
            else:
                while not self.fits(rows := int(0.97 * rows), how):
                    pass
            result[name] = {"rows": rows}
        return result

    def fits(self, rows: int, how: dict) -> bool:
        try:
            self.step(rows, **how)()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            free()

    def memory(self, step: Callable[[], None]) -> float:
        """Peak memory of a step minus the memory before it, in MiB."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            step()
            return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step()
        with tempfile.TemporaryDirectory() as folder:
            recorded.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
        calls = sorted((event["ts"], event["args"]) for event in events if event["name"] == "[memory]")
        before = calls[0][1]["Total Allocated"] - calls[0][1]["Bytes"]
        return (max(call["Total Allocated"] for _, call in calls) - before) / 2**20


def room(device: torch.device) -> float:
    """Free memory of a GPU in MiB."""
    free()
    return torch.cuda.mem_get_info(device)[0] / 2**20


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
    torch.compiler.reset()


def show(part: str, result: dict) -> None:
    """Print one line per variant."""
    variants = {name: value for name, value in result.items() if isinstance(value, dict)}
    for name, value in variants.items():
        columns = [f"{part:20}{name:22}"]
        if "time_ratio" in value:
            ratio, share = value["time_ratio"], value.get("share_of_matrix_rate", math.nan)
            columns += [
                f"{value['seconds']['median']:8.4f} s  x {ratio['median']:.3f}",
                f"({ratio['low']:.3f} to {ratio['high']:.3f})",
                f"{value.get('step_mib', math.nan):10,.1f} MiB  x {value.get('memory_ratio', math.nan):.3f}",
                f"{value['tokens_per_second']:9,.0f} tokens/s {share:6.1%} of matmul",
            ]
        else:
            columns += [f"{value['rows']} rows"]
        print(*columns, flush=True)
    if not variants:
        print(f"{part:20}{result}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__, rounds=15, rows=8, more_rows=24, tokens=256, answer=8)
    on_cpu = ", ".join(part for part in PARTS if part not in GPU_ONLY)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help=f"which parts (all; on a CPU {on_cpu})")
    parser.add_argument("--minutes", type=float, help="no part starts after this time (no limit; on a GPU 6.5)")
    parser.add_argument("--shape", choices=("smoke", "calls"), help="size of the model (by device); smoke is for tests")
    options = parser.parse_args(arguments)
    if options.shape == "smoke" and not options.out:
        parser.error("--shape smoke measures nothing: choose where to write its JSON with --out")
    if options.tokens <= options.answer:
        parser.error(f"{options.tokens} tokens are too few for an answer of {options.answer}: choose more --tokens")
    run, out = measure.start("adapter_calls" if options.shape == "calls" else "adapter", options, "parts", "minutes")
    on_gpu, metrics = run.device.type == "cuda", {}
    minutes = options.minutes or (6.5 if on_gpu else math.inf)
    bench = Bench(options)
    work = {"largest batch": bench.largest, "matmul": lambda _: bench.matmul()}
    usual = ["adapter"] if options.shape == "calls" else [part for part in PARTS if on_gpu or part not in GPU_ONLY]
    for part in ("matmul", *(options.parts or usual)):
        try:
            if time.perf_counter() - run.started > 60 * minutes:
                raise TimeoutError(f"not started: {minutes} minutes are over")
            metrics[part] = work.get(part, bench.compare)(part)
        except Exception as error:  # report it and continue with the next part
            metrics[part] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        show(part, metrics[part])
        run.save(metrics, path=out)
        free()
    print(out, flush=True)


if __name__ == "__main__":
    main()
