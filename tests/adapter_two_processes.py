"""Two gloo processes average their gradients, under DDP and with the model in shards (FSDP), as one process has them.

Run by test_adapter.py as `python adapter_two_processes.py FOLDER`; exits with an error where they differ.
"""

import sys

import torch
from test_adapter import adapted, gradients, outputs, tokens, users
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

ROWS = 4
CASES = [({}, None), ({}, False), ({}, True), ({"gate_per_layer": True}, False)]


def model_of(options, reentrant):
    model = adapted(**options).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def sharded(model, **options):
    """What `accelerate launch --use_fsdp --fsdp_version 2` makes of a model: each layer is a unit, and the rest is."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def flattened(model, strategy):
    """What FSDP 1 makes of a model whose parameters keep their names."""
    units = ModuleWrapPolicy({type(model.base_model.model.model.layers[0])})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, None, strategy, None, units, use_orig_params=True, device_id=cpu)


def work(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for options, reentrant in CASES:
        expected = gradients(model_of(options, None), users(ROWS), tokens(ROWS))
        model = DistributedDataParallel(model_of(options, reentrant))
        result = gradients(model, users(ROWS)[mine], tokens(ROWS)[mine])
        check({name.removeprefix("module."): value for name, value in result.items()}, expected, options, reentrant)
        if not reentrant:  # FSDP has no reentrant checkpoints
            result = gradients(sharded(model_of(options, reentrant)), users(ROWS)[mine], tokens(ROWS)[mine])
            check({name: value.full_tensor() for name, value in result.items()}, expected, "FSDP", options, reentrant)
    options = {"gate_per_layer": True}
    expected = gradients(model_of(options, None), users(ROWS), tokens(ROWS))
    model = sharded(model_of(options, None), reshard_after_forward=False)
    outputs(model, tokens(ROWS), sequence_embeds=users(ROWS))  # leaves the parameters gathered
    result = gradients(model, users(ROWS)[mine], tokens(ROWS)[mine])
    check({name: value.full_tensor() for name, value in result.items()}, expected, "FSDP without resharding")
    model = flattened(model_of(options, None), ShardingStrategy.NO_SHARD)
    result = gradients(model, users(ROWS)[mine], tokens(ROWS)[mine])
    check({name.replace("_fsdp_wrapped_module.", ""): value for name, value in result.items()}, expected, "FSDP 1")
    options = {"gate_per_layer": True, "target_modules": ["q_proj"]}  # each process has one piece of every gate
    ids, z, model = tokens(ROWS)[mine], users(ROWS)[mine], model_of(options, None)
    expected = outputs(model, ids, sequence_embeds=z)
    result = outputs(flattened(model, ShardingStrategy.FULL_SHARD), ids, sequence_embeds=z)
    torch.testing.assert_close(result, expected)
    distributed.destroy_process_group()


def check(result, expected, *case):
    assert set(result) == set(expected), case
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    multiprocessing.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
