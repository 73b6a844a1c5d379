"""A language model as a recommender: prompt, projector and adapter around a frozen causal language model.

text-only prompt, no adapter             the paper's Llama2 row
hybrid prompt, LoRA, curriculum          LLaRA
the same with a gate over K experts      iLoRA: the gate gets the recommender's `encode(history)`
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from ilora import artifacts
from ilora.adapter import ILoraConfig, gate_weights
from ilora.adapter.gates import ClusterGate
from ilora.data import Dataset, Questions
from ilora.data.windows import Row
from ilora.errors import UserError
from ilora.evaluation import OPEN
from ilora.language import base_models, ranking
from ilora.language.adapted_layers import adapted
from ilora.language.graphs import record_passes
from ilora.language.prompts import PROMPT, Prompts, first_line, read_answer
from ilora.recommenders.base import SequenceModel, k_means

GUIDANCE = ("sequence", "random", "token")  # what the gate may get, see `LanguageRecommender.guide`


class LanguageRecommender(nn.Module):
    """A frozen language model that learns -log P(title of the next item | prompt), Eqs. 7 and 8.

    encoder: a trained recommender, kept frozen; None for text-only prompts. adapter: LoRA or iLoRA; None for the
    language model as it is. seed: of the projector, and of random guidance. guidance: what iLoRA's gate gets.
    """

    batch_size = 64  # rows that are evaluated at once, at most; `fit` sets it to the micro-batch that fits

    def __init__(
        self, language_model: nn.Module, prompts: Prompts, encoder: SequenceModel | None = None,
        adapter: LoraConfig | None = None, seed: int = 0, guidance: str = "sequence",
    ):  # fmt: skip
        super().__init__()
        if guidance not in GUIDANCE:
            raise UserError(f"unknown guidance {guidance!r}: choose one of {', '.join(GUIDANCE)}")
        self.prompts, self.guidance, self.seed, self.gated = prompts, guidance, seed, isinstance(adapter, ILoraConfig)
        if self.gated and encoder is None:
            raise UserError("iLoRA's gate reads the recommender's representation: give an encoder")
        self.encoder, self.projector, self.compiled, self.n_items = encoder, None, False, len(prompts.titles)
        if encoder is not None and encoder.n_items != self.n_items:
            raise UserError(f"the encoder is of {encoder.n_items} items, not {self.n_items}: train it on this data")
        base_models.check_causal(language_model.requires_grad_(False), prompts)
        self.positions = getattr(language_model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        # for item tokens: their embedding or, in a model without the item token, the mean over all titles' tokens
        embedding = language_model.get_input_embeddings()
        known = prompts.has_item_token and prompts.item_token < len(embedding.weight)
        tokens = [prompts.item_token] if known else sorted({token for title in prompts.answers for token in title})
        placeholder = embedding(torch.tensor(tokens, device=embedding.weight.device)).detach().float().mean(0)
        self.register_buffer("placeholder", placeholder.to(embedding.weight.dtype), persistent=False)
        torch.manual_seed(seed)  # the projector first, so that LoRA and iLoRA start from the same one
        if encoder is not None:
            device = embedding.weight.device
            self.projector = base_models.Projector(encoder.item_embeddings.cpu(), self.placeholder.cpu()).to(device)
            encoder.requires_grad_(False).eval().to(device)
        self.language_model = adapted(language_model, adapter) if adapter else language_model

    @property
    def embedding(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        return next(self.language_model.parameters()).device

    def batch(self, rows: list[Row], answers: Sequence[Sequence[int]] = ()) -> dict[str, Tensor]:
        """`collate` with these `answers`, on the model's device."""
        return {name: value.to(self.device) for name, value in self.collate(rows, answers).items()}

    def collate(self, rows: list[Row], answers: Sequence[Sequence[int]] | None = None) -> dict[str, Tensor]:
        """`Prompts.batch` with these `answers`, by default the targets, and histories, on the CPU."""
        histories, candidates, targets = zip(*rows, strict=True)
        answers = [[target] for target in targets] if answers is None else answers
        batch = self.prompts.batch(histories, candidates, answers, self.encoder is not None)
        self._check_length(int((batch["part"] == PROMPT).sum(1).max()))
        if self.encoder is not None:
            batch["history"] = self.encoder.stack(histories)
        return batch

    def length(self, row: Row) -> int:
        """Tokens of the row's prompt."""
        return len(self.prompts.write(row[0], row[1], self.encoder is not None))

    def check(self, rows: Questions) -> None:
        """Raise UserError if a prompt with its answer is longer than the language model can read."""
        self._check_length(max(map(self.length, rows), default=0))

    def _check_length(self, prompt: int) -> None:
        if (tokens := prompt + self.prompts.longest) > self.positions:
            problem = f"a prompt with its answer has up to {tokens} tokens, but the base model reads {self.positions}"
            raise UserError(f"{problem}: choose a smaller window, or another base model")

    def embeds(self, batch: dict[str, Tensor], hybrid: bool) -> Tensor:
        """(batch, tokens, hidden): token embeddings; those of item tokens are an item's in a hybrid prompt (Eq. 6)."""
        embeds = self.embedding(batch["input_ids"].masked_fill(batch["input_ids"] == self.prompts.item_token, 0))
        items = self.placeholder.expand(len(batch["places"]), -1)
        if self.encoder is not None and hybrid:
            items = self.projector(self.encoder.item_embeddings[batch["items"]])
        return embeds.flatten(0, 1).index_copy(0, batch["places"], items.to(embeds.dtype)).view_as(embeds)

    def guide(self, batch: dict[str, Tensor]) -> Tensor:
        """z (batch, gate_dim), what the gate gets, by the setting `guidance`; a row of z depends only on that row.

        sequence: the encoder's state (Eq. 10). As in Fig. 5, random: normal numbers, fixed by seed and history; token:
        the mean of the prompt's token embeddings, projected at random (our choice), on the scale of SASRec's states.
        """
        history = batch["history"]
        if self.guidance == "sequence":
            return self.encoder.encode(history)
        width = self.language_model.active_peft_config.gate_dim
        if self.guidance == "random":
            rows = [np.random.default_rng([self.seed, *items]).standard_normal(width) for items in history.tolist()]
            return torch.tensor(np.array(rows), dtype=torch.float32, device=history.device)
        in_prompt = (batch["part"] == PROMPT)[..., None].float()  # (batch, tokens, 1)
        mean = (self.embeds(batch, hybrid=False).float() * in_prompt).sum(1) / in_prompt.sum(1)  # (batch, hidden)
        projection = torch.randn(mean.shape[1], width, generator=torch.Generator().manual_seed(self.seed))
        return nn.functional.layer_norm(mean @ projection.to(mean.device), (width,), eps=1e-12)

    def _gate_input(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sequence_embeds": self.guide(batch)} if self.gated else {}

    @torch.no_grad()
    def fit_gate(self, rows: Questions) -> None:
        """Place the centres of ClusterGates by k-means over the encoder's states of these histories."""
        if gates := [part for part in self.language_model.modules() if isinstance(part, ClusterGate)]:
            parts = self.encoder.stack(rows.sequences.history).to(self.device).split(1000)
            states = torch.cat([self.encoder.encode(part) for part in parts]).cpu().numpy()
            _, centres = k_means(states, len(gates[0].centres), self.seed, rows.sequences.user)
            for gate in gates:
                gate.centres.copy_(torch.from_numpy(centres))

    def logits(self, batch: dict[str, Tensor], hybrid: bool = True, **inputs: Tensor | dict) -> Tensor:
        """(batch, labels, vocabulary): what the model predicts for the batch's labels."""
        embeds, gate_input = self.embeds(batch, hybrid), self._gate_input(batch)
        if self.training and self.compiled:
            embeds.requires_grad_()  # in text-only prompts too, so that compiled layers get one kind of input
        low = self.embedding.weight.dtype == torch.bfloat16  # then the adapter computes in it, too, as in training
        at, head = batch["at"][..., None], self.language_model.get_output_embeddings()
        with (
            self._eager_unless_training(),
            torch.autocast(embeds.device.type, torch.bfloat16) if low else nullcontext(),
            head.register_forward_pre_hook(lambda _, states: (states[0].take_along_dim(at, dim=1),)),
        ):
            return self.language_model(inputs_embeds=embeds, use_cache=False, **inputs, **gate_input).logits

    def forward(self, batch: dict[str, Tensor], progress: float = 1.0, step_seed: int = 0) -> Tensor:
        """Mean over rows of -log P(answer); hybrid with probability `progress`, else text-only (the curriculum)."""
        hybrid = np.random.default_rng(step_seed).random() < progress
        return -ranking.log_likelihood(self.logits(batch, hybrid), batch["labels"]).sum() / len(batch["labels"])

    def train(self, mode: bool = True) -> "LanguageRecommender":
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()  # frozen: no dropout in the representations
        return self

    def trainable_state(self) -> dict[str, Tensor]:
        """What training changes: trained parameters, and what a gate keeps in buffers."""
        state = self.state_dict(keep_vars=True).items()
        return {name: value for name, value in state if value.requires_grad or ".lora_gate." in name}

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Weight decay on the projector alone, as in LLaRA."""
        parts = [(self.language_model, 0.0), *([(self.projector, weight_decay)] if self.projector else [])]
        return [{"params": [p for p in part.parameters() if p.requires_grad], "weight_decay": w} for part, w in parts]

    def compile_layers(self) -> None:
        """Compile the language model's layers for training; each padded length is compiled once, in seconds."""
        self.prompts.pad_to_multiple_of = 32  # tokens
        torch._dynamo.config.recompile_limit = 64  # shapes; layers run uncompiled after more
        lists = [module for module in self.language_model.modules() if isinstance(module, nn.ModuleList)]
        for layer in max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=()):
            layer.compile(dynamic=False, options={"combo_kernels": True})  # small ones share a launch
        getattr(self, "forget_passes", lambda: None)()  # of an earlier training
        small = sum(p.numel() for p in self.language_model.parameters()) < 1e9  # recorded passes keep their memory
        if small and self.device.type == "cuda" and isinstance(self.language_model, PeftModel):
            self.forget_passes = record_passes(self.language_model)
        self.compiled = True

    def checkpoint_layers(self) -> None:
        """Compute the layers' activations again in the backward pass instead of keeping them.  Raises UserError."""
        if not self.language_model.supports_gradient_checkpointing:
            raise UserError("gradient_checkpointing must be False: this base model does not have it")
        self.language_model.activation_checkpointing_enable({"use_reentrant": False})

    def _eager_unless_training(self) -> AbstractContextManager:
        return torch.compiler.set_stance("force_eager") if self.compiled and not self.training else nullcontext()

    packs = cached_property(ranking.fits_one_pass)  # whether all candidates are scored in one pass

    def score(self, rows: list[Row]) -> Tensor:
        """(rows, candidates) log P(title and end | prompt)."""
        return ranking.scores(self, rows, self.packs)[0]

    @torch.no_grad()
    def generate(self, rows: list[Row]) -> list[int | None]:
        """For each row the column of the candidate that the greedily written answer names; None if invalid."""
        batch = self.batch(rows)
        limits = [1 + max(len(self.prompts.answers[item]) for item in candidates) for _, candidates, _ in rows]
        autocast = torch.autocast(self.device.type, torch.bfloat16, self.embedding.weight.dtype == torch.bfloat16)
        with self._eager_unless_training(), autocast, base_models.greedy(self.language_model, self.prompts.end):
            written = self.language_model.generate(
                inputs_embeds=self.embeds(batch, hybrid=True), attention_mask=(batch["part"] == PROMPT).long(),
                max_new_tokens=max(limits), **self._gate_input(batch),
            )  # fmt: skip
        texts = [self.prompts.read(tokens[:limit]) for tokens, limit in zip(written, limits, strict=True)]
        offered = [[self.prompts.titles[item] for item in candidates] for _, candidates, _ in rows]
        return list(map(read_answer, texts, offered))

    def answer(self, rows: list[Row]) -> tuple[Tensor, list[int]]:
        """What `score` and `generate` give, but OPEN, left to `generate`, where greedy decoding writes no candidate."""
        scores, written = ranking.scores(self, rows, self.packs)
        columns = dict(reversed(written.nonzero().tolist()))  # row number -> the first candidate that it writes
        return scores, [columns.get(number, OPEN) for number in range(len(rows))]

    @torch.no_grad()
    def gate_weights(self, rows: list[Row]) -> Tensor:
        """The experts' weights, Eq. 11: (rows, K), or (layers, rows, K) with a gate per layer; (rows, 1) for LoRA."""
        if not self.gated:
            return torch.ones(len(rows), 1)
        return gate_weights(self.language_model, self.guide(self.batch(rows))).cpu()

    def save_pretrained(self, folder: str | Path, base_model: str = "") -> None:
        """Write adapter/, encoder/, projector.safetensors and recommender.json, or none; base_model "": its source."""
        about = {"base_model": base_model or self.language_model.name_or_path, "titles": self.prompts.titles}
        about |= {"wording": self.prompts.words, "guidance": self.guidance, "seed": self.seed}
        about |= {"batch_size": self.batch_size, "quantize": base_models.quantization(self.language_model)}
        with artifacts.atomic_folder(folder, "recommender.json") as temporary:
            if isinstance(self.language_model, PeftModel):
                self.language_model.save_pretrained(temporary / "adapter")
            if self.encoder is not None:
                self.encoder.save_pretrained(temporary / "encoder")
                safetensors.torch.save_model(self.projector, temporary / "projector.safetensors")
            about |= {"files": sorted(path.name for path in temporary.iterdir())}
            artifacts.write_json(temporary / "recommender.json", about)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base_model: str = "", device: str = "auto", dataset: Dataset | None = None
    ) -> "LanguageRecommender":
        """What `save_pretrained` wrote, around the base model it names or the given one; `dataset`: of "embedded"."""
        folder, file = Path(folder), Path(folder, "recommender.json")
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            for name in about.get("files", ()):
                (folder / name).stat()  # all that was saved is there
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {file} ({error}): name a folder that save_pretrained wrote") from error
        base_model, quantize = base_model or about["base_model"], about.get("quantize", "")
        language_model, tokenizer = base_models.load_language_model(base_model, dataset, device, quantize)
        prompts = Prompts(tokenizer, about["titles"], *about["wording"])
        encoder = SequenceModel.from_pretrained(folder / "encoder") if (folder / "encoder").is_dir() else None
        model = cls(language_model, prompts, encoder, None, about.get("seed", 0), about.get("guidance", "sequence"))
        model.batch_size = about.get("batch_size", model.batch_size)
        try:
            if encoder is not None:
                safetensors.torch.load_model(model.projector, folder / "projector.safetensors")
            if (folder / "adapter").is_dir():
                model.language_model = PeftModel.from_pretrained(language_model, folder / "adapter", is_trainable=True)
                config = model.language_model.active_peft_config
                model.gated = isinstance(config, ILoraConfig)
                if base_model == "embedded" != Path(config.base_model_name_or_path).name and dataset is None:
                    raise ValueError("the base of this adapter was made for its data set")
        except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
            remedy = f"name the base model that it was trained on, {about['base_model']!r}, for 'embedded' with dataset"
            raise UserError(f"{folder} does not fit {base_model!r} ({first_line(str(error))}): {remedy}") from error
        return model.to(model.device).eval()
