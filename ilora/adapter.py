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
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import LoraVariant
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ilora.conditioning import Condition, Conditioning
from ilora.errors import UserError
from ilora.gates import Gate, check_representations, make_gate

# PEFT's LoRA layers that ask their variant; others (AWQ, EETQ, AQLM, embeddings, ...) would ignore the gate.
_LAYERS = {"Linear", "Linear8bitLt", "Linear4bit", "HqqLoraLinear", "GPTQLoraLinear", "TorchaoLoraLinear"}

# PEFT's task types of models that do not generate, by the end of their class's name
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class _TypeName(str):
    """PEFT's `PeftType` is a closed enum; this string compares and prints like a member of it."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    name = value

    def __str__(self) -> str:
        return f"PeftType.{self.value}"

    def __repr__(self) -> str:
        return f"<{self}: {self.value!r}>"

    def __format__(self, specification: str) -> str:
        return format(str(self), specification)


ILORA = _TypeName("ILORA")


@dataclass
class ILoraConfig(LoraConfig):
    """LoRA's configuration plus the gate's.

    Attributes:
        task_type: PEFT's, such as SEQ_CLS for a classifier; None for a module outside transformers.
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


class ILoraVariant(LoraVariant):
    """The mathematics of one adapted layer (PEFT asks one such object per layer and adapter)."""

    merged: Tensor | None = None  # w (1, K) of the user that is merged into the base weight

    def supports_lora_conversion(self) -> bool:
        return False

    def init(self, module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """The layer is wrapped again under this name: iLoRA sets a new variant, and plain LoRA has none."""
        del module.lora_variant[adapter_name]

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """x (b, s, d_in), result (b, s, d_out) -> result + K alpha/r B diag(w) A dropout(x), Eq. 12."""
        A = module.lora_A[active_adapter]
        if module.cast_input_dtype_enabled is not False and not _autocast_takes(x):
            x = x.to(A.weight.dtype)
        middle = A(module.lora_dropout[active_adapter](x))  # (b, s, r)
        return result + module.lora_B[active_adapter](
            middle * module.conditioning.factor(module, active_adapter, middle)
        )

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        self.merged = module.conditioning.weights_of_one_user(module, active_adapter)
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


class _LoraCasts:
    """A layer's `cast_input_dtype_enabled`: true, and PEFT casts x, if the layer has a plain LoRA adapter too."""

    def __init__(self, layer: LoraLayer) -> None:
        self.adapters, self.variants = layer.lora_A, layer.lora_variant

    def __bool__(self) -> bool:
        return len(self.adapters) > len(self.variants)


def _autocast_takes(x: Tensor) -> bool:
    """x has the type that autocast multiplies in: cast to A's first, as LoRA does, it would be cast back at once."""
    kind = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type  # spares the name's making
    return torch.is_autocast_enabled(kind) and x.dtype == torch.get_autocast_dtype(kind)


def _mixed(A: Tensor, w: Tensor) -> Tensor:
    """A (r, d_in), w (1, K) -> diag(K w, each repeated p times) A, in float32 or better."""
    K = w.shape[1]
    return (K * w[0]).repeat_interleave(A.shape[0] // K).unsqueeze(1).to(A.device) * A


class ILoraModel(LoraModel):
    """PEFT's LoRA tuner plus gates: `lora_gate` holds the shared ones by adapter, a layer holds its own."""

    uses_shared_state = True

    # ---- conditioned calls

    def sequence_embeds(self, z: Tensor) -> AbstractContextManager[None]:
        """Condition every forward in the context on z (b, d), for callers that cannot pass the keyword."""
        return self.conditioning.context(z)

    def generate(self, *args: Any, sequence_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's `generate`; a row of sequence_embeds serves all beams or samples of its prompt."""
        base, z = self.model, self.conditioning.given_or_enclosing(sequence_embeds)
        while isinstance(base, PeftModel):  # a model that was wrapped again
            base = base.get_base_model()
        if z is None:
            return base.generate(*args, **kwargs)
        check_representations(z, finite=True)
        repeats = _rows_per_prompt(base, args, kwargs)
        if repeats > 1 and getattr(base.config, "is_encoder_decoder", False):
            raise UserError(
                "an encoder-decoder model generates one sequence per prompt under sequence_embeds: "
                "leave num_beams and num_return_sequences at 1."
            )
        with self.sequence_embeds(z.repeat_interleave(repeats, dim=0)):
            return base.generate(*args, **kwargs)

    # ---- the adapter's life: injection, trainability, merging, saving

    def _layers(self) -> Iterator[LoraLayer]:
        return (module for module in self.model.modules() if isinstance(module, LoraLayer))

    def _pre_injection_hook(self, model: nn.Module, config: ILoraConfig, adapter_name: str) -> None:
        _check_task(model, config)
        shared = (layer.conditioning for layer in self._layers() if hasattr(layer, "conditioning"))
        if (conditioning := next(shared, None)) is None:
            conditioning = Conditioning(model, least_dim=3 if _generates(model) else 2)
        if any(conditioning.merged):
            raise UserError("the base model has a merged adapter: call unmerge_adapter() before you wrap it again.")
        self.conditioning, self.lora_gate = conditioning, conditioning.gates

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if adapter_name in self.lora_gate:  # of an earlier wrapper
            del self.lora_gate[adapter_name]
        trainable = [(parameter, parameter.requires_grad) for parameter in self.lora_gate.parameters()]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config, layers = self.peft_config[adapter_name], list(self._layers())
        if not config.gate_per_layer:
            matrix = next(layer for layer in layers if adapter_name in layer.lora_A).lora_A[adapter_name].weight
            with init_empty_weights() if kwargs.get("low_cpu_mem_usage") else nullcontext():
                self.lora_gate[adapter_name] = make_gate(config, like=matrix).requires_grad_(matrix.requires_grad)
        for parameter, flag in trainable:  # another adapter changes nothing here, as PEFT has it for the layers
            parameter.requires_grad_(flag)
        self.conditioning.merged = [layer.merged_adapters for layer in layers]

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
        layer.conditioning, layer.lora_variant[adapter_name] = self.conditioning, ILoraVariant()
        layer.cast_input_dtype_enabled = _LoraCasts(layer)  # the variant casts for itself; False: nobody casts
        if config.gate_per_layer:
            if not hasattr(layer, "lora_gate"):
                layer.lora_gate = nn.ModuleDict()
                layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_gate")
            layer.lora_gate[adapter_name] = make_gate(config, like=layer.lora_A[adapter_name].weight)
        elif adapter_name in getattr(layer, "lora_gate", ()):  # of an earlier wrapper
            del layer.lora_gate[adapter_name]

    # PEFT itself looks after the layers only; a shared gate is cast and trainable as its adapter is, and goes with it.

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._layers():
            if adapter_name in layer.lora_variant:
                self.conditioning.gate_of(layer, adapter_name).to(layer.lora_A[adapter_name].weight.dtype)

    def _train_active_gates(self, trainable: bool) -> None:
        for name, gate in self.lora_gate.items():
            gate.requires_grad_(trainable and name in self.conditioning.active)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        self.conditioning.active = self.active_adapters
        self._train_active_gates(not inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._train_active_gates(enabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for name in {adapter_names} if isinstance(adapter_names, str) else set(adapter_names):
            if name in self.lora_gate:
                self.lora_gate[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.lora_gate:
            del self.lora_gate[adapter_name]
        if self.active_adapters != self.conditioning.active:  # PEFT activates another one
            self.conditioning.active = self.active_adapters
            self._train_active_gates(True)

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
        self.conditioning.disconnect(model)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if f"lora_gate.{adapter_name}." in key:  # PEFT's own rule reaches modules of depth one only
            return key.replace(f"lora_gate.{adapter_name}.", "lora_gate.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)


def _generates(model: nn.Module) -> bool:
    return hasattr(model, "prepare_inputs_for_generation")


def _check_task(model: nn.Module, config: ILoraConfig) -> None:
    """Refuse a task type under which PEFT would not hand on sequence_embeds, or would not wrap the model."""
    name, generates = type(model).__name__, _generates(model)
    if config.task_type == "CAUSAL_LM" and not generates:
        bare = "FEATURE_EXTRACTION" if isinstance(model, PreTrainedModel) else None
        task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), bare)
        raise UserError(f"{name} does not generate text: use ILoraConfig(task_type={task!r}).")
    if config.task_type is None and generates:
        task = "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
        raise UserError(f"PEFT hands sequence_embeds to generate only under a task type: use task_type={task!r}.")


def _rows_per_prompt(model: nn.Module, args: tuple, kwargs: dict) -> int:
    """The rows that `generate` makes of each prompt: its beams or the sequences it returns."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, GenerationConfig)]

    def setting(name: str) -> int:
        sources = (getattr(config, name, None) for config in (*given, model.generation_config))
        return next(value for value in (kwargs.get(name), *sources, 1) if value is not None)

    return max(setting("num_beams"), setting("num_return_sequences"))


def _tuner_and_name(model: PeftModel, adapter_name: str | None) -> tuple[ILoraModel, str]:
    """The tuner of the model and the named adapter, the only active one if None.  Raises UserError."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, ILoraModel):
        raise UserError(
            f"{type(model).__name__} has no iLoRA adapter: pass what get_peft_model(base, ILoraConfig()) made."
        )
    names = tuner.active_adapters if adapter_name is None else [adapter_name]
    known = [name for name, config in tuner.peft_config.items() if isinstance(config, ILoraConfig)]
    if len(names) != 1 or names[0] not in known:
        wrong = f"{names[0]!r} is not an iLoRA adapter" if len(names) == 1 else f"several adapters are active, {names}"
        raise UserError(f"{wrong}: set adapter_name and name one of {', '.join(known)}.")
    return tuner, names[0]


def gate_weights(model: PeftModel, z: Tensor, adapter_name: str | None = None) -> Tensor:
    """w of the sequences z (b, d) under the active or named adapter: (b, K), or (layers, b, K) per layer."""
    tuner, name = _tuner_and_name(model, adapter_name)
    if name in tuner.lora_gate:
        return tuner.lora_gate[name](z)
    return torch.stack([layer.lora_gate[name](z) for layer in tuner._layers() if name in layer.lora_A])


def export_lora(model: PeftModel, z: Tensor, folder: str | Path, adapter_name: str | None = None) -> Path:
    """Write one user's iLoRA, B diag(w) A, as a plain PEFT LoRA checkpoint that needs none of this package.

    Args:
        z: (1, d), one sequence's representation or, for a group, the mean of its rows.
        folder: gets adapter_config.json and adapter_model.safetensors.
        adapter_name: the adapter to export; the active one if None.
    """
    tuner, name = _tuner_and_name(model, adapter_name)
    check_representations(z, finite=True)
    config = tuner.peft_config[name]
    tensors = {}
    with torch.no_grad(), tuner.conditioning.under(Condition(z, {})):
        for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items():
            if ".lora_A." in key:
                layer = tuner.get_submodule(key.removeprefix("base_model.").rsplit(".lora_A.", 1)[0])
                tensor = _mixed(tensor, layer.conditioning.weights_of_one_user(layer, name)).to(tensor.dtype)
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
