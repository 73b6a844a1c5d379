"""The small base models: documents that teach a small Llama what Llama-2 brings along, and the training on them.

A base has read much, knows the titles and what everybody reads after what, and answers a prompt with one of the
offered titles, though an uninformed one. Four kinds of documents, with loss only where there is something to learn:

    history    each story that a reader of the training split read     which title tends to follow which
    about      title and further text, where the data have any         what the items are
    list       a list of titles, then the same in another order        naming what is offered
    choice     a whole prompt, answered with an offered title          answering, and looking for what was read

A choice is "spotted" when one title alone is both offered and read: it is the answer. So the base learns to weigh the
offered titles by what was read, which tuning then needs. Prompts offer nothing that was read, so this tells nothing of
their answers, and the other choices are left to chance: the base answers validly, but uninformed.

`embedded` is made from the readers of a library without taste groups. A base for other data starts from its weights;
`embedded-large`, of 50 M parameters, is grown from them.
Its tokens may span words, up to whole titles: a model this small learns to choose among thousands of titles, but not
to spell them.
"""

import argparse
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ilora import artifacts, devices
from ilora.data.dataset import Dataset
from ilora.data.world import make_world
from ilora.language import smollm2
from ilora.language.prompts import ITEM_TOKEN, NO_LABEL, Prompts, wording
from ilora.training.loop import TrainingArguments, fit

EMBEDDED = Path(__file__).parent / "embedded"
VOCABULARY = 4096
SPECIAL = ["<pad>", "<s>", "</s>", ITEM_TOKEN]
PUBLIC_READERS = 20_000
LONGEST_LIST = 22  # titles; prompts offer 20
HISTORY = 10  # longest history of a choice, titles
KINDS = ("history", "about", "list", "choice")


@dataclass(frozen=True)
class Recipe:
    """What is read, and how it is learned."""

    documents: int  # all together, each read once
    batch_size: int
    learning_rate: float
    shares: tuple[float, ...]  # of KINDS; without texts, nothing is about one
    spotted: float  # share of choices that offer exactly one title that was read
    invented: bool = False  # half the lists and choices hold invented titles, made of any tokens
    grow: bool = False  # short lists first
    epochs: int = 1  # parts of the reading, between which lists grow
    vocabulary: int = VOCABULARY
    across_spaces: bool = False  # tokens may span words
    width: int = 128  # of the model; many narrow heads beat few wide ones at choosing from a list
    layers: int = 4
    heads: int = 8


PUBLIC = Recipe(448_000, 128, 3e-3, shares=(0.2, 0.02, 0.28, 0.5), spotted=0.5, invented=True, grow=True, epochs=8)


OTHER_DATA = Recipe(
    128_000, 64, 2e-3, shares=(0.28, 0.02, 0.2, 0.5), spotted=0.7, vocabulary=3 * VOCABULARY, across_spaces=True
)
LARGE = replace(OTHER_DATA, documents=384_000, batch_size=256, learning_rate=1e-3, width=512, layers=15, heads=32)
RECIPES = {"embedded": OTHER_DATA, "embedded-large": LARGE}  # base_model -> how it is made for a data set
NOISE = 0.2  # in copies of a weight, over their standard deviation


def base_content(base_model: str) -> str:
    """What the name of a base model stands for, as an input of `artifacts.key`: see `artifacts.model_content`.

    The names in RECIPES stand for the embedded model, from which their bases are made.
    """
    if base_model == "smollm2":
        return smollm2.content()
    return (
        f"{base_model} {artifacts.content(EMBEDDED)}" if base_model in RECIPES else artifacts.model_content(base_model)
    )


def base_for(dataset: Dataset, seed: int = 0, device: str = "auto", recipe: Recipe = OTHER_DATA) -> Path:
    """Folder of the small base for a data set, from the embedded one; made once, kept under `artifacts.home()`."""
    settings, inputs = (
        {"seed": seed, "recipe": asdict(recipe)},
        {"data": dataset.key, "start": artifacts.content(EMBEDDED)},
    )
    work = artifacts.home() / "training" / f"base-{artifacts.key(settings, inputs)}"

    def make(folder: Path) -> None:
        pretrain(dataset, folder, work, recipe, seed, device, start=EMBEDDED)

    folder = artifacts.cached("base", settings, inputs, make, note=f"a small language model for {dataset.name}")
    shutil.rmtree(work, ignore_errors=True)
    return folder


def make_embedded(folder: Path, device: str = "auto") -> None:
    """Make the embedded model anew; ilora/embedded/README.md says how the shipped one was made."""
    with tempfile.TemporaryDirectory() as work:
        pretrain(public_library(), folder, Path(work), PUBLIC, device=device)


def pretrain(
    dataset: Dataset, folder: Path, work: Path, recipe: Recipe, seed: int = 0, device: str = "auto",
    start: Path | None = None,
) -> None:  # fmt: skip
    """Make a base from a data set's titles, further texts and training histories; save it to `folder` in bf16.

    work: folder of the checkpoints; start: a base whose weights are taken over, as wide or a divisor of the width.
    """
    texts = [" " + " ".join(text.split()) for column in ("title", "text") for text in dataset.items[column] if text]
    tokenizer = train_tokenizer(list(wording(dataset.noun, dataset.verb)), texts, recipe)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(recipe))
    if start is not None:
        _take_over(model, tokenizer, start)
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
    """Byte-level BPE with at most `recipe.vocabulary` tokens from the prompts and the items' texts.

    Tokens that span words (Liu et al. 2025, SuperBPE) let a catalogue of thousands fit into short prompts.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not recipe.across_spaces)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
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

    It takes the documents of an epoch as `number`; `set_epoch` goes on to other ones, with longer lists if they grow.
    """

    def __init__(self, dataset: Dataset, prompts: Prompts, number: int, seed: int, recipe: Recipe):
        self.prompts, self.number, self.seed, self.recipe = prompts, number, seed, recipe
        events = dataset.events[dataset.events["user"].map(dataset.users["split"].eq("train"))]
        self.histories = [items.to_numpy() for _, items in events.groupby("user")["item"]]
        texts = {item: " ".join(text.split()) for item, text in enumerate(dataset.items["text"])}
        self.about = [
            (item, prompts.tokenizer(f" {text}", add_special_tokens=False).input_ids)
            for item, text in texts.items()
            if text
        ]
        self.kinds = {
            kind: share for kind, share in zip(KINDS, recipe.shares, strict=True) if kind != "about" or self.about
        }
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.longest = epoch, min(LONGEST_LIST, 6 + 4 * epoch) if self.recipe.grow else LONGEST_LIST

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, row: int) -> tuple[list[int], list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch, row])
        shares = np.array(list(self.kinds.values()))
        kind = rng.choice(list(self.kinds), p=shares / shares.sum())
        read, learned = getattr(self, f"_{kind}")(rng)
        return read + learned, [NO_LABEL] * len(read) + learned

    def _history(self, rng) -> tuple[list[int], list[int]]:
        items = self._some_history(rng, LONGEST_LIST)
        listed, _ = self._listed(rng, [self.prompts.answers[item] for item in items])
        return self.prompts.opening, listed

    def _about(self, rng) -> tuple[list[int], list[int]]:
        item, text = self.about[rng.integers(len(self.about))]
        return self.prompts.opening[:1] + self.prompts.answers[item] + self.prompts.separator, text

    def _list(self, rng) -> tuple[list[int], list[int]]:
        titles, _ = self._some_titles(rng, rng.integers(2, self.longest + 1))
        order = rng.permutation(len(titles)) if rng.random() < 0.7 else range(len(titles))
        listed, _ = self._listed(rng, titles)
        again, _ = self.prompts.join([titles[place] for place in order])
        prompt = self.prompts.opening[:1] + self.prompts.offer + listed + self.prompts.question
        return prompt, [*again, self.prompts.end]

    def _choice(self, rng) -> tuple[list[int], list[int]]:
        number = rng.integers(2, self.longest + 1)
        titles, invented = self._some_titles(rng, HISTORY + number)
        history, offered = titles[:HISTORY], titles[-number:]
        if not invented:
            history = [self.prompts.answers[item] for item in self._some_history(rng, HISTORY)]
        answer = None
        if rng.random() < self.recipe.spotted:
            offered = [title for title in offered[1:] if title not in history]
            answer = rng.integers(len(offered) + 1)
            offered.insert(answer, history[rng.integers(len(history))])
        marked = rng.random() < 0.5
        read, _ = self.prompts.join(history, history if marked else None)
        listed, _ = self.prompts.join(offered, offered if marked else None)
        prompt = self.prompts.opening + read + self.prompts.offer + listed + self.prompts.question
        answer = rng.integers(len(offered)) if answer is None else answer
        return prompt, [*offered[answer], self.prompts.end]

    def _listed(self, rng, titles: list[list[int]]) -> tuple[list[int], list[int]]:
        """A list whose titles carry behaviour tokens in half the documents."""
        return self.prompts.join(titles, titles if rng.random() < 0.5 else None)

    def _some_history(self, rng, longest: int) -> np.ndarray:
        items = self.histories[rng.integers(len(self.histories))]
        length = min(len(items), rng.integers(3, longest + 1))
        first = rng.integers(len(items) - length + 1)
        return items[first : first + length]

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


def _config(recipe: Recipe) -> LlamaConfig:
    """The shape of a base: 0.8 M parameters by default, 48 M in LARGE, and `width` for each token."""
    return LlamaConfig(
        vocab_size=recipe.vocabulary, hidden_size=recipe.width, intermediate_size=11 * recipe.width // 4,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


@torch.no_grad()
def _take_over(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, start: Path) -> None:
    """Weights of the base in `start`; tokens of both vocabularies keep their embeddings, others draw theirs alike.

    A model c times as wide gets c copies of each unit, and so computes what `start` does (Chen et al. 2016, Net2Net)
    but for a little noise that lets copies become different; what it has more layers adds nothing at first.
    """
    small = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    copies = model.config.hidden_size // small.config.hidden_size
    places = np.linspace(0, len(model.model.layers) - 1, len(small.model.layers)).round().tolist()
    for place, layer in enumerate(model.model.layers):
        if place in places:
            learned = small.model.layers[places.index(place)].named_parameters()
            layer.load_state_dict({name: _widen(weight, copies) for name, weight in learned})
        else:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight.zero_()
    model.model.norm.weight.copy_(_widen(small.model.norm.weight, copies) / copies)  # a logit sums over the copies
    learned, embedding = small.get_input_embeddings().weight, model.get_input_embeddings().weight
    embedding.normal_(std=learned.std().item())
    old = AutoTokenizer.from_pretrained(start).get_vocab()
    for token, row in tokenizer.get_vocab().items():
        if token in old:
            embedding[row] = _widen(learned[old[token]], copies)


def _widen(weight: Tensor, copies: int) -> Tensor:
    """(n,) -> (c n,), or (out, in) -> (c out, c in), where each of c equal inputs has a c-th of the weight."""
    wide = weight.repeat([copies] * weight.dim())
    if copies == 1 or weight.dim() == 1:
        return wide
    return (wide + NOISE * wide.std() * torch.randn_like(wide)) / copies


def public_library() -> Dataset:
    """What the embedded model has read: readers of a world without conflict, no one of whom is in any data set."""
    world = make_world(users=PUBLIC_READERS, conflict=0.0, seed=1_000_000)
    users = world.events[["user"]].drop_duplicates().assign(split="train").reset_index(drop=True)
    return Dataset(world.items, world.events, users, name="public", key="public", noun="story", verb="read")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m ilora.language.pretraining", description="Make the embedded model anew."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="gets the model and its tokenizer")
    make_embedded(parser.parse_args().folder)
