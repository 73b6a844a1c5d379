"""Language models: any Hugging Face causal LM, or `embedded`, the small Llama that the package brings, grown or not."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ilora import runs, smollm2
from ilora.data import Dataset
from ilora.pretraining import EMBEDDED, RECIPES, base_for


def load_language_model(
    base_model: str = "embedded", dataset: Dataset | None = None, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM, frozen and in eval mode, and its tokenizer.

    base_model: a name on the Hugging Face hub, a folder, "smollm2", see smollm2.py, "embedded", or "embedded-large",
        which is grown from it; for a
        `dataset` other than the world the embedded model is first trained on the titles and the training users'
        histories, once, and kept; the large one for the world, too.
    """
    folder = base_model
    if base_model == "embedded" and (dataset is None or dataset.name == "world"):
        folder = EMBEDDED
    elif base_model in RECIPES:
        if dataset is None:
            raise runs.UserError(f"base_model {base_model!r} is made for a data set: name the data set")
        folder = base_for(dataset, device=device, recipe=RECIPES[base_model])
    elif base_model == "smollm2":
        folder = smollm2.folder()
    elif not Path(base_model).is_dir() and base_model.count("/") != 1:
        raise runs.UserError(f"base_model {base_model!r} is no folder and no name of the form owner/model")
    place = runs.pick_device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise runs.UserError(
            f"base_model {base_model!r} could not be loaded ({str(error).splitlines()[0]}): name a folder or a model "
            "of the Hugging Face hub with safetensors weights"
        ) from error
    return model.to(place).eval().requires_grad_(False), tokenizer


@contextmanager
def only_last(model: PreTrainedModel, keep: int) -> Iterator[None]:
    """Within it the last layer computes queries and all behind attention for the last `keep` tokens alone; 0: for all.

    For forward passes of which only the logits of those tokens are read: they are the same, and a model of n layers
    saves most of an n-th of its arithmetic. Keys and values are of all tokens, so a cache is whole. The layer is left
    as it is if it lacks Llama's names, or is checkpointed: then it is computed again outside.
    """
    last = getattr(model.get_decoder(), "layers", [None])[-1]
    attention, mlp = getattr(last, "self_attn", None), getattr(last, "mlp", None)
    by_token = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None), mlp]
    fits = all(by_token) and hasattr(mlp, "down_proj") and not getattr(last, "gradient_checkpointing", False)
    with ExitStack() as hooks:
        for module in by_token if keep and fits else ():
            for hook in _cut(module, keep):
                hooks.callback(hook.remove)
        yield


def _cut(module: nn.Module, keep: int) -> tuple[RemovableHandle, RemovableHandle]:
    """Let a module of (batch, tokens, dim) compute the last `keep` tokens; zeros stand for the others."""
    before = 0

    def cut(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal before
        before = max(inputs[0].shape[1] - keep, 0)
        return (inputs[0][:, before:],)

    def fill(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
        return F.pad(output, (0, 0, before, 0))

    return module.register_forward_pre_hook(cut), module.register_forward_hook(fill)


class Projector(nn.Module):
    """Recommender's item embedding (..., dim) -> behaviour token (..., hidden): Linear, GELU, Linear.

    Starts near the placeholder's embedding (hidden,) for every item, so that the first hybrid prompt is close to
    the text-only one, and with inputs of unit variance, whatever the scale of the recommender's embeddings.
    """

    def __init__(self, embeddings: Tensor, placeholder: Tensor):
        super().__init__()
        dim, hidden = embeddings.shape[1], len(placeholder)
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        with torch.no_grad():
            self.layers[0].weight.div_(embeddings.std())
            self.layers[-1].weight.mul_(placeholder.float().std())
            self.layers[-1].bias.copy_(placeholder)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings)
