"""What a VQGAN learns from: the loss of a batch, the running means beside the network, and the optimizer of them all.

The parameters are groups: `model`, the network as a flat dict by dotted path; `average`, its running mean, which is
what is evaluated and kept in the end; `codebook`, the running means that the codes follow from; where asked for,
`discriminator` and `clock` (adversary.py) and `perceptual` (lpips.py; it never moves). One scalar moves them all, each
by its own optimizer, because its terms are kept apart by stop_gradient: gradient descent at rate 1 - d on half the
squared distance to x is a running mean of x with decay d, and a term may have a gradient without a value (`silent`).
Shapes: B images, H W pixels, M = B h w vectors, Z their length, K codes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tokenizer.image_quality import code_usage, lpips
from tokenizer.training.discriminator import TICK, Adversary, adaptive_weight
from tokenizer.vqgan import VQGAN, VQGANConfig, weights

DECAY = 0.99  # of a running mean, a step
# Of the even share 1/K: a code used less than _DEAD is given a new place with the weight _FRESH. An unused code so
# moves every 120 steps, which follows an encoder that still drifts, while a rare but useful one stays.
_DEAD, _FRESH = 0.03, 0.1
_EMBEDDING = "quantize.embedding"


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a VQGAN of `config` is trained for.

    Reconstruction is the mean absolute and squared error of pixels and a perceptual term: LPIPS with the weight
    `perceptual_weight` where `vgg` (lpips.load) is given; else a stand-in that needs no weights: `gradient_weight`
    times the absolute error of pixels' differences to their neighbours at three scales, which keeps outlines sharp. The
    encoder is drawn to its codes with `commitment_cost` (VQ-VAE, arXiv 1711.00937, equation 3) and receives the
    decoder's gradient as if there were no quantization. The codebook learns by running means (there, appendix A.1).
    With a `locality_weight` it is also drawn to its codes where the picture stays as it was when a part of another is
    cut in (as CutMix does, arXiv 1905.04899): a code then says what is at its place, whatever is elsewhere. Without,
    the codes of an even wall change with every thing that moves before it, and a model of sentences must guess them.
    With an `adversary`, from its start step on, drawn pictures are also to look real (VQGAN, arXiv 2012.09841).
    """

    config: VQGANConfig
    dtype: object = jnp.float32
    gradient_weight: float = 1.0
    perceptual_weight: float = 1.0
    locality_weight: float = 0.0
    vgg: dict[str, np.ndarray] | None = None
    adversary: Adversary | None = None

    def init_params(self, key: jax.Array) -> dict:
        """Fresh parameters. No code has been used yet, so the first step places them all on vectors of its batch."""
        network = weights.parameters(VQGAN(self.config, rngs=nnx.Rngs(params=key)))
        empty_KZ = jnp.zeros_like(network.pop(_EMBEDDING))
        codebook = {"share": jnp.zeros(len(empty_KZ)), "sum": empty_KZ}
        params = {"model": network, "average": jax.tree.map(jnp.copy, network), "codebook": codebook}
        if self.vgg is not None:
            params["perceptual"] = jax.tree.map(jnp.asarray, self.vgg)
        if self.adversary is not None:
            params |= self.adversary.init_params(jax.random.fold_in(key, 1))
        return params

    def loss(self, params: dict, batch: dict, key: jax.Array | None) -> tuple[jax.Array, dict]:
        """(scalar, figures) of `{"pixels": [B,H,W,3] in [0,1]}`; a key of None means evaluation, of the average.

        The adversary's terms have no value, so the loss means the same before and after its start.
        """
        pixels_BHWC = batch["pixels"]
        training = key is not None
        model = make_model(self.config, params, "model" if training else "average", self.dtype)
        hidden_BhwZ, codes_BN = model.encode(pixels_BHWC)
        hidden_BhwZ = hidden_BhwZ.astype(jnp.float32)
        # Before any code has a place the vectors pass as they are: a decoder fed one constant has no finite gradient.
        placed = jnp.sum(params["codebook"]["share"]) > 0
        chosen_BhwZ = jnp.where(placed, model.quantize(codes_BN).reshape(hidden_BhwZ.shape), hidden_BhwZ)
        mixed_BhwZ = hidden_BhwZ + jax.lax.stop_gradient(chosen_BhwZ - hidden_BhwZ)
        features_BHWC = model.decoder.features(model.post_quant_conv(mixed_BhwZ))
        drawn_BHWC = model.decoder.conv_out(features_BHWC).astype(jnp.float32)

        (reconstruction, figures), slope_BHWC = jax.value_and_grad(self._reconstruction, argnums=1, has_aux=True)(
            jax.lax.stop_gradient(params.get("perceptual")), jax.lax.stop_gradient(drawn_BHWC), pixels_BHWC
        )
        counts_K = jnp.bincount(codes_BN.reshape(-1), length=self.config.num_embeddings)
        commitment = self.config.commitment_cost * commitment_error(hidden_BhwZ, chosen_BhwZ)
        figures |= {"commitment": commitment, **code_usage(counts_K)}
        loss = reconstruction + commitment
        if not training:
            return loss, figures
        if self.locality_weight:
            elsewhere, kept = self._locality(model, pixels_BHWC, chosen_BhwZ, codes_BN, jax.random.fold_in(key, 1))
            loss += self.locality_weight * elsewhere
            figures |= {"locality": elsewhere, "codes_kept": kept}
        if self.adversary is not None:
            layer = model.decoder.conv_out, features_BHWC
            slope_BHWC, lesson, more = self._adversarial(params, pixels_BHWC, drawn_BHWC, slope_BHWC, *layer)
            figures |= more
            loss += silent(lesson) - silent(params["clock"])
        hidden_MZ = jax.lax.stop_gradient(hidden_BhwZ).reshape(-1, hidden_BhwZ.shape[-1])
        targets = {
            "codebook": codebook_targets(params["codebook"], hidden_MZ, codes_BN.reshape(-1), key),
            "average": params["model"],
        }
        # Both losses reach the network through their slopes by drawn pixel, so that neither is computed twice.
        loss += silent(jnp.sum(jax.lax.stop_gradient(slope_BHWC) * drawn_BHWC))
        return loss + pull({name: params[name] for name in targets}, targets), figures

    def _locality(self, model, pixels_BHWC, chosen_BhwZ, codes_BN, key):
        """Commitment of pictures with a part of another to the codes of the whole ones; and the share of codes kept."""
        mixed_BHWC, same_Bhw = cut_in(pixels_BHWC, self.config.side, key)
        hidden_BhwZ, mixed_codes_BN = model.encode(mixed_BHWC)
        same_BN = same_Bhw.reshape(codes_BN.shape)
        kept = jnp.sum(same_BN & (mixed_codes_BN == codes_BN)) / jnp.maximum(jnp.sum(same_BN), 1)
        return commitment_error(hidden_BhwZ.astype(jnp.float32), chosen_BhwZ, same_Bhw), kept

    def _reconstruction(self, vgg, drawn_BHWC, pixels_BHWC):
        error_BHWC = drawn_BHWC - pixels_BHWC
        terms = {"absolute": jnp.mean(jnp.abs(error_BHWC)), "squared": jnp.mean(error_BHWC**2)}
        if vgg is None:
            terms["gradient"] = self.gradient_weight * gradient_error(error_BHWC)
        else:
            distance_B = lpips.distance(vgg, drawn_BHWC, pixels_BHWC, self.dtype)
            terms["perceptual"] = self.perceptual_weight * jnp.mean(distance_B)
        return sum(terms.values()), terms | {"psnr": -10 * jnp.log10(terms["squared"])}

    def _adversarial(self, params, pixels_BHWC, drawn_BHWC, slope_BHWC, last_layer, features_BHWC):
        """The slope by drawn pixel with the adversary's share in it, the discriminator's loss, and figures."""
        started = self.adversary.started(params)
        generator, adversarial_slope_BHWC = self.adversary.judge(params, drawn_BHWC)
        adaptive = adaptive_weight(last_layer, features_BHWC, slope_BHWC, adversarial_slope_BHWC)
        lesson, verdicts = self.adversary.lesson(params, pixels_BHWC, drawn_BHWC)
        figures = {"generator": generator, "discriminator": lesson, "adaptive_weight": adaptive, **verdicts}
        share = started * adaptive * self.adversary.weight
        return slope_BHWC + share * adversarial_slope_BHWC, started * lesson, figures

    def make_optimizer(self, rate: optax.Schedule, weight_decay: float, clip_gradient: float, average_decay: float):
        """The optimizer of all groups, and its rate as a function of its state.

        adamw for the network, adam for the discriminator, plain descent for what is a running mean or a count.
        """
        network = optax.chain(
            optax.clip_by_global_norm(clip_gradient),
            optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=weight_decay),
        )
        transforms = {"model": network, "codebook": optax.sgd(1 - DECAY), "average": optax.sgd(1 - average_decay)}
        if self.vgg is not None:
            transforms["perceptual"] = optax.set_to_zero()
        if self.adversary is not None:
            transforms["discriminator"] = optax.adam(self.adversary.lr, b1=0.5, b2=0.9)
            transforms["clock"] = optax.sgd(TICK)

        def is_schedule(state):
            return isinstance(state, optax.ScaleByScheduleState)

        def learning_rate(opt_state):
            return rate(next(s.count for s in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(s)))

        return optax.multi_transform(transforms, {name: name for name in transforms}), learning_rate


def make_model(config: VQGANConfig, params: dict, which: str = "average", dtype=jnp.float32) -> VQGAN:
    """The model of trained parameters, its codes computed from the running means. `which`: average or model."""
    arrays = {**params[which], _EMBEDDING: codes_of(params["codebook"])}
    return weights.with_parameters(lambda: VQGAN(config, dtype=dtype, rngs=nnx.Rngs(0)), arrays)


def codes_of(codebook: dict) -> jax.Array:
    """Codes [K,Z]: the mean of the vectors that chose each."""
    return codebook["sum"] / jnp.maximum(codebook["share"], 1e-12)[:, None]


def commitment_error(hidden_BhwZ: jax.Array, chosen_BhwZ: jax.Array, where_Bhw: jax.Array | None = None) -> jax.Array:
    """Mean squared distance of vectors (those where `where_Bhw` is true) to their codes, which get no gradient.

    It is relative to the codes' spread, so that its weight means the same however large the vectors grow.
    """
    chosen_BhwZ = jax.lax.stop_gradient(chosen_BhwZ)
    scale = jnp.maximum(jnp.mean(jnp.var(chosen_BhwZ, axis=(0, 1, 2))), 1e-3)
    error_Bhw = jnp.mean((hidden_BhwZ - chosen_BhwZ) ** 2, axis=-1)
    if where_Bhw is None:
        return jnp.mean(error_Bhw) / scale
    return jnp.sum(jnp.where(where_Bhw, error_Bhw, 0.0)) / jnp.maximum(jnp.sum(where_Bhw), 1) / scale


def cut_in(pixels_BHWC: jax.Array, side: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pictures, each with a random rectangle of `side` x `side` cells from the next one; and which cells stay, [B,h,w].

    Cells that touch the rectangle do not count as staying: what is beside a cell may show in its code.
    """
    B, H = pixels_BHWC.shape[:2]
    edges_B22 = jnp.sort(jax.random.randint(key, (B, 2, 2), 0, side + 1), axis=-1)

    def rectangle(margin):
        cells = jnp.arange(side)[None, None]
        rows, columns = jnp.moveaxis(
            (cells >= edges_B22[..., :1] - margin) & (cells < edges_B22[..., 1:] + margin), 1, 0
        )
        return rows[:, :, None] & columns[:, None, :]

    cut_BHW = jnp.repeat(jnp.repeat(rectangle(0), H // side, axis=1), H // side, axis=2)
    return jnp.where(cut_BHW[..., None], jnp.roll(pixels_BHWC, 1, axis=0), pixels_BHWC), ~rectangle(1)


def gradient_error(error_BHWC: jax.Array) -> jax.Array:
    """Mean absolute difference between neighbours of an error, summed over three scales."""
    total = jnp.zeros(())
    for _ in range(3):
        total += jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=2)))
        error_BHWC = nnx.avg_pool(error_BHWC, (2, 2), (2, 2))
    return total


def pull(means, targets) -> jax.Array:
    """A term of value 0 whose gradient is `means - targets`: half their squared distance, less its value."""
    pairs = zip(jax.tree.leaves(means), jax.tree.leaves(jax.lax.stop_gradient(targets)), strict=True)
    return silent(sum(0.5 * jnp.sum((mean - target) ** 2) for mean, target in pairs))


def silent(term: jax.Array) -> jax.Array:
    """A term's gradient without its value."""
    return term - jax.lax.stop_gradient(term)


def codebook_targets(codebook: dict, hidden_MZ: jax.Array, codes_M: jax.Array, key: jax.Array) -> dict:
    """Where the codebook's running means are drawn: to the share of each code in the batch, and the sum of its vectors.

    Codes that are hardly used are moved at once onto vectors of the batch (as in Jukebox, arXiv 2005.00341), drawn in
    proportion to the squared distance to their code (as k-means++ does). Drawn evenly they would crowd where most
    vectors are, and an even wall would get a hundred codes that mean the same.
    """
    share_K, sum_KZ = codebook["share"], codebook["sum"]
    num_codes = len(share_K)
    chosen_MK = jax.nn.one_hot(codes_M, num_codes)
    new_share_K = jnp.mean(chosen_MK, axis=0)
    new_sum_KZ = jnp.einsum("MK,MZ->KZ", chosen_MK, hidden_MZ, precision="highest") / len(hidden_MZ)
    error_M = jnp.cumsum(jnp.sum((hidden_MZ - codes_of(codebook)[codes_M]) ** 2, axis=-1))
    picked_K = jnp.searchsorted(error_M, error_M[-1] * jax.random.uniform(key, (num_codes,)))
    picked_KZ = hidden_MZ[jnp.minimum(picked_K, len(hidden_MZ) - 1)]
    dead_K = DECAY * share_K + (1 - DECAY) * new_share_K < _DEAD / num_codes
    fresh = _FRESH / num_codes
    return {
        "share": jnp.where(dead_K, _reach(share_K, fresh), new_share_K),
        "sum": jnp.where(dead_K[:, None], _reach(sum_KZ, fresh * picked_KZ), new_sum_KZ),
    }


def _reach(mean: jax.Array, goal) -> jax.Array:
    """The target that takes a running mean to `goal` in one step."""
    return (goal - DECAY * mean) / (1 - DECAY)
