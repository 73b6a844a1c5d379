"""The recommender that asks a language model: prompt, projector and adapter around a frozen causal LM.

    text-only prompt, no adapter             the paper's Llama2 row
    hybrid prompt, LoRA, curriculum          LLaRA
    the same with a gate over K experts      iLoRA: the gate is fed with the recommender's `encode(history)`

It learns -log P(title of the next item | prompt), summed over the title's tokens (Eqs. 7 and 8), and answers in
two ways: `generate` writes a title greedily, `rank` scores each of the 20 candidates by its likelihood; `answer`
does both at once.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from ilora import artifacts
from ilora.adapter.config import ILoraConfig
from ilora.adapter.export import gate_weights
from ilora.data.dataset import Dataset
from ilora.data.windows import Questions, Row
from ilora.errors import UserError
from ilora.language.base_models import (
    Projector,
    adapted,
    check_causal,
    decoder_layers,
    greedy,
    load_language_model,
    only_at,
    position_limit,
)
from ilora.language.guidance import GUIDANCE
from ilora.language.prompts import NO_ITEM, NO_LABEL, PROMPT, Prompts, read_answer
from ilora.recommenders.base import SequenceModel

log = logging.getLogger(__name__)


def adapter_config(
    rank: int = 8,
    alpha: float = 32,
    dropout: float = 0.1,
    experts: int = 1,
    target_modules: str | list[str] = "all-linear",
    **gate: int | str | bool,
) -> LoraConfig:
    """The paper's adapter: LoRA for one expert, else iLoRA; on all linear layers but the output layer by default."""
    shape = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": target_modules}
    if experts == 1:
        return LoraConfig(task_type="CAUSAL_LM", **shape)
    return ILoraConfig(num_experts=experts, **shape, **gate)


def _log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """log P of each label, 0 for NO_LABEL: (rows, answer tokens, vocabulary), (rows, answer tokens) -> the latter."""
    flat = logits.float().flatten(0, 1)
    return -F.cross_entropy(flat, labels.flatten(), ignore_index=NO_LABEL, reduction="none").view_as(labels)


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
            raise UserError(f"unknown guidance {guidance!r}: choose one of {', '.join(GUIDANCE)}")
        self.prompts, self.guidance, self.seed = prompts, guidance, seed
        self.gated = isinstance(adapter, ILoraConfig)
        if self.gated and encoder is None:
            raise UserError("iLoRA's gate reads the recommender's representation: give an encoder")
        self.encoder, self.projector = encoder, None
        self._layers: tuple = ([], [])  # of the language model, and compiled ones
        check_causal(language_model, prompts)
        self.positions = position_limit(language_model.config)
        self.register_buffer("placeholder", self._placeholder(language_model.get_input_embeddings()), persistent=False)
        torch.manual_seed(seed)  # the projector first, so that LoRA and iLoRA start from the same one
        if encoder is not None:
            encoder.requires_grad_(False)
            device = self.placeholder.device
            self.projector = Projector(encoder.item_embeddings.cpu(), self.placeholder.float().cpu()).to(device)
            encoder.to(device)
        self.language_model = adapted(language_model, adapter) if adapter else language_model

    @torch.no_grad()
    def _placeholder(self, embedding: nn.Module) -> Tensor:
        """(hidden,) for a behaviour token in a text-only prompt: the item token's embedding.

        For a base model without that token it is the mean over the tokens of all titles. It enters as this vector, not
        as one more row of the embeddings, so that the base model and what it may write stay as they are.
        """
        table = embedding.weight
        known = self.prompts.has_item_token and self.prompts.item_token < len(table)
        tokens = [self.prompts.item_token] if known else sorted({t for title in self.prompts.answers for t in title})
        return embedding(torch.tensor(tokens, device=table.device)).float().mean(0).to(table.dtype)

    @property
    def device(self) -> torch.device:
        return next(self.language_model.parameters()).device

    def train(self, mode: bool = True) -> "LanguageRecommender":
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()  # frozen: no dropout in the representations
        return self

    def check(self, questions: Questions) -> None:
        """Raise UserError if a prompt with its answer is longer than the language model can read."""
        if self.positions is not None:
            longest = max((self.length(questions[row]) for row in range(len(questions))), default=0)
            self._fits(longest + self.prompts.longest)

    def _fits(self, tokens: int) -> None:
        if self.positions is not None and tokens > self.positions:
            raise UserError(
                f"a prompt with its answer has up to {tokens} tokens, but the base model reads {self.positions}: "
                "choose a smaller window, or another base model"
            )

    # ---------------------------------------------------------------- what `fit` needs

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        """Prompts, each followed by its target, see Prompts.batch, and the padded histories for the gate."""
        return self._collated(rows, [[target] for *_, target in rows])

    def length(self, row: Row) -> int:
        """Tokens of the row's prompt."""
        return self.prompts.length(row[0], row[1], self.encoder is not None)

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
        """Mean over rows of -log P(answer); hybrid with probability `progress`, else text-only (the curriculum).

        Padding is on the right, where causal attention needs no mask.
        """
        hybrid = np.random.default_rng(step_seed).random() < progress
        with self._compiled() if self.training else nullcontext():
            logits = self._logits(batch, hybrid)
        return -_log_likelihood(logits, batch["labels"]).sum() / len(batch["labels"])

    def compile_layers(self) -> None:
        """Compile the language model's layers for training; each padded length is compiled once, in seconds."""
        self.prompts.pad_to_multiple_of = 64  # tokens
        layers = decoder_layers(self.language_model)
        self._layers = layers, [torch.compile(layer, dynamic=False) for layer in layers]

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """Inside this context the language model runs the layers that `compile_layers` compiled, if it did."""
        layers, compiled = self._layers
        plain = list(layers)
        for place, layer in enumerate(compiled):
            layers[place] = layer
        try:
            yield
        finally:
            for place, layer in enumerate(plain):
                layers[place] = layer

    # ---------------------------------------------------------------- answers

    @torch.no_grad()
    def generate(self, rows: list[Row]) -> list[int | None]:
        """For each row the column of the candidate that the greedily written answer names; None if invalid."""
        if not rows:
            return []
        batch = self._batch(rows)
        limits = [1 + max(len(self.prompts.answers[item]) for item in candidates) for _, candidates, _ in rows]
        with greedy(self.language_model, self.prompts.end):
            written = self.language_model.generate(
                inputs_embeds=self._embeds(batch, hybrid=True),
                attention_mask=batch["prompt"].long(),
                max_new_tokens=max(limits),
                **self._guidance(batch),
            )
        return [self._column(row, tokens[:limit]) for row, tokens, limit in zip(rows, written, limits, strict=True)]

    def _column(self, row: Row, tokens: Tensor | list[int]) -> int | None:
        """Column of the offered title that a row's answer names, or None."""
        return read_answer(self.prompts.read(tokens), [self.prompts.titles[item] for item in row[1]])

    def rank(self, rows: list[Row]) -> Tensor:
        """(rows, candidates) log P(title and end | prompt).

        One forward pass a row: the candidates follow the prompt and see it and themselves, not each other. A language
        model that cannot read them like this, see `packs`, reads each candidate after a prompt of its own.
        """
        return self._candidates(rows)[0]

    def answer(self, rows: list[Row]) -> tuple[Tensor, list[int | None]]:
        """What `rank` and `generate` give, for the price of `rank` where an offered title is written.

        Ranking has read every candidate, so it knows whether the greedy answer is one of them.
        """
        scores, greedy = self._candidates(rows)
        column: list[int | None] = []
        for row, written in zip(rows, greedy, strict=True):
            column.append(self._column(row, self.prompts.answers[row[1][written.argmax()]]) if written.any() else None)
        other = np.flatnonzero(~greedy.any(1))
        for place, found in zip(other, self.generate([rows[place] for place in other]), strict=True):
            column[place] = found
        return scores, column

    def _candidates(self, rows: list[Row]) -> tuple[Tensor, np.ndarray]:
        """(rows, candidates) log P(title and end | prompt), and whether that is what is written greedily."""
        return self._packed(rows) if self.packs else self._one_by_one(rows)

    def _packed(self, rows: list[Row]) -> tuple[Tensor, np.ndarray]:
        batch = self._batch(rows, [candidates for _, candidates, _ in rows])
        return self._read(batch, attention_mask=self._mask(batch), position_ids=batch["position_ids"])

    def _one_by_one(self, rows: list[Row]) -> tuple[Tensor, np.ndarray]:
        columns = [[[item] for item in items] for items in zip(*(candidates for _, candidates, _ in rows), strict=True)]
        scores, greedy = zip(*(self._read(self._batch(rows, answers)) for answers in columns), strict=True)
        return torch.cat(scores, dim=1), np.concatenate(greedy, axis=1)

    @torch.no_grad()
    def _read(self, batch: dict[str, Tensor], **inputs: Tensor | dict) -> tuple[Tensor, np.ndarray]:
        """`_candidates` of a batch that holds them."""
        logits, labels = self._logits(batch, hybrid=True, **inputs), batch["labels"]
        answers = torch.arange(int(batch["column"].max()) + 1, device=labels.device)
        belongs = batch["column"][..., None] == answers  # (rows, answer tokens, answers)
        scores = _log_likelihood(logits, labels)[..., None].where(belongs, 0).sum(1)
        differs = (logits.argmax(-1) != labels)[..., None] & belongs
        return scores, ~differs.any(1).cpu().numpy()

    @cached_property
    def packs(self) -> bool:
        """Whether the language model reads all candidates in one pass as it reads each of them on its own.

        That takes attention that follows a given mask and given positions. It is tried out once, on a prompt that is
        longer than most; if not, the log says so.
        """
        training = self.training
        self.eval()
        rows, why = [self._long_row()], ""
        expected = self._one_by_one(rows)[0]
        try:
            found = self._packed(rows)[0]
            tolerance = 1e-3 if self._embedding().weight.dtype == torch.float32 else 4e-2  # of log P; no mask: more
            if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
                why = "it does not follow the given mask and positions"
        except Exception as error:  # whatever a model says to masks or positions that it does not know
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.train(training)
        if why:
            kind = self.language_model.config.model_type
            log.warning("%s needs a pass for each candidate, so ranking is slow (%s)", kind, why)
        return not why

    def _long_row(self) -> Row:
        """A question of at least 300 tokens, and longer than a sliding window of up to 1,024, if there is room."""
        window = getattr(self.language_model.config.get_text_config(), "sliding_window", None) or 0
        long, history = max(300, window + 50 if window <= 1024 else 0), np.arange(0)
        candidates = np.arange(min(3, len(self.prompts.titles)))
        room = (self.positions or 10**6) - self.length((history, candidates, 0)) - 4 * self.prompts.longest
        each = self.length((candidates, candidates, 0)) - self.length((history, candidates, 0))
        times = max(min(long, room) // each, 0)
        return np.tile(candidates, times), candidates, 0

    def _mask(self, batch: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """(rows, 1, query, key) to add to attention scores, 0 where a token attends to another, else the least number.

        A token attends to the prompt and to its own title, as far back as a sliding window reaches. Models whose layers
        differ get a mask for each type of layer.
        """
        part, position = batch["part"], batch["position_ids"]
        before = torch.ones(2 * part.shape[1:], dtype=torch.bool, device=part.device).tril()
        sees = before & ((part[:, None] == PROMPT) | (part[:, None] == part[:, :, None]))  # (rows, query, key)
        config, dtype = self.language_model.config.get_text_config(), self._embedding().weight.dtype
        window = getattr(config, "sliding_window", None) or part.shape[1]
        near = position[:, :, None] - position[:, None] < window
        types = set(getattr(config, "layer_types", None) or ["sliding_attention"])
        masks = {"full_attention": sees, "sliding_attention": sees & near}
        masks = {kind: torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(
            ~masks[kind], torch.finfo(dtype).min)[:, None] for kind in types}  # fmt: skip
        return masks if len(masks) > 1 else masks.popitem()[1]

    @torch.no_grad()
    def gate_weights(self, rows: list[Row]) -> Tensor:
        """Weights of the experts, Eq. 11: (rows, K), or (layers, rows, K) of a gate per layer; LoRA's one has 1."""
        if not self.gated:
            return torch.ones(len(rows), 1)
        z = self._guidance(self._batch(rows))["sequence_embeds"]
        return gate_weights(self.language_model, z).cpu()

    # ---------------------------------------------------------------- inside

    def _collated(self, rows: list[Row], answers: Sequence[Sequence[int]] | None = None) -> dict[str, Tensor]:
        """Prompts.batch of the rows, and the padded histories for the gate."""
        histories, candidates, _ = zip(*rows, strict=True)
        batch = self.prompts.batch(histories, candidates, answers, self.encoder is not None)
        batch["behaviour"] = (batch["owners"].flatten() != NO_ITEM).nonzero()[:, 0]  # places in the flattened batch
        self._fits(int(batch["prompt"].sum(1).max()) + self.prompts.longest)
        if self.encoder is not None:
            batch["history"] = self.encoder.pad(histories)
        return batch

    def _batch(self, rows: list[Row], answers: Sequence[Sequence[int]] | None = None) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self._collated(rows, answers).items()}

    def _embedding(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def _embeds(self, batch: dict[str, Tensor], hybrid: bool) -> Tensor:
        """(batch, tokens, hidden): token embeddings, behaviour tokens replaced in a hybrid prompt (Eq. 6)."""
        owned = batch["owners"] != NO_ITEM
        embeds = self._embedding()(batch["input_ids"].masked_fill(owned, 0))
        if self.encoder is None or not hybrid:
            return embeds.where(~owned[..., None], self.placeholder)
        places = batch["behaviour"]
        behaviour = self.projector(self.encoder.item_embeddings[batch["owners"].flatten()[places]]).to(embeds.dtype)
        return embeds.flatten(0, 1).index_copy(0, places, behaviour).view_as(embeds)

    def _guidance(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gate's input z (batch, gate_dim), see guidance.py; empty without a gate."""
        if not self.gated:
            return {}
        width = self.language_model.active_peft_config.gate_dim
        guide = GUIDANCE[self.guidance]
        return {"sequence_embeds": guide(batch, self.encoder, partial(self._embeds, hybrid=False), width, self.seed)}

    def _logits(self, batch: dict[str, Tensor], hybrid: bool, **inputs: Tensor | dict) -> Tensor:
        """(batch, answer tokens, vocabulary): what the model expects at the places of `labels`."""
        embeds, guidance = self._embeds(batch, hybrid), self._guidance(batch)
        if self.training and self._layers[1]:
            embeds.requires_grad_()  # in text-only prompts too, so that compiled layers meet one kind of input
        low = self._embedding().weight.dtype == torch.bfloat16  # so is the adapter's arithmetic, as in training
        with (
            torch.autocast(embeds.device.type, torch.bfloat16) if low else nullcontext(),
            only_at(self.language_model.get_output_embeddings(), batch["at"]),
        ):
            return self.language_model(inputs_embeds=embeds, use_cache=False, **inputs, **guidance).logits

    # ---------------------------------------------------------------- files

    def save_pretrained(self, folder: str | Path, base_model: str = "") -> None:
        """Write adapter/, encoder/, projector.safetensors and recommender.json; all of them or none."""
        about = {"base_model": base_model, "titles": self.prompts.titles, "wording": self.prompts.words}
        about |= {"guidance": self.guidance, "seed": self.seed}
        with artifacts.atomic_folder(folder) as temporary:
            if isinstance(self.language_model, PeftModel):
                self.language_model.save_pretrained(temporary / "adapter")
            if self.encoder is not None:
                self.encoder.save_pretrained(temporary / "encoder")
                state = {name: value.contiguous() for name, value in self.projector.state_dict().items()}
                safetensors.torch.save_file(state, temporary / "projector.safetensors")
            artifacts.write_json(temporary / "recommender.json", about)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base_model: str = "", device: str = "auto", dataset: Dataset | None = None
    ) -> "LanguageRecommender":
        """What `save_pretrained` wrote, around the base model it names or the one given."""
        folder = Path(folder)
        if not (folder / "recommender.json").is_file():
            raise UserError(f"{folder} holds no recommender.json: name a folder that save_pretrained wrote")
        about = json.loads((folder / "recommender.json").read_text(encoding="utf-8"))
        language_model, tokenizer = load_language_model(base_model or about["base_model"], dataset, device)
        prompts = Prompts(tokenizer, about["titles"], *about["wording"])
        encoder = SequenceModel.from_pretrained(folder / "encoder") if (folder / "encoder").is_dir() else None
        guided = {name: about[name] for name in ("seed", "guidance") if name in about}
        model = cls(language_model, prompts, encoder, **guided)
        try:
            if encoder is not None:
                model.projector.load_state_dict(safetensors.torch.load_file(folder / "projector.safetensors"))
            if (folder / "adapter").is_dir():
                model.language_model = PeftModel.from_pretrained(language_model, folder / "adapter", is_trainable=True)
                model.gated = isinstance(model.language_model.active_peft_config, ILoraConfig)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"what {folder} holds does not fit {base_model!r}: name the base model that it was trained on, "
                f"{about['base_model']!r}"
            ) from error
        return model.to(model.device).eval()
