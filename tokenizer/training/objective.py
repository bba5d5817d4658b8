"""The training objective of a VQGAN: initial state, loss and gradients, evaluation and optimizer.

Trained parameters, by group:
    model           the network, by dotted path; its codebook only if that is trained
    discriminator   the discriminator, with adversarial training only
Extra state, which has no gradient:
    codebook        running means that define the codes (see `codebook`), unless they are trained or constant
    average         the running mean of `model`, which is evaluated and exported
    perceptual      the constant weights of LPIPS, if given
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tokenizer.image_quality import code_usage, lpips
from tokenizer.training.code_losses import CodeLoss, commitment, straight_through
from tokenizer.training.codebook import Codebook, code_vectors, empty_codebook, update_codebook
from tokenizer.training.discriminator import AdversarialLoss, adaptive_weight
from tokenizer.training.losses import gradient_error, paste_rectangles, roll_cells
from tokenizer.vqgan import VQGAN, VQGANConfig, grid_vectors, weights

_EMBEDDING = "quantize.embedding"

Metrics = dict[str, jax.Array]


class _Forward(NamedTuple):
    """The arrays of one forward pass."""

    hidden: jax.Array  # [B,h,w,Z], in the space of the codes
    chosen: jax.Array  # [B,h,w,Z]
    codes: jax.Array  # [B,N]
    features: jax.Array  # [B,H,W,C], the input of the decoder's last layer
    reconstructed: jax.Array  # [B,H,W,3]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The training objective of a VQGAN.

    Reconstruction: mean absolute and squared error of pixels, and a perceptual term. The latter is LPIPS if `vgg`
    (`lpips.load`) is given; otherwise the gradient error (`losses.gradient_error`), which keeps edges sharp.
    Codes: `CodeLoss`, among others the commitment to them. Gradients pass straight through the quantization, from the
    decoder to the encoder.
    Locality (with a `locality_weight`): each image is rolled by whole cells, and a rectangle of another image is pasted
    into it. Vectors of unchanged cells are pulled towards their codes in the original image, so a code depends neither
    on its place nor on the rest of the image. Without this term the codes of a uniform wall change with its place and
    with each object before it, and a model of sentences cannot predict them.
    Adversarial (from a start step on): raises the logits that a discriminator gives to reconstructions (VQGAN, arXiv
    2012.09841).

    Attributes:
      average_decay: decay per step of the running mean of the network.
      locality_steps: steps in which the weight of the locality loss grows from 0 to `locality_weight`. The whole weight
        at the start would outweigh the reconstruction.
      unquantized_steps: steps at the start in which vectors pass unquantized. After them, the codes are placed on
        vectors that differ. With quantization from the first step, all vectors would have the same few codes, the
        decoder would learn to ignore its input, and no gradient would spread the encoder's vectors. This applies only
        to codes that are running means.
    """

    config: VQGANConfig
    dtype: Any = jnp.float32
    code_loss: CodeLoss = dataclasses.field(default_factory=CodeLoss)
    gradient_weight: float = 1.0
    perceptual_weight: float = 1.0
    locality_weight: float = 0.0
    locality_steps: int = 1
    average_decay: float = 0.999
    unquantized_steps: int = 0
    vgg: Mapping[str, np.ndarray] | None = None
    adversarial: AdversarialLoss | None = None

    def init(self, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns fresh parameters and extra state."""
        network = weights.parameters(VQGAN(self.config, rngs=nnx.Rngs(params=key)))
        extra: dict[str, Any] = {}
        if self.config.quantizer != "vq":
            del network[_EMBEDDING]
        elif self.code_loss.codebook_update == "ema":
            extra["codebook"] = empty_codebook(*network.pop(_EMBEDDING).shape)
        params: dict[str, Any] = {"model": network}
        if self.adversarial is not None:
            params["discriminator"] = self.adversarial.init_params(jax.random.fold_in(key, 1))
        extra["average"] = jax.tree.map(jnp.copy, network)
        if self.vgg is not None:
            extra["perceptual"] = jax.tree.map(jnp.asarray, dict(self.vgg))
        return params, extra

    def loss_and_gradients(
        self, params: dict[str, Any], extra: dict[str, Any], batch: dict, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, Any], Metrics, dict[str, Any]]:
        """Returns the loss of `{"pixels": [B,H,W,3] in [0,1]}`, gradients by group, metrics, and the new extra state.

        The network descends reconstruction, commitment, locality and the generator loss; the discriminator descends its
        own loss. The returned loss excludes both adversarial terms, so it is comparable before and after their start.
        """
        pixels_BHWC, network = batch["pixels"], params["model"]

        # The network's image and code loss. `backward` maps the gradients of these two to the gradient of the network.
        def reconstruct(network: dict[str, jax.Array]) -> Any:
            return self._reconstruct(network, extra.get("codebook"), pixels_BHWC, step, key)

        (reconstructed_BHWC, code_loss), backward, (forward, metrics) = jax.vjp(reconstruct, network, has_aux=True)

        # The gradient of the image: each loss of the image is differentiated by its pixels only.
        image_loss = jax.value_and_grad(self._image_loss, has_aux=True)
        (loss, image_metrics), gradient_BHWC = image_loss(reconstructed_BHWC, pixels_BHWC, extra)
        metrics |= image_metrics
        gradients = {}
        if self.adversarial is not None:
            added_gradient_BHWC, gradients["discriminator"], adversarial_metrics = self._adversarial_gradients(
                self.adversarial, params, extra, forward, pixels_BHWC, gradient_BHWC, step
            )
            gradient_BHWC += added_gradient_BHWC
            metrics |= adversarial_metrics
        (gradients["model"],) = backward((gradient_BHWC, jnp.ones(())))

        updated = {"average": optax.incremental_update(network, extra["average"], 1 - self.average_decay)}
        if "codebook" in extra:
            hidden_MZ = forward.hidden.reshape(-1, forward.hidden.shape[-1])
            codebook = update_codebook(extra["codebook"], hidden_MZ, forward.codes.reshape(-1), key)
            is_quantized = step >= self.unquantized_steps
            updated["codebook"] = jax.tree.map(partial(jnp.where, is_quantized), codebook, extra["codebook"])
        return loss + code_loss, gradients, metrics, extra | updated

    def evaluate(self, params: dict[str, Any], extra: dict[str, Any], batch: dict) -> Metrics:
        """Returns the metrics of the averaged network: reconstruction and codes."""
        model = make_model(self.config, extra["average"], extra.get("codebook"), self.dtype)
        forward = self._forward(model, extra.get("codebook"), batch["pixels"])
        loss, metrics = self._image_loss(forward.reconstructed, batch["pixels"], extra)
        code_loss, code_metrics = self._code_loss(model, forward)
        return {"loss": loss + code_loss, **metrics, **code_metrics}

    def _reconstruct(
        self,
        network: dict[str, jax.Array],
        codebook: Codebook | None,
        pixels_BHWC: jax.Array,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[_Forward, Metrics]]:
        """Returns the reconstructed image and the loss of the codes (with locality), then arrays, metrics."""
        model = make_model(self.config, network, codebook, self.dtype)
        forward = self._forward(model, codebook, pixels_BHWC)
        loss, metrics = self._code_loss(model, forward)
        if self.locality_weight:
            locality, kept = self._locality(model, forward, pixels_BHWC, jax.random.fold_in(key, 1))
            loss += self.locality_weight * jnp.minimum(step / self.locality_steps, 1.0) * locality
            metrics |= {"locality": locality, "codes_kept": kept}
        return (forward.reconstructed, loss), (forward, metrics)

    def _forward(self, model: VQGAN, codebook: Codebook | None, pixels_BHWC: jax.Array) -> _Forward:
        hidden_BhwZ, codes_BN = model.encode(pixels_BHWC)
        hidden_BhwZ = model.quantize.project(hidden_BhwZ)
        chosen_BhwZ = model.quantize(codes_BN).reshape(hidden_BhwZ.shape)
        if codebook is not None:
            chosen_BhwZ = jnp.where(jnp.sum(codebook["share"]) > 0, chosen_BhwZ, hidden_BhwZ)
        vectors_BhwZ = straight_through(hidden_BhwZ, chosen_BhwZ)
        features_BHWC = model.decoder.features(model.post_quant_conv(vectors_BhwZ))
        reconstructed_BHWC = model.decoder.conv_out(features_BHWC).astype(jnp.float32)
        return _Forward(hidden_BhwZ, chosen_BhwZ, codes_BN, features_BHWC, reconstructed_BHWC)

    def _image_loss(
        self, reconstructed_BHWC: jax.Array, pixels_BHWC: jax.Array, extra: dict[str, Any]
    ) -> tuple[jax.Array, Metrics]:
        """Returns the reconstruction loss and its terms."""
        error_BHWC = reconstructed_BHWC - pixels_BHWC
        terms = {"absolute": jnp.mean(jnp.abs(error_BHWC)), "squared": jnp.mean(error_BHWC**2)}
        if self.vgg is None:
            terms["gradient"] = self.gradient_weight * gradient_error(error_BHWC)
        else:
            distance_B = lpips.distance(extra["perceptual"], reconstructed_BHWC, pixels_BHWC, self.dtype)
            terms["perceptual"] = self.perceptual_weight * jnp.mean(distance_B)
        return sum(terms.values(), jnp.zeros(())), terms | {"psnr": -10 * jnp.log10(terms["squared"])}

    def _code_loss(self, model: VQGAN, forward: _Forward) -> tuple[jax.Array, Metrics]:
        """Returns the loss of the codes, its terms, and metrics of the codes."""
        terms = self.code_loss.terms(model, forward.hidden, forward.chosen)
        counts_K = jnp.bincount(forward.codes.reshape(-1), length=self.config.num_embeddings)
        return sum(terms.values(), jnp.zeros(())), terms | code_usage(counts_K)

    def _locality(
        self, model: VQGAN, forward: _Forward, pixels_BHWC: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the locality loss, and the share of moved but unchanged cells that keep their code."""
        roll_key, paste_key = jax.random.split(key)
        rolled_BHWC, shift_2, away_from_seam_hw = roll_cells(pixels_BHWC, self.config.side, roll_key)
        changed_BHWC, unchanged_Bhw = paste_rectangles(rolled_BHWC, self.config.side, paste_key)
        unchanged_Bhw &= away_from_seam_hw[None]
        codes_Bhw = jnp.roll(forward.codes.reshape(unchanged_Bhw.shape), shift_2, axis=(1, 2))
        chosen_BhwZ = jnp.roll(forward.chosen, shift_2, axis=(1, 2))
        hidden_BhwZ, changed_codes_BN = model.encode(changed_BHWC)
        keeps_Bhw = unchanged_Bhw & (changed_codes_BN.reshape(codes_Bhw.shape) == codes_Bhw)
        kept = jnp.sum(keeps_Bhw) / jnp.maximum(jnp.sum(unchanged_Bhw), 1)
        return commitment(model, model.quantize.project(hidden_BhwZ), chosen_BhwZ, unchanged_Bhw), kept

    def _adversarial_gradients(
        self,
        adversarial: AdversarialLoss,
        params: dict[str, Any],
        extra: dict[str, Any],
        forward: _Forward,
        pixels_BHWC: jax.Array,
        reconstruction_gradient_BHWC: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array], Metrics]:
        """Returns the weighted gradient of the generator loss by pixel, that of the discriminator, and metrics."""
        generator = jax.value_and_grad(adversarial.generator_loss)
        generator_loss, gradient_BHWC = generator(forward.reconstructed, params["discriminator"])
        discriminator = jax.value_and_grad(adversarial.discriminator_loss, has_aux=True)
        (discriminator_loss, logits), discriminator_gradient = discriminator(
            params["discriminator"], pixels_BHWC, forward.reconstructed
        )
        last_layer = make_model(self.config, params["model"], extra.get("codebook"), self.dtype).decoder.conv_out
        adaptive = adaptive_weight(last_layer, forward.features, reconstruction_gradient_BHWC, gradient_BHWC)
        losses = {"generator": generator_loss, "discriminator": discriminator_loss}
        started = adversarial.started(step)
        return (
            started * adaptive * adversarial.weight * gradient_BHWC,
            jax.tree.map(lambda gradient: started * gradient, discriminator_gradient),
            {**losses, "adaptive_weight": adaptive, **logits},
        )

    def make_optimizer(
        self, rate: optax.Schedule, weight_decay: float, clip_gradient: float
    ) -> optax.GradientTransformation:
        """Returns AdamW for the network and Adam for the discriminator."""
        network = optax.chain(
            optax.clip_by_global_norm(clip_gradient),
            optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=weight_decay),
        )
        transforms = {"model": network}
        if self.adversarial is not None:
            transforms["discriminator"] = optax.adam(self.adversarial.lr, b1=0.5, b2=0.9)
        return optax.multi_transform(transforms, {name: name for name in transforms})


def learning_rate(rate: optax.Schedule, opt_state: optax.OptState) -> jax.Array:
    """Returns the learning rate of the network's next update."""

    def is_schedule(state: Any) -> bool:
        return isinstance(state, optax.ScaleByScheduleState)

    leaves = jax.tree.leaves(opt_state, is_leaf=is_schedule)
    return rate(next(state.count for state in leaves if is_schedule(state)))


def make_model(
    config: VQGANConfig, network: Mapping[str, jax.Array], codebook: Codebook | None, dtype: Any = jnp.float32
) -> VQGAN:
    """Returns the VQGAN of a network's parameters (`model` or `average`) and a codebook.

    Args:
      codebook: None: the codes are parameters, or constants.
    """
    arrays = dict(network)
    if codebook is not None:
        arrays[_EMBEDDING] = code_vectors(codebook)
    elif config.quantizer != "vq":
        arrays[_EMBEDDING] = jnp.asarray(grid_vectors(config))
    return weights.with_parameters(lambda: VQGAN(config, dtype=dtype, rngs=nnx.Rngs(0)), arrays)
