"""What the adapter costs: variants of one model measured in turn, as ratios, within one run.

    python benchmarks/adapter.py                 # on the GPU if torch sees one, else on the CPU

On a CPU the model is a Llama of two layers and hidden size 1,024 in float32; on a GPU it has the shape of
Llama-2-7B, in bfloat16, with the adapter trained under autocast. Its weights are random, frozen and shared by all
variants. LoRA and iLoRA have rank 8 on all seven projections, iLoRA 4 experts. PARTS says what is compared; the
part `experts`, which needs the most memory, takes half the rows.

Time is that of a forward and backward pass, by the clock, with the device idle at both ends. The variants of a
part take turns in every round, each round begun by another one. A ratio is taken within a round, to the part's
first variant; what is given is the median over rounds, with the quartiles as its spread.

Memory is the peak of one such step above what was held before it: on a GPU by torch.cuda.max_memory_allocated, on
a CPU by the running total that torch's profiler records at every call of torch's allocator (exact and repeatable,
but without what matrix libraries take for themselves).

The share of the matrix rate is the operations of LoRA's step with answer logits, as torch's FlopCounterMode counts
them, for each second, over those of a large square matrix product of the same type on the same device: what is
recomputed or computed in vain lowers it.
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

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from ilora import runs
from ilora.adapter import ILoraVariant
from ilora.model import adapter_config

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SHAPES = {  # the sizes of the model, and the side of the matrix product
    "smoke": ((32, 64, 2, 4, 100), 64),
    "cpu": ((1024, 2816, 2, 16, 32000), 2048),
    "cuda": ((4096, 11008, 32, 32, 32000), 8192),  # Llama-2-7B
}
PARTS = {  # part -> variant -> what makes it; ratios are to the first
    "adapter": {"LoRA": {"experts": 1}, "iLoRA": {}},
    "experts": {"LoRA": {"experts": 1}, "iLoRA": {}, "every expert's output": {"written_out": True}},
    "logits": {"all logits": {"all_logits": True}, "answer logits": {}},
    "checkpointing": {"iLoRA": {}, "checkpointed": {"checkpointed": True}},
    "compile": {
        "LoRA, compiled": {"experts": 1, "compiled": True}, "iLoRA, compiled": {"compiled": True}, "iLoRA": {},
    },
}  # fmt: skip


class PerExpert(ILoraVariant):
    """Eq. 12 as it stands, and as the released code computes it: every expert's output, weighted and summed."""

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        w = self.tuner.weights_of(module, active_adapter)  # (b, K)
        K = w.shape[1]
        factor = K * module.scaling[active_adapter] * w[:, :, None, None]
        x = module.lora_dropout[active_adapter](x)
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        for k, (A_k, B_k) in enumerate(zip(A.chunk(K, dim=0), B.chunk(K, dim=1), strict=True)):
            output = F.linear(F.linear(x, A_k), B_k)
            result = result + factor[:, k].to(output) * output
        return result


class Bench:
    """The frozen model, a batch for it, and the steps over it that the parts compare."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = runs.pick_device(options.device)
        self.rows, self.tokens, self.answer, self.rounds = options.rows, options.tokens, options.answer, options.rounds
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        shape, self.side = SHAPES["smoke" if options.smoke else "cuda" if on_gpu else "cpu"]
        config = LlamaConfig(**dict(zip(SIZES, shape, strict=True)), max_position_embeddings=4096, use_cache=False)
        runs.seed_all(0)
        with torch.device(self.device):
            self.base = AutoModelForCausalLM.from_config(config, dtype=self.dtype).requires_grad_(False)
            self.ids = torch.randint(1, config.vocab_size, (self.rows, self.tokens))
            self.z = torch.randn(self.rows, 64)
        self.matrix_rate = self.flops = None

    def model(self, experts: int, written_out: bool, checkpointed: bool, compiled: bool) -> PeftModel:
        """A copy of the model's modules, not of its weights, with LoRA (experts 1) or iLoRA, in training mode."""
        modules = copy.deepcopy(self.base, {id(weight): weight for weight in self.base.parameters()})
        model = get_peft_model(modules, adapter_config(rank=8, dropout=0.0, experts=experts)).train()
        if written_out:
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    layer.lora_variant["default"] = PerExpert(model.base_model)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if compiled:
            for layer in modules.model.layers:  # all alike: one compilation serves every layer
                layer.compile()
        return model

    def step(self, rows: int, experts: int = 4, written_out: bool = False, checkpointed: bool = False,
             compiled: bool = False, all_logits: bool = False) -> Callable[[], None]:  # fmt: skip
        """Forward and backward of the mean -log P(answer), where the answer is each row's last tokens."""
        model, ids = self.model(experts, written_out, checkpointed, compiled), self.ids[:rows]
        keep = self.tokens if all_logits else self.answer + 1
        labels = F.pad(ids[:, -self.answer :], (self.tokens - self.answer, 0), value=-100)
        guidance = {"sequence_embeds": self.z[:rows]} if experts > 1 else {}

        def run() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                logits = model(ids, logits_to_keep=keep, **guidance).logits[:, :-1]
                loss = F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1 - keep :].flatten())
            loss.backward()
            model.zero_grad(set_to_none=True)  # the next step starts from the same memory

        return run

    def matmul(self) -> dict:
        """Operations for each second of a square matrix product on random data, and those of LoRA's step."""
        a, b = torch.randn(2, self.side, self.side, device=self.device, dtype=self.dtype)
        product = partial(torch.mm, a, b)
        seconds = float(np.median([self.timed(product) for _ in range(self.rounds + 3)][3:]))
        self.matrix_rate = 2 * self.side**3 / seconds
        step = self.step(self.rows, experts=1)
        with FlopCounterMode(display=False) as counter:
            step()
        self.flops = counter.get_total_flops()
        rates = {"per_second": self.matrix_rate, "of_a_step": self.flops}
        return {"side": self.side} | {f"tera_{name}": round(value / 1e12, 6) for name, value in rates.items()}

    def compare(self, part: str) -> dict:
        """For each variant: seconds, MiB, both as ratios to the first one, and rates; warmed up by two steps each."""
        rows, names = max(1, self.rows // 2) if part == "experts" else self.rows, list(PARTS[part])
        steps = {name: self.step(rows, **how) for name, how in PARTS[part].items()}
        for step in (*steps.values(), *steps.values()):
            step()
        mib = {name: self.memory(step) for name, step in steps.items()}
        seconds = {name: [] for name in names}
        for name in (name for turn in range(self.rounds) for name in np.roll(names, -turn)):
            seconds[name].append(self.timed(steps[name]))
        held = torch.cuda.memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else math.nan
        found = {}
        for name in names:
            median = float(np.median(seconds[name]))
            found[name] = {
                "seconds": spread(seconds[name]),
                "time_ratio": spread(np.divide(seconds[name], seconds[names[0]])),
                "step_mib": round(mib[name], 1),
                "memory_ratio": round(mib[name] / mib[names[0]], 4),
                "tokens_per_second": round(rows * self.tokens / median, 1),
            }
            if self.flops:  # unless that part failed
                share = self.flops * rows / self.rows / median / self.matrix_rate
                found[name]["share_of_matrix_rate"] = round(share, 4)
            found[name] |= {"peak_mib": round(held + mib[name], 1)} if held > 0 else {}
        return found | {"rows": rows, "rounds": self.rounds}

    def timed(self, step: Callable[[], None]) -> float:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        step()
        wait()
        return time.perf_counter() - began

    def memory(self, step: Callable[[], None]) -> float:
        """MiB at the peak of a step above what was held before it."""
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


def spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).round(5).tolist()
    return {"median": median, "low": low, "high": high}


def show(part: str, found: dict) -> None:
    """One line a variant, as soon as the part is measured."""
    variants = {name: value for name, value in found.items() if isinstance(value, dict)}
    for name, value in variants.items():
        time, ratio, share = value["seconds"], value["time_ratio"], value.get("share_of_matrix_rate", math.nan)
        columns = [
            f"{part:14}{name:22} {time['median']:8.4f} s  x {ratio['median']:.3f}",
            f"({ratio['low']:.3f} to {ratio['high']:.3f})",
            f"{value['step_mib']:10,.1f} MiB  x {value['memory_ratio']:.3f}",
            f"{value['tokens_per_second']:9,.0f} tokens/s {share:6.1%} of matmul",
        ]
        print(*columns, flush=True)
    if not variants:
        print(f"{part:14}{found}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="which parts (all; on a CPU all but compile)")
    for name, default in {"rounds": 15, "rows": 8, "tokens": 256, "answer": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    parser.add_argument("--minutes", type=float, help="begin no further part after this time (on a GPU 4)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, whose numbers mean nothing")
    parser.add_argument("--out", type=Path, help="the JSON to write (book/results/benchmarks/adapter_DEVICE.json)")
    options = parser.parse_args(arguments)
    on_gpu = runs.pick_device(options.device).type == "cuda"
    minutes = options.minutes or (4 if on_gpu else math.inf)
    book = Path(__file__).resolve().parents[1] / "book"
    out = options.out or book / "results" / f"adapter_{'cuda' if on_gpu else 'cpu'}.json"
    if options.smoke and not options.out:
        parser.error("--smoke measures nothing: say with --out where its JSON belongs")
    given = {name: value for name, value in vars(options).items() if name not in ("out", "parts", "minutes")}
    run, metrics = runs.Run("benchmark_adapter", given), {}
    bench = Bench(options)
    for part in ("matmul", *(options.parts or [part for part in PARTS if on_gpu or part != "compile"])):
        try:
            if run.seconds > 60 * minutes:
                raise TimeoutError(f"not begun, {minutes} minutes are over")
            metrics[part] = bench.matmul() if part == "matmul" else bench.compare(part)
        except Exception as error:  # whatever fails is reported, and the other parts go on
            metrics[part] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        show(part, metrics[part])
        run.save(metrics, path=out)
        gc.collect()
        torch.cuda.empty_cache()  # nothing without a GPU
    print(out, flush=True)


if __name__ == "__main__":
    main()
