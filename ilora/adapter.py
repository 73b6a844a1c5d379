"""iLoRA as a PEFT adapter: one LoRA pair whose experts are mixed anew for every row of the batch.

Letters, as in the paper's section 3.2:

    b  rows of the batch      K  num_experts               z  (b, d) sequence representations
    s  tokens of a row        r  rank of the LoRA pair     w  (b, K) gate weights, each row sums to 1
    d  gate_dim, width of z   p  r / K, rank of one expert (the paper's r*)

    Eq. 9    A = [A_1 .. A_K] (r, d_in), B = [B_1 .. B_K] (d_out, r): LoRA's matrices, read as K blocks
    Eq. 10   z: what a sequential recommender makes of the row's history; passed as `sequence_embeds`
    Eq. 11   w = softmax(W_g z)
    Eq. 12   dW = sum_k w_k B_k A_k = B diag(w, each repeated p times) A

The diagonal form is what runs: the r-wide middle of plain LoRA times one factor per row and expert, so no
expert's output is ever formed. The scale is the released code's alpha / p = K * alpha / r, hence a uniform
gate (w = 1 / K) is LoRA of rank r with scale alpha / r, and num_experts=1 is LoRA.

    model = get_peft_model(base, ILoraConfig(r=8, lora_alpha=32, target_modules=["q_proj"], gate_dim=64))
    model(input_ids, attention_mask=mask, sequence_embeds=z)
    model.generate(input_ids, attention_mask=mask, sequence_embeds=z)
    with model.sequence_embeds(z): ...              # for loops that cannot pass the keyword
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import LoraVariant
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from ilora.gates import Gate, make_gate
from ilora.runs import UserError

# PEFT's LoRA layers that ask their variant; others (AWQ, EETQ, AQLM, embeddings, ...) would ignore the gate.
_LAYERS = {"Linear", "Linear8bitLt", "Linear4bit", "HqqLoraLinear", "GPTQLoraLinear", "TorchaoLoraLinear"}


class _TypeName(str):
    """PEFT's `PeftType` is a closed enum; this string answers like a member of it."""

    @property
    def value(self) -> str:
        return str(self)


ILORA = _TypeName("ILORA")


@dataclass
class ILoraConfig(LoraConfig):
    """LoRA's configuration plus the gate's.

    Attributes:
        task_type: None for a model that does not generate text.
        num_experts: K, the experts that the rank is split into; divides r.
        gate_dim: d, the width of the sequence representations.
        gate: kind of gate, see gates.py: "linear" (Eq. 11), "convolutional" (the released code's) or your own.
        gate_per_layer: one gate for each adapted layer instead of one that all share.
        gate_top_k: keep only the k largest weights of a row, renormalised; None keeps all.

    Raises:
        UserError: a rank that num_experts does not divide, an unknown gate, or an option of LoRA that iLoRA
            cannot carry (another variant, a bias, a data-driven initialisation, ...).
    """

    task_type: str | None = "CAUSAL_LM"
    num_experts: int = 4
    gate_dim: int = 64
    gate: str = "linear"
    gate_per_layer: bool = False
    gate_top_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ILORA
        if self.num_experts < 1 or self.gate_dim < 1:
            raise UserError("num_experts and gate_dim must be at least 1: correct them in ILoraConfig.")
        for rank in (self.r, *self.rank_pattern.values()):
            if rank % self.num_experts:
                raise UserError(
                    f"rank {rank} is not divisible by num_experts={self.num_experts}: "
                    "choose r as a multiple of num_experts, so that each expert has r / num_experts ranks."
                )
        if self.gate not in Gate.kinds:
            raise UserError(f"unknown gate {self.gate!r}: choose one of {', '.join(Gate.kinds)}.")
        if self.gate_top_k is not None and not 2 <= self.gate_top_k <= self.num_experts:
            raise UserError(
                f"gate_top_k={self.gate_top_k}: keep 2 to num_experts={self.num_experts} experts, or None "
                "for all (a single renormalised weight is the constant 1, so that the gate could not learn)."
            )
        self._refuse_what_the_gate_cannot_carry()

    def _refuse_what_the_gate_cannot_carry(self) -> None:
        variants = [f.name for f in dataclasses.fields(self) if f.metadata.get("is_lora_variant")]
        others = ["use_qalora", "lora_bias", "target_parameters", "layer_replication", "megatron_config"]
        for name in variants + others:
            if getattr(self, name):
                raise UserError(f"iLoRA does not combine with LoRA's {name}: leave it out of ILoraConfig.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise UserError(
                f"iLoRA does not start from init_lora_weights={self.init_lora_weights!r}: "
                "use True (A random, B zero) or 'gaussian'."
            )


@dataclass(eq=False)
class _Condition:
    """What running code is conditioned on: z, and the w of the shared gates by adapter once computed."""

    z: Tensor | None
    weights: dict[str, Tensor]
    outer: "_Condition | None"
    of_forward: bool = False
    factors: dict[tuple, list[Tensor]] = field(default_factory=dict)  # those not handed out yet, see `factor_of`


# id of a tuner -> its condition. A context variable, so that threads that serve different users stay apart.
_RUNNING: ContextVar[MappingProxyType] = ContextVar("ilora_running", default=MappingProxyType({}))


class _CarryingCheckpoint:
    """A checkpoint function that takes along the z and w of *its* forward.

    The recomputation runs in the backward pass, when that forward is gone, perhaps in another thread. z and w
    enter as arguments, so that the gate is neither recomputed nor run backward more than once.
    """

    def __init__(self, tuner: "ILoraModel", checkpoint: Callable) -> None:
        self.tuner, self.checkpoint = tuner, checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.tuner.current_z() is None or torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        condition = self.tuner.condition()
        adapters = tuple(condition.weights)

        def run(z: Tensor, *rest: Any) -> Any:
            weights = dict(zip(adapters, rest, strict=False))
            with self.tuner.conditioned(z, weights):
                return function(*rest[len(adapters) :])

        return self.checkpoint(run, condition.z, *condition.weights.values(), *args, **kwargs)


class ILoraVariant(LoraVariant):
    """The mathematics of one adapted layer (PEFT asks one such object per layer and adapter)."""

    def __init__(self, tuner: "ILoraModel") -> None:
        self.tuner = tuner
        self.merged: Tensor | None = None  # w (1, K) of the user that is merged into the base weight

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """x (b, s, d_in), result (b, s, d_out) -> result + K alpha/r B diag(w) A dropout(x), Eq. 12."""
        A = module.lora_A[active_adapter]
        if module.cast_input_dtype_enabled is None and not _autocast_takes(x):
            x = x.to(A.weight.dtype)
        middle = A(module.lora_dropout[active_adapter](x))  # (b, s, r)
        return result + module.lora_B[active_adapter](middle * self.tuner.factor_of(module, active_adapter, middle))

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        self.merged = self.tuner.weights_of_one_user(module, active_adapter)
        return orig_weight + self._delta(module, active_adapter).to(orig_weight)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight.data - self._delta(module, active_adapter).to(orig_weight)

    def _delta(self, module: LoraLayer, adapter: str) -> Tensor:
        """dW of the merged user, laid out like the base weight: (d_out, d_in), for Conv1D (d_in, d_out)."""
        A = _mixed(module.lora_A[adapter].weight, self.merged)
        delta = module.scaling[adapter] * module.lora_B[adapter].weight.to(A.dtype) @ A
        return (delta.T if module.fan_in_fan_out else delta).detach()


def _autocast_takes(x: Tensor) -> bool:
    """x has the type that autocast multiplies in: cast to A's first, as LoRA does, it would be cast back at once."""
    kind = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type  # spares the name's making
    return torch.is_autocast_enabled(kind) and x.dtype == torch.get_autocast_dtype(kind)


def _factor(w: Tensor, scale: float, like: Tensor) -> Tensor:
    """w (b, K) -> scale K w, each repeated p times: (b, 1.., r), with the dimensions, type and place of `like`."""
    K, rank = w.shape[1], like.shape[-1]
    factor = (K * scale * w).repeat_interleave(rank // K, dim=1, output_size=rank).to(like)
    return factor.view(len(factor), *(1,) * (like.dim() - 2), rank)


def _mixed(A: Tensor, w: Tensor) -> Tensor:
    """A (r, d_in), w (1, K) -> diag(K w, each repeated p times) A, in float32 or better."""
    K = w.shape[1]
    return (K * w[0]).repeat_interleave(A.shape[0] // K).unsqueeze(1).to(A.device) * A


class ILoraModel(LoraModel):
    """PEFT's LoRA tuner plus gates: `lora_gate` holds the shared ones by adapter, a layer holds its own."""

    uses_shared_state = True

    # ---- the representations that the running forward is conditioned on

    def condition(self) -> _Condition | None:
        if torch.compiler.is_compiling():  # which cannot read a context variable
            return self._traced
        return _RUNNING.get().get(id(self))

    def _set_condition(self, condition: _Condition | None) -> None:
        self._traced = condition
        if not torch.compiler.is_compiling():
            _RUNNING.set(MappingProxyType({**_RUNNING.get(), id(self): condition}))

    def current_z(self) -> Tensor | None:
        condition = self.condition()
        return None if condition is None else condition.z

    def _enclosing(self) -> _Condition | None:
        """The context around a starting call; a condition of a forward is left from an interrupted one."""
        condition = self.condition()
        return condition.outer if condition is not None and condition.of_forward else condition

    def _given_or_enclosing(self, z: Tensor | None) -> Tensor | None:
        outer = self._enclosing()
        return outer.z if z is None and outer is not None else z

    @contextmanager
    def conditioned(self, z: Tensor, weights: dict[str, Tensor]) -> Iterator[None]:
        before = self.condition()
        self._set_condition(_Condition(z, weights, outer=before))
        try:
            yield
        finally:
            self._set_condition(before)

    def sequence_embeds(self, z: Tensor) -> AbstractContextManager[None]:
        """Condition every forward in the context on z (b, d), for callers that cannot pass the keyword."""
        return self.conditioned(z, {})

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = kwargs.pop("sequence_embeds", None)
        if given is not None and next(self._layers()).merged:
            raise UserError("the adapter is merged for one user: unmerge it before passing sequence_embeds.")
        z = self._given_or_enclosing(given)
        condition = _Condition(z, {}, self._enclosing(), of_forward=True)
        self._set_condition(condition)
        if z is not None:
            active = [name for name in self.active_adapters if name in self.lora_gate]
            condition.weights = {name: self.lora_gate[name](z) for name in active}
        if not torch.compiler.is_compiling():
            self._carry_through_checkpoints()
        return args, kwargs

    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        condition = self.condition()
        if condition is not None and condition.of_forward:
            self._set_condition(condition.outer)

    def _carry_through_checkpoints(self) -> None:
        for module in self._checkpointed:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _CarryingCheckpoint):
                module._gradient_checkpointing_func = _CarryingCheckpoint(self, function)

    def weights_of(self, layer: LoraLayer, adapter: str) -> Tensor:
        """w (b, K) of an adapted layer in the running forward."""
        if (z := self.current_z()) is None:
            raise UserError(
                "iLoRA got no sequence representations: pass sequence_embeds=z of shape (batch, gate_dim) or "
                "call inside `with model.sequence_embeds(z):` (and give transformers.Trainer "
                "remove_unused_columns=False, or it drops the column)."
            )
        if adapter in (weights := self.condition().weights):
            return weights[adapter]
        return self.gate_of(layer, adapter)(z)  # a layer's own gate, or a call below the whole model

    def factor_of(self, layer: LoraLayer, adapter: str, middle: Tensor) -> Tensor:
        """What the middle (b, .., r) of a layer is multiplied by: K alpha/r w, (b, 1.., r).

        Under a shared gate all layers multiply by the same. It is made once a forward and handed out as slices of one
        tensor, whose gradients are summed at once: on a GPU each small kernel more costs eager code a launch a layer.
        """
        condition = None if torch.compiler.is_compiling() else self.condition()
        if condition is None or not condition.of_forward or adapter not in condition.weights:
            return self._new_factor(layer, adapter, middle)
        like = middle.shape, middle.dtype, middle.device, torch.is_grad_enabled()
        left = condition.factors.get(key := (adapter, layer.scaling[adapter], *like))
        if not left:
            factor = self._new_factor(layer, adapter, middle)
            left = condition.factors[key] = list(factor.expand(self._number, *factor.shape).unbind())
        return left.pop()

    def _new_factor(self, layer: LoraLayer, adapter: str, middle: Tensor) -> Tensor:
        w, shape = self.weights_of(layer, adapter), middle.shape
        if shape[0] != w.shape[0] or len(shape) < self.least_dim:
            raise UserError(
                f"sequence_embeds has {w.shape[0]} rows but an adapted layer got {(*shape[:-1], layer.in_features)}: "
                "pass one representation per row of the batch (a layer that sees loose tokens, such as OPT's fc1 or a "
                "routed expert, cannot be adapted)."
            )
        return _factor(w, layer.scaling[adapter], middle)

    def weights_of_one_user(self, layer: LoraLayer, adapter: str) -> Tensor:
        """w (1, K) of the only row that the context has."""
        if (z := self.current_z()) is None or z.shape[0] != 1:
            raise UserError(
                "merging and exporting are for exactly one user: give z of shape (1, gate_dim), such as a "
                "group's mean, and merge inside `with model.sequence_embeds(z):`."
            )
        return self.gate_of(layer, adapter)(z).detach()

    def gate_of(self, layer: LoraLayer, adapter: str) -> Gate:
        return self.lora_gate[adapter] if adapter in self.lora_gate else layer.lora_gate[adapter]

    def generate(self, *args: Any, sequence_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's `generate`; a row of sequence_embeds serves all beams or samples of its prompt."""
        if (z := self._given_or_enclosing(sequence_embeds)) is None:
            return self.model.generate(*args, **kwargs)
        with self.sequence_embeds(z.repeat_interleave(self._rows_per_prompt(args, kwargs), dim=0)):
            return self.model.generate(*args, **kwargs)

    def _rows_per_prompt(self, args: tuple, kwargs: dict) -> int:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, GenerationConfig)]

        def setting(name: str) -> int:
            sources = (getattr(config, name, None) for config in (*given, self.model.generation_config))
            return next(value for value in (kwargs.get(name), *sources, 1) if value is not None)

        return max(setting("num_beams"), setting("num_return_sequences"))

    # ---- the adapter's life: injection, trainability, merging, saving

    def _layers(self) -> Iterator[LoraLayer]:
        return (module for module in self.model.modules() if isinstance(module, LoraLayer))

    def _pre_injection_hook(self, model: nn.Module, config: ILoraConfig, adapter_name: str) -> None:
        generates = hasattr(model, "prepare_inputs_for_generation")
        if config.task_type == "CAUSAL_LM" and not generates:
            raise UserError(f"{type(model).__name__} does not generate: use ILoraConfig(task_type=None).")
        if config.task_type is None and generates:
            raise UserError("PEFT hands sequence_embeds to generate only with task_type='CAUSAL_LM': set it.")
        self.least_dim = 3 if generates else 2  # of what a layer may get: (b, s, d_in) or (b, d_in)
        self.lora_gate = nn.ModuleDict()
        self._traced: _Condition | None = None
        self._checkpointed = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]
        self._hooks = (
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        self._number = sum(1 for _ in self._layers())
        if not config.gate_per_layer:
            first = next(layer for layer in self._layers() if adapter_name in layer.lora_A)
            with init_empty_weights() if kwargs.get("low_cpu_mem_usage") else nullcontext():
                self.lora_gate[adapter_name] = make_gate(config, like=first.lora_A[adapter_name].weight)
        self._gates_follow_adapters()

    @staticmethod
    def _create_new_module(config: ILoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        module = LoraModel._create_new_module(config, adapter_name, target, **kwargs)
        if type(module).__name__ not in _LAYERS:
            raise UserError(
                f"iLoRA adapts linear layers, not {type(target).__name__}: "
                "take it out of target_modules, or load the base model with another quantisation."
            )
        return module

    def _create_and_replace(
        self, config: ILoraConfig, adapter_name: str, *args: Any, current_key: str, **kwargs: Any
    ) -> None:
        super()._create_and_replace(config, adapter_name, *args, current_key=current_key, **kwargs)
        layer = self.model.get_submodule(current_key)
        layer.lora_variant[adapter_name] = ILoraVariant(self)
        layer.cast_input_dtype_enabled = None  # PEFT does not cast, the variant does; False: nobody does
        if config.gate_per_layer:
            if not hasattr(layer, "lora_gate"):
                layer.lora_gate = nn.ModuleDict()
                layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_gate")
            layer.lora_gate[adapter_name] = make_gate(config, like=layer.lora_A[adapter_name].weight)

    def _gates_follow_adapters(self) -> None:
        """A shared gate lives and is trainable as its adapter is; PEFT itself looks after layers only."""
        for name in list(self.lora_gate):
            matrices = [layer.lora_A[name].weight for layer in self._layers() if name in layer.lora_A]
            if matrices:
                self.lora_gate[name].requires_grad_(any(matrix.requires_grad for matrix in matrices))
            else:
                del self.lora_gate[name]

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        self._gates_follow_adapters()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        super().set_requires_grad(*args, **kwargs)
        self._gates_follow_adapters()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._gates_follow_adapters()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._gates_follow_adapters()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UserError("iLoRA does not mix adapters in a batch: use set_adapter, not adapter_names.")
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise UserError("iLoRA adapters do not add up by weight: export_lora a user of each and combine those.")

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(type(layer).__name__ == "TorchaoLoraLinear" for layer in self._layers()):
            raise UserError("PEFT merges torchao weights without the gate: export_lora the user instead.")

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        for module in self._checkpointed:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, _CarryingCheckpoint):
                module._gradient_checkpointing_func = function.checkpoint
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if f"lora_gate.{adapter_name}." in key:  # PEFT's own rule reaches modules of depth one only
            return key.replace(f"lora_gate.{adapter_name}.", "lora_gate.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)


def gate_weights(model: PeftModel, z: Tensor, adapter_name: str | None = None) -> Tensor:
    """w of the sequences z (b, d) under the active or named adapter: (b, K), or (layers, b, K) per layer."""
    tuner, name = model.base_model, adapter_name or model.active_adapter
    if name in tuner.lora_gate:
        return tuner.lora_gate[name](z)
    return torch.stack([tuner.gate_of(layer, name)(z) for layer in tuner._layers() if name in layer.lora_A])


def export_lora(model: PeftModel, z: Tensor, folder: str | Path, adapter_name: str | None = None) -> Path:
    """Write one user's iLoRA, B diag(w) A, as a plain PEFT LoRA checkpoint that needs none of this package.

    Args:
        z: (1, d), one sequence's representation or, for a group, the mean of its rows.
        folder: gets adapter_config.json and adapter_model.safetensors.
        adapter_name: the adapter to export; the active one if None.
    """
    tuner, name = model.base_model, adapter_name or model.active_adapter
    config = tuner.peft_config[name]
    tensors = {}
    with torch.no_grad(), tuner.sequence_embeds(z):
        for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items():
            if ".lora_A." in key:
                layer = tuner.get_submodule(key.removeprefix("base_model.").rsplit(".lora_A.", 1)[0])
                tensor = _mixed(tensor, tuner.weights_of_one_user(layer, name)).to(tensor.dtype)
            if ".lora_gate." not in key:
                tensors[key] = tensor.clone(memory_format=torch.contiguous_format)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    lora = LoraConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(LoraConfig) if f.init})
    lora.inference_mode = True
    lora.save_pretrained(str(folder))
    return Path(folder)


def register() -> None:
    """Make iLoRA known to PEFT; on import, as `PeftModel.from_pretrained` looks the type up by name."""
    PEFT_TYPE_TO_CONFIG_MAPPING[ILORA] = ILoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[ILORA] = ILoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[ILORA] = ILoraModel.prefix


register()
