"""Gradients of eight clusters of sequences, against two other ways over the same sequences, in one run:

    loop    one backward for each sequence, summed by cluster: the same result
    pass    one forward and backward in batches of like length, as training has it: the least it can cost

Prints and writes medians, spreads and ratios; the ways take turns, in an order that changes. Untrained adapters
with B away from zero: what is timed does not depend on what they have learned. Needs no data and no network.

    python benchmarks/gradients.py --sequences 1000 --rounds 5 --out book/results/benchmarks/gradients_cpu.json
"""

import argparse
import time

import numpy as np
import torch

from ilora import analysis, data, pipeline, runs
from ilora.model import LanguageRecommender, Questions, adapter_config
from ilora.recommenders import SASRec


def main() -> None:
    options = arguments()
    run = runs.Run("benchmark-gradients", {"device": options.device})
    model, asked = prepare(options)
    z = analysis.representations(model.encoder, asked.sequences.history)
    labels, _ = analysis.clusters(z)
    ways = {
        "clusters": lambda: analysis.gradients(model, asked, labels, options.batch_size),
        "loop": lambda: analysis.gradients(model, asked, labels, batch_size=1),
        "pass": lambda: one_pass(model, asked, options.batch_size),
    }
    seconds, found = {name: [] for name in ways}, {}
    for turn in range(options.rounds + 1):  # the first round warms up
        for name in sorted(ways, reverse=bool(turn % 2)):
            if name == "loop" and turn > options.rounds_of_loop:
                continue
            began = time.perf_counter()
            found[name] = ways[name]()
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    report = {name: summary(values) for name, values in seconds.items()}
    report["clusters / pass"] = summary(np.divide(seconds["clusters"], seconds["pass"]))
    report["loop / clusters"] = summary(np.divide(seconds["loop"], seconds["clusters"][: options.rounds_of_loop]))
    report["largest relative difference"] = max(
        float((found["clusters"][kind] - part).norm() / part.norm()) for kind, part in found["loop"].items()
    )
    began = time.perf_counter()
    analysis.clusters(np.random.default_rng(0).normal(size=(40_000, z.shape[1])))
    report["seconds to cluster 40,000 sequences"] = time.perf_counter() - began
    for name, value in report.items():
        print(f"{name:36s}", value)
    result = {"name": run.name, "parameters": vars(options), "metrics": report, "seconds": run.seconds}
    result |= {"peak_memory_mib": round(run.peak_memory_mib), "device": runs.describe_device(run.device)}
    runs.write_json(options.out, result | {"versions": runs.versions(), "commit": runs.commit()})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rounds-of-loop", type=int, default=3)
    parser.add_argument("--experts", type=int, default=4, help="1: LoRA")
    parser.add_argument("--base-model", default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default=str(runs.home() / "results" / "benchmark-gradients.json"))
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> tuple[LanguageRecommender, Questions]:
    """An untrained iLoRA on the world, whose A and B both have gradients, and the sequences."""
    runs.seed_all(0)
    source = data.load("world")
    plain = pipeline.untuned(source, options.base_model, device=options.device)
    encoder = SASRec(len(source.items)).eval()
    model = LanguageRecommender(plain.language_model, plain.prompts, encoder, adapter_config(experts=options.experts))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.01 * torch.randn_like(parameter)
    return model.eval(), pipeline.questions(source, "train", limit=options.sequences)


def one_pass(model: LanguageRecommender, asked: Questions, batch_size: int) -> None:
    """What an epoch of training does but for the optimiser."""
    rows = sorted((asked[row] for row in range(len(asked))), key=model.length)
    for start in range(0, len(rows), batch_size):
        batch = {
            name: value.to(model.device) for name, value in model.collate(rows[start : start + batch_size]).items()
        }
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = model(batch)
        loss.backward()
    model.zero_grad()


def summary(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0, 0.5, 1))
    return {"median": float(middle), "low": float(low), "high": float(high), "rounds": len(values)}


if __name__ == "__main__":
    main()
