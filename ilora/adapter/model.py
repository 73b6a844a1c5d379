"""The tuner that PEFT calls: LoRA's, plus the gates and the calls that take sequence representations."""

from contextlib import AbstractContextManager
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from transformers import GenerationConfig

from ilora.adapter.conditioning import Condition, Conditioning, current_task
from ilora.adapter.config import ILoraConfig
from ilora.adapter.gates import GATE_CLASSES, check_representations
from ilora.adapter.layer import ILoraVariant, InputCasts
from ilora.errors import UserError

# PEFT's LoRA layers that call their variant; others (AWQ, torchao's merge, embeddings, ...) ignore the gate.
LAYERS = {"Linear", "Linear8bitLt", "Linear4bit", "HqqLoraLinear", "GPTQLoraLinear"}


class ILoraModel(LoraModel):
    """PEFT's LoRA tuner plus gates: `lora_gate` holds the shared ones by adapter, or each layer holds one."""

    uses_shared_state = True

    def sequence_embeds(self, z: Tensor) -> AbstractContextManager[None]:
        """Condition every forward in the context on z (b, d), for callers that cannot pass the keyword."""
        check_representations(z)
        return self.conditioning.under(Condition(self.conditioning.representations(z), task=current_task()))

    def generate(self, *args: Any, sequence_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's `generate`; a row of sequence_embeds serves all beams or samples of its prompt."""
        base, z = self.model, self.conditioning.representations(sequence_embeds)
        while isinstance(base, PeftModel):  # a model that was wrapped again
            base = base.get_base_model()
        if z is None:
            return base.generate(*args, **kwargs)
        check_representations(z)
        configs = [value for value in (*args, *kwargs.values()) if isinstance(value, GenerationConfig)]
        settings = [kwargs, *map(vars, configs), vars(base.generation_config)]
        names = ("num_beams", "num_return_sequences")  # the larger one says how many rows a prompt becomes
        repeats = max(next((s[name] for s in settings if s.get(name) is not None), 1) for name in names)
        if repeats > 1 and getattr(base.config, "is_encoder_decoder", False):
            raise UserError("encoder-decoders generate one sequence per prompt: leave beams and sequences at 1.")
        with self.conditioning.under(Condition(z.repeat_interleave(repeats, dim=0), task=current_task())):
            return base.generate(*args, **kwargs)

    def adapted_layers(self) -> list[LoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    def _pre_injection_hook(self, model: nn.Module, config: ILoraConfig, adapter_name: str) -> None:
        generates = hasattr(model, "prepare_inputs_for_generation")
        if config.task_type == (None if generates else "CAUSAL_LM"):  # PEFT would not pass on sequence_embeds
            others = "SEQ_CLS, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION, or None for a module outside transformers"
            tasks = "CAUSAL_LM or SEQ_2_SEQ_LM" if generates else others
            raise UserError(f"set task_type in ILoraConfig to what fits {type(model).__name__}: {tasks}.")
        shared = (layer.conditioning for layer in self.adapted_layers() if hasattr(layer, "conditioning"))
        conditioning = next(shared, None) or Conditioning(model)
        if any(conditioning.merged):
            raise UserError("the base model has a merged adapter: call unmerge_adapter() before you wrap it again.")
        self.conditioning, self.lora_gate = conditioning, conditioning.gates

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if adapter_name in self.lora_gate:  # of an earlier wrapper
            del self.lora_gate[adapter_name]
        trainable = [(parameter, parameter.requires_grad) for parameter in self.lora_gate.parameters()]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config, layers = self.peft_config[adapter_name], self.adapted_layers()
        if not config.gate_per_layer:
            A = next(layer for layer in layers if adapter_name in layer.lora_A).lora_A[adapter_name].weight
            self.lora_gate[adapter_name] = GATE_CLASSES[config.gate](config).to(A).requires_grad_(A.requires_grad)
        for parameter, flag in trainable:  # a new adapter changes nothing here, nor does PEFT change the layers
            parameter.requires_grad_(flag)
        self.conditioning.merged = [layer.merged_adapters for layer in layers]
        per_layer = [layer.lora_gate for layer in layers if adapter_name in getattr(layer, "lora_gate", ())]
        self.conditioning.layer_gates[adapter_name] = [gates[adapter_name] for gates in per_layer]

    @staticmethod
    def _create_new_module(config: ILoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        module = LoraModel._create_new_module(config, adapter_name, target, **kwargs)
        if type(module).__name__ not in LAYERS:
            remedy = "change target_modules, or load the base with another quantisation"
            raise UserError(f"iLoRA adapts linear layers, not {type(target).__name__}: {remedy}.")
        return module

    def _create_and_replace(self, config: ILoraConfig, name: str, *args: Any, current_key: str, **kwargs: Any) -> None:
        super()._create_and_replace(config, name, *args, current_key=current_key, **kwargs)
        layer = self.model.get_submodule(current_key)
        layer.conditioning, layer.lora_variant[name] = self.conditioning, ILoraVariant()
        layer.cast_input_dtype_enabled = InputCasts(layer)
        if not hasattr(layer, "lora_gate"):
            layer.lora_gate = nn.ModuleDict()
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_gate")
        if config.gate_per_layer:
            layer.lora_gate[name] = GATE_CLASSES[config.gate](config).to(layer.lora_A[name].weight)
        elif name in layer.lora_gate:  # of an earlier wrapper
            del layer.lora_gate[name]

    # PEFT handles the layers; below, a shared gate gets its adapter's type, is trainable as it is, and goes with it
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.adapted_layers():
            if adapter_name in layer.lora_variant:
                self.conditioning.gate_of(layer, adapter_name).to(layer.lora_A[adapter_name].weight.dtype)

    def _train_active_gates(self, trainable: bool) -> None:
        self.conditioning.active = self.active_adapters
        for name, gate in self.lora_gate.items():
            gate.requires_grad_(trainable and name in self.conditioning.active)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        self._train_active_gates(not inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._train_active_gates(enabled)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in set(names) & set(self.lora_gate):
            self.lora_gate[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.lora_gate:
            del self.lora_gate[adapter_name]
        if self.active_adapters != self.conditioning.active:  # PEFT activates another one
            self._train_active_gates(True)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if f"lora_gate.{adapter_name}." in key:  # PEFT's rule reaches modules of depth one only
            return key.replace(f"lora_gate.{adapter_name}.", "lora_gate.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self.conditioning.disconnect(model)
        return model

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise UserError("iLoRA adapters do not add up by weight: export_lora a user of each and combine those.")
