"""The configuration of an iLoRA adapter: LoRA's, and the gate's."""

import dataclasses
from dataclasses import dataclass

from peft import LoraConfig

from ilora.adapter.gates import Gate
from ilora.errors import UserError


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
