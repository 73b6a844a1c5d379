"""Two gloo processes average their gradients under DDP; each case must give those of one process.

Run by test_adapter.py as `python adapter_two_processes.py FOLDER`; exits with an error where they differ.
"""

import sys

import torch
from test_adapter import adapted, gradients, tokens, users
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

ROWS = 4
CASES = [
    ({}, None), ({}, False), ({}, True),
    ({"gate_per_layer": True}, None), ({"gate_per_layer": True}, False), ({"gate_per_layer": True}, True),
]  # fmt: skip


def model_of(options, reentrant):
    model = adapted(**options).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def work(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for options, reentrant in CASES:
        model = DistributedDataParallel(model_of(options, reentrant))
        found = gradients(model, users(ROWS)[mine], tokens(ROWS)[mine])
        if rank == 0:
            expected = gradients(model_of(options, None), users(ROWS), tokens(ROWS))
            assert {"module." + name for name in expected} == set(found), (options, reentrant)
            for name, value in expected.items():
                torch.testing.assert_close(found["module." + name], value, rtol=1e-10, atol=1e-12)
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
