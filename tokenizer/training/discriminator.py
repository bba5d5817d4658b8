"""The adversary of VQGAN training (arXiv 2012.09841): a discriminator of patches, its hinge loss, the adaptive weight.

Shapes: B images, H W pixels, h w patches, C channels.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from tokenizer.vqgan import GroupNorm, weights

ADVERSARY_FLAGS = {
    "weight": Flag(
        0.0, "Weight of the adversarial term beside the adaptive one (0.8 in VQGAN); 0: no discriminator.", least=0
    ),
    "start_step": Flag(
        0, "Step from which the discriminator learns and is heard: when pictures are good already.", least=0
    ),
    "lr": Flag(1e-4, "Learning rate of the discriminator.", above=0),
    "channels": Flag(64, "Channels of the discriminator's first layer.", least=1),
    "layers": Flag(
        3, "Layers of the discriminator that halve the side; each patch sees about 9 * 2^layers pixels.", least=1
    ),
}
# The clock counts steps in units of 2^-24: exact in float32, and no weight in the norm of the parameters.
TICK = 2.0**-24


class Discriminator(nnx.Module):
    """A verdict on each patch of a picture: the PatchGAN of pix2pix (arXiv 1611.07004, appendix 6.1.2).

    Group normalization stands where the original has batch normalization: a verdict then depends on its own picture
    alone, so it is the same whatever the batch and the number of devices, and no running statistics are kept.
    """

    def __init__(self, channels: int, layers: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]

        def conv(width, out, strides, bias):
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
        """Pixels in [0, 1] -> float32 [B,h,w]: positive where a patch looks real."""
        x = nnx.leaky_relu(self.conv_in(2 * pixels_BHWC - 1), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.leaky_relu(norm(conv(x)), 0.2)
        return self.conv_out(x)[..., 0].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Adversary:
    """The settings of ADVERSARY_FLAGS, checked against the pictures' size.

    Its parameters are two groups: `discriminator`, flat by dotted path, and `clock`, the steps done.

    Raises:
      UserError: naming flag, value and rule.
    """

    weight: float
    start_step: int
    lr: float
    channels: int
    layers: int
    resolution: int
    dtype: object = jnp.float32

    def __post_init__(self):
        rules = [
            ("channels", self.channels % min(32, self.channels) == 0, "must be 1..32 or 32 times"),
            ("layers", self.resolution // 2**self.layers >= 3, f"leaves no patch of {self.resolution} pixels"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise UserError(f"--adversary.{name}={getattr(self, name)}: {rule}")

    def init_params(self, key: jax.Array) -> dict:
        """Fresh parameters."""
        return {"discriminator": weights.parameters(self._make(nnx.Rngs(params=key))), "clock": jnp.zeros(())}

    def _make(self, rngs: nnx.Rngs) -> Discriminator:
        return Discriminator(self.channels, self.layers, dtype=self.dtype, rngs=rngs)

    def discriminator(self, params: dict) -> Discriminator:
        """The network of these parameters."""
        return weights.with_parameters(lambda: self._make(nnx.Rngs(0)), params["discriminator"])

    def started(self, params: dict) -> jax.Array:
        """Whether the discriminator takes part: 1.0 or 0.0."""
        return (params["clock"] >= self.start_step * TICK).astype(jnp.float32)

    def judge(self, params: dict, drawn_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The generator's loss, -mean(verdicts), and its slope by pixel [B,H,W,C]; no gradient passes either."""
        network = self.discriminator(jax.lax.stop_gradient(params))
        return jax.value_and_grad(lambda drawn: -jnp.mean(network(drawn)))(jax.lax.stop_gradient(drawn_BHWC))

    def lesson(self, params: dict, real_BHWC: jax.Array, drawn_BHWC: jax.Array) -> tuple[jax.Array, dict]:
        """The discriminator's hinge loss (its gradient reaches the discriminator alone), and its mean verdicts."""
        network = self.discriminator(params)
        both = jnp.concatenate([real_BHWC, jax.lax.stop_gradient(drawn_BHWC)])
        real, drawn = jnp.split(network(both), 2)
        loss = 0.5 * (jnp.mean(nnx.relu(1 - real)) + jnp.mean(nnx.relu(1 + drawn)))
        return loss, {"verdict_real": jnp.mean(real), "verdict_drawn": jnp.mean(drawn)}


def adaptive_weight(last_layer: nnx.Conv, features_BHWC: jax.Array, slope_BHWC, adversarial_slope_BHWC) -> jax.Array:
    """The weight that makes both losses pull equally at the kernel of the decoder's last layer (equation 7).

    Args:
      features_BHWC: what the last layer draws from.
      slope_BHWC, adversarial_slope_BHWC: gradients of the two losses by drawn pixel.
    """
    graphdef, state = nnx.split(last_layer)
    features_BHWC, state = jax.lax.stop_gradient((features_BHWC, state))
    _, back = jax.vjp(lambda state: nnx.merge(graphdef, state)(features_BHWC).astype(jnp.float32), state)
    norm, adversarial_norm = (
        jnp.linalg.norm(back(slope)[0]["kernel"].get_value()) for slope in (slope_BHWC, adversarial_slope_BHWC)
    )
    return jnp.clip(norm / (adversarial_norm + 1e-4), 0, 1e4)
