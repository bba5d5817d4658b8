"""Instructions of compiled programs, and their communication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.parallel import make_mesh
from EasyLM.planning.collectives import communication
from EasyLM.planning.hlo import Instruction, executed_instructions

# A loop of 3 trips as TPUs write it, a loop of 5 trips as noted by XLA, and asynchronous operations. One is in three
# fusions as on TPUs: it starts before the second loop, whose trips accompany it, and ends after it.
MODULE = """HloModule step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %reduced = f32[8]{0:T(256)} all-reduce(%x), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%sum
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %reduced)
}

%condition (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%noted (x.2: f32[8]) -> f32[8] {
  %x.2 = f32[8]{0} parameter(0)
  %gathered = f32[16]{0} all-gather(%x.2), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %during = f32[16]{0} fusion(%x.2), kind=kOutput, calls=%accompanied
  ROOT %half = f32[8]{0} slice(%gathered), slice={[0:8]}
}

%started (x.7: f32[8]) -> (f32[8], f32[16]) {
  %x.7 = f32[8]{0} parameter(0)
  %first = f32[16]{0} all-gather(%x.7), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %in-flight = (f32[8]{0}, f32[16]{0}) custom-call(%first), custom_call_target="AsyncCollectiveStart"
}

%accompanied (x.4: f32[8]) -> f32[16] {
  %x.4 = f32[8]{0} parameter(0)
  ROOT %part = f32[16]{0} all-gather(%x.4), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
}

%ended (x.5: f32[8]) -> f32[16] {
  %x.5 = f32[8]{0} parameter(0)
  %last = f32[16]{0} all-gather(%x.5), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %landed = f32[16]{0} custom-call(%last), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (x.6: f32[6]) -> f32[4] {
  %x.6 = f32[6]{0} parameter(0)
  %padded = f32[8]{0} pad(%x.6, %zero), padding=0_2
  %summed = f32[8]{0} all-reduce(%padded), channel_id=7, replica_groups={{0,1},{2,3}}, to_apply=%sum
  ROOT %own = f32[4]{0} dynamic-slice(%summed, %at), dynamic_slice_sizes={4}
}

ENTRY %main (x.3: f32[8]) -> f32[8] {
  %x.3 = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %x.3)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %y = f32[8]{0} get-tuple-element(%loop), index=1
  %begin = (f32[8]{0}, f32[16]{0}) fusion(%y), kind=kCustom, calls=%started
  %loop.1 = f32[8]{0} while(%y), condition=%always, body=%noted, backend_config={"known_trip_count":{"n":"5"}}
  %own.1 = f32[4]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %end = f32[16]{0} fusion(%loop.1), kind=kCustom, calls=%ended
  %begin.1 = (f32[8]{0}, f32[12]{0}) all-gather-start(%loop.1), channel_id=1, replica_groups={{0,1},{2,3}}
  %end.1 = f32[12]{0} all-gather-done(%begin.1)
  %ring = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%y), channel_id=4, source_target_pairs={{0,2},{2,0}}
  %alone = f32[8]{0} all-reduce(%y), channel_id=5, replica_groups={{0},{1},{2},{3}}, to_apply=%sum
  %sent = (bf16[4], u32[], token[]) send(%y, %after), attributes={_xla_host_transfer_rendezvous="all-reduce.9_0"}
  %received = (bf16[4], u32[], token[]) recv(%after), attributes={_xla_host_transfer_rendezvous="all-reduce.9_0"}
  ROOT %scattered = bf16[8]{0} reduce-scatter(%z), channel_id=6, replica_groups={{0,1,2,3}}, to_apply=%sum
}
"""


def test_loops_count_by_their_trips():
    executions = {instruction.name: times for times, instruction in executed_instructions(MODULE)}
    assert executions["reduced"] == 3 and executions["gathered"] == 5 and executions["end"] == 1
    assert "add" not in executions, "the function of a reduction is not executed as a step of its own"


def test_communication_counts_the_larger_side_by_network():
    sent = communication(executed_instructions(MODULE), island_of=[0, 0, 1, 1])
    kinds = {
        "all-gather": 64 + 48,
        "all-reduce": 3 * 32,
        "reduce-scatter": 32,
        "all-to-all": 0,
        "collective-permute": 0,
    }
    assert sent.within == kinds, (
        "neighbours are in one island; a group of one device sends nothing; shard_map reuses channels"
    )
    kinds = {"all-gather": 5 * 64, "all-reduce": 8, "reduce-scatter": 16, "all-to-all": 0, "collective-permute": 32}
    assert sent.across == kinds, "groups of transposed devices, rings between islands and transfers by hosts cross"
    assert sent.total["all-gather"] == 6 * 64 + 48


@pytest.mark.parametrize(
    "groups, crosses",
    [
        ("mesh['a'=2,'b'=2] {'b'}", False),
        ("mesh['a'=2,'b'=2] {'a'}", True),
        ("mesh['a'=2,'b'=2] {'a','b'}", True),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", False),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", True),
        ("mesh['a'=4,'b'=1] {'b'}", None),
        ("[2,2]<=[4]", False),
        ("[2,2]<=[2,2]", False),
        ("[2,2]<=[2,2]T(1,0)", True),
    ],
)
def test_groups_of_devices(groups, crosses):
    """Devices 0 and 1 are in one island, 2 and 3 in another. Groups of one device send nothing."""
    instruction = Instruction("x", "f32[8]{0}", "all-reduce", f"%y), replica_groups={groups}, to_apply=%sum")
    sent = communication([(1, instruction)], island_of=[0, 0, 1, 1])
    assert sent.across["all-reduce"] == (32 if crosses else 0)
    assert sent.within["all-reduce"] == (0 if crosses is not False else 32)


@pytest.mark.parametrize(
    "branches", ["branch_computations={%plain, %sums}", "true_computation=%sums, false_computation=%plain"]
)
def test_branches_have_their_share_of_the_executions(branches):
    module = f"""
%plain (x: f32[8]) -> f32[8] {{
  ROOT %x = f32[8]{{0}} parameter(0)
}}

%sums (x.1: f32[8]) -> f32[8] {{
  %x.1 = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%x.1), channel_id=1, replica_groups={{{{0,1}}}}, to_apply=%add
}}

ENTRY %main (p: pred[], x.2: f32[8]) -> f32[8] {{
  %p = pred[] parameter(0)
  %x.2 = f32[8]{{0}} parameter(1)
  %always = f32[8]{{0}} all-reduce(%x.2), channel_id=2, replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %y = f32[8]{{0}} conditional(%p, %always, %always), {branches}
}}
"""
    for share in (0, 0.25, 1):
        sent = communication(executed_instructions(module, branch_share=share), island_of=[0, 1])
        assert sent.across["all-reduce"] == 32 + 32 * share


@pytest.mark.parametrize("scanned", [True, False])
def test_a_program_compiled_here(scanned):
    mesh, layers, width, rows = make_mesh("1,8,1"), 3, 16, 8

    def program(x, stack):
        if scanned:
            return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, stack)[0]
        for layer in range(layers):
            x = jnp.sin(x @ stack[layer])
        return x

    x = jax.ShapeDtypeStruct((rows, width), np.float32, sharding=NamedSharding(mesh, P("fsdp")))
    stack = jax.ShapeDtypeStruct((layers, width, width), np.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    text = jax.jit(program, out_shardings=NamedSharding(mesh, P("fsdp"))).lower(x, stack).compile().as_text()
    sent = communication(executed_instructions(text), island_of=range(8))
    assert sum(sent.across.values()) == layers * width * width * 4 and sum(sent.within.values()) == 0
