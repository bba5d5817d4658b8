"""The losses of codes: commitment, codebook and entropy."""

import dataclasses

import jax
import jax.numpy as jnp

from tokenizer.vqgan import VQGAN

CODEBOOK_UPDATES = ("ema", "gradient")


@dataclasses.dataclass(frozen=True)
class CodeLoss:
    """The loss of the codes of a model.

    Commitment (vq, lfq): pulls the encoder's vectors towards their codes with the weight `commitment_cost` (VQ-VAE,
    arXiv 1711.00937, equation 3). FSQ has no such term, because its vectors cannot leave the grid.
    Codebook (vq with the update "gradient"): pulls the codes towards their vectors.
    Entropy (vq, lfq, with an `entropy_weight`): spreads the vectors over all codes; see `entropy_loss`.

    Attributes:
      codebook_update: how the codes of vq are learned. "ema": they are running means, and unused codes are replaced
        (see `codebook`). "gradient": they are parameters.
    """

    codebook_update: str = "ema"
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01

    def terms(self, model: VQGAN, hidden_BhwZ: jax.Array, chosen_BhwZ: jax.Array) -> dict[str, jax.Array]:
        """Returns the weighted terms by name.

        Args:
          hidden_BhwZ: the vectors, in the space of the codes.
          chosen_BhwZ: the code of each vector.
        """
        terms = {}
        quantizer = model.config.quantizer
        if quantizer != "fsq":
            terms["commitment"] = model.config.commitment_cost * commitment(model, hidden_BhwZ, chosen_BhwZ)
        if quantizer == "vq" and self.codebook_update == "gradient":
            terms["codebook"] = codebook_error(hidden_BhwZ, chosen_BhwZ)
        if self.entropy_weight:
            hidden_MZ = hidden_BhwZ.reshape(-1, hidden_BhwZ.shape[-1])
            if quantizer == "lfq":
                entropy = sign_entropy_loss(hidden_MZ, self.entropy_temperature)
            else:
                entropy = entropy_loss(hidden_MZ, model.quantize.table(), self.entropy_temperature)
            terms["entropy"] = self.entropy_weight * entropy
        return terms


def commitment(
    model: VQGAN, hidden_BhwZ: jax.Array, chosen_BhwZ: jax.Array, mask_Bhw: jax.Array | None = None
) -> jax.Array:
    """Returns the `commitment_error`: relative to the variance of the vectors with vq, as a grid has a fixed scale."""
    scale = None if model.config.quantizer == "vq" else 1.0
    return commitment_error(hidden_BhwZ, chosen_BhwZ, mask_Bhw, scale)


def commitment_error(
    hidden_BhwZ: jax.Array,
    chosen_BhwZ: jax.Array,
    mask_Bhw: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Returns the mean squared distance of vectors from their codes. The codes get no gradient.

    The distance is relative to the variance of the vectors, so its weight does not depend on their scale. The variance
    of the codes is unsuitable: it vanishes when all vectors have one code, and the loss then outweighs all others.

    Args:
      chosen_BhwZ: the code of each vector.
      mask_Bhw: the vectors to include; None: all.
      scale: divides the error in place of the variance.
    """
    chosen_BhwZ = jax.lax.stop_gradient(chosen_BhwZ)
    divisor = _variance(hidden_BhwZ) if scale is None else scale
    error_Bhw = jnp.mean((hidden_BhwZ - chosen_BhwZ) ** 2, axis=-1)
    if mask_Bhw is None:
        return jnp.mean(error_Bhw) / divisor
    return jnp.sum(jnp.where(mask_Bhw, error_Bhw, 0.0)) / jnp.maximum(jnp.sum(mask_Bhw), 1) / divisor


def codebook_error(hidden_BhwZ: jax.Array, chosen_BhwZ: jax.Array) -> jax.Array:
    """Returns the value of `commitment_error`. Only the codes get a gradient."""
    error_BhwZ = jax.lax.stop_gradient(hidden_BhwZ) - chosen_BhwZ
    return jnp.mean(error_BhwZ**2) / _variance(hidden_BhwZ)


def straight_through(hidden: jax.Array, chosen: jax.Array) -> jax.Array:
    """Returns `chosen`, with the gradient of the identity for `hidden`, and none for `chosen`."""
    return hidden + jax.lax.stop_gradient(chosen - hidden)


def _variance(hidden_BhwZ: jax.Array) -> jax.Array:
    """Returns the mean variance of the dimensions, without a gradient."""
    return jnp.maximum(jnp.mean(jnp.var(jax.lax.stop_gradient(hidden_BhwZ), axis=(0, 1, 2))), 1e-6)


def entropy_loss(hidden_MZ: jax.Array, table_KZ: jax.Array, temperature: float) -> jax.Array:
    """Returns the entropy loss of MaskGIT and of LFQ (arXiv 2310.05737, equation 5), in nats: 0 to -log K, the best.

    Each vector has a distribution over the codes: the softmax of the negative squared distances, divided by the
    temperature. The loss is the mean entropy of these distributions, low if the choice of a code is clear, minus the
    entropy of their mean, high if all codes are chosen equally often. Needs memory for M x K numbers.
    """
    product_MK = jnp.einsum("MZ,KZ->MK", hidden_MZ, table_KZ, precision="highest")
    # The squared lengths of the vectors are missing, as they are the same for all codes.
    logits_MK = (2 * product_MK - jnp.sum(table_KZ**2, axis=1)[None]) / temperature
    logs_MK = jax.nn.log_softmax(logits_MK)
    shares_MK = jnp.exp(logs_MK)
    return -jnp.mean(jnp.sum(shares_MK * logs_MK, axis=1)) - _entropy(jnp.mean(shares_MK, axis=0))


def sign_entropy_loss(hidden_MZ: jax.Array, temperature: float) -> jax.Array:
    """Returns the `entropy_loss` for the codes of LFQ, all vectors of -1 and 1, without M x K numbers.

    The dimensions of a vector are independent: the probability of a code is the product over its signs. So the entropy
    of a vector is a sum over dimensions, and the mean distribution is a matrix product of those of two halves.
    """
    logits_MZ = 4 * hidden_MZ / temperature  # of 1 against -1: (x + 1)^2 - (x - 1)^2 = 4 x
    logs_MZ2 = jnp.stack([jax.nn.log_sigmoid(-logits_MZ), jax.nn.log_sigmoid(logits_MZ)], axis=-1)
    shares_MZ2 = jnp.exp(logs_MZ2)
    half = hidden_MZ.shape[1] // 2
    first_MI, second_MJ = _combined(shares_MZ2[:, :half]), _combined(shares_MZ2[:, half:])
    mean_IJ = jnp.einsum("MI,MJ->IJ", first_MI, second_MJ, precision="highest") / len(hidden_MZ)
    return -jnp.mean(jnp.sum(shares_MZ2 * logs_MZ2, axis=(1, 2))) - _entropy(mean_IJ)


def _combined(shares_MZ2: jax.Array) -> jax.Array:
    """Returns the probabilities of all combinations of signs, [M,2^Z]."""
    combined_MI = jnp.ones((len(shares_MZ2), 1))
    for dimension in range(shares_MZ2.shape[1]):
        combined_MI = (combined_MI[:, :, None] * shares_MZ2[:, dimension, None]).reshape(len(shares_MZ2), -1)
    return combined_MI


def _entropy(shares: jax.Array) -> jax.Array:
    """Returns the entropy of a distribution, of any shape. The lower limit keeps the gradient finite."""
    return -jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-12)))
