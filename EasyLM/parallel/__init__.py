"""Devices and processes: the mesh, how arrays are split over it, and the start and coordination of several processes.

May import EasyLM's own modules only.

    mesh          the axes dp, fsdp, mp and sp; `--mesh_dim`; the sharding of a batch
    partition     partition rules: the path of an array -> its sharding
    memory        bytes that JAX may use on each device, and those of this machine
    distributed   the start of jax.distributed
    compiler      options of XLA by platform
    coordination  host work in the order of processes; values that must be equal on all of them; messages
    peers         the processes of a run end together
    parts         the part of this process in work that is divided without jax.distributed

Vocabulary:
    mesh            devices as an array with named axes: dp (data parallel), fsdp (fully sharded data parallel: batch
                    and parameters are split), mp (model, or tensor, parallel), sp (sequence parallel: the tokens of a
                    row and the parameters are split)
    partition rule  (regular expression, PartitionSpec): the spec of the arrays whose path it matches
    process         one Python process of a run, usually one per host; process 0 writes files
"""

from EasyLM.parallel.compiler import compiler_options
from EasyLM.parallel.coordination import (
    Channel,
    PeerError,
    check_same,
    from_all_processes,
    on_first_process_first,
)
from EasyLM.parallel.distributed import JAX_DISTRIBUTED_FLAGS, initialize_distributed
from EasyLM.parallel.memory import SHARE_VARIABLES, device_memory, host_memory, more_device_memory, usable_memory
from EasyLM.parallel.mesh import (
    BATCH_AXES,
    GROUP_AXIS,
    HEAD_AXES,
    SHARD_AXES,
    TOKEN_AXES,
    axis_size,
    batch_sharding,
    check_batch_size,
    check_whole_sequences,
    group_mesh,
    make_mesh,
)
from EasyLM.parallel.partition import constrain, shardings
from EasyLM.parallel.parts import own_part
from EasyLM.parallel.peers import end_together, fail_together

__all__ = [
    "BATCH_AXES",
    "GROUP_AXIS",
    "HEAD_AXES",
    "JAX_DISTRIBUTED_FLAGS",
    "SHARD_AXES",
    "SHARE_VARIABLES",
    "TOKEN_AXES",
    "Channel",
    "PeerError",
    "axis_size",
    "batch_sharding",
    "check_batch_size",
    "check_same",
    "check_whole_sequences",
    "compiler_options",
    "constrain",
    "device_memory",
    "end_together",
    "fail_together",
    "from_all_processes",
    "group_mesh",
    "host_memory",
    "initialize_distributed",
    "make_mesh",
    "more_device_memory",
    "on_first_process_first",
    "own_part",
    "shardings",
    "usable_memory",
]
