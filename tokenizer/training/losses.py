"""Loss terms of images without a network of their own, and changes of images for the locality loss."""

import jax
import jax.numpy as jnp
from flax import nnx


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
