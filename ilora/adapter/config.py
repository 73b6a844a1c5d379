"""The configuration of an iLoRA adapter: LoRA's, and the gate's."""

from dataclasses import dataclass, fields

from peft import LoraConfig, PeftType

from ilora.errors import UserError

# a member of PEFT's enum of adapter types, which has no public way to add one
ILORA = str.__new__(PeftType, "ILORA")
ILORA._name_ = ILORA._value_ = "ILORA"
PeftType.ILORA = PeftType._value2member_map_["ILORA"] = ILORA


@dataclass
class ILoraConfig(LoraConfig):
    """LoRA's configuration plus the gate's.  Raises UserError for options that are impossible or do not combine."""

    task_type: str | None = "CAUSAL_LM"  # PEFT's, such as SEQ_CLS; None for a module outside transformers
    num_experts: int = 4  # K, the experts that the rank is split into; divides r
    gate_dim: int = 64  # d, the width of the sequence representations
    gate: str = "linear"  # Eq. 11; "convolutional", the released code's; or "clusters": no learning, see ClusterGate
    gate_per_layer: bool = False  # one gate for each adapted layer instead of one that all share
    gate_top_k: int | None = None  # keep only the k largest weights of a row, renormalised; None keeps all

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ILORA
        K, top_k, start = self.num_experts, self.gate_top_k, self.init_lora_weights
        if K < 1 or self.gate_dim < 1:
            raise UserError("num_experts and gate_dim must be at least 1: correct them in ILoraConfig.")
        if odd := [rank for rank in (self.r, *self.rank_pattern.values()) if rank % K]:
            raise UserError(f"rank {odd[0]} is not divisible by num_experts={K}: choose a multiple of num_experts.")
        if self.gate not in ("linear", "convolutional", "clusters"):
            raise UserError(f"unknown gate {self.gate!r}: choose one of linear, convolutional, clusters.")
        if top_k is not None and not 2 <= top_k <= K:
            raise UserError(f"gate_top_k={top_k}: keep 2 to num_experts={K} (one weight would be the constant 1).")
        variants = [f.name for f in fields(self) if f.metadata.get("is_lora_variant")]
        others = ["use_qalora", "lora_bias", "target_parameters", "layer_replication", "megatron_config"]
        if used := [name for name in variants + others if getattr(self, name)]:
            raise UserError(f"iLoRA does not combine with LoRA's {used[0]}: leave it out of ILoraConfig.")
        if start not in (True, False, "gaussian"):
            raise UserError(f"init_lora_weights={start!r} does not work in iLoRA: use True or 'gaussian'.")
