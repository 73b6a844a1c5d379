"""Trains a toy, an iLoRA recommender, and all steps of a small study with the files that processes share.

Losses and weights must not depend on the number of processes. test_training.py calls main(FOLDER) and runs this with
`accelerate launch`; each process writes FOLDER/RANK-of-WORLD.pt.
"""

import os
import sys
from pathlib import Path

import torch
from test_language_recommender import KINDS, make, question_rows
from test_training import trained, weights

from ilora import data, language
from ilora.recommenders import SASRec, fit_recommender
from ilora.training import TrainingArguments, fit


def flat(model):
    return torch.cat([value.detach().flatten() for value in model.trainable_state().values()])


def main(folder):
    results = {}
    for name, micro_batch_size in [("toy", None), ("toy in parts", 4)]:
        model, history = trained(folder / name, dropout=0.0, micro_batch_size=micro_batch_size, device="cpu")
        results[name] = weights(model), torch.tensor(history["loss"])
    KINDS["ilora without dropout"] = (True, KINDS["ilora"][1] | {"dropout": 0.0})
    model = make("ilora without dropout")
    arguments = TrainingArguments(epochs=2, batch_size=4, learning_rate=1e-2, micro_batch_size=2, device="cpu")
    history = fit(model, question_rows(lengths=(1, 6, 3, 4, 5, 2)), arguments, folder / "iLoRA")
    results["iLoRA"] = flat(model), torch.tensor(history["loss"])
    os.environ["ILORA_HOME"] = str(folder / "home")
    world = data.load("world", users=60)
    fit_recommender(world, epochs=1, device="cpu")  # its dropout differs with two processes: it only has to finish
    torch.manual_seed(3)
    encoder = SASRec(len(world.items))
    adapter = language.AdapterSettings(experts=4)
    arguments = language.tuning_arguments(batch_size=8, device="cpu")
    model, history, _ = language.tune(world, encoder, adapter, arguments, train_limit=32)
    results["pipeline"] = flat(model), torch.tensor(history["loss"])
    group = torch.distributed
    together = group.is_initialized()
    rank, world = (group.get_rank(), group.get_world_size()) if together else (0, 1)
    torch.save(results, folder / f"{rank}-of-{world}.pt")
    if together:
        group.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
