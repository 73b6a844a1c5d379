"""The small base for a user's own data: `embedded`, trained further on their titles and training histories.

    Each film this person watched, in order: A; B; C. The next film is one of: X; B; Y. The next film is: B</s>

Each document is a question about a training user, with an answer; the base learns to write the history and the answer.
Most answers are the one offered title of the history, which no real question offers, so that the base learns to compare
both lists; the others are random.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from ilora import artifacts, devices
from ilora.data.dataset import CANDIDATES, Dataset, one_line
from ilora.data.windows import questions
from ilora.language import smollm2
from ilora.language.prompts import NO_LABEL, Prompts, wording
from ilora.training.loop import TrainingArguments, fit

EMBEDDED = Path(__file__).parent / "embedded"
# How a base learns: each document is read once; `from_history` is the share of those whose answer is in the history.
RECIPE = {"documents": 64_000, "batch_size": 32, "learning_rate": 2e-3, "vocabulary": 12_288, "from_history": 0.7}


def base_content(base_model: str) -> str:
    """The content that the name of a base model stands for, as an input of `artifacts.key`."""
    if base_model == "embedded":
        return f"embedded {artifacts.content(EMBEDDED)}"
    packaged = base_model == "smollm2"
    return artifacts.content(smollm2.packaged_file()) if packaged else artifacts.model_content(base_model)


def base_for(dataset: Dataset, seed: int = 0, device: str = "auto", recipe: dict = RECIPE) -> Path:
    """Folder of the base for a data set, in bfloat16; made once and kept."""
    settings = {"seed": seed, "recipe": recipe}
    inputs = {"data": dataset.content, "start": artifacts.content(EMBEDDED)}

    def make(folder: Path, work: Path) -> None:
        titles = list(dataset.items["title"])
        tokenizer = train_tokenizer(titles, wording(dataset.noun, dataset.verb), recipe["vocabulary"])
        model = embedded_with(tokenizer, seed)
        documents = Documents(dataset, Prompts(tokenizer, titles, dataset.noun, dataset.verb), recipe, seed)
        precision = "bf16" if devices.pick_device(device).type == "cuda" else "no"
        more = {"seed": seed, "device": device, "precision": precision}
        arguments = TrainingArguments(1, recipe["batch_size"], recipe["learning_rate"], **more)
        fit(Pretraining(model), documents, arguments, work)
        model.to(torch.bfloat16).cpu().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return artifacts.cached("base", settings, inputs, make, note=f"a small language model for {dataset.name}")


def train_tokenizer(titles: list[str], words: tuple[str, ...], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens may span words (Liu et al. 2025, SuperBPE), which makes prompts short."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [*words * 1000, *(f" {one_line(title)}" for title in titles)]  # repeated words become whole tokens
    return tokenizer.train_new_from_iterator(texts, vocabulary, show_progress=False)


def embedded_with(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The embedded model with the tokens of another tokenizer; those that are new to it get random embeddings."""
    model, vocabulary = LlamaForCausalLM.from_pretrained(EMBEDDED), AutoTokenizer.from_pretrained(EMBEDDED).vocab
    known = model.float().get_input_embeddings().weight.data.clone()
    embedding = model.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight.data
    embedding.normal_(std=known.std().item(), generator=torch.Generator().manual_seed(seed))
    for token in tokenizer.vocab.keys() & vocabulary.keys():
        embedding[tokenizer.vocab[token]] = known[vocabulary[token]]
    return model


class Documents:
    """Row i of `recipe.documents` is a document, token ids and labels, that depends on (seed, i) alone."""

    def __init__(self, dataset: Dataset, prompts: Prompts, recipe: dict, seed: int):
        self.prompts, self.recipe, self.seed = prompts, recipe, seed
        self.questions = questions(dataset, "train", min(10, max(len(dataset.items) - CANDIDATES, 1)), seed=seed)

    def __len__(self) -> int:
        return self.recipe["documents"]

    def __getitem__(self, row: int) -> tuple[list[int], list[int]]:
        rng = np.random.default_rng([self.seed, row])
        history, offered, target = self.questions[rng.integers(len(self.questions))]
        history = history[history < self.questions.n_items]  # without padding
        answer = rng.choice(offered)
        if rng.random() < self.recipe["from_history"]:
            answer = rng.choice(history)
            offered = np.where(offered == target, answer, offered)
        prompts, hybrid = self.prompts, rng.random() < 0.5
        prompt = prompts.write(history, offered, hybrid)
        labels = [NO_LABEL] * len(prompts.opening) + prompts.join(history, hybrid)
        labels += [NO_LABEL] * (len(prompt) - len(labels)) + [*prompts.answers[answer], prompts.end]
        return [*prompt, *prompts.answers[answer], prompts.end], labels


class Pretraining(nn.Module):
    """Next-token loss at the labels, in the form that `fit` trains."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def collate(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """input_ids and labels, (batch, longest), padded on the right, where a causal model needs no mask."""
        tokens, labels = ([torch.tensor(row[column]) for row in rows] for column in (0, 1))
        return {"input_ids": pad_sequence(tokens, True), "labels": pad_sequence(labels, True, NO_LABEL)}

    def forward(self, batch: dict[str, Tensor], progress: float = 0.0, step_seed: int = 0) -> Tensor:
        states, labels = self.model.model(input_ids=batch["input_ids"]).last_hidden_state, batch["labels"][:, 1:]
        learned = labels != NO_LABEL
        logits = self.model.lm_head(states[:, :-1][learned]).float()  # (labels, vocabulary): no logits elsewhere
        return nn.functional.cross_entropy(logits, labels[learned])
