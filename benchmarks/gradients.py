"""Gradients of eight clusters of sequences, against a backward pass a sequence and against training on them.

    python benchmarks/gradients.py               # on the GPU if torch sees one, else on the CPU

    clusters         `group_gradients`: backward in batches of one cluster and of sequences of similar length
    usual loop       a backward pass a sequence, its prompt tokenised from text, every logit computed
    loop             a backward pass a sequence, but with the prompts and the logits of `clusters`
    pass             forward and backward in batches of like length, as training has it: the least it can cost

The adapters are untrained, with B away from zero: what is timed does not depend on what they have learned.
"""

from argparse import Namespace
from collections.abc import Sequence

import measure
import numpy as np
import torch
from language import collate_text, full_loss
from torch import Tensor

from ilora import data, devices, language
from ilora.data import Questions
from ilora.language import LanguageRecommender, adapter_config
from ilora.recommenders import SASRec
from ilora.study import gradients

GOALS = {"usual loop": {"at_least": 5}, "pass": {"at_least": 0.83}}  # at most 1.2 times the pass


def prepare(options: Namespace) -> tuple[LanguageRecommender, Questions]:
    """An untrained iLoRA on the world, whose A and B both have gradients, and the sequences."""
    devices.seed_all(0)
    source = data.load("world", users=options.users)
    plain = language.untuned(source, device=options.device)
    encoder = SASRec(len(source.items)).eval()
    model = LanguageRecommender(plain.language_model, plain.prompts, encoder, adapter_config(experts=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.01 * torch.randn_like(parameter)
    return model.eval(), data.questions(source, "train", limit=options.sequences)


def usual_loop(model: LanguageRecommender, asked: Questions, labels: np.ndarray) -> dict[str, Tensor]:
    """What `gradients.group_gradients` gives, from a backward pass a sequence."""
    kinds = gradients.adapter_parameters(model)
    found = {kind: torch.zeros(labels.max() + 1, sum(p.numel() for p in own)) for kind, own in kinds.items()}
    for row, label in enumerate(labels):
        model.zero_grad()
        batch = {name: value.to(model.device) for name, value in collate_text(model, [asked[row]]).items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = full_loss(model, batch, hybrid=True)
        loss.backward()
        for kind, own in kinds.items():
            found[kind][label] += torch.cat([parameter.grad.flatten() for parameter in own]).cpu()
    model.zero_grad()
    return found


def one_pass(model: LanguageRecommender, asked: Questions, batch_size: int) -> None:
    """What an epoch of training does but for the optimiser."""
    rows = sorted((asked[row] for row in range(len(asked))), key=model.length)
    for start in range(0, len(rows), batch_size):
        gradients.summed_loss(model, rows[start : start + batch_size]).backward()
    model.zero_grad()


def largest_difference(found: dict[str, dict[str, Tensor]], others: Sequence[str]) -> float:
    """Between gradients of a kind of module, as a share of their norm."""
    own = found["clusters"]
    return max(float((own[kind] - found[name][kind]).norm() / own[kind].norm()) for name in others for kind in own)


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.parser(__doc__, rounds=3, sequences=1000, batch_size=32, users=2000).parse_args(arguments)
    run, out = measure.start("gradients", options)
    model, asked = prepare(options)
    z = gradients.representations(model.encoder, asked.sequences.history)
    labels, _ = gradients.clusters(z)
    ways = {
        "clusters": lambda: gradients.group_gradients(model, asked, labels, options.batch_size),
        "usual loop": lambda: usual_loop(model, asked, labels),
        "loop": lambda: gradients.group_gradients(model, asked, labels, batch_size=1),
        "pass": lambda: one_pass(model, asked, options.batch_size),
    }
    measured, found = measure.compare(ways, options.rounds, run.device, GOALS)
    measured["rows"] = len(asked)
    measured["agreement"] = {"largest difference": largest_difference(found, ["usual loop", "loop"])}
    many = np.random.default_rng(0).normal(size=(options.sequences * 40, z.shape[1]))
    clustering, _ = measure.timed(lambda: gradients.clusters(many), torch.device("cpu"))
    measure.show("gradients", measured)
    run.save({"gradients": measured, "clustering": {"rows": len(many), "seconds": clustering}}, path=out)
    print(out)


if __name__ == "__main__":
    main()
