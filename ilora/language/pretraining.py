"""The small base models: documents that teach a small Llama what Llama-2 already knows, and the training on them.

    history    the stories that a reader of the training split read, in order
    about      title and further text, where the data have any
    list       a list of titles, then the same in another order
    choice     a whole prompt, answered with an offered title: a valid answer, but an uninformed one

A choice is "spotted" if exactly one offered title was read: it is the answer, so that the base learns to compare the
offered titles with the history. Real prompts offer nothing that was read, so this gives no answer away; the answers of
other choices are random. `embedded` was made from readers without taste groups; a base for other data starts from its
weights. Its tokens may be whole titles: a model this small learns to choose among many titles, not to spell them.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ilora import artifacts, devices
from ilora.data.dataset import Dataset
from ilora.language import smollm2
from ilora.language.prompts import ITEM_TOKEN, NO_LABEL, Prompts, wording
from ilora.training.loop import TrainingArguments, fit

EMBEDDED = Path(__file__).parent / "embedded"
VOCABULARY = 4096
SPECIAL = ["<pad>", "<s>", "</s>", ITEM_TOKEN]
LONGEST_LIST = 22  # titles; prompts offer 20
LONGEST_HISTORY = 10  # of a choice, titles
KINDS = ("history", "about", "list", "choice")


@dataclass(frozen=True)
class Recipe:
    """Which documents a base reads, how it learns from them, and its shape."""

    documents: int  # in total, each read once
    batch_size: int
    learning_rate: float
    shares: tuple[float, ...]  # of KINDS; if the data have no texts, there are none of kind "about"
    spotted: float  # share of choices that offer exactly one title that was read
    invented: bool = False  # half the lists and choices hold invented titles, made of any tokens
    grow: bool = False  # short lists first
    epochs: int = 1  # parts of the documents, between which lists grow
    vocabulary: int = VOCABULARY
    across_spaces: bool = False  # tokens may span words
    width: int = 128  # of the model; many narrow heads are better than few wide ones at choosing from a list
    layers: int = 4
    heads: int = 8


OTHER_DATA = Recipe(
    128_000, 64, 2e-3, shares=(0.28, 0.02, 0.2, 0.5), spotted=0.7, vocabulary=3 * VOCABULARY, across_spaces=True
)


def base_content(base_model: str) -> str:
    """The content that the name of a base model stands for, as an input of `artifacts.key`."""
    if base_model == "smollm2":
        return smollm2.content()
    return (
        f"embedded {artifacts.content(EMBEDDED)}" if base_model == "embedded" else artifacts.model_content(base_model)
    )


def base_for(dataset: Dataset, seed: int = 0, device: str = "auto", recipe: Recipe = OTHER_DATA) -> Path:
    """Folder of the base for a data set, trained from the embedded one; made once and kept."""
    settings = {"seed": seed, "recipe": asdict(recipe)}
    inputs = {"data": dataset.key, "start": artifacts.content(EMBEDDED)}
    work = artifacts.home() / "training" / f"base-{artifacts.key(settings, inputs)}"

    def make(folder: Path) -> None:
        pretrain(dataset, folder, work, recipe, seed, device, start=EMBEDDED)

    folder = artifacts.cached("base", settings, inputs, make, note=f"a small language model for {dataset.name}")
    shutil.rmtree(work, ignore_errors=True)
    return folder


def pretrain(
    dataset: Dataset, folder: Path, work: Path, recipe: Recipe, seed: int = 0, device: str = "auto",
    start: Path | None = None,
) -> None:  # fmt: skip
    """Train a base on a data set's titles, further texts and training histories; save it to `folder` in bf16.

    work: folder of the checkpoints; start: folder of a base of the same shape, whose weights it starts from.
    """
    texts = [" " + " ".join(text.split()) for column in ("title", "text") for text in dataset.items[column] if text]
    tokenizer = train_tokenizer(list(wording(dataset.noun, dataset.verb)), texts, recipe)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(recipe))
    if start is not None:
        copy_weights(model, tokenizer, start)
    prompts = Prompts(tokenizer, list(dataset.items["title"]), dataset.noun, dataset.verb)
    rows = Documents(dataset, prompts, recipe.documents // recipe.epochs, seed, recipe)
    on_gpu = devices.pick_device(device).type == "cuda"
    arguments = TrainingArguments(
        recipe.epochs, recipe.batch_size, recipe.learning_rate, weight_decay=0.01, seed=seed, device=device,
        precision="bf16" if on_gpu else "no", micro_batch_size=None if on_gpu else 32,
        save_every=1000 if on_gpu else 200,
    )  # fmt: skip
    fit(Pretraining(model), rows, arguments, work)
    model.to(torch.bfloat16).cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(prompts: list[str], texts: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE; tokens that span words (Liu et al. 2025, SuperBPE) make prompts short."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not recipe.across_spaces)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(prompts * 1000 + texts, trainer)  # the prompts' words become whole tokens
    pad, bos, eos, _ = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def llama_config(recipe: Recipe) -> LlamaConfig:
    """The shape of a base: by default 0.8 M parameters, and `width` for each token."""
    return LlamaConfig(
        vocab_size=recipe.vocabulary, hidden_size=recipe.width, intermediate_size=11 * recipe.width // 4,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


@torch.no_grad()
def copy_weights(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, start: Path) -> None:
    """Copy the base in `start` into a model of its shape; tokens that it does not know get random embeddings."""
    base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.model.layers.load_state_dict(base.model.layers.state_dict())
    model.model.norm.load_state_dict(base.model.norm.state_dict())
    known, embedding = base.get_input_embeddings().weight, model.get_input_embeddings().weight
    embedding.normal_(std=known.std().item())
    vocabulary = AutoTokenizer.from_pretrained(start).get_vocab()
    for token, row in tokenizer.get_vocab().items():
        if token in vocabulary:
            embedding[row] = known[vocabulary[token]]


class Documents:
    """Row i of `number` is document i of an epoch: token ids and labels, which depend on (seed, epoch, i) alone."""

    def __init__(self, dataset: Dataset, prompts: Prompts, number: int, seed: int, recipe: Recipe):
        self.prompts, self.number, self.seed, self.recipe = prompts, number, seed, recipe
        events = dataset.events[dataset.events["user"].map(dataset.users["split"].eq("train"))]
        self.histories = [items.to_numpy() for _, items in events.groupby("user")["item"]]
        texts = {item: " ".join(text.split()) for item, text in enumerate(dataset.items["text"])}
        self.texts = {item: prompts.tokenizer(f" {text}", add_special_tokens=False).input_ids
                      for item, text in texts.items() if text}  # fmt: skip
        shares = [
            share if kind != "about" or self.texts else 0 for kind, share in zip(KINDS, recipe.shares, strict=True)
        ]
        self.shares = np.array(shares) / sum(shares)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.longest = epoch, min(LONGEST_LIST, 6 + 4 * epoch) if self.recipe.grow else LONGEST_LIST

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, row: int) -> tuple[list[int], list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch, row])
        context, learned = getattr(self, f"_{rng.choice(KINDS, p=self.shares)}")(rng)
        return context + learned, [NO_LABEL] * len(context) + learned

    def _history(self, rng) -> tuple[list[int], list[int]]:
        titles = self._some_history(rng, LONGEST_LIST)
        return self.prompts.opening, self.prompts.join(titles, hybrid=rng.random() < 0.5)

    def _about(self, rng) -> tuple[list[int], list[int]]:
        item = list(self.texts)[rng.integers(len(self.texts))]
        return self.prompts.opening[:1] + self.prompts.answers[item] + self.prompts.separator, self.texts[item]

    def _list(self, rng) -> tuple[list[int], list[int]]:
        titles, _ = self._some_titles(rng, rng.integers(2, self.longest + 1))
        order = rng.permutation(len(titles)) if rng.random() < 0.7 else range(len(titles))
        listed = self.prompts.join(titles, hybrid=rng.random() < 0.5)
        again = self.prompts.join([titles[place] for place in order], hybrid=False)
        return self.prompts.opening[:1] + self.prompts.offer + listed + self.prompts.question, [
            *again,
            self.prompts.end,
        ]

    def _choice(self, rng) -> tuple[list[int], list[int]]:
        number = rng.integers(2, self.longest + 1)
        titles, invented = self._some_titles(rng, LONGEST_HISTORY + number)
        history, offered = titles[:LONGEST_HISTORY], titles[-number:]
        if not invented:
            history = self._some_history(rng, LONGEST_HISTORY)
        answer = None
        if rng.random() < self.recipe.spotted:
            offered = [title for title in offered[1:] if title not in history]
            answer = rng.integers(len(offered) + 1)
            offered.insert(answer, history[rng.integers(len(history))])
        hybrid = rng.random() < 0.5
        answer = rng.integers(len(offered)) if answer is None else answer
        return self.prompts.write_titles(history, offered, hybrid), [*offered[answer], self.prompts.end]

    def _some_history(self, rng, longest: int) -> list[list[int]]:
        """Titles that one reader read in a row."""
        items = self.histories[rng.integers(len(self.histories))]
        length = min(len(items), rng.integers(3, longest + 1))
        first = rng.integers(len(items) - length + 1)
        return [self.prompts.answers[item] for item in items[first : first + length]]

    def _some_titles(self, rng, number: int) -> tuple[list[list[int]], bool]:
        """Titles, and whether they are invented."""
        if not self.recipe.invented or rng.random() < 0.5:
            known = self.prompts.answers
            return [known[item] for item in rng.choice(len(known), min(number, len(known)), replace=False)], False
        # A small pool makes titles share tokens, so that one token of context is not enough to copy.
        pool = rng.integers(len(SPECIAL), self.recipe.vocabulary, size=rng.choice([16, 64, VOCABULARY]))
        return [rng.choice(pool, size=rng.integers(1, 7)).tolist() for _ in range(number)], True


class Pretraining(nn.Module):
    """Next-token loss at the labels, in the form that `fit` trains."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def collate(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """input_ids and labels, (batch, longest), padded on the right, where a causal model needs no mask."""
        tokens, labels = ([torch.tensor(row[column]) for row in rows] for column in (0, 1))
        return {"input_ids": pad_sequence(tokens, True), "labels": pad_sequence(labels, True, NO_LABEL)}

    def length(self, row: tuple[list[int], list[int]]) -> int:
        return len(row[0])

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        return [{"params": list(self.parameters()), "weight_decay": weight_decay, "betas": (0.9, 0.95)}]

    def forward(self, batch: dict[str, Tensor], progress: float = 0.0, step_seed: int = 0) -> Tensor:
        states, labels = self.model.model(input_ids=batch["input_ids"]).last_hidden_state, batch["labels"][:, 1:]
        learned = labels != NO_LABEL
        logits = self.model.lm_head(states[:, :-1][learned]).float()  # (labels, vocabulary): no logits elsewhere
        return functional.cross_entropy(logits, labels[learned])
