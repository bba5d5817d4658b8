"""The plan of a small model without attention, whose bytes and FLOPs are known."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from EasyLM import flags
from EasyLM.checkpoints import SavedPart
from EasyLM.parallel import make_mesh
from EasyLM.planning import report
from EasyLM.planning.estimates import ASSUMPTION_FLAGS, Assumptions
from EasyLM.planning.plan import Plan, PlannedTask, make_plan, peak_bytes
from EasyLM.planning.topologies import Topology, make_topology
from EasyLM.training import OPTIMIZER_FLAGS, make_optimizer, model_without_extra

ROWS, WIDTH, OUTPUTS, DEVICES = 16, 32, 64, 8
COUNTERS = 3 * 4  # the step, and the counts of AdamW and of its schedule: int32, on every device


def task(save_optimizer_state: bool) -> PlannedTask:
    def loss(params, batch, key):
        return jnp.square(batch["x"] @ params["params"]["w"]).mean(), {}

    def init(key):
        return {"params": {"w": jax.random.normal(key, (WIDTH, OUTPUTS))}}

    return PlannedTask(
        model=model_without_extra(init, loss, [("w", P("fsdp", None))]),
        optimizer=make_optimizer(flags.defaults(OPTIMIZER_FLAGS)),
        seed=0,
        batch={"x": np.zeros((0, WIDTH), np.float32)},
        batch_size=ROWS,
        seq_length=1,
        flops_per_row=2 * 2 * WIDTH * OUTPUTS,
        saved=SavedPart(save_optimizer_state=save_optimizer_state),
    )


@pytest.fixture(scope="module")
def planned():
    assert jax.device_count() == DEVICES
    topology = make_topology(f"cpu:{DEVICES}")
    config = ConfigDict(flags.defaults(ASSUMPTION_FLAGS).to_dict() | {"peak_tflops": 1.0, "hbm_gb": 1.0})

    def plan(save_optimizer_state: bool, hbm_gb: float = 1.0) -> Plan:
        config.hbm_gb = hbm_gb
        blank = Plan(f"cpu:{DEVICES}", 1, "linear", ROWS, 1)
        mesh = make_mesh("1,-1,1", list(topology.devices))
        return make_plan(blank, task(save_optimizer_state), mesh, topology, Assumptions.of(config, topology))

    return plan


def test_bytes_and_flops_of_a_step(planned):
    plan = planned(save_optimizer_state=True)
    weights = 4 * WIDTH * OUTPUTS
    assert plan.fits and plan.error is None
    assert plan.state_bytes_per_device == 3 * weights / DEVICES + COUNTERS
    assert plan.checkpoint_bytes == plan.host_bytes_per_process == 3 * weights + COUNTERS
    assert plan.matmul_flops_ratio == 1, "forward, and the gradient of the weights"
    assert plan.collective_bytes["all-gather"] == weights
    assert plan.collective_bytes["all-reduce"] + plan.collective_bytes["reduce-scatter"] >= weights
    assert plan.network_bytes == dict.fromkeys(plan.collective_bytes, 0)
    assert plan.attention_weights == "" and plan.attention_kernels == {}
    text = report.text(plan)
    assert text.startswith("linear on cpu:8\n") and "8 x cpu in 1 process, mesh dp=1 fsdp=8 mp=1" in text
    assert "1.00 times those of the model" in text
    assert re.search(r"saved in [\d.e-]*[1-9][\d.e-]* s ", text), "not 0 s"


def test_parameters_alone_are_saved_in_half_precision_and_copied_by_all_processes(planned, monkeypatch):
    monkeypatch.setattr(Topology, "num_processes", 2)
    plan = planned(save_optimizer_state=False)
    assert (plan.checkpoint_bytes, plan.host_bytes_per_process) == (2 * WIDTH * OUTPUTS, 4 * WIDTH * OUTPUTS // 2)


def test_a_step_that_needs_more_memory_does_not_fit(planned):
    plan = planned(save_optimizer_state=True, hbm_gb=1e-6)
    assert plan.fits is False and plan.error.startswith("does not fit: 0.0") and plan.peak_bytes_per_device > 1000
    assert report.text(plan).endswith(f"error         {plan.error}")


@pytest.mark.parametrize("platform, xla_peak, peak", [("cuda", 3000, 3000), ("tpu", 8000, 3604), ("cpu", 700, 3604)])
def test_the_peak_is_at_most_that_of_all_arrays_of_the_device(platform, xla_peak, peak):
    sizes = {"argument_size": 659, "output_size": 658, "alias_size": 600, "temp_size": 2887, "peak_memory": xla_peak}
    memory = types.SimpleNamespace(**{f"{name}_in_bytes": size for name, size in sizes.items()})
    assert peak_bytes(memory, platform) == peak


def test_offloaded_values_are_a_part_of_the_text(planned):
    plan = planned(save_optimizer_state=True)
    assert plan.offloaded_bytes_per_device == 0 and "of the host's" not in report.text(plan)
    assert "; 5.03 GB of the host's\n" in report.text(plan.with_values(offloaded_bytes_per_device=5_033_000_000))


@pytest.mark.parametrize(
    "message, cause, fits",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (233.65G) "
            "exceeds available HBM (15.75G).",
            "does not fit: Ran out of memory on HBM, the total memory required for HLO temporaries (233.65G) exceeds "
            "available HBM (15.75G)",
            False,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G "
            "of 15.75G hbm. Exceeded hbm capacity by 4.75G.\n\nTotal hbm usage >= 21.01G:",
            "does not fit: XLA needs 20.50G of 15.75G a device",
            False,
        ),
        (
            'INTERNAL: custom_partitioner: Traceback (most recent call last):\n\n  File "a.py", line 26, in <module>\n'
            '  File "b.py", line 58, in main\n    partition()\nIndivisibleError: dim_size=2 is not divisible by '
            "axis_size=4.\n\n\nSuspected Python Code Location:\n  c.py:43:10 [kernel]",
            "does not compile: INTERNAL: custom_partitioner: IndivisibleError: dim_size=2 is not divisible by "
            "axis_size=4",
            None,
        ),
        ("UNIMPLEMENTED: no such\n operation.", "does not compile: UNIMPLEMENTED: no such operation", None),
    ],
)
def test_a_failed_compilation_is_one_line(planned, monkeypatch, message, cause, fits):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    plan = planned(save_optimizer_state=True)
    assert (plan.error, plan.fits, plan.peak_bytes_per_device) == (cause, fits, None)
    assert plan.checkpoint_bytes and report.text(plan).endswith(f"error         {cause}")
