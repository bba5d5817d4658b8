"""Usage of the codebook. Shapes: K codes."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # commands that only read files start faster without JAX
    import jax


def code_usage(counts_K: "np.ndarray | jax.Array") -> dict[str, Any]:
    """Returns the share of codes in use and the perplexity of the codes, for NumPy arrays and inside `jax.jit`.

    Args:
      counts_K: how often each code occurs.

    Returns:
      `codes_used`, 0..1, and `code_perplexity`, exp of the entropy of the codes; both 0-dimensional arrays. If all
      counts are 0, the perplexity is 1.
    """
    xp = counts_K.__array_namespace__()
    share_K = counts_K / xp.maximum(xp.sum(counts_K), 1)
    entropy = -xp.sum(share_K * xp.log(xp.maximum(share_K, 1e-12)))
    return {"codes_used": xp.mean(counts_K > 0), "code_perplexity": xp.exp(entropy)}
