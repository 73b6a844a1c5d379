"""The recommender that asks a language model: prompt, projector and adapter around a frozen causal LM.

    text-only prompt, no adapter             the paper's Llama2 row
    hybrid prompt, LoRA, curriculum          LLaRA
    the same with a gate over K experts      iLoRA: the gate is fed with the recommender's `encode(history)`

It learns -log P(title of the next item | prompt), summed over the title's tokens (Eqs. 7 and 8), and answers in
two ways: `generate` writes a title greedily, `rank` scores each of the 20 candidates by its likelihood; `answer`
does both at once.
"""

import json
from copy import copy
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from ilora import data, runs
from ilora.adapter import ILoraConfig, gate_weights
from ilora.guidance import GUIDANCE
from ilora.language_model import Projector, load_language_model, only_last
from ilora.morec import MoRec  # noqa: F401, one of those that SequenceModel.from_pretrained finds
from ilora.prompts import NO_ITEM, NO_LABEL, Prompts, read_answer
from ilora.recommenders import SequenceModel
from ilora.writing import write

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Questions:
    """Sequences with candidates; row i is (history without padding, candidates, target).

    `set_epoch` draws other candidates for each epoch of training; epoch 0 has those of `seed` itself.
    """

    def __init__(self, sequences: data.Sequences, n_items: int, seed: int):
        self.sequences, self.n_items, self.seed = sequences, n_items, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.candidates = data.candidates(self.sequences, self.n_items, self.seed + 1_000_003 * epoch)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray, int]:
        length = self.sequences.length[row]
        history = self.sequences.history[row, self.sequences.history.shape[1] - length :]
        return history, self.candidates[row], int(self.sequences.target[row])

    def take(self, index: np.ndarray) -> "Questions":
        """The rows of an index array, a mask or a slice, with the candidates that they have now."""
        part = copy(self)
        part.sequences, part.candidates = self.sequences.take(index), self.candidates[index]
        return part


def adapter_config(rank: int = 8, alpha: float = 32, dropout: float = 0.1, experts: int = 1, **gate) -> LoraConfig:
    """The paper's adapter on all seven projections: LoRA for one expert, else iLoRA."""
    shape = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": TARGET_MODULES}
    if experts == 1:
        return LoraConfig(task_type="CAUSAL_LM", **shape)
    return ILoraConfig(num_experts=experts, **shape, **gate)


def causal_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, 1, query, key) to add to attention scores: 0 where a token sees another, else the least number.

    visible: (batch, 1 or query, key) bool, what may be seen if it stands before. Every token sees itself, even
    padding: a softmax over nothing has NaN gradients in CUDA's attention kernels.
    """
    tokens = visible.shape[-1]
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=visible.device).tril()
    sees = visible & before | torch.eye(tokens, dtype=torch.bool, device=visible.device)
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


class LanguageRecommender(nn.Module):
    """A frozen language model that is asked for the next item.

    encoder: a trained recommender, kept frozen; None for text-only prompts, which need none.
    adapter: configuration of LoRA or iLoRA; None for the language model as it is.
    guidance: what iLoRA's gate reads, a name in GUIDANCE.
    seed: of the projector, and of a guidance that draws numbers.
    """

    def __init__(
        self,
        language_model: nn.Module,
        prompts: Prompts,
        encoder: SequenceModel | None = None,
        adapter: LoraConfig | None = None,
        seed: int = 0,
        guidance: str = "sequence",
    ):
        super().__init__()
        if guidance not in GUIDANCE:
            raise runs.UserError(f"unknown guidance {guidance!r}: choose one of {', '.join(GUIDANCE)}")
        self.prompts, self.guidance, self.seed = prompts, guidance, seed
        self.gated = isinstance(adapter, ILoraConfig)
        if self.gated and encoder is None:
            raise runs.UserError("iLoRA's gate reads the recommender's representation: give an encoder")
        self.encoder, self.projector = encoder, None
        torch.manual_seed(seed)  # the projector first, so that LoRA and iLoRA start from the same one
        if encoder is not None:
            encoder.requires_grad_(False)
            placeholder = language_model.get_input_embeddings().weight[prompts.item_token].detach()
            self.projector = Projector(encoder.item_embeddings.cpu(), placeholder.float().cpu()).to(placeholder.device)
            encoder.to(placeholder.device)
        self.language_model = get_peft_model(language_model, adapter) if adapter else language_model

    @property
    def device(self) -> torch.device:
        return next(self.language_model.parameters()).device

    def train(self, mode: bool = True) -> "LanguageRecommender":
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()  # frozen: no dropout in the representations
        return self

    # ---------------------------------------------------------------- what `fit` asks for

    def collate(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> dict[str, Tensor]:
        """Prompts with answers and labels, see Prompts.batch, and the padded histories for the gate."""
        return self._batch(rows, answers=True)

    def length(self, row: tuple[np.ndarray, np.ndarray, int]) -> int:
        return self.prompts.length(row[0], row[1])

    def trainable_state(self) -> dict[str, Tensor]:
        """What training changes: trained parameters, and the running statistics of a convolutional gate."""
        state = self.state_dict(keep_vars=True).items()
        return {name: value for name, value in state if value.requires_grad or ".lora_gate." in name}

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Weight decay on the projector alone, as LLaRA has it."""
        groups = [{"params": [p for p in self.language_model.parameters() if p.requires_grad], "weight_decay": 0.0}]
        if self.projector is not None:
            groups.append({"params": list(self.projector.parameters()), "weight_decay": weight_decay})
        return groups

    def forward(self, batch: dict[str, Tensor], progress: float = 1.0, step_seed: int = 0) -> Tensor:
        """Mean over rows of -log P(answer); hybrid with probability `progress`, else text-only (the curriculum)."""
        hybrid = np.random.default_rng(step_seed).random() < progress
        answer = int((batch["labels"] != NO_LABEL).sum(1).max())  # longest answer, tokens
        logits = self._logits(batch, hybrid, keep=answer + 1)[:, :-1]  # (batch, answer, vocabulary)
        labels = batch["labels"][:, -answer:]
        known = labels != NO_LABEL
        log_likelihood = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return -(log_likelihood * known).sum() / len(labels)

    # ---------------------------------------------------------------- answers

    @torch.no_grad()
    def generate(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> list[int | None]:
        """For each row the column of the candidate that the greedily written answer names; None if invalid."""
        if not rows:
            return []
        batch = self._batch(rows, answers=False)
        offered = [[self.prompts.answers[item] for item in candidates] for _, candidates, _ in rows]
        embeds = self._embeds(batch, hybrid=True)
        written = write(self.language_model, embeds, batch["attention_mask"], offered, **self._guidance(batch))
        return [self._read(row, tokens) for row, tokens in zip(rows, written, strict=True)]

    def _read(self, row: tuple[np.ndarray, np.ndarray, int], tokens: Tensor | list[int]) -> int | None:
        """Column of the offered title that a row's answer names, or None."""
        text = self.prompts.tokenizer.decode(tokens, skip_special_tokens=True)
        return read_answer(text, [self.prompts.titles[item] for item in row[1]])

    def rank(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> Tensor:
        """(rows, candidates) log P(title and end | prompt).

        One forward pass a row: the candidates stand behind the prompt and see it and themselves, not each other.
        """
        return self._candidates(rows)[0]

    def answer(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> tuple[Tensor, list[int | None]]:
        """What `rank` and `generate` give, for the price of `rank` where an offered title is written.

        The ranking's forward pass has read every candidate, so it knows whether the greedy answer is one of them.
        """
        scores, greedy = self._candidates(rows)
        column: list[int | None] = []
        for row, written in zip(rows, greedy, strict=True):
            column.append(self._read(row, self.prompts.answers[row[1][written.argmax()]]) if written.any() else None)
        other = np.flatnonzero(~greedy.any(1))
        for place, found in zip(other, self.generate([rows[place] for place in other]), strict=True):
            column[place] = found
        return scores, column

    @torch.no_grad()
    def _candidates(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> tuple[Tensor, np.ndarray]:
        """(rows, candidates) log P(title and end | prompt), and whether that is what is written greedily."""
        batch = self._batch(rows, answers=False)
        behind = self.prompts.titles_behind([candidates for _, candidates, _ in rows])
        behind = {name: value.to(self.device) for name, value in behind.items()}
        first, following, column = behind["first"], behind["following"], behind["column"]
        own = column[..., None] == torch.arange(first.shape[1], device=self.device)  # (rows, tokens behind, candidates)
        logits = self._logits(self._behind_the_prompt(batch, behind), hybrid=True, keep=1 + column.shape[1]).float()
        total, best = logits.logsumexp(-1), logits.argmax(-1)  # (rows, 1 + tokens behind)
        start = logits[:, 0].gather(1, first) - total[:, :1]  # all candidates start at the question
        later = logits[:, 1:].gather(-1, following[..., None])[..., 0] - total[:, 1:]
        scores = start + later[..., None].where(own, 0).sum(1)
        otherwise = (best[:, 1:] != following)[..., None] & own
        return scores, ((best[:, :1] == first) & ~otherwise.any(1)).cpu().numpy()

    def _behind_the_prompt(self, batch: dict[str, Tensor], behind: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the candidates' titles, a mask that keeps candidates apart, and positions."""
        tokens, column = behind["input_ids"], behind["column"]
        prompt = batch["input_ids"].shape[1]
        mask = F.pad(batch["attention_mask"].bool(), (0, tokens.shape[1]), value=True)
        sees = mask[:, None].repeat(1, mask.shape[1], 1)  # (rows, query, key)
        sees[:, prompt:, prompt:] = column[:, :, None] == column[:, None]
        length = batch["attention_mask"].sum(1, keepdim=True)
        positions = torch.cat([(batch["attention_mask"].cumsum(1) - 1).clamp(min=0), length + behind["place"]], dim=1)
        return batch | {
            "input_ids": torch.cat([batch["input_ids"], tokens], dim=1),
            "owners": F.pad(batch["owners"], (0, tokens.shape[1]), value=NO_ITEM),
            "prompt": F.pad(batch["prompt"], (0, tokens.shape[1]), value=False),
            "attention_mask": causal_mask(sees, self._embedding().weight.dtype),
            "position_ids": positions,
        }

    @torch.no_grad()
    def gate_weights(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> Tensor:
        """Weights of the experts, Eq. 11: (rows, K), or (layers, rows, K) of a gate per layer; LoRA's one has 1."""
        if not self.gated:
            return torch.ones(len(rows), 1)
        z = self._guidance(self._batch(rows, answers=False))["sequence_embeds"]
        return gate_weights(self.language_model, z).cpu()

    # ---------------------------------------------------------------- inside

    def _batch(self, rows: list[tuple[np.ndarray, np.ndarray, int]], answers: bool) -> dict[str, Tensor]:
        histories, candidates, targets = zip(*rows, strict=True)
        batch = self.prompts.batch(histories, candidates, targets if answers else None, self.encoder is not None)
        if self.encoder is not None:
            batch["history"] = self.encoder.pad(histories)
        batch["prompt"] = batch["attention_mask"].bool()
        if answers:
            batch["prompt"] &= batch["labels"] == NO_LABEL
        return batch if answers else {name: value.to(self.device) for name, value in batch.items()}

    def _embedding(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def _embeds(self, batch: dict[str, Tensor], hybrid: bool) -> Tensor:
        """(batch, tokens, hidden): token embeddings, behaviour tokens replaced in a hybrid prompt (Eq. 6)."""
        embeds = self._embedding()(batch["input_ids"])
        if self.encoder is None or not hybrid:
            return embeds
        owned = batch["owners"] != NO_ITEM
        behaviour = self.projector(self.encoder.item_embeddings[batch["owners"][owned]])
        return embeds.masked_scatter(owned[..., None], behaviour.to(embeds.dtype))

    def _guidance(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gate's input z (batch, gate_dim), see guidance.py; empty without a gate."""
        if not self.gated:
            return {}
        width = self.language_model.active_peft_config.gate_dim
        guide = GUIDANCE[self.guidance]
        return {"sequence_embeds": guide(batch, self.encoder, self._embedding(), width, self.seed)}

    def _logits(self, batch: dict[str, Tensor], hybrid: bool, keep: int) -> Tensor:
        """(batch, keep, vocabulary): logits at the last `keep` tokens only."""
        mask, positions = batch["attention_mask"], batch.get("position_ids")
        if positions is None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            mask = causal_mask(mask.bool()[:, None], self._embedding().weight.dtype)
        with only_last(self.language_model, keep):
            return self.language_model(
                inputs_embeds=self._embeds(batch, hybrid),
                attention_mask=mask,
                position_ids=positions,
                logits_to_keep=keep,
                **self._guidance(batch),
            ).logits

    # ---------------------------------------------------------------- files

    def save_pretrained(self, folder: str | Path, base_model: str = "") -> None:
        """Write adapter/, encoder/, projector.safetensors and recommender.json; all of them or none."""
        about = {"base_model": base_model, "titles": self.prompts.titles, "wording": self.prompts.words}
        about |= {"guidance": self.guidance, "seed": self.seed}
        with runs.atomic_folder(folder) as temporary:
            if isinstance(self.language_model, PeftModel):
                self.language_model.save_pretrained(temporary / "adapter")
            if self.encoder is not None:
                self.encoder.save_pretrained(temporary / "encoder")
                state = {name: value.contiguous() for name, value in self.projector.state_dict().items()}
                safetensors.torch.save_file(state, temporary / "projector.safetensors")
            runs.write_json(temporary / "recommender.json", about)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base_model: str = "", device: str = "auto", dataset: data.Dataset | None = None
    ) -> "LanguageRecommender":
        """What `save_pretrained` wrote, around the base model it names or the one given."""
        folder = Path(folder)
        if not (folder / "recommender.json").is_file():
            raise runs.UserError(f"{folder} holds no recommender.json: name a folder that save_pretrained wrote")
        about = json.loads((folder / "recommender.json").read_text(encoding="utf-8"))
        language_model, tokenizer = load_language_model(base_model or about["base_model"], dataset, device)
        prompts = Prompts(tokenizer, about["titles"], *about["wording"])
        encoder = SequenceModel.from_pretrained(folder / "encoder") if (folder / "encoder").is_dir() else None
        guided = {name: about[name] for name in ("seed", "guidance") if name in about}
        model = cls(language_model, prompts, encoder, **guided)
        if encoder is not None:
            model.projector.load_state_dict(safetensors.torch.load_file(folder / "projector.safetensors"))
        if (folder / "adapter").is_dir():
            model.language_model = PeftModel.from_pretrained(language_model, folder / "adapter", is_trainable=True)
            model.gated = isinstance(model.language_model.active_peft_config, ILoraConfig)
        return model.to(model.device).eval()
