"""The search for the fastest settings, and the estimates that it compares."""

import types

import pytest
from ml_collections import ConfigDict

from EasyLM.errors import UserError
from EasyLM.flags import defaults
from EasyLM.parallel import SHARE_VARIABLES
from EasyLM.planning import report
from EasyLM.planning.collectives import OPERATIONS, Communication
from EasyLM.planning.estimates import ASSUMPTION_FLAGS, Assumptions
from EasyLM.planning.plan import Plan
from EasyLM.planning.search import Candidate, search
from EasyLM.planning.topologies import Topology
from EasyLM.training.throughput import PEAK_TFLOPS

BLANK = Plan("cpu:8", 1, "model", 8, 64)
MEMORY, SAVED = 10, {"": 4, "some": 2, "nothing": 1}  # of a row, by policy
SPEED = {"": 100.0, "some": 90.0, "nothing": 75.0}


def make(candidate: Candidate, saturation: int = 64) -> Plan:
    """A device with memory for 10 units. Batches amortise a fixed cost up to a size."""
    if candidate.mesh_dim == "refused":
        return BLANK.with_values(error="--mesh_dim=refused: no such mesh")
    used = SAVED[candidate.policy] * candidate.rows
    speed = SPEED[candidate.policy] * min(1, candidate.rows / saturation)
    return BLANK.with_values(fits=used <= MEMORY, tokens_per_second_estimate=speed, error=f"does not fit: {used}")


def test_more_rows_are_worth_recomputation_while_they_make_the_step_faster():
    result = search(make, ["1,8,1"], list(SAVED))
    assert result.fastest[0] == Candidate("1,8,1", "nothing", 8)
    assert "mesh 1,8,1, saving nothing, 16 rows a device: does not fit: 16" in result.reason
    assert "mesh 1,8,1, saving nothing, 4 rows a device: -50.0% tokens/s" in result.reason


def test_without_a_gain_from_more_rows_the_least_recomputation_is_the_fastest():
    reported = []
    result = search(lambda c: make(c, saturation=1), ["1,8,1"], list(SAVED), lambda c, plan: reported.append(c))
    assert result.fastest[0].policy == "", "and memory does not limit it, so other policies are not compiled"
    assert reported == [Candidate("1,8,1", "", rows) for rows in (1, 2)]


def test_a_refused_mesh_is_tried_once():
    result = search(make, ["refused", "1,8,1"], ["some"])
    assert [candidate.mesh_dim for candidate, _ in result.tried].count("refused") == 1
    assert result.fastest[0].mesh_dim == "1,8,1"


def test_nothing_fits():
    result = search(lambda c: make(Candidate(c.mesh_dim, c.policy, 100)), ["1,8,1"], list(SAVED))
    assert result.fastest is None and result.reason == "none of the candidates fits"
    assert len(result.tried) == len(SAVED)


def assumptions(kind: str, **given: float) -> Assumptions:
    config = ConfigDict(defaults(ASSUMPTION_FLAGS).to_dict() | {"peak_tflops": 0.0} | given)
    return Assumptions.of(config, Topology([types.SimpleNamespace()] * 4, "cuda" if "H100" in kind else "any", kind))


H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("kind, memory", [("TPU v5 lite", 16.9), ("TPU v5p", 102.8), (H100, 0.75 * 85.0)])
def test_rates_are_those_of_the_device_unless_a_flag_gives_them(monkeypatch, kind, memory):
    for name in SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    sheet = assumptions(kind)
    assert sheet.hbm_gb == memory and sheet.peak_tflops == next(v for k, v in PEAK_TFLOPS.items() if k in kind)
    given = assumptions(kind, hbm_gb=7.0, peak_tflops=3.0)
    assert (given.hbm_gb, given.peak_tflops, given.link_gb_per_second) == (7.0, 3.0, sheet.link_gb_per_second)


@pytest.mark.parametrize("name", SHARE_VARIABLES)
def test_gpus_have_the_share_of_memory_that_jax_uses(monkeypatch, name):
    for other in SHARE_VARIABLES:
        monkeypatch.setenv(other, "")
    for text, share in {"0.95": 0.95, ".5": 0.5, "": 0.75, "1": 1.0}.items():
        monkeypatch.setenv(name, text)
        assert assumptions(H100).hbm_gb == pytest.approx(share * 85.0)
    assert assumptions("TPU v5p").hbm_gb == 102.8 and assumptions(H100, hbm_gb=80.0).hbm_gb == 80.0
    for text in ("all", "0", "1.5", "nan"):
        monkeypatch.setenv(name, text)
        with pytest.raises(UserError, match=f"^{name}={text}: must be above 0 and at most 1"):
            assumptions(H100)


def test_one_setting_with_two_names_is_refused_as_jax_refuses_it(monkeypatch):
    jax_options = pytest.importorskip("jaxlib.xla_client").generate_pjrt_gpu_plugin_options
    for name in SHARE_VARIABLES:
        monkeypatch.setenv(name, "0.9")
    with pytest.raises(ValueError, match="Remove the latter one"):
        jax_options()
    monkeypatch.setenv(SHARE_VARIABLES[1], "")
    assert jax_options()["memory_fraction"] == 0.9
    monkeypatch.setenv(SHARE_VARIABLES[1], "0.9")
    with pytest.raises(UserError, match=r"MEM_FRACTION=0.9: two names .* unset XLA_PYTHON_CLIENT_MEM_FRACTION"):
        assumptions(H100)


def test_a_step_takes_the_longer_of_computation_and_communication():
    rates = assumptions(
        "cpu", peak_tflops=2.0, matmul_efficiency=0.5, hbm_gb_per_second=4.0, link_gb_per_second=2.0,
        network_gb_per_second=1.0, host_gb_per_second=2.0, disk_gb_per_second=0.5,
    )  # fmt: skip
    none = dict.fromkeys(OPERATIONS, 0)
    within = Communication(none | {"all-gather": 10**9, "all-reduce": 2 * 10**9}, none)
    across = Communication(none, none | {"reduce-scatter": 3 * 10**9})
    # 1 s of products, 1 s for 2 GB of state, read and written
    assert rates.step_seconds(1e12, 2 * 10**9, within) == pytest.approx(max(1 + 1, (1 + 2 * 2) / 2))
    assert rates.step_seconds(1e12, 2 * 10**9, across) == pytest.approx(3 / 1)
    assert rates.step_seconds(5e12, 0, across) == pytest.approx(5)
    assert rates.save_seconds(file_bytes=10**9, host_bytes=3 * 10**9) == pytest.approx(3 / 2 + 1 / 0.5)


def test_a_plan_without_a_step_is_one_line():
    plan = BLANK.with_values(error="--mesh_dim=3,-1,1: does not divide the 8 devices of this run")
    assert report.text(plan) == f"error: model on cpu:8: {plan.error}"
