"""The memory of a train step by formula, and from it what `remat_block=auto` saves for the backward pass.

For the presets in scripts/plan_table.json, the formula gives between 1% less and 3% more than the compilers' plans. For
vqlm_100m on v5e, whose logits are large beside its blocks, it gives 12% more.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from EasyLM.errors import UserError
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.llama_model import LOGITS_TOKENS
from EasyLM.models.llama.remat_policies import AUTO, AUTOMATIC_POLICIES
from EasyLM.models.tuning import LANES
from EasyLM.parallel import TOKEN_AXES, axis_size
from EasyLM.training import TrainState, bytes_per_device

_USABLE = 0.95  # share of the memory that a step may need by the formula; the rest is lost to fragmentation
# Copies of a block's values, and of its kernels, that its backward pass holds at once: gradients, and operands in other
# types and layouts. Of the logits: the logits, their softmax and its gradient.
_BLOCK_COPIES, _KERNEL_COPIES, _LOGITS_COPIES = 1.75, 1, 3


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What the memory of a step depends on, besides the model's settings.

    Attributes:
      tokens: tokens of a batch on one device.
      mp: the size of the mesh axis mp.
      dtype: the type of activations and of the kernels that are gathered.
      state_bytes: bytes of the train state on one device.
      trained_count: trained parameters on one device. They are float32; frozen ones have the type `dtype`.
      lanes: a head takes a multiple of so many values in memory: 128 on TPUs.
    """

    tokens: int
    mp: int
    dtype: DTypeLike
    state_bytes: int
    trained_count: int
    lanes: int = 1

    @classmethod
    def of(cls, state: TrainState, mesh: Mesh, dtype: DTypeLike, batch_size: int, seq_length: int) -> "StepShape":
        """Returns the shape of the step of an abstract state."""
        tokens = batch_size * seq_length // axis_size(mesh, TOKEN_AXES)
        mp, count = axis_size(mesh, "mp"), bytes_per_device(state.params) // 4
        lanes = LANES if mesh.devices.flat[0].platform == "tpu" else 1
        return cls(tokens, mp, dtype, bytes_per_device(state), count, lanes)


@dataclasses.dataclass(frozen=True)
class RematChoice:
    """The policy of a step, with the reason as text."""

    policy: str
    reason: str

    def __str__(self) -> str:
        return f"{self.policy or 'everything is saved'} ({self.reason})"


def choose_remat(config: LLaMAConfig, shape: StepShape | None, memory: int | None) -> RematChoice:
    """Returns the policy of a block: for "auto", the one of AUTOMATIC_POLICIES that recomputes the least and fits.

    Args:
      shape: only needed if both the choice is automatic and the memory is known.
      memory: bytes of a device that the step may use; None: unknown, so that the least is saved.
    """
    if config.remat_block != AUTO:
        return RematChoice(config.remat_block, "given by --llama.remat_block")
    if memory is None or shape is None:
        return RematChoice(list(AUTOMATIC_POLICIES)[-1], "the memory of the devices is unknown")
    limit, refused = _USABLE * memory, ""
    for policy in AUTOMATIC_POLICIES:
        needed = step_bytes(config, policy, shape)
        text = f"needs {needed / 1e9:.1f} GB of {memory / 1e9:.1f} GB a device, by formula"
        if needed <= limit:
            return RematChoice(policy, text + refused)
        refused = f"; {policy} would need {needed / 1e9:.1f} GB"
    return RematChoice(policy, f"{text}, which is more than {_USABLE:.0%}")


def check_memory(
    config: LLaMAConfig, shape: StepShape, memory: int, state_remedies: Sequence[str], token_remedies: Sequence[str]
) -> None:
    """Checks that a step can fit under every rematerialization, before it is compiled.

    At the end of its backward pass a step holds the state and all gradients; at the beginning, the state and the input
    of each block. What else it holds depends on the compiler.

    Args:
      memory: bytes of a device that JAX may use.
      state_remedies: what to change if the state and the gradients do not fit, whatever the tokens of a batch.
      token_remedies: what to change if they do, and the tokens of a batch do not.

    Raises:
      UserError: with the bytes and the remedies, if it cannot fit.
    """
    itemsize = jnp.dtype(shape.dtype).itemsize
    gradients = shape.trained_count * itemsize
    inputs = config.num_hidden_layers * shape.tokens * config.hidden_size * itemsize
    for what, size, remedies in (
        ("gradients", gradients, state_remedies),
        (f"inputs of the blocks for the {shape.tokens} tokens of a batch", inputs, token_remedies),
    ):
        if shape.state_bytes + size > memory:
            raise UserError(
                f"the train step does not fit: on each device, the train state has {shape.state_bytes / 1e9:.3g} GB "
                f"and the {what} {size / 1e9:.3g} GB, but JAX may use {memory / 1e9:.3g} GB: try {', '.join(remedies)}"
            )


def step_bytes(config: LLaMAConfig, policy: str, shape: StepShape) -> int:
    """Returns the bytes that a step needs on one device. The kernels and their gradients have the type `shape.dtype`.

    Args:
      policy: one of AUTOMATIC_POLICIES.
    """
    c, itemsize = config, jnp.dtype(shape.dtype).itemsize
    copies = shape.trained_count if itemsize < 4 else 0  # the kernels in the type of the computation
    residual = c.num_hidden_layers * shape.tokens * c.hidden_size  # the input of each block
    saved = c.num_hidden_layers * shape.tokens * _elements(c, AUTOMATIC_POLICIES[policy], shape)
    block = shape.tokens * (c.hidden_size + _elements(c, next(iter(AUTOMATIC_POLICIES.values())), shape))
    kernels = (2 * c.hidden_size + 2 * c.kv_heads * c.head_dim + 3 * c.intermediate_size) * c.hidden_size // shape.mp
    logits = min(shape.tokens, LOGITS_TOKENS) * _split(c.vocab_size, shape.mp) * 4
    # The logits are no longer in memory when the backward pass of the blocks begins, and with it their gradients.
    blocks = (shape.trained_count + _BLOCK_COPIES * block + _KERNEL_COPIES * kernels) * itemsize
    return round(shape.state_bytes + (copies + residual + saved) * itemsize + max(blocks, _LOGITS_COPIES * logits))


def _elements(config: LLaMAConfig, saved: Sequence[str], shape: StepShape) -> int:
    """Returns the elements that saved values have for each token and layer on one device."""
    heads, groups = _split(config.num_attention_heads, shape.mp), _split(config.kv_heads, shape.mp)
    wide, head_dim = _split(config.intermediate_size, shape.mp), -(-config.head_dim // shape.lanes) * shape.lanes
    sizes = {
        "attention": heads * head_dim,
        "query": heads * head_dim,
        "key": groups * head_dim,
        "value": groups * head_dim,
        "up": wide,
        "gate": wide,
        "output": config.hidden_size,
    }
    return sum(sizes[name] for name in saved)


def _split(size: int, ways: int) -> int:
    return size // ways if size % ways == 0 else size
