"""The recommender that asks a language model: prompt, projector and adapter around a frozen causal LM.

    text-only prompt, no adapter             the paper's Llama2 row
    hybrid prompt, LoRA, curriculum          LLaRA
    the same with a gate over K experts      iLoRA: the gate is fed with the recommender's `encode(history)`

It learns -log P(title of the next item | prompt), summed over the title's tokens (Eqs. 7 and 8), and answers in
two ways: `generate` writes a title greedily, `rank` scores each of the 20 candidates by its likelihood.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ilora import data, runs
from ilora.adapter import ILoraConfig, gate_weights
from ilora.guidance import GUIDANCE
from ilora.language_model import Projector, load_language_model
from ilora.prompts import NO_ITEM, NO_LABEL, Prompts, read_answer
from ilora.recommenders import SASRec

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
        """The rows of an index array, a mask or a slice."""
        return Questions(self.sequences.take(index), self.n_items, self.seed)


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
        encoder: SASRec | None = None,
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
        batch = self._batch(rows, answers=False)
        longest = [1 + max(len(self.prompts.answers[item]) for item in candidates) for _, candidates, _ in rows]
        written = self.language_model.generate(
            inputs_embeds=self._embeds(batch, hybrid=True),
            attention_mask=batch["attention_mask"],
            max_new_tokens=max(longest),
            do_sample=False,
            pad_token_id=self.prompts.tokenizer.pad_token_id or self.prompts.end,
            **self._guidance(batch),
        )
        own = [tokens[:length] for tokens, length in zip(written, longest, strict=True)]  # whatever others may write
        texts = self.prompts.tokenizer.batch_decode(own, skip_special_tokens=True)
        offered = [[self.prompts.titles[item] for item in candidates] for _, candidates, _ in rows]
        return [read_answer(text, titles) for text, titles in zip(texts, offered, strict=True)]

    @torch.no_grad()
    def rank(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> Tensor:
        """(rows, candidates) log P(title and end | prompt).

        One forward pass a row: the candidates stand behind the prompt and see it and themselves, not each other.
        """
        batch = self._batch(rows, answers=False)
        answers = [
            [[*self.prompts.answers[item], self.prompts.end] for item in candidates] for _, candidates, _ in rows
        ]
        longest = max(len(answer) for row in answers for answer in row)
        labels = torch.tensor(
            [[answer + [NO_LABEL] * (longest - len(answer)) for answer in row] for row in answers], device=self.device
        )  # (rows, candidates, longest)
        spread = self._behind_the_prompt(batch, labels)
        logits = self._logits(spread, hybrid=True, keep=labels.shape[1] * (longest - 1) + 1).float().log_softmax(-1)
        first = logits[:, :1].expand(-1, labels.shape[1], -1)[:, :, None]  # all candidates start at the question
        later = logits[:, 1:].unflatten(1, (labels.shape[1], longest - 1))
        chosen = torch.cat([first, later], dim=2).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return (chosen * (labels != NO_LABEL)).sum(-1)

    def _behind_the_prompt(self, batch: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The batch with each candidate's tokens but its last, a mask that keeps candidates apart, and positions."""
        _, candidates, longest = labels.shape
        prompt, extra = batch["input_ids"].shape[1], candidates * (longest - 1)
        tokens = labels[:, :, :-1].clamp(min=0).flatten(1)
        real = torch.cat([batch["attention_mask"].bool(), torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        together = torch.ones(prompt + extra, prompt + extra, dtype=torch.bool, device=self.device)
        owner = torch.arange(extra, device=self.device) // max(longest - 1, 1)
        together[prompt:, prompt:] = owner[:, None] == owner[None]
        mask = causal_mask(real[:, None] & together, self._embedding().weight.dtype)
        length = batch["attention_mask"].sum(1, keepdim=True)
        behind = length + torch.arange(longest - 1, device=self.device).repeat(candidates)[None]
        at = torch.cat([(batch["attention_mask"].cumsum(1) - 1).clamp(min=0), behind], dim=1)
        owners = torch.cat([batch["owners"], torch.full_like(tokens, NO_ITEM)], dim=1)
        ids = torch.cat([batch["input_ids"], tokens], dim=1)
        asked = torch.cat([batch["prompt"], torch.zeros_like(tokens, dtype=torch.bool)], dim=1)
        theirs = {"input_ids": ids, "owners": owners, "prompt": asked}
        return batch | theirs | {"attention_mask": mask, "position_ids": at}

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
            window, padding = self.encoder.window, len(self.prompts.titles)
            padded = [[padding] * (window - len(history)) + list(history)[-window:] for history in histories]
            batch["history"] = torch.tensor(padded)
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
        encoder = SASRec.from_pretrained(folder / "encoder") if (folder / "encoder").is_dir() else None
        guided = {name: about[name] for name in ("seed", "guidance") if name in about}
        model = cls(language_model, prompts, encoder, **guided)
        if encoder is not None:
            model.projector.load_state_dict(safetensors.torch.load_file(folder / "projector.safetensors"))
        if (folder / "adapter").is_dir():
            model.language_model = PeftModel.from_pretrained(language_model, folder / "adapter", is_trainable=True)
            model.gated = isinstance(model.language_model.active_peft_config, ILoraConfig)
        return model.to(model.device).eval()
