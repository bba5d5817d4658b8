"""Adversarial training of a VQGAN (arXiv 2012.09841): patch discriminator, hinge loss, adaptive weight."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from tokenizer.vqgan import GroupNorm, weights

DISCRIMINATOR_FLAGS = {
    "weight": Flag(
        0.0, "Weight of the adversarial loss, times the adaptive weight (0.8 in VQGAN); 0: no discriminator.", least=0
    ),
    "start_step": Flag(0, "First step of adversarial training; reconstructions should be good by then.", least=0),
    "lr": Flag(1e-4, "Learning rate of the discriminator.", above=0),
    "channels": Flag(64, "Channels of the discriminator's first layer.", least=1),
    "layers": Flag(
        3,
        "Layers of the discriminator that halve the side; a patch depends on about 9 * 2^layers pixels a side.",
        least=1,
    ),
}


class Discriminator(nnx.Module):
    """One logit per patch of an image: the PatchGAN of pix2pix (arXiv 1611.07004, appendix 6.1.2).

    Group normalization replaces the original's batch normalization. A logit then depends only on its own image, not on
    the batch or the number of devices, and there are no running statistics.
    """

    def __init__(self, channels: int, layers: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]

        def conv(width: int, out: int, strides: int, bias: bool) -> nnx.Conv:
            return nnx.Conv(
                width,
                out,
                (4, 4),
                strides=strides,
                padding=1,
                use_bias=bias,
                kernel_init=nnx.initializers.normal(0.02),
                dtype=dtype,
                rngs=rngs,
            )

        self.conv_in = conv(3, channels, 2, bias=True)
        pairs = list(itertools.pairwise(widths))
        self.convs = nnx.List([conv(a, b, 2 if i < layers - 1 else 1, bias=False) for i, (a, b) in enumerate(pairs)])
        self.norms = nnx.List([GroupNorm(b, min(32, channels), dtype) for _, b in pairs])
        self.conv_out = conv(widths[-1], 1, 1, bias=True)

    def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Pixels in [0, 1] -> float32 logits [B,h,w], positive where a patch looks real."""
        x = nnx.leaky_relu(self.conv_in(2 * pixels_BHWC - 1), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.leaky_relu(norm(conv(x)), 0.2)
        return self.conv_out(x)[..., 0].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class AdversarialLoss:
    """Values of DISCRIMINATOR_FLAGS, validated for an image size. Parameters of the discriminator are arguments.

    Raises:
      UserError: naming field, value and rule.
    """

    weight: float
    start_step: int
    lr: float
    channels: int
    layers: int
    resolution: int
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.channels % min(32, self.channels):
            raise UserError(f"channels={self.channels}: must be 1..32 or a multiple of 32")
        if self.resolution // 2**self.layers < 3:
            raise UserError(f"layers={self.layers}: too many for images of {self.resolution} pixels")

    def init_params(self, key: jax.Array) -> dict[str, jax.Array]:
        """Returns fresh parameters of the discriminator, by dotted path."""
        return weights.parameters(self._build(nnx.Rngs(params=key)))

    def discriminator(self, params: dict[str, jax.Array]) -> Discriminator:
        """Returns the discriminator with these parameters."""
        return weights.with_parameters(lambda: self._build(nnx.Rngs(0)), params)

    def _build(self, rngs: nnx.Rngs) -> Discriminator:
        return Discriminator(self.channels, self.layers, dtype=self.dtype, rngs=rngs)

    def started(self, step: jax.Array) -> jax.Array:
        """Returns 1.0 from the start step on, else 0.0."""
        return (step >= self.start_step).astype(jnp.float32)

    def generator_loss(self, reconstructed_BHWC: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        """Returns -mean(logits) of reconstructions: what the VQGAN minimizes."""
        return -jnp.mean(self.discriminator(params)(reconstructed_BHWC))

    def discriminator_loss(
        self, params: dict[str, jax.Array], real_BHWC: jax.Array, reconstructed_BHWC: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the hinge loss, which the discriminator minimizes, and the mean logits as metrics."""
        logits = self.discriminator(params)(jnp.concatenate([real_BHWC, reconstructed_BHWC]))
        real, reconstructed = jnp.split(logits, 2)
        loss = 0.5 * (jnp.mean(nnx.relu(1 - real)) + jnp.mean(nnx.relu(1 + reconstructed)))
        return loss, {"logits_real": jnp.mean(real), "logits_reconstructed": jnp.mean(reconstructed)}


def adaptive_weight(
    last_layer: nnx.Conv,
    features_BHWC: jax.Array,
    pixel_gradient_BHWC: jax.Array,
    adversarial_pixel_gradient_BHWC: jax.Array,
) -> jax.Array:
    """Returns the weight that gives both losses equal gradient norms at the decoder's last kernel (equation 7).

    Args:
      last_layer: the decoder's last convolution.
      features_BHWC: its input.
      pixel_gradient_BHWC, adversarial_pixel_gradient_BHWC: gradients of the two losses by reconstructed pixel.
    """
    graphdef, state = nnx.split(last_layer)
    _, backward = jax.vjp(lambda state: nnx.merge(graphdef, state)(features_BHWC).astype(jnp.float32), state)
    norm, adversarial_norm = (
        jnp.linalg.norm(backward(gradient)[0]["kernel"].get_value())
        for gradient in (pixel_gradient_BHWC, adversarial_pixel_gradient_BHWC)
    )
    return jnp.clip(norm / (adversarial_norm + 1e-4), 0, 1e4)
