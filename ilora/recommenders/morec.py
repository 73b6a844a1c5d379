"""MoRec: SASRec over item vectors that a pretrained text encoder computes from the titles."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ilora import artifacts
from ilora.data.dataset import Dataset
from ilora.errors import UserError
from ilora.recommenders.baselines import Popularity
from ilora.recommenders.sasrec import SASRec

NO_TOKEN = -1  # pads the tokens of titles
TEXT_LEARNING_RATE = 0.05  # of the pretrained text encoder, relative to the learning rate of the other layers


class MoRec(SASRec):
    """SASRec whose item embeddings come from titles; the text encoder is trained end to end (Yuan et al. 2023).

    A step encodes only the m distinct items of its batch. The loss is the cross entropy over them after each state,
    with the score of item i corrected by -log Q(i) (Yi et al. 2019); Q(i) = 1 - (1 - p(i))^n is the probability that
    i is among the n items of a batch sampled by popularity p.
    """

    def __init__(self, n_items: int, text: dict, title_tokens: int, **config: int | float) -> None:
        super().__init__(n_items, **config)
        self.config |= {"text": text, "title_tokens": title_tokens}
        self.items = TitleVectors(n_items, text, title_tokens, self.config["dim"])
        self.register_buffer("popularity", torch.full((n_items,), 1 / n_items))

    @classmethod
    def from_dataset(cls, dataset: Dataset, text_encoder: str | Path, **config: int | float) -> "MoRec":
        """Start from a sentence-transformers model, a folder or a name on the hub; UserError if it is not usable."""
        options = {"trust_remote_code": False} | artifacts.revision(text_encoder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(text_encoder, **options)
            encoder = AutoModel.from_pretrained(text_encoder, use_safetensors=True, dtype=torch.float32, **options)
        except (OSError, ValueError) as error:
            remedy = "name a folder or a model of the Hugging Face hub with safetensors weights"
            reason = str(error).splitlines()[0]
            raise UserError(f"text_encoder {str(text_encoder)!r} could not be loaded ({reason}): {remedy}") from error
        if encoder.config.is_encoder_decoder:
            raise UserError(f"text_encoder {str(text_encoder)!r} has a decoder: choose one that only encodes, as BERT")
        ids = [torch.tensor(row) for row in tokenizer(list(dataset.items["title"]), truncation=True).input_ids]
        tokens = pad_sequence(ids, batch_first=True, padding_value=NO_TOKEN)  # (titles, title_tokens)
        model = cls(len(tokens), json.loads(encoder.config.to_json_string()), tokens.shape[1], **config)
        model.items.text.load_state_dict(encoder.state_dict())
        model.items.tokens.copy_(tokens)
        model.popularity.copy_((counts := Popularity.from_dataset(dataset).counts) / counts.sum())
        return model

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """The text encoder has a smaller learning rate and no L2, to keep what it has learned in pretraining."""
        (group,) = super().parameter_groups(weight_decay)
        rest = [parameter for name, parameter in self.named_parameters() if not name.startswith("items.text.")]
        text = {"params": list(self.items.text.parameters()), "weight_decay": 0.0, "lr_scale": TEXT_LEARNING_RATE}
        return [group | {"params": rest}, text]

    def forward(self, batch: Tensor, progress: float = 0.0, step_seed: int = 0) -> Tensor:
        """Cross entropy of the next item after each state, over the items of the batch."""
        self.items.vectors.fill_(torch.nan)  # this step changes them
        distinct, index = batch.unique(return_inverse=True)  # (m,), (batch, window + 1); padding is the largest id
        vectors = self.items.encode(distinct)  # (m, dim)
        history, mask = index[:, :-1], batch[:, :-1] != self.n_items
        states = self.states(vectors[history], mask, n=history.shape[1])  # (batch, window, dim)
        n, p = (batch != self.n_items).sum(), self.popularity[distinct.clamp(max=self.n_items - 1)]
        log_q = (-torch.expm1(n * torch.log1p(-p))).clamp(min=1e-12).log()
        logits = states[mask] @ vectors.T - log_q.masked_fill(distinct == self.n_items, torch.inf)
        return nn.functional.cross_entropy(logits, index[:, 1:][mask], reduction="sum") / mask.numel()


class TitleVectors(nn.Module):
    """Text encoder, mean over tokens, LayerNorm, linear map; `vectors` keeps the results in eval mode, NaN before."""

    def __init__(self, n_items: int, text: dict, title_tokens: int, dim: int) -> None:
        super().__init__()
        self.text = AutoModel.from_config(AutoConfig.for_model(**text), dtype=torch.float32)
        width = self.text.config.hidden_size
        self.norm, self.projection = nn.LayerNorm(width), nn.Linear(width, dim)
        nn.init.normal_(self.projection.weight, std=0.02 / width**0.5)  # vectors as small as embeddings at the start
        nn.init.zeros_(self.projection.bias)
        self.register_buffer("tokens", torch.zeros(n_items, title_tokens, dtype=torch.long))  # of the titles
        self.register_buffer("vectors", torch.full((n_items + 1, dim), torch.nan))

    @property
    def weight(self) -> Tensor:
        """The vectors of all items and of padding, as in nn.Embedding: (n_items + 1, dim)."""
        every_item = torch.arange(len(self.vectors), device=self.vectors.device)
        if self.training:
            return self.encode(every_item)
        if self.vectors.isnan().any():
            with torch.no_grad():
                self.vectors.copy_(self.encode(every_item))
        return self.vectors

    def forward(self, items: Tensor) -> Tensor:
        return self.weight[items]

    def encode(self, items: Tensor) -> Tensor:
        """Compute vectors from titles: (m,) item ids -> (m, dim)."""
        tokens = self.tokens[items.clamp(max=len(self.tokens) - 1)]  # (m, title_tokens); padding takes any title
        order = (tokens != NO_TOKEN).sum(1).argsort()  # batches of 64 titles of similar length
        means = []
        for batch in tqdm(tokens[order].split(64), "encoding titles", delay=2, disable=self.training):
            batch = batch[:, : (batch != NO_TOKEN).sum(1).max()]
            mask = (batch != NO_TOKEN).long()
            states = self.text(input_ids=batch.clamp(min=0), attention_mask=mask).last_hidden_state
            means.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))  # (titles, hidden)
        return self.projection(self.norm(torch.cat(means)[order.argsort()])) * (items < len(self.tokens))[:, None]
