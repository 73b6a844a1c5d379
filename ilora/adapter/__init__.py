"""iLoRA as a PEFT adapter: one LoRA pair whose experts are mixed separately for every row of a batch.

Letters, as in the paper's section 3.2:

    b  rows of the batch      K  num_experts               z  (b, d) `sequence_embeds`, Eq. 10
    s  tokens of a row        r  rank of the LoRA pair     w  (b, K) gate weights softmax(W_g z), Eq. 11
    d  gate_dim, width of z   p  r / K, rank of one expert (the paper's r*)

    Eq. 9    A = [A_1 .. A_K] (r, d_in), B = [B_1 .. B_K] (d_out, r): LoRA's matrices, cut into K blocks
    Eq. 12   dW = sum_k w_k B_k A_k = B diag(w, each repeated p times) A

The layers multiply LoRA's middle (compiled: B) by one factor per row; no expert's output is ever formed. The scale is
the released code's alpha / p = K alpha / r: a uniform gate is LoRA with scale alpha / r, and num_experts=1 is LoRA.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from ilora.adapter.config import ILORA, ILoraConfig
from ilora.adapter.export import export_lora, gate_weights
from ilora.adapter.layer import ILoraVariant
from ilora.adapter.model import ILoraModel

# `PeftModel.from_pretrained` finds the classes of a saved adapter by its type's name
PEFT_TYPE_TO_CONFIG_MAPPING[ILORA] = ILoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[ILORA] = ILoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[ILORA] = ILoraModel.prefix
