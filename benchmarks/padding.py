"""Measure the share of padding in batches of prompts, which is the most that packing prompts could save.

    python benchmarks/padding.py --data-dir FOLDER     # with MovieLens; without the option it is downloaded

    as they come     batches in random order, each padded to its longest prompt
    training         `fit`: a step's rows are sorted by length, then cut into micro-batches
    evaluation       `evaluate`: some thousand rows are sorted by length, then cut into batches

Prompts are hybrid and include the answer. The tokenizer is that of --base-model.
"""

from collections.abc import Iterator, Sequence

import measure
import numpy as np
from transformers import AutoTokenizer

from ilora import data
from ilora.language import Prompts
from ilora.language.pretraining import EMBEDDED


def batches(length: np.ndarray, together: int, size: int) -> Iterator[np.ndarray]:
    """Cut lengths (n,) into batches of `size`, after sorting every `together` of them."""
    for start in range(0, len(length), together):
        rows = np.sort(length[start : start + together])
        yield from np.split(rows, range(size, len(rows), size))


def share(length: np.ndarray, together: int, size: int) -> float:
    """The share of padding among the tokens of all batches."""
    tokens = sum(rows.max() * len(rows) for rows in batches(length, together, size))
    return float(1 - length.sum() / tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__, examples=20_000, batch_size=128, micro_batch_size=32, users=2000)
    parser.add_argument("--dataset", default="movielens", help="the data set (movielens)")
    parser.add_argument("--data-dir", default="", help="the folder with its files (download)")
    parser.add_argument("--base-model", default=str(EMBEDDED), help="the model of the tokenizer (embedded)")
    options = parser.parse_args(arguments)
    options.device = "cpu"  # nothing is computed
    run, out = measure.start("padding", options, "data_dir", "base_model")
    source = data.load(options.dataset, options.data_dir, users=options.users)
    prompts = Prompts(
        AutoTokenizer.from_pretrained(options.base_model), source.items["title"], source.noun, source.verb
    )
    questions = data.questions(source, "train", limit=options.examples)
    rows = (questions[row] for row in np.random.default_rng(0).permutation(len(questions)))
    length = np.array([len(prompts.write(row[0], row[1], hybrid=True)) + len(prompts.answers[row[2]]) for row in rows])
    shares = {
        "as they come": share(length, options.micro_batch_size, options.micro_batch_size),
        "training": share(length, options.batch_size, options.micro_batch_size),
        "evaluation": share(length, len(length), options.micro_batch_size),
    }
    tokens = {"shortest": length.min(), "mean": length.mean(), "longest": length.max()}
    for name, value in shares.items():
        print(f"{name:14}{value:.1%} padding")
    run.save({"padding": {"rows": len(length), "tokens": tokens, "share": shares}}, path=out)
    print(out)


if __name__ == "__main__":
    main()
