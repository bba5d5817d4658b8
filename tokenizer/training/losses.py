"""Loss terms without a network of their own."""

import jax
import jax.numpy as jnp
from flax import nnx


def commitment_error(hidden_BhwZ: jax.Array, chosen_BhwZ: jax.Array, mask_Bhw: jax.Array | None = None) -> jax.Array:
    """Returns the mean squared distance of vectors from their codes. The codes get no gradient.

    The distance is relative to the variance of the vectors, so its weight does not depend on their scale. The variance
    of the codes would not do: it vanishes when all vectors have one code, and the loss then outweighs all others.

    Args:
      chosen_BhwZ: the code of each vector.
      mask_Bhw: the vectors to include; None: all.
    """
    chosen_BhwZ = jax.lax.stop_gradient(chosen_BhwZ)
    variance = jnp.mean(jnp.var(jax.lax.stop_gradient(hidden_BhwZ), axis=(0, 1, 2)))
    scale = jnp.maximum(variance, 1e-6)
    error_Bhw = jnp.mean((hidden_BhwZ - chosen_BhwZ) ** 2, axis=-1)
    if mask_Bhw is None:
        return jnp.mean(error_Bhw) / scale
    return jnp.sum(jnp.where(mask_Bhw, error_Bhw, 0.0)) / jnp.maximum(jnp.sum(mask_Bhw), 1) / scale


def gradient_error(error_BHWC: jax.Array) -> jax.Array:
    """Returns the mean absolute difference between neighbouring pixels of an error, summed over three scales."""
    total = jnp.zeros(())
    for _ in range(3):
        total += jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=2)))
        error_BHWC = nnx.avg_pool(error_BHWC, (2, 2), (2, 2))
    return total


def paste_rectangles(pixels_BHWC: jax.Array, side: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pastes a random rectangle of the next image into each image (as in CutMix, arXiv 1905.04899).

    Args:
      side: cells along an edge of an image; rectangles consist of whole cells.

    Returns:
      The images, and the mask [B,h,w] of the cells that neither lie in the rectangle nor touch it. A cell beside the
      rectangle is excluded, since its code may depend on its neighbours.
    """
    B, H = pixels_BHWC.shape[:2]
    edges_B22 = jnp.sort(jax.random.randint(key, (B, 2, 2), 0, side + 1), axis=-1)

    def rectangle(margin: int) -> jax.Array:
        cells = jnp.arange(side)[None, None]
        rows, columns = jnp.moveaxis(
            (cells >= edges_B22[..., :1] - margin) & (cells < edges_B22[..., 1:] + margin), 1, 0
        )
        return rows[:, :, None] & columns[:, None, :]

    pasted_BHW = jnp.repeat(jnp.repeat(rectangle(0), H // side, axis=1), H // side, axis=2)
    return jnp.where(pasted_BHW[..., None], jnp.roll(pixels_BHWC, 1, axis=0), pixels_BHWC), ~rectangle(1)


def roll_cells(pixels_BHWC: jax.Array, side: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rolls the images of a batch cyclically by a random number of cells, the same for all images.

    Args:
      side: cells along an edge of an image.

    Returns:
      The images; the shift [2] in cells, down and to the right; and the mask [h,w] of the cells that do not touch the
      seam, where edges of the original images meet. Other cells have their old neighbours, or the edge of the image
      where they had neighbours, which a code is not to depend on.
    """
    shift_2 = jax.random.randint(key, (2,), 0, side)
    rolled_BHWC = jnp.roll(pixels_BHWC, shift_2 * (pixels_BHWC.shape[1] // side), axis=(1, 2))
    cells = jnp.arange(side)
    away_from_seam = [(cells != shift) & (cells != (shift - 1) % side) for shift in shift_2]
    return rolled_BHWC, shift_2, away_from_seam[0][:, None] & away_from_seam[1][None, :]
