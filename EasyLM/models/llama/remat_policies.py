"""The policies of the flags `llama.remat_*`. A policy selects the values that are saved for the backward pass."""

from typing import Any

import jax


def _save_attention(prim: Any, *_: Any, **params: Any) -> bool:
    """Saves the output of attention. Matches cuDNN by primitive, because saving by name would run the kernel twice."""
    return "dot_product_attention_fwd" in prim.name or (prim.name == "name" and params["name"] == "attention")


_SAVE_PROJECTIONS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT_POLICIES = {
    "": None,  # no rematerialisation
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
    "attention_saveable": _save_attention,
    "projections_and_attention_saveable": jax.checkpoint_policies.save_from_both_policies(
        _SAVE_PROJECTIONS, _save_attention
    ),
}
