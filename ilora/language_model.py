"""Language models: any Hugging Face causal LM, or `embedded`, a small Llama that the package brings.

The embedded model is to a laptop what Llama-2 is to a data centre: it has read much, knows the titles and what
everybody reads after what, and answers a prompt with one of the offered titles, though an uninformed one. Its
recipe is `pretrain`: documents of four kinds, with loss only where there is something to learn.

    history    each story of a public reader                          which title tends to follow which
    about      title and further text, where the data have any        what the items are
    list       a list of titles, then the same in another order       copying
    choice     a whole prompt, answered with a random offered title   answering

Half the lists and choices of the embedded model offer strings of random tokens in place of titles. A base for other
data starts from the embedded one: tokens of both vocabularies keep their embeddings, and its own tokens may span words
up to whole titles, since a model this small learns to choose among thousands of titles, but not to spell them.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ilora import runs
from ilora.data import Dataset
from ilora.prompts import ITEM_TOKEN, NO_LABEL, Prompts, wording
from ilora.training import TrainingArguments, fit
from ilora.world import make_world

EMBEDDED = Path(__file__).parent / "embedded"
VOCABULARY = 4096
SPECIAL = ["<pad>", "<s>", "</s>", ITEM_TOKEN]
PUBLIC_READERS = 20_000
LONGEST_LIST = 22  # titles; prompts offer 20


def load_language_model(
    base_model: str = "embedded", dataset: Dataset | None = None, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM, frozen and in eval mode, and its tokenizer.

    base_model: a name on the Hugging Face hub, a folder, or "embedded"; for a `dataset` other than the world the
        embedded model is first trained on the titles and the training users' histories, once, and kept.
    """
    folder = base_model
    if base_model == "embedded":
        folder = EMBEDDED if dataset is None or dataset.name == "world" else base_for(dataset, device=device)
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


def base_for(dataset: Dataset, documents: int = 64_000, seed: int = 0, device: str = "auto") -> Path:
    """Folder of the small base for a data set, from the embedded one; made once, kept under `runs.home()`."""
    parameters = {"dataset": dataset.key, "documents": documents, "seed": seed}
    work = runs.home() / "unfinished" / f"base-{runs.key(parameters)}"

    def make(folder: Path) -> None:
        pretrain(dataset, folder, work, documents, seed=seed, device=device, start=EMBEDDED)

    base = runs.cached("base", parameters, make, note=f"a small language model for {dataset.name}")
    shutil.rmtree(work, ignore_errors=True)
    return base


# ---------------------------------------------------------------- the recipe


def train_tokenizer(
    prompts: list[str], texts: list[str], vocabulary: int = VOCABULARY, across_spaces: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most `vocabulary` tokens from the prompts and the items' texts.

    across_spaces: tokens may span words, up to whole titles (Liu et al. 2025, SuperBPE), so that a catalogue of
        thousands fits into short prompts.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_spaces)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts * 1000 + texts, trainer)  # the prompts' words become whole tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


class Documents:
    """Row i is document i of an epoch: token ids and labels, a function of (seed, epoch, i) alone.

    From scratch lists are short in the first epochs, and half of them hold invented titles: answering with what is
    offered is found on short lists first.
    """

    def __init__(self, dataset: Dataset, prompts: Prompts, number: int, seed: int, scratch: bool = False):
        self.prompts, self.number, self.seed, self.scratch = prompts, number, seed, scratch
        events = dataset.events[dataset.events["user"].map(dataset.users["split"].eq("train"))]
        self.histories = [items.to_numpy() for _, items in events.groupby("user")["item"]]
        self.about = [
            prompts.tokenizer(f" {text}", add_special_tokens=False).input_ids if text else []
            for text in dataset.items["text"]
        ]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.longest = epoch, min(LONGEST_LIST, 6 + 4 * epoch) if self.scratch else LONGEST_LIST

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, row: int) -> tuple[list[int], list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch, row])
        kind = rng.choice(["history", "about", "list", "choice"], p=[0.32, 0.02, 0.33, 0.33] if self.scratch else [0.28, 0.02, 0.2, 0.5])
        read, learned = getattr(self, f"_{kind}")(rng)
        return read + learned, [NO_LABEL] * len(read) + learned

    def _history(self, rng) -> tuple[list[int], list[int]]:
        items = self._some_history(rng, LONGEST_LIST)
        listed, _ = self._listed(rng, [self.prompts.answers[item] for item in items])
        return self.prompts.opening, listed

    def _about(self, rng) -> tuple[list[int], list[int]]:
        item = rng.integers(len(self.about))
        return self.prompts.opening[:1] + self.prompts.answers[item] + self.prompts.separator, self.about[item]

    def _list(self, rng) -> tuple[list[int], list[int]]:
        titles = self._some_titles(rng, rng.integers(2, self.longest + 1))
        order = rng.permutation(len(titles)) if rng.random() < 0.7 else range(len(titles))
        listed, _ = self._listed(rng, titles)
        again, _ = self.prompts.join([titles[place] for place in order])
        return self.prompts.opening[:1] + self.prompts.offer + listed + self.prompts.question, [
            *again,
            self.prompts.end,
        ]

    def _choice(self, rng) -> tuple[list[int], list[int]]:
        history = [self.prompts.answers[item] for item in self._some_history(rng, 10)]
        titles = self._some_titles(rng, rng.integers(2, self.longest + 1))
        answer = rng.integers(len(titles))
        if not self.scratch and rng.random() < 0.7:  # one title is offered that was read: find it
            titles[answer] = history[rng.integers(len(history))]
        marked = rng.random() < 0.5
        read, _ = self.prompts.join(history, history if marked else None)
        listed, _ = self.prompts.join(titles, titles if marked else None)
        prompt = self.prompts.opening + read + self.prompts.offer + listed + self.prompts.question
        return prompt, [*titles[answer], self.prompts.end]

    def _listed(self, rng, titles: list[list[int]]) -> tuple[list[int], list[int]]:
        """A list whose titles carry behaviour tokens in half the documents."""
        return self.prompts.join(titles, titles if rng.random() < 0.5 else None)

    def _some_history(self, rng, longest: int) -> np.ndarray:
        items = self.histories[rng.integers(len(self.histories))]
        length = min(len(items), rng.integers(3, longest + 1))
        first = rng.integers(len(items) - length + 1)
        return items[first : first + length]

    def _some_titles(self, rng, number: int) -> list[list[int]]:
        if not self.scratch or rng.random() < 0.5:
            return [self.prompts.answers[item] for item in rng.choice(len(self.prompts.titles), number, replace=False)]
        # A small pool makes titles share tokens, so that one token of context is not enough to copy.
        pool = rng.integers(len(SPECIAL), VOCABULARY, size=rng.choice([16, 64, VOCABULARY]))
        return [rng.choice(pool, size=rng.integers(1, 7)).tolist() for _ in range(number)]


class Pretraining(nn.Module):
    """Next-token loss at the labels, in the form that `fit` trains."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def collate(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """Padded on the right, where a causal model needs no mask: input_ids and labels, (batch, longest)."""
        tokens, labels = ([torch.tensor(row[part]) for row in rows] for part in (0, 1))
        return {
            "input_ids": pad_sequence(tokens, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=NO_LABEL),
        }

    def length(self, row: tuple[list[int], list[int]]) -> int:
        return len(row[0])

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        return [{"params": list(self.parameters()), "weight_decay": weight_decay, "betas": (0.9, 0.95)}]

    def forward(self, batch: dict[str, Tensor], progress: float = 0.0, step_seed: int = 0) -> Tensor:
        states = self.model.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1]
        learned = batch["labels"][:, 1:] != NO_LABEL
        logits = self.model.lm_head(states[learned]).float()  # (labels, vocabulary): no logits elsewhere
        return F.cross_entropy(logits, batch["labels"][:, 1:][learned])


def pretrain(
    dataset: Dataset,
    folder: Path,
    work: Path,
    documents: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    device: str = "auto",
    start: Path | None = None,
    epochs: int = 8,
) -> None:
    """Make a small base from a data set's titles, further texts and training histories; save it to `folder`.

    documents: how many are read, each once; work: folder of the checkpoints; start: a base of this recipe whose
    weights are taken over; epochs: parts of the reading, between which lists grow if there is no start.
    Trained in bf16 on a GPU, saved in bf16 (2.7 MB for VOCABULARY tokens).
    """
    texts = [f" {text}" for column in ("title", "text") for text in dataset.items[column]]
    frame = list(wording(dataset.noun, dataset.verb))
    vocabulary = VOCABULARY if start is None else 3 * VOCABULARY
    tokenizer = train_tokenizer(frame, texts, vocabulary, across_spaces=start is not None)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(vocabulary))
    if start is not None:
        _take_over(model, tokenizer, start)
    prompts = Prompts(tokenizer, list(dataset.items["title"]), dataset.noun, dataset.verb)
    rows = Documents(dataset, prompts, documents // epochs, seed, scratch=start is None)
    precision = "bf16" if runs.pick_device(device).type == "cuda" else "no"
    arguments = TrainingArguments(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, weight_decay=0.01, seed=seed, device=device,
        precision=precision, micro_batch_size=32 if precision == "no" else None,
    )  # fmt: skip
    fit(Pretraining(model), rows, arguments, work)
    model.to(torch.bfloat16).cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(vocabulary: int) -> LlamaConfig:
    """0.8 M parameters, and 128 for each token. Many narrow heads beat few wide ones at choosing from a list."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


@torch.no_grad()
def _take_over(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, start: Path) -> None:
    """Weights of the base in `start`; tokens of both vocabularies keep their embeddings, others draw theirs alike."""
    weights = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
    learned = weights.pop("model.embed_tokens.weight")
    weights.pop("lm_head.weight")  # tied
    model.load_state_dict(weights, strict=False)
    embedding = model.get_input_embeddings().weight
    embedding.normal_(std=learned.std().item())
    old = AutoTokenizer.from_pretrained(start).get_vocab()
    for token, row in tokenizer.get_vocab().items():
        if token in old:
            embedding[row] = learned[old[token]]


def public_library() -> Dataset:
    """What the embedded model has read: readers of a world without conflict, no one of whom is in any data set."""
    world = make_world(users=PUBLIC_READERS, conflict=0.0, seed=1_000_000)
    users = world.events[["user"]].drop_duplicates().assign(split="train").reset_index(drop=True)
    return Dataset(world.items, world.events, users, name="public", key="public", noun="story", verb="read")


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
