"""What the adapter costs: variants of one model measured in turn, as ratios, within one run.

    python benchmarks/adapter.py                 # on the GPU if torch sees one, else on the CPU
    python benchmarks/adapter.py --smoke         # a tiny model in a few seconds; its numbers mean nothing

On a CPU the model is a Llama of two layers and hidden size 1,024 in float32; on a GPU it has the shape of
Llama-2-7B, in bfloat16, with the adapter trained under autocast. Its weights are random, frozen and shared by all
variants. LoRA and iLoRA have rank 8 on all seven projections, iLoRA 4 experts.

    adapter         iLoRA against PEFT's LoRA
    experts         the same and Eq. 12 with every expert's output formed, on half the rows (its memory)
    logits          iLoRA with logits at the answer's tokens only, against logits at all tokens
    checkpointing   iLoRA with gradient checkpointing, against none
    compile         layers compiled by torch.compile: iLoRA against LoRA (by default on a GPU only)

Time is that of a forward and backward pass, by the clock, with the device idle at both ends. The variants of a
part take turns in every round, each round begun by another one. A ratio is taken within a round, to the part's
first variant; what is given is the median over rounds, with the quartiles as its spread.

Memory is the peak of one such step above what was held before it: on a GPU by torch.cuda.max_memory_allocated, on
a CPU by the running total that torch's profiler records at every call of torch's allocator (exact and repeatable,
but without what matrix libraries take for themselves).

The share of the matrix rate is the operations of LoRA's step with answer logits, as torch's FlopCounterMode counts
them, for each second, over those of a large square matrix product in the same type on the same device: what is
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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from ilora import runs
from ilora.adapter import ILoraVariant
from ilora.model import adapter_config

RESULTS = Path(__file__).resolve().parents[1] / "book" / "results"
SHAPES = {  # hidden, intermediate, layers, heads, vocabulary; side of the matrix product
    "smoke": ((32, 64, 2, 4, 100), 64),
    "cpu": ((1024, 2816, 2, 16, 32000), 2048),
    "cuda": ((4096, 11008, 32, 32, 32000), 8192),  # Llama-2-7B
}
GATE_DIM = 64
Step = Callable[[], None]


class PerExpert(ILoraVariant):
    """Eq. 12 as it stands, and as the released code computes it: every expert's output, weighted and summed."""

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        w = self.tuner.weights_of(module, active_adapter)  # (b, K)
        K = w.shape[1]
        factor = (K * module.scaling[active_adapter] * w).to(x)
        x = module.lora_dropout[active_adapter](x)
        A = module.lora_A[active_adapter].weight.chunk(K, dim=0)
        B = module.lora_B[active_adapter].weight.chunk(K, dim=1)
        for k in range(K):
            result = result + factor[:, k, None, None] * F.linear(F.linear(x, A[k]), B[k])
        return result


class Bench:
    """The frozen model, a batch for it, and the steps over it that the parts compare."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = runs.pick_device(options.device)
        self.rows, self.tokens, self.answer, self.rounds = options.rows, options.tokens, options.answer, options.rounds
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        (hidden, intermediate, layers, heads, vocabulary), self.side = SHAPES[
            "smoke" if options.smoke else "cuda" if on_gpu else "cpu"
        ]
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=max(2048, self.tokens), use_cache=False,
        )  # fmt: skip
        runs.seed_all(0)
        with torch.device(self.device):
            self.base = AutoModelForCausalLM.from_config(config, dtype=self.dtype).requires_grad_(False)
            self.ids = torch.randint(1, vocabulary, (self.rows, self.tokens))
            self.z = torch.randn(self.rows, GATE_DIM)
        self.matrix_rate = self.flops = None

    # ---------------------------------------------------------------- variants

    def model(self, experts: int = 4) -> PeftModel:
        """A copy of the model's modules, not of its weights, with LoRA (experts 1) or iLoRA, in training mode."""
        modules = copy.deepcopy(self.base, {id(weight): weight for weight in self.base.parameters()})
        return get_peft_model(modules, adapter_config(rank=8, dropout=0.0, experts=experts)).train()

    def per_expert(self) -> PeftModel:
        model = self.model()
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_variant["default"] = PerExpert(model.base_model)
        return model

    def checkpointed(self) -> PeftModel:
        model = self.model()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def compiled(self, experts: int = 4) -> PeftModel:
        model = self.model(experts)
        for layer in model.get_base_model().model.layers:  # all alike: one compilation serves every layer
            layer.compile()
        return model

    def step(self, model: PeftModel, rows: int | None = None, all_logits: bool = False) -> Step:
        """Forward and backward of the mean -log P(answer), where the answer is each row's last tokens."""
        ids = self.ids[:rows]
        keep = self.tokens if all_logits else self.answer + 1
        labels = ids.clone()
        labels[:, : -self.answer] = -100
        gated = hasattr(model.base_model, "lora_gate")
        guidance = {"sequence_embeds": self.z[:rows]} if gated else {}

        def run() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                logits = model(ids, logits_to_keep=keep, **guidance).logits[:, :-1]
                loss = F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1 - keep :].flatten())
            loss.backward()
            model.zero_grad(set_to_none=True)  # the next step starts from the same memory

        return run

    # ---------------------------------------------------------------- parts

    def adapter(self) -> dict:
        return self.compare({"LoRA": self.step(self.model(1)), "iLoRA": self.step(self.model())})

    def experts(self) -> dict:
        variants = {"LoRA": self.model(1), "iLoRA": self.model(), "every expert's output": self.per_expert()}
        half = max(1, self.rows // 2)
        return self.compare({name: self.step(model, half) for name, model in variants.items()}, half)

    def logits(self) -> dict:
        model = self.model()
        return self.compare({"all logits": self.step(model, all_logits=True), "answer logits": self.step(model)})

    def checkpointing(self) -> dict:
        return self.compare({"iLoRA": self.step(self.model()), "checkpointed": self.step(self.checkpointed())})

    def compile(self) -> dict:
        variants = {"LoRA, compiled": self.compiled(1), "iLoRA, compiled": self.compiled(), "iLoRA": self.model()}
        return self.compare({name: self.step(model) for name, model in variants.items()})

    # ---------------------------------------------------------------- measuring

    def matmul(self) -> dict:
        """Operations for each second of a square matrix product on random data, and those of LoRA's step."""
        a, b = torch.randn(2, self.side, self.side, device=self.device, dtype=self.dtype)
        product = partial(torch.mm, a, b)
        seconds = np.median([self.timed(product) for _ in range(self.rounds + 3)][3:])
        self.matrix_rate = 2 * self.side**3 / seconds
        step = self.step(self.model(1))
        with FlopCounterMode(display=False) as counter:
            step()
        self.flops = counter.get_total_flops()
        rates = {"tera_per_second": self.matrix_rate / 1e12, "tera_of_a_step": self.flops / 1e12}
        return {"side": self.side} | {name: float(f"{value:.4g}") for name, value in rates.items()}

    def compare(self, steps: dict[str, Step], rows: int | None = None) -> dict:
        """For each step: seconds, MiB, both as ratios to the first step, and rates; warmed up by two steps each."""
        rows, names = rows or self.rows, list(steps)
        for step in (*steps.values(), *steps.values()):
            step()
        mib = {name: self.memory(step) for name, step in steps.items()}
        seconds = {name: [] for name in names}
        for turn in range(self.rounds):
            for name in np.roll(names, -turn):
                seconds[name].append(self.timed(steps[name]))
        found = {}
        for name in names:
            time_of_one = spread(seconds[name])
            found[name] = {
                "seconds": time_of_one,
                "time_ratio": spread(np.divide(seconds[name], seconds[names[0]])),
                "step_mib": round(mib[name], 1),
                "memory_ratio": round(mib[name] / mib[names[0]], 4),
                "tokens_per_second": round(rows * self.tokens / time_of_one["median"], 1),
            }
            if self.flops:
                useful = self.flops * rows / self.rows / time_of_one["median"]
                found[name]["share_of_matrix_rate"] = round(useful / self.matrix_rate, 4)
            if self.device.type == "cuda":
                found[name]["peak_mib"] = round(mib[name] + torch.cuda.memory_allocated(self.device) / 2**20, 1)
        return found | {"rows": rows, "rounds": self.rounds}

    def timed(self, step: Step) -> float:
        self.wait()
        began = time.perf_counter()
        step()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self, step: Step) -> float:
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
        first = calls[0][1]
        peak = max(call["Total Allocated"] for _, call in calls)
        return (peak - first["Total Allocated"] + first["Bytes"]) / 2**20


def spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).round(5).tolist()
    return {"median": median, "low": low, "high": high}


def show(part: str, found: dict) -> None:
    """One line a variant, as soon as the part is measured."""
    variants = {name: value for name, value in found.items() if isinstance(value, dict)}
    for name, value in variants.items():
        ratio = value["time_ratio"]
        print(
            f"{part:14}{name:22} {value['seconds']['median']:8.4f} s  x {ratio['median']:.3f}"
            f" ({ratio['low']:.3f} to {ratio['high']:.3f}) {value['step_mib']:10,.1f} MiB  x {value['memory_ratio']:.3f}"
            f" {value['tokens_per_second']:11,.0f} tokens/s {value.get('share_of_matrix_rate', float('nan')):6.1%} of matmul",
            flush=True,
        )
    if not variants:
        print(f"{part:14}{found}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parts = ["adapter", "experts", "logits", "checkpointing", "compile"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--parts", nargs="+", choices=parts, help="which parts (all; on a CPU all but compile)")
    for name, default, meaning in [("rounds", 15, "rounds of a part"), ("rows", 8, "rows of the batch"),
                                   ("tokens", 256, "tokens of a row"), ("answer", 8, "of which answer")]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    parser.add_argument("--minutes", type=float, help="begin no further part after this time (on a GPU 4)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path, help="the JSON to write (book/results/benchmark_adapter_DEVICE.json)")
    options = parser.parse_args(arguments)
    on_gpu = runs.pick_device(options.device).type == "cuda"
    minutes = options.minutes or (4 if on_gpu else math.inf)
    out = options.out or RESULTS / f"benchmark_adapter_{'cuda' if on_gpu else 'cpu'}.json"
    if options.smoke and not options.out:
        parser.error("--smoke measures nothing: say with --out where its JSON belongs")
    chosen = options.parts or (parts if on_gpu else parts[:-1])
    given = {name: value for name, value in vars(options).items() if name not in ("out", "parts", "minutes")}
    run, metrics = runs.Run("benchmark_adapter", given), {}
    bench = Bench(options)
    for part in ("matmul", *chosen):
        if run.seconds > 60 * minutes:
            metrics[part] = {"error": f"not begun: {minutes} minutes are over"}
        else:
            try:
                metrics[part] = getattr(bench, part)()
            except Exception as error:  # whatever fails is reported, and the other parts go on
                metrics[part] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        show(part, metrics[part])
        run.save(metrics, path=out)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    print(out, flush=True)


if __name__ == "__main__":
    main()
