"""FLOPs of matrix products: small programs whose FLOPs are known."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from EasyLM.models.attention import AttentionMask, attention
from EasyLM.parallel import make_mesh
from EasyLM.planning.matmuls import attention_weights, matmul_flops

ROWS, WIDTH, LAYERS = 2, 4, 5
PRODUCT = 2 * ROWS * WIDTH * WIDTH
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
W = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
STACK = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)


def flops(function, *arguments):
    return matmul_flops(jax.make_jaxpr(function)(*arguments))


def layers(x, stack, policy=jax.checkpoint_policies.everything_saveable):
    @partial(jax.checkpoint, policy=policy)
    def layer(x, w):
        return jnp.sin(x @ w), None

    return jax.lax.scan(layer, x, stack)[0]


def test_products_in_jit_count_and_unused_ones_do_not():
    def program(x, w):
        jax.jit(jnp.matmul)(x, w + 1)
        return jax.jit(jnp.matmul)(x, w)

    assert flops(program, X, W) == PRODUCT


def test_the_body_of_a_loop_counts_once_for_each_trip():
    assert flops(layers, X, STACK) == LAYERS * PRODUCT
    assert flops(lambda x, w: jax.lax.fori_loop(2, 5, lambda i, x: x @ w, x), X, W) == 3 * PRODUCT


def test_recomputation_counts():
    def gradient(policy):
        return jax.grad(lambda stack, x: layers(x, stack, policy).sum(), argnums=(0, 1))

    assert flops(gradient(jax.checkpoint_policies.everything_saveable), STACK, X) == 3 * LAYERS * PRODUCT
    assert flops(gradient(jax.checkpoint_policies.nothing_saveable), STACK, X) == 4 * LAYERS * PRODUCT


def test_trips_may_depend_on_the_index_of_an_outer_loop():
    def triangle(x, w):
        return jax.lax.map(lambda i: jax.lax.fori_loop(0, 2 * i + 1, lambda j, x: x @ w, x), jnp.arange(4))

    assert flops(triangle, X, W) == (1 + 3 + 5 + 7) * PRODUCT


def test_trips_that_depend_on_an_argument_are_unknown():
    def program(x, w, n):
        return jax.lax.fori_loop(0, n, lambda i, x: x @ w, x)

    assert flops(program, X, W, jax.ShapeDtypeStruct((), jnp.int32)) is None
    assert flops(lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: x + 1, x), X, jnp.int32(3)) == 0


def test_the_larger_branch_of_a_condition_counts():
    def program(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops(program, X, W) == 2 * PRODUCT


def test_an_inner_program_of_each_device_counts_on_all():
    mesh = make_mesh("1,2,1", jax.devices()[:2])
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
    assert flops(product, X, W) == PRODUCT


@pytest.mark.parametrize("query_chunk, key_chunk, share", [(4, 4, 10 / 16), (8, 8, 3 / 4), (16, 16, 1)])
def test_blockwise_attention_skips_later_chunks(query_chunk, key_chunk, share):
    batch, length, heads, head_dim = 2, 16, 3, 8
    q = jax.ShapeDtypeStruct((batch, length, heads, head_dim), jnp.float32)
    attend = partial(
        attention,
        mask=AttentionMask(),
        platform="cpu",
        implementation="blockwise",
        query_chunk=query_chunk,
        key_chunk=key_chunk,
    )
    product = 2 * batch * heads * length**2 * head_dim * share
    gradient = jax.grad(lambda q, k, v: attend(q, k, v).sum(), argnums=(0, 1, 2))
    assert flops(attend, q, q, q) == 2 * product
    assert flops(gradient, q, q, q) == (2 + 5) * product


@pytest.mark.parametrize("groups, expected", [(3, "float32[2,3,16,16]"), (1, "float32[2,1,48,16]")])
def test_attention_weights_are_found(groups, expected):
    q, k = (jax.ShapeDtypeStruct((2, 16, heads, 8), jnp.float32) for heads in (3, groups))

    def weights(implementation):
        attend = partial(attention, mask=AttentionMask(), implementation=implementation, query_chunk=4, key_chunk=4)
        return attention_weights(jax.make_jaxpr(attend)(q, k, k), 16)

    assert weights("xla") == expected and weights("blockwise") == ""


def test_activations_as_wide_as_the_row_are_not_attention_weights():
    def program(x_BTD, stack):
        return jax.lax.scan(lambda x, w: (x @ w, x), x_BTD, stack)

    x_BTD, stack = jax.ShapeDtypeStruct((2, 16, 16), jnp.float32), jax.ShapeDtypeStruct((3, 16, 16), jnp.float32)
    assert attention_weights(jax.make_jaxpr(program)(x_BTD, stack), 16) == ""


def test_splash_counts_half_of_the_scores_on_all_devices():
    """Without JAX's backend for TPUs, programs for them can be traced. The head dimension is padded to 128."""
    mesh = make_mesh("2,2,2")
    q = jax.ShapeDtypeStruct((4, 256, 2, 100), jnp.float32)
    attend = partial(attention, mask=AttentionMask(), platform="tpu", mesh=mesh)
    product = 2 * 4 * 2 * 256**2 * 128 / 2
    assert flops(attend, q, q, q) == 2 * product
    gradient = jax.grad(lambda q, k, v: attend(q, k, v).sum(), argnums=(0, 1, 2))
    row_sums = 2 * 4 * 2 * 256 * 128  # of the output times its gradient
    assert flops(gradient, q, q, q) == (2 + 4 + 3) * product + row_sums
