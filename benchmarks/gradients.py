"""Compare the gradients of eight clusters of sequences with one backward pass per sequence and with training.

    python benchmarks/gradients.py               # on the GPU if torch sees one, else on the CPU

    clusters         `group_gradients`: one backward pass per batch of sequences of one cluster and similar length
    usual loop       one backward pass per sequence, with the prompt tokenised from text and all logits computed
    loop             one backward pass per sequence, with the prompts and logits of `clusters`
    pass             forward and backward in batches of similar length, as in training: the lower bound

The adapters are untrained, with B different from zero: the time does not depend on what they have learned.
"""

from argparse import Namespace
from collections.abc import Sequence

import measure
import numpy as np
import torch
from accelerate.utils import set_seed
from language import collate_text, full_loss
from torch import Tensor

from ilora import data, language
from ilora.data import Questions
from ilora.language import LanguageRecommender, adapter_config
from ilora.recommenders import SASRec
from ilora.study import gradients

GOALS = {"usual loop": {"at_least": 5}, "pass": {"at_least": 0.83}}  # at most 1.2 times the time of the pass


def prepare(options: Namespace) -> tuple[LanguageRecommender, Questions]:
    """An untrained iLoRA on the world whose A and B both have gradients, and the questions."""
    set_seed(0)
    source = data.load("world", users=options.users)
    plain = language.untuned(source, device=options.device)
    encoder = SASRec(len(source.items)).eval()
    model = LanguageRecommender(plain.language_model, plain.prompts, encoder, adapter_config(experts=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.01 * torch.randn_like(parameter)
    return model.eval(), data.questions(source, "train", limit=options.sequences)


def usual_loop(model: LanguageRecommender, questions: Questions, labels: np.ndarray) -> dict[str, Tensor]:
    """The result of `gradients.group_gradients`, from one backward pass per sequence."""
    kinds = gradients.adapter_parameters(model)
    sums = {kind: torch.zeros(labels.max() + 1, sum(p.numel() for p in group)) for kind, group in kinds.items()}
    for row, label in enumerate(labels):
        model.zero_grad()
        batch = {name: value.to(model.device) for name, value in collate_text(model, [questions[row]]).items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = full_loss(model, batch, hybrid=True)
        loss.backward()
        for kind, group in kinds.items():
            sums[kind][label] += torch.cat([parameter.grad.flatten() for parameter in group]).cpu()
    model.zero_grad()
    return sums


def one_pass(model: LanguageRecommender, questions: Questions, batch_size: int) -> None:
    """An epoch of training without the optimiser."""
    rows = sorted((questions[row] for row in range(len(questions))), key=model.length)
    for start in range(0, len(rows), batch_size):
        gradients.summed_loss(model, rows[start : start + batch_size]).backward()
    model.zero_grad()


def largest_difference(results: dict[str, dict[str, Tensor]], ways: Sequence[str]) -> float:
    """Between the gradients of two ways for a kind of module, relative to their norm."""
    first, others = results["clusters"], [results[name] for name in ways]
    return max(float((first[kind] - other[kind]).norm() / first[kind].norm()) for other in others for kind in first)


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.parser(__doc__, rounds=3, sequences=1000, batch_size=32, users=2000).parse_args(arguments)
    run, out = measure.start("gradients", options)
    model, questions = prepare(options)
    z = gradients.representations(model.encoder, questions.sequences.history)
    labels, _ = gradients.clusters(z)
    ways = {
        "clusters": lambda: gradients.group_gradients(model, questions, labels, options.batch_size),
        "usual loop": lambda: usual_loop(model, questions, labels),
        "loop": lambda: gradients.group_gradients(model, questions, labels, batch_size=1),
        "pass": lambda: one_pass(model, questions, options.batch_size),
    }
    measured, results = measure.compare(ways, options.rounds, run.device, GOALS)
    measured["rows"] = len(questions)
    measured["agreement"] = {"largest difference": largest_difference(results, ["usual loop", "loop"])}
    many = np.random.default_rng(0).normal(size=(options.sequences * 40, z.shape[1]))
    clustering, _ = measure.timed(lambda: gradients.clusters(many), torch.device("cpu"))
    measure.show("gradients", measured)
    run.save({"gradients": measured, "clustering": {"rows": len(many), "seconds": clustering}}, path=out)
    print(out)


if __name__ == "__main__":
    main()
