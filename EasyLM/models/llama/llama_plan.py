"""Plans training without hardware and data: `python -m EasyLM.models.llama.llama_plan --topology=v5p:2x2x2`.

XLA compiles the step that `llama_train` runs with the same flags. The plan lists memory, recomputation, attention
kernels, communication, and estimates of times. TPU topologies need the extra `tpu`, GPU topologies the extra `gpu`.
"""

import dataclasses
import math
import sys
from typing import Any

from EasyLM import checkpoints, flags
from EasyLM.checkpoints import SavedPart
from EasyLM.data import dataset
from EasyLM.errors import UserError
from EasyLM.flags import Flag, to_dataclass
from EasyLM.models.llama import hf_layout, training_task
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.lora import LoRAConfig
from EasyLM.models.llama.remat_policies import AUTO
from EasyLM.parallel import BATCH_AXES, make_mesh
from EasyLM.planning import estimates, report, topologies
from EasyLM.planning.estimates import Assumptions
from EasyLM.planning.plan import Plan, PlannedTask, make_plan
from EasyLM.planning.search import Candidate, Search, search
from EasyLM.planning.topologies import Topology
from EasyLM.storage import check_output, write_json
from EasyLM.training import make_optimizer

FLAGS = {
    "topology": Flag("", f"Devices to plan for: {topologies.FORMS}.", required=True),
    "num_slices": Flag(1, "TPU slices of that topology, connected by the data center's network.", least=1),
    "suggest": Flag(False, "Try batch sizes, remat policies and meshes; print the fastest that fits."),
    "output_json": Flag("", "File of the plan."),
    **estimates.ASSUMPTION_FLAGS,
    **training_task.TRAIN_FLAGS,
}
# The policies that --suggest tries. "auto" recomputes the least that fits according to a formula, which can
# overestimate the memory by an eighth. Therefore the policy that saves everything is tried, too.
_POLICIES = ("", AUTO)


def main(config: Any) -> int:
    """Prints a plan, and writes it as JSON.

    Returns:
      The exit code: 0 if the step compiles and fits, else 1.

    Raises:
      UserError: if the JSON file cannot be written.
    """
    if config.output_json:
        check_output(config.output_json, "output_json")
    settings = dataset.settings(config.train_dataset)
    plan = Plan(config.topology, config.num_slices, config.load_llama_config, settings.batch_size, settings.seq_length)
    extra: dict[str, Any] = {}
    try:
        if config.load_checkpoint and not config.load_llama_config:  # the settings would be those of a 7B model
            name = f"--load_checkpoint={config.load_checkpoint}"
            checkpoints.parse_spec(config.load_checkpoint, hf_layout.CHECKPOINT_FORMATS, name)
        llama = training_task.read_model(config)
        topology = topologies.make_topology(config.topology, config.num_slices)
        if config.suggest:
            plan, extra = _suggest(plan, config, llama, topology)
        else:
            plan = _plan(plan, config, llama, topology)
    except UserError as error:
        plan = plan.with_values(error=str(error))
    if plan.error and plan.state_bytes_per_device is None:
        print(report.text(plan), file=sys.stderr)
    else:
        print(report.text(plan))
    if extra:
        print(f"flags         {' '.join(extra['flags'])}\nreason        {extra['reason']}")
    if config.output_json:
        write_json(config.output_json, dataclasses.asdict(plan) | extra)
    return 1 if plan.error else 0


def _plan(plan: Plan, config: Any, llama: LLaMAConfig, topology: Topology) -> Plan:
    """Plans the step of the flags.

    Raises:
      UserError: if the flags contradict each other.
    """
    mesh = make_mesh(config.mesh_dim, list(topology.devices))
    training_task.check_batch("train_dataset", config.train_dataset, llama, mesh)
    settings = dataset.settings(config.train_dataset)
    lora = LoRAConfig.from_flags(config.lora)
    assumptions = Assumptions.of(config, topology)
    memory = round(assumptions.hbm_gb * 1e9)
    llama, remat = training_task.with_remat(config, llama, mesh, memory)
    task = PlannedTask(
        model=training_task.make_model(llama, config.dtype, mesh, lora, config.gradient_reduce_dtype),
        optimizer=make_optimizer(config.optimizer),
        seed=config.seed,
        batch=dataset.no_batch(config.train_dataset),
        batch_size=settings.batch_size,
        seq_length=settings.seq_length,
        flops_per_row=training_task.accounting(llama, settings.seq_length, lora).flops_per_row,
        saved=to_dataclass(SavedPart, config.checkpointer),
    )
    plan = make_plan(plan.with_values(remat=str(remat)), task, mesh, topology, assumptions)
    if plan.fits is not False:
        return plan
    try:
        training_task.check_step(config, llama, mesh, memory)
    except UserError as error:  # under no rematerialization; the trainer would say the same
        return plan.with_values(error=str(error))
    return plan.with_values(error=f"{plan.error}; {_remedy(config, llama, plan)}")


def _remedy(config: Any, llama: LLaMAConfig, plan: Plan) -> str:
    """Returns what to change if the step needs too much memory, but not so much that it fits in no way."""
    mesh, group = dict(plan.mesh or {}), f"--train_dataset.{config.train_dataset.type}_dataset"
    remedies = training_task.fewer_tokens(group, plan.batch_size, plan.seq_length, llama, mesh)
    if llama.remat_block != "nothing_saveable":
        remedies.append("--llama.remat_block=nothing_saveable")
    if mesh["dp"] > 1:
        remedies.append("a smaller dp and a larger fsdp in --mesh_dim")
    return f"try {', '.join(remedies)}" if remedies else "use more devices"


def _suggest(plan: Plan, config: Any, llama: LLaMAConfig, topology: Topology) -> tuple[Plan, dict[str, Any]]:
    """Returns the fastest plan that fits, and what describes the search."""

    def with_candidate(candidate: Candidate) -> tuple[Any, LLaMAConfig]:
        changed = config.copy_and_resolve_references()
        changed.mesh_dim = candidate.mesh_dim
        mesh = make_mesh(candidate.mesh_dim, list(topology.devices))
        ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        dataset.settings(changed.train_dataset).batch_size = candidate.rows * ways
        return changed, dataclasses.replace(llama, remat_block=candidate.policy)

    def make(candidate: Candidate) -> Plan:
        changed, model = with_candidate(candidate)
        blank = plan.with_values(batch_size=dataset.settings(changed.train_dataset).batch_size)
        try:
            return _plan(blank, changed, model, topology)
        except UserError as error:
            return blank.with_values(error=str(error))

    def print_outcome(candidate: Candidate, tried: Plan) -> None:
        outcome = tried.error or f"{tried.tokens_per_second_estimate:,.0f} tokens/s"
        print(f"{candidate}: {outcome}", file=sys.stderr, flush=True)

    result = search(make, _mesh_dims(topology, llama), _POLICIES, print_outcome)
    for mesh_dim in _split_mesh_dims(topology, llama, plan.seq_length):
        if result.fastest is None:  # no device has the memory for a row
            result = Search(result.tried + search(make, [mesh_dim], _POLICIES, print_outcome).tried)
    tried = [dataclasses.asdict(candidate) | dataclasses.asdict(outcome) for candidate, outcome in result.tried]
    if result.fastest is None:
        return result.tried[-1][1], {"flags": [], "reason": result.reason, "tried": tried}
    candidate, best = result.fastest
    group = f"train_dataset.{config.train_dataset.type}_dataset"
    chosen = {
        "mesh_dim": candidate.mesh_dim,
        "llama.remat_block": candidate.policy,
        f"{group}.batch_size": best.batch_size,
    }
    return best, {
        "flags": [f"--{name}={value}" for name, value in chosen.items()],
        "reason": result.reason,
        "tried": tried,
    }


def _mesh_dims(topology: Topology, llama: LLaMAConfig) -> list[str]:
    """Returns the meshes to try: fully sharded, replicated over slices or nodes, and with split heads."""
    count, islands = len(topology.devices), len({topology.island_of(device) for device in topology.devices})
    shapes = [(1, count, 1), (islands, count // islands, 1)]
    if count % 2 == 0 and llama.num_attention_heads % 2 == 0:
        shapes.append((1, count // 2, 2))
    return list(dict.fromkeys(",".join(map(str, shape)) for shape in shapes))


def _split_mesh_dims(topology: Topology, llama: LLaMAConfig, seq_length: int) -> list[str]:
    """Returns the meshes that split rows over 2, 4, ... devices of a slice or node."""
    count, islands = len(topology.devices), len({topology.island_of(device) for device in topology.devices})
    sizes = [2**power for power in range(1, (count // islands).bit_length())]
    return [
        f"dp:1,fsdp:{count // sp},mp:1,sp:{sp}"
        for sp in sizes
        if count // islands % sp == llama.num_attention_heads % sp == seq_length % sp == 0
    ]


def cli() -> None:
    """Runs `main` with the flags of the command line."""
    flags.run(main, FLAGS)


if __name__ == "__main__":
    cli()
