"""Training steps of the language recommender on a GPU: examples/s by padding, precision, compilation and CUDA graphs.

    python benchmarks/training_speed.py                  # writes training_speed.jsonl to $OUT, a line a variant
    python benchmarks/training_speed.py --tiny --device cpu

Random weights of SmolLM2-135M's shape and prompts of random tokens, as long as MovieLens' training prompts. A step is
forward, backward, clipping and AdamW on 128 rows; it is timed with the copies of the batch to the GPU.
"""

# ruff: noqa
import argparse
import inspect
import json
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that importing leaves CUDA alone
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

BEGAN = time.perf_counter()
BACKEND = os.environ.get("BACKEND", "inductor")  # aot_eager where only the code is to be tried
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 790e12  # multiply-adds count twice; what an H100 reaches in large bf16 matrix products
# MovieLens training prompts with answers, in SmolLM2's tokens: how many of 5,000 have 144, 145, ... tokens
LENGTHS = [
    1,
    0,
    2,
    0,
    0,
    0,
    2,
    3,
    2,
    2,
    1,
    1,
    1,
    4,
    6,
    8,
    4,
    3,
    3,
    6,
    6,
    6,
    5,
    2,
    5,
    4,
    4,
    5,
    9,
    7,
    7,
    6,
    9,
    11,
    5,
    6,
    14,
    13,
    17,
    20,
    26,
    21,
    22,
    20,
    29,
    43,
    32,
    53,
    43,
    40,
    61,
    58,
    57,
    83,
    77,
    96,
    84,
    77,
    97,
    102,
    109,
    119,
    104,
    107,
    110,
    128,
    123,
    120,
    122,
    116,
    122,
    124,
    128,
    103,
    100,
    106,
    110,
    111,
    114,
    111,
    83,
    92,
    96,
    77,
    81,
    71,
    81,
    72,
    65,
    41,
    60,
    56,
    40,
    35,
    49,
    37,
    34,
    26,
    31,
    16,
    24,
    19,
    14,
    13,
    9,
    16,
    15,
    17,
    10,
    11,
    12,
    5,
    8,
    9,
    4,
    8,
    5,
    5,
    3,
    4,
    2,
    3,
    5,
    2,
    0,
    3,
    2,
    1,
    0,
    1,
    1,
    1,
    1,
    1,
    1,
    0,
    0,
    0,
    2,
    0,
    0,
    0,
    0,
    1,
]  # noqa: E501
SHORTEST, LONGEST = 144, 288  # the few rows of more tokens are cut to 288
ANSWERS = [0, 0, 243, 1105, 1171, 831, 661, 427, 180, 158, 71, 37, 38, 25, 15, 5, 7, 4, 0, 14, 3, 4, 0, 1]
BEHIND = 88  # tokens of a question's twenty candidates, on average
ITEMS, DIM = 30, 64  # behaviour tokens of a prompt; width of their embeddings and of z


@dataclass
class Variant:
    """How a step is computed."""

    name: str
    adapter: str = "lora"  # "lora", "scaled" (LoRA with a factor a row, as iLoRA has it), or "ilora" (the package's)
    precision: str = "master"  # "today", "autocast" (float32 LoRA, inputs not cast), "master" (bf16, float32 masters)
    padding: str = "right"  # or "left", with a 4-D mask
    parts: int = 1  # micro-batches of a step, rows sorted by length
    multiple: int = 96  # lengths are padded to a multiple of it
    least: int = 0  # and to at least that
    compile: str = ""  # "layer", "dynamic" (a layer of any length), "model", "autotune" (a layer)
    graph: str = (
        ""  # "all": forward and backward of a micro-batch is one CUDA graph; "decoder": of the model alone, two
    )
    limit: int = 40  # seconds


S = {"multiple": 32, "least": 224}
VARIANTS = [
    Variant("layer, scaled, graph", "scaled", compile="layer", graph="all"),
    Variant("eager, scaled, graph", "scaled", graph="all"),
    Variant("layer, ilora, autocast, decoder graph", "ilora", precision="autocast", compile="layer", graph="decoder"),
    Variant(
        "layer, ilora, autocast, decoder graph, 4", "ilora", "autocast", parts=4, **S, compile="layer", graph="decoder"
    ),
    Variant(
        "layer, lora, autocast, decoder graph, 4", "lora", "autocast", parts=4, **S, compile="layer", graph="decoder"
    ),
    Variant("layer, scaled, graph, 4", "scaled", parts=4, **S, compile="layer", graph="all"),
    Variant("ranking"),
    Variant("packed, layer, graph", padding="packed", compile="layer", multiple=1024, graph="all"),
    Variant("eager, lora, autocast, decoder graph, 4", "lora", "autocast", parts=4, **S, graph="decoder"),
    Variant(
        "layer, lora, autocast, decoder graph, 2", "lora", "autocast", parts=2, **S, compile="layer", graph="decoder"
    ),
    Variant("model, scaled", "scaled", compile="model", limit=80),
]


class Rows:
    """Batches of random prompts with realistic lengths, sorted by length."""

    def __init__(self, config: LlamaConfig, batch_size: int, seed: int, scale: int) -> None:
        rng = np.random.default_rng(seed)
        lengths = np.minimum(np.arange(SHORTEST, SHORTEST + len(LENGTHS)), LONGEST)
        self.length = np.sort(rng.choice(lengths, batch_size, p=np.array(LENGTHS) / sum(LENGTHS)))
        self.answer = rng.choice(len(ANSWERS), batch_size, p=np.array(ANSWERS) / sum(ANSWERS))
        self.length = np.maximum(self.length // scale, self.answer + 8)
        self.items = min(ITEMS, int(self.length.min()) // 4 - 1)
        self.tokens = rng.integers(3, config.vocab_size, (batch_size, LONGEST + 32))
        self.embedding = rng.standard_normal((batch_size, self.items, DIM)).astype(np.float32)
        self.z = rng.standard_normal((batch_size, DIM)).astype(np.float32)

    def parts(self, variant: Variant) -> list[dict[str, Tensor]]:
        cuts = np.linspace(0, len(self.length), variant.parts + 1).astype(int)
        return [self.part(slice(a, b), variant) for a, b in zip(cuts, cuts[1:], strict=False)]

    def part(self, rows: slice, variant: Variant) -> dict[str, Tensor]:
        """ids (b, s); flat places of behaviour tokens, of what predicts the answers' tokens, and those tokens."""
        length, answer = self.length[rows], self.answer[rows]
        b, s = len(length), max(-(-int(length.max()) // variant.multiple) * variant.multiple, variant.least)
        start = s - length if variant.padding == "left" else np.zeros(b, int)
        base = np.arange(b) * s
        ids = np.zeros((b, s), np.int64)
        for i in range(b):
            ids[i, start[i] : start[i] + length[i]] = self.tokens[rows][i, : length[i]]
        if variant.padding == "packed":
            base = np.cumsum(length) - length
            ids = np.concatenate([self.tokens[rows][i, : length[i]] for i in range(b)])
            ids = np.pad(ids, (0, -len(ids) % variant.multiple))[None]
        size = max(-(-b * 8 // 256) * 256, int(answer.sum()))
        at = np.concatenate([base[i] + start[i] + length[i] - answer[i] - 1 + np.arange(answer[i]) for i in range(b)])
        items = (base + start)[:, None] + 3 + 4 * np.arange(self.items)
        batch = {
            "ids": ids,
            "at": np.pad(at, (0, size - len(at))),
            "labels": np.pad(ids.ravel()[at + 1], (0, size - len(at)), constant_values=-100),
            "items": items.ravel(),
            "embedding": self.embedding[rows].reshape(-1, DIM),
            "z": self.z[rows],
            "start": start,
        }
        if variant.padding == "packed":
            batch["ends"] = np.append(np.concatenate([[0], np.cumsum(length)]), ids.size).astype(np.int32)
            place = np.arange(ids.size) - np.repeat(batch["ends"][:-1], np.diff(batch["ends"]))
            batch["positions"] = place[None]
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}


class Scaled(nn.Module):
    """A of LoRA, its output times a factor (b, 1, r) that is set before each forward pass."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.factor = inner, None

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


class Graphed:
    """A function of tensors that CUDA replays, with its gradients for these and for `parameters`."""

    def __init__(self, function, parameters: list[nn.Parameter]) -> None:  # noqa: ANN001
        self.function, self.parameters = function, parameters
        self.stream, self.pool, self.captures = torch.cuda.Stream(), None, {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        if key not in self.captures:
            self.captures[key] = self.capture(inputs)
        return Replay.apply(self.captures[key], len(inputs), *inputs, *self.parameters)

    def capture(self, inputs: tuple[Tensor, ...]) -> dict:
        static = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        wanted = [*(x for x in static if x.requires_grad), *self.parameters]
        self.stream.wait_stream(torch.cuda.current_stream())
        enabled = torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled, cache_enabled=False):
            with torch.cuda.stream(self.stream), torch.enable_grad():
                for _ in range(2):
                    out = self.function(*static)
                    torch.autograd.grad(out, wanted, torch.zeros_like(out))
            torch.cuda.current_stream().wait_stream(self.stream)
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.enable_grad(), torch.cuda.graph(forward, pool=self.pool, stream=self.stream):
                out = self.function(*static)
            self.pool = forward.pool()
            gradient = torch.zeros_like(out)
            with torch.cuda.graph(backward, pool=self.pool, stream=self.stream):
                found = torch.autograd.grad(out, wanted, gradient)
                flat = torch.cat([g.flatten() for g in found[len(found) - len(self.parameters) :]])
        first = [g.detach() for g in found[: len(found) - len(self.parameters)]]
        return {"static": static, "forward": forward, "backward": backward, "out": out.detach(), "gradient": gradient,
                "first": first, "flat": flat, "shapes": [p.shape for p in self.parameters]}  # fmt: skip


class Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, capture: dict, number: int, *tensors: Tensor) -> Tensor:  # noqa: ANN001
        for static, given in zip(capture["static"], tensors[:number], strict=True):
            static.detach().copy_(given)
        capture["forward"].replay()
        ctx.capture, ctx.number = capture, number
        return capture["out"].detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:  # noqa: ANN001
        capture = ctx.capture
        capture["gradient"].copy_(gradient)
        capture["backward"].replay()
        first = iter([g.clone() for g in capture["first"]])
        inputs = [next(first) if x.requires_grad else None for x in capture["static"]]
        shapes = capture["shapes"]
        pieces = capture["flat"].clone().split([shape.numel() for shape in shapes])
        return None, None, *inputs, *(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))


class Trainer:
    """A model, its adapter, and one step of training as a variant has it."""

    def __init__(self, config: LlamaConfig, variant: Variant, device: torch.device) -> None:
        torch.manual_seed(0)
        self.variant, self.device, self.cuda = variant, device, device.type == "cuda"
        low = torch.bfloat16
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=low, attn_implementation=attention(variant))
            model.requires_grad_(False).train()
            self.head, model.lm_head = model.lm_head.weight, nn.Identity()  # so that the model gives its last states
            self.lm = get_peft_model(model, adapter_config(variant))
            self.projector = nn.Sequential(nn.Linear(DIM, config.hidden_size), nn.GELU(),
                                           nn.Linear(config.hidden_size, config.hidden_size))  # fmt: skip
            self.gate = nn.Linear(DIM, 4, bias=False) if variant.adapter == "scaled" else None
        self.lm.to(device)
        self.embedding = self.lm.get_input_embeddings()
        layers = model.get_decoder().layers
        self.matrix = sum(m.weight.numel() for m in layers.modules() if type(m) is nn.Linear)
        self.scaled = []
        if variant.adapter == "scaled":
            for module in self.lm.modules():
                if hasattr(module, "lora_A") and "default" in module.lora_A:
                    module.lora_A["default"] = Scaled(module.lora_A["default"])
                    self.scaled.append(module.lora_A["default"])
        for module in self.lm.modules():
            if hasattr(module, "cast_input_dtype_enabled") and variant.precision != "today":
                module.cast_input_dtype_enabled = False
        trained = [p for p in self.lm.parameters() if p.requires_grad]
        if variant.precision == "master":
            for p in trained:
                p.data = p.data.to(low)
        with torch.no_grad():  # away from zero, so that A has a gradient
            for name, p in self.lm.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.02)
        own = list(self.projector.parameters()) + (list(self.gate.parameters()) if self.gate else [])
        self.flat = variant.precision == "master"
        self.inner = trained
        if self.flat:
            self.masters = [Flat(trained), Flat(own)]
            self.optimizer = torch.optim.AdamW([f.master for f in self.masters], lr=1e-3, fused=self.cuda)
        else:
            self.trained = trained + own
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, fused=self.cuda)
        if variant.compile in ("layer", "dynamic", "autotune"):
            mode = {"mode": "max-autotune-no-cudagraphs"} if variant.compile == "autotune" else {"backend": BACKEND}
            for layer in layers:  # None: of a length that varies once it has varied
                layer.compile(dynamic=None if variant.compile == "dynamic" else False, **mode)
        if variant.compile == "model":
            model.get_decoder().compile(dynamic=False, backend=BACKEND)
        self.graphs, self.pool = {}, None
        self.stream = torch.cuda.Stream() if self.cuda else None
        self.decoder = Graphed(self.states, trained) if self.cuda and variant.graph == "decoder" else self.states

    def states(self, embeds: Tensor, condition: Tensor | None = None, **more: Tensor) -> Tensor:
        """(b, s, hidden) for embeddings and the factor or z."""
        for module in self.scaled:
            module.factor = condition
        more |= {"sequence_embeds": condition} if self.variant.adapter == "ilora" else {}
        return self.lm(inputs_embeds=embeds, use_cache=False, **more).logits

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Sum of -log P(answer) over the rows, / 128."""
        low = torch.autocast(self.device.type, torch.bfloat16, enabled=self.variant.precision != "master")
        with low:
            embeds = self.embedding(batch["ids"])
            behaviour = self.projector(batch["embedding"]).to(embeds.dtype)
            embeds = embeds.flatten(0, 1).index_copy(0, batch["items"], behaviour).view_as(embeds)
            given, more = [embeds], {}
            if self.variant.adapter == "ilora":
                given.append(batch["z"])
            if self.gate is not None:
                w = (4 * self.gate(batch["z"]).float().softmax(-1)).repeat_interleave(2, 1)[:, None]
                given.append(w.to(torch.bfloat16))
            if self.variant.padding == "left":
                more = {"attention_mask": four_d(batch["start"], embeds), "position_ids": positions(batch, embeds)}
            if self.variant.padding == "packed":
                PACKED.update(ends=batch["ends"], longest=LONGEST)
                more = {"position_ids": batch["positions"]}
            states = self.decoder(*given, **more)
            logits = F.linear(states.flatten(0, 1)[batch["at"]], self.head)
        return F.cross_entropy(logits.float(), batch["labels"], reduction="sum", ignore_index=-100) / 128

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def captured(self, batch: dict[str, Tensor]) -> Tensor:
        """`backward` replayed from a graph of the batch's shape."""
        shape = tuple(batch["ids"].shape)
        if shape not in self.graphs:
            static = {name: value.clone() for name, value in batch.items()}
            before = [flat.gradient.clone() for flat in self.masters]
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(3):
                    self.backward(static)
            torch.cuda.current_stream().wait_stream(self.stream)
            for flat, gradient in zip(self.masters, before, strict=True):
                flat.gradient.copy_(gradient)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                loss = self.backward(static)
            self.pool = graph.pool()
            self.graphs[shape] = graph, static, loss
        graph, static, loss = self.graphs[shape]
        for name, value in batch.items():
            static[name].copy_(value)
        graph.replay()
        return loss

    def step(self, parts: list[dict[str, Tensor]]) -> Tensor:
        total = torch.zeros((), device=self.device)
        for part in parts:
            batch = {name: value.to(self.device, non_blocking=True) for name, value in part.items()}
            total += self.captured(batch) if self.variant.graph == "all" and self.cuda else self.backward(batch)
        return self.update(total)

    def update(self, total: Tensor) -> Tensor:
        """Clipping and AdamW."""
        if not self.flat:
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return total
        for flat in self.masters:
            flat.read()
        gradients = [flat.master.grad for flat in self.masters]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_([f.master for f in self.masters], 1.0, norm)
        self.optimizer.step()
        for flat in self.masters:
            flat.write()
        return total


class Flat:
    """Parameters as views of one tensor, their gradients too, and a float32 master of it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        first = parameters[0]
        self.values = torch.cat([p.data.flatten() for p in parameters])
        self.gradient = torch.zeros_like(self.values)
        at = 0
        for p in parameters:
            p.data = self.values[at : at + p.numel()].view_as(p)
            p.grad = self.gradient[at : at + p.numel()].view_as(p)
            at += p.numel()
        self.same = first.dtype == torch.float32
        self.master = nn.Parameter(self.values if self.same else self.values.float())
        self.master.grad = self.gradient if self.same else torch.zeros_like(self.master)

    def read(self) -> None:
        if not self.same:
            self.master.grad.copy_(self.gradient)

    @torch.no_grad()
    def write(self) -> None:
        if not self.same:
            self.values.copy_(self.master)
        self.gradient.zero_()


def adapter_config(variant: Variant) -> LoraConfig:
    shape = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": TARGETS}
    if variant.adapter == "ilora":
        from ilora.adapter import ILoraConfig

        return ILoraConfig(num_experts=4, gate_dim=DIM, **shape)
    return LoraConfig(task_type="CAUSAL_LM", **shape)


PACKED: dict = {}


def attention(variant: Variant) -> str:
    if variant.padding != "packed":
        return "sdpa"
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    by_window = "window_size" in inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if by_window else {"is_causal": True}

    def packed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: object) -> tuple:
        groups = module.num_key_value_groups
        q = query[0].transpose(0, 1).contiguous()  # (tokens, heads, width)
        k, v = (x[0].repeat_interleave(groups, 0).transpose(0, 1).contiguous() for x in (key, value))
        ends, longest = PACKED["ends"], PACKED["longest"] * 4
        return varlen_attn(q, k, v, ends, ends, longest, longest, **causal)[None], None

    AttentionInterface.register("packed", packed)
    return "packed"


def four_d(start: Tensor, embeds: Tensor) -> Tensor:
    s = embeds.shape[1]
    ids = torch.arange(s, device=embeds.device)
    sees = (ids >= start[:, None])[:, None] & (ids[:, None] >= ids) | torch.eye(s, dtype=torch.bool, device=ids.device)
    mask = torch.zeros(sees.shape, dtype=torch.bfloat16, device=ids.device)
    return mask.masked_fill_(~sees, torch.finfo(torch.bfloat16).min)[:, None]


def positions(batch: dict[str, Tensor], embeds: Tensor) -> Tensor:
    ids = torch.arange(embeds.shape[1], device=embeds.device)
    return (ids - batch["start"][:, None]).clamp(min=0)


# ---------------------------------------------------------------- measuring


def measure(variant: Variant, config: LlamaConfig, options: argparse.Namespace, device: torch.device) -> tuple:
    """The record of a variant, and a function that takes one more step."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    began = time.perf_counter()
    trainer = Trainer(config, variant, device)
    pin = (lambda t: t.pin_memory()) if device.type == "cuda" else (lambda t: t)
    rows = [Rows(config, options.batch_size, seed, options.scale) for seed in range(options.steps)]
    steps = [[{n: pin(v) for n, v in part.items()} for part in one.parts(variant)] for one in rows]
    built = time.perf_counter() - began
    shapes, began, losses = set(), time.perf_counter(), []
    for parts in steps:  # every shape once, then two more steps
        if not {tuple(p["ids"].shape) for p in parts} <= shapes:
            losses.append(float(trainer.step(parts)))
            shapes |= {tuple(p["ids"].shape) for p in parts}
        if len(losses) == 1 and not variant.compile and not variant.graph:
            break
    for parts in steps[:2]:
        losses.append(float(trainer.step(parts)))
    wait()
    warm = time.perf_counter() - began
    began = time.perf_counter()
    for parts in steps:
        last = trainer.step(parts)
        issued = time.perf_counter() - began
    wait()
    each = (time.perf_counter() - began) / len(steps)
    tokens = np.mean([one.length.sum() for one in rows])
    padded = np.mean([sum(p["ids"].numel() for p in parts) for parts in steps])
    for p in trainer.lm.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    wait()
    began = time.perf_counter()
    trainer.update(last)
    wait()
    update = time.perf_counter() - began
    record = asdict(variant) | {
        "update_seconds": round(update, 4),
        "seconds": round(each, 4), "issued": round(issued / len(steps), 4),
        "examples_per_second": round(options.batch_size / each, 1),
        "share_of_rate": round(4 * trainer.matrix * tokens / each / RATE, 4),
        "tokens": int(tokens), "padded": int(padded), "shapes": sorted(map(str, shapes)),
        "losses": [round(loss, 4) for loss in (*losses[:3], float(last))],
        "build_seconds": round(built, 1), "warm_seconds": round(warm, 1),
        "frames": dict(torch._dynamo.utils.counters["frames"]), "stats": dict(torch._dynamo.utils.counters["stats"]),
        "breaks": {str(k)[:150]: v for k, v in torch._dynamo.utils.counters["graph_break"].items()},
    }  # fmt: skip
    if device.type == "cuda":
        record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return record, lambda n: [trainer.step(parts) for parts in steps[:n]]


def ranking(config: LlamaConfig, options: argparse.Namespace, device: torch.device) -> list[dict]:
    """64 questions x 20 candidates behind one prompt each: seconds, in one pass or after the prompt's."""
    from transformers import DynamicCache

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    prompt, behind, found = 274 // options.scale, 140 // options.scale, []
    for precision in ("today", "master"):
        trainer = Trainer(config, Variant("", precision=precision), device)
        lm, n = trainer.lm.eval(), options.questions
        with device:
            ids = torch.randint(3, config.vocab_size, (n, prompt + behind))
            column = torch.arange(behind).mul(20).div(behind, rounding_mode="floor")
        sees = (column[:, None] == column).tril()
        sees = torch.cat([torch.ones(behind, prompt, dtype=torch.bool, device=device), sees], 1)  # (behind, all)

        @torch.no_grad()
        def one_pass(
            lm: nn.Module = lm, ids: Tensor = ids, n: int = n, sees: Tensor = sees, head: Tensor = trainer.head
        ) -> Tensor:  # noqa: E501
            top = torch.ones(prompt, ids.shape[1], dtype=torch.bool, device=device).tril()
            mask = torch.cat([top, sees])[None, None].expand(n, 1, -1, -1)
            mask = torch.zeros(mask.shape, dtype=torch.bfloat16, device=device).masked_fill_(~mask, -3e38)
            states = lm(inputs_embeds=lm.get_input_embeddings()(ids), attention_mask=mask, use_cache=False).logits
            return F.linear(states[:, prompt - 1 :], head).float().logsumexp(-1)

        @torch.no_grad()
        def two_passes(
            lm: nn.Module = lm, ids: Tensor = ids, n: int = n, sees: Tensor = sees, head: Tensor = trainer.head
        ) -> Tensor:  # noqa: E501
            cache, embeds = DynamicCache(), lm.get_input_embeddings()(ids)
            first = lm(inputs_embeds=embeds[:, :prompt], use_cache=True, past_key_values=cache).logits[:, -1:]
            places = torch.arange(prompt, prompt + behind, device=device)[None].expand(n, -1)
            rest = lm(inputs_embeds=embeds[:, prompt:], attention_mask=sees[None, None].expand(n, 1, -1, -1),
                      past_key_values=cache, position_ids=places).logits  # fmt: skip
            return F.linear(torch.cat([first, rest], 1), head).float().logsumexp(-1)

        for name, way in (("one pass", one_pass), ("two passes", two_passes)):
            try:
                way(), way()
                wait()
                began = time.perf_counter()
                for _ in range(5):
                    way()
                wait()
                each = (time.perf_counter() - began) / 5
                found.append(
                    {"name": f"ranking, {name}, {precision}", "seconds": each, "questions_per_second": n / each}
                )
            except Exception as error:
                found.append({"name": f"ranking, {name}, {precision}", "error": repr(error)[:400]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=195)
    parser.add_argument("--here", default="", help="measure the variant of this name in this process")
    parser.add_argument("--only", default="", help="names of variants that contain this")
    options = parser.parse_args()
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    shape |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    options.scale = 1
    if options.tiny:
        shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 512}
        shape |= {"num_attention_heads": 3, "num_key_value_heads": 1}
        options.batch_size, options.questions, options.steps, options.scale = 16, 4, 2, 6
    config = LlamaConfig(**shape, max_position_embeddings=8192, rope_parameters={"rope_theta": 1e5, "rope_type": "default"},
                         tie_word_embeddings=True, rms_norm_eps=1e-5)  # fmt: skip
    device = torch.device(options.device)
    torch._dynamo.config.recompile_limit = 64
    out = Path(os.environ.get("OUT", ".")) / "training_speed.jsonl"
    if options.here:
        attempt(next(v for v in VARIANTS if v.name == options.here), config, options, device, out)
        return
    limit = options.seconds
    for variant in VARIANTS:
        if options.only not in variant.name:
            continue
        left = limit - (time.perf_counter() - BEGAN)
        if left < 12:
            write(out, {"name": variant.name, "error": "no time left"})
            continue
        child = multiprocessing.get_context("fork").Process(
            target=attempt, args=(variant, config, options, device, out)
        )
        child.start()
        child.join(min(variant.limit, left))
        if child.is_alive():
            child.kill()
            child.join()
            write(out, {"name": variant.name, "error": "took longer than its limit"})


def write(out: Path, record: dict) -> None:
    """A line of the output, and a shorter one on the screen."""
    record["at"] = round(time.perf_counter() - BEGAN, 1)
    with open(out, "a") as file:
        file.write(json.dumps(record) + "\n")
    shown = ("name", "seconds", "issued", "update_seconds", "examples_per_second", "questions_per_second", "peak_gib",
             "warm_seconds", "padded", "losses", "error", "at")  # fmt: skip
    print({name: record[name] for name in shown if name in record}, flush=True)


def attempt(
    variant: Variant, config: LlamaConfig, options: argparse.Namespace, device: torch.device, out: Path
) -> None:
    """Measure a variant in a process of its own, where CUDA starts anew; its record, or why it failed."""
    if torch.cuda._is_in_bad_fork():  # a library has looked for CUDA on import
        os.execv(sys.executable, [sys.executable, *sys.argv, "--here", variant.name])
    try:
        if variant.name == "ranking":
            for record in ranking(config, options, device):
                write(out, record)
            return
        record, again = measure(variant, config, options, device)
        record["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        write(out, record)
        if device.type == "cuda" and variant.name.endswith((", 4", "graph")):
            profile(variant, again, out)
    except BaseException as error:
        text = traceback.format_exc()
        write(out, asdict(variant) | {"error": f"{type(error).__name__}: {str(error)[:300]}", "trace": text[-2500:]})


def profile(variant: Variant, again, out: Path) -> None:  # noqa: ANN001
    """The kernels of two steps, into a file of its own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        again(2)
        torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="self_device_time_total", row_limit=45, max_name_column_width=120)
    (out.parent / f"profile {variant.name}.txt".replace(", ", "_").replace(" ", "_")).write_text(table)


if __name__ == "__main__":
    main()
