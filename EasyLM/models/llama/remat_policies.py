"""The policies of the flags `llama.remat_*`. A policy selects the values that are saved for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax

AUTO = "auto"  # a policy is chosen by the memory of the devices
# The named values of a block that policies save, the first ones first. Recomputing a projection costs as many FLOPs per
# saved byte as any other; their order makes the policies differ by similar numbers of bytes. Attention comes first,
# because its kernel is slower than a matrix product.
SAVED_VALUES = ("attention", "up", "value", "key", "query", "gate", "output")


def _save(*names: str) -> Callable[..., bool]:
    """Returns the policy that saves named values.

    cuDNN's attention is matched by its primitive, because saving it by name would run the kernel twice.
    """

    def policy(prim: Any, *_: Any, **params: Any) -> bool:
        return "dot_product_attention_fwd" in prim.name or (prim.name == "name" and params["name"] in names)

    return policy


def _offload(*names: str) -> Callable[..., Any]:
    """Returns the policy that saves attention, and named values in the memory of the host."""
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=names,
        offload_src="device",
        offload_dst="pinned_host",
    )
    save_attention = _save("attention")

    def policy(prim: Any, *values: Any, **params: Any) -> Any:
        return save_attention(prim, **params) or by_name(prim, *values, **params)

    return policy


# The policies among which "auto" chooses, and the values that each saves. Those that recompute the least come first.
# The first one saves all matrix products, and recomputes only elementwise operations. This takes less time than writing
# and reading their results (on a CPU, a step takes 10% less).
AUTOMATIC_POLICIES: dict[str, tuple[str, ...]] = {
    "projections_and_attention_saveable": SAVED_VALUES,
    **{
        "_".join((*SAVED_VALUES[:count], "saveable")): SAVED_VALUES[:count]
        for count in range(len(SAVED_VALUES) - 1, 0, -1)
    },
    "nothing_saveable": (),
}
REMAT_POLICIES = {
    "": None,  # no rematerialization
    **{
        name: getattr(jax.checkpoint_policies, name)
        for name in (
            "everything_saveable",
            "nothing_saveable",
            "dots_saveable",
            "checkpoint_dots",
            "dots_with_no_batch_dims_saveable",
            "checkpoint_dots_with_no_batch_dims",
        )
    },
    **{name: _save(*saved) for name, saved in AUTOMATIC_POLICIES.items() if saved},
    # Recomputes as little as "projections_and_attention_saveable" and needs far less memory of the device.
    "projections_offloadable": _offload(*(name for name in SAVED_VALUES if name != "attention")),
}
