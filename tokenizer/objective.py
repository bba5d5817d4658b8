"""What a VQGAN learns from: the loss of a batch, the running means beside the network, and the optimizer of them all.

The parameters are three flat dicts: `model`, the network by dotted path; `average`, its running mean, which is what is
evaluated and kept in the end; and `codebook`, the running means that the codes follow from. Gradient descent at rate
1 - d on half the squared distance to x is a running mean of x with decay d: so one optimizer moves all three.
Shapes: B images, H W pixels, M = B h w vectors, Z their length, K codes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tokenizer import weights
from tokenizer.vqgan import VQGAN, VQGANConfig

DECAY = 0.99  # of a running mean, a step
# Of the even share 1/K: a code used less than _DEAD is given a new place with the weight _FRESH. An unused code so
# moves every 120 steps, which follows an encoder that still drifts, while a rare but useful one stays.
_DEAD, _FRESH = 0.03, 0.1
_EMBEDDING = "quantize.embedding"


def init_params(config: VQGANConfig, key: jax.Array) -> dict:
    """Fresh parameters. No code has been used yet, so the first step places them all on vectors of its batch."""
    network = parameters(VQGAN(config, rngs=nnx.Rngs(params=key)))
    empty_KZ = jnp.zeros_like(network.pop(_EMBEDDING))
    codebook = {"share": jnp.zeros(len(empty_KZ)), "sum": empty_KZ}
    return {"model": network, "average": jax.tree.map(jnp.copy, network), "codebook": codebook}


def parameters(model: VQGAN) -> dict[str, jax.Array]:
    """The arrays of a model by dotted path, e.g. `encoder.down.0.block.0.conv1.kernel`."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in weights.flat_parameters(model)}


def make_model(config: VQGANConfig, params: dict, which: str = "average", dtype=jnp.float32) -> VQGAN:
    """The model of trained parameters, its codes computed from the running means. `which`: average or model."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VQGAN(config, dtype=dtype, rngs=nnx.Rngs(0))))
    arrays = {**params[which], _EMBEDDING: codes_of(params["codebook"])}
    flat = [(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def codes_of(codebook: dict) -> jax.Array:
    """Codes [K,Z]: the mean of the vectors that chose each."""
    return codebook["sum"] / jnp.maximum(codebook["share"], 1e-12)[:, None]


def make_loss(config: VQGANConfig, dtype=jnp.float32, gradient_weight: float = 1.0) -> Callable:
    """The loss `(params, {"pixels": [B,H,W,3] in [0,1]}, key) -> (scalar, figures)`.

    Reconstruction is the mean absolute and squared error of pixels, and `gradient_weight` times the absolute error of
    their differences to the neighbours at three scales, which is what keeps outlines sharp. The encoder is drawn to
    its codes with `commitment_cost` (VQ-VAE, arXiv 1711.00937, equation 3) and receives the decoder's gradient as if
    there were no quantization. The codebook learns by running means (there, appendix A.1). A key of None means
    evaluation: of the averaged network.
    """

    def loss_fn(params, batch, key):
        pixels_BHWC = batch["pixels"]
        model = make_model(config, params, "average" if key is None else "model", dtype)
        hidden_BhwZ, codes_BN = model.encode(pixels_BHWC)
        hidden_BhwZ = hidden_BhwZ.astype(jnp.float32)
        # Before any code has a place the vectors pass as they are: a decoder fed one constant has no finite gradient.
        placed = jnp.sum(params["codebook"]["share"]) > 0
        chosen_BhwZ = jnp.where(placed, model.quantize(codes_BN).reshape(hidden_BhwZ.shape), hidden_BhwZ)
        drawn_BHWC = model.draw(hidden_BhwZ + jax.lax.stop_gradient(chosen_BhwZ - hidden_BhwZ))
        error_BHWC = drawn_BHWC - pixels_BHWC
        scale = jnp.maximum(jax.lax.stop_gradient(jnp.mean(jnp.var(chosen_BhwZ, axis=(0, 1, 2)))), 1e-3)
        terms = {
            "absolute": jnp.mean(jnp.abs(error_BHWC)),
            "squared": jnp.mean(error_BHWC**2),
            "gradient": gradient_weight * gradient_error(error_BHWC),
            # relative to the codes' spread, so that its weight means the same however large the vectors grow
            "commitment": config.commitment_cost
            * jnp.mean((hidden_BhwZ - jax.lax.stop_gradient(chosen_BhwZ)) ** 2)
            / scale,
        }
        figures = terms | {"psnr": -10 * jnp.log10(terms["squared"]), **code_figures(codes_BN, config.num_embeddings)}
        loss = sum(terms.values())
        if key is not None:
            hidden_MZ = jax.lax.stop_gradient(hidden_BhwZ).reshape(-1, hidden_BhwZ.shape[-1])
            targets = {
                "codebook": codebook_targets(params["codebook"], hidden_MZ, codes_BN.reshape(-1), key),
                "average": params["model"],
            }
            loss += pull({name: params[name] for name in targets}, targets)
        return loss, figures

    return loss_fn


def gradient_error(error_BHWC: jax.Array) -> jax.Array:
    """Mean absolute difference between neighbours of an error, summed over three scales."""
    total = jnp.zeros(())
    for _ in range(3):
        total += jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error_BHWC, axis=2)))
        error_BHWC = nnx.avg_pool(error_BHWC, (2, 2), (2, 2))
    return total


def code_figures(codes_BN: jax.Array, num_codes: int) -> dict[str, jax.Array]:
    """`codes_used`, the share of the codebook that the batch uses, and `code_perplexity`, exp of the codes' entropy."""
    share_K = jnp.bincount(codes_BN.reshape(-1), length=num_codes) / codes_BN.size
    entropy = -jnp.sum(jnp.where(share_K > 0, share_K * jnp.log(jnp.maximum(share_K, 1e-12)), 0.0))
    return {"codes_used": jnp.mean(share_K > 0), "code_perplexity": jnp.exp(entropy)}


def pull(means, targets) -> jax.Array:
    """A term of value 0 whose gradient is `means - targets`: half their squared distance, less its value."""
    pairs = zip(jax.tree.leaves(means), jax.tree.leaves(jax.lax.stop_gradient(targets)), strict=True)
    distance = sum(0.5 * jnp.sum((mean - target) ** 2) for mean, target in pairs)
    return distance - jax.lax.stop_gradient(distance)


def codebook_targets(codebook: dict, hidden_MZ: jax.Array, codes_M: jax.Array, key: jax.Array) -> dict:
    """Where the codebook's running means are drawn: to the share of each code in the batch, and the sum of its vectors.

    Codes that are hardly used are moved at once onto random vectors of the batch (as in Jukebox, arXiv 2005.00341).
    """
    share_K, sum_KZ = codebook["share"], codebook["sum"]
    num_codes = len(share_K)
    chosen_MK = jax.nn.one_hot(codes_M, num_codes)
    new_share_K = jnp.mean(chosen_MK, axis=0)
    new_sum_KZ = jnp.einsum("MK,MZ->KZ", chosen_MK, hidden_MZ, precision="highest") / len(hidden_MZ)
    picked_KZ = hidden_MZ[jax.random.randint(key, (num_codes,), 0, len(hidden_MZ))]
    dead_K = DECAY * share_K + (1 - DECAY) * new_share_K < _DEAD / num_codes
    fresh = _FRESH / num_codes
    return {
        "share": jnp.where(dead_K, _reach(share_K, fresh), new_share_K),
        "sum": jnp.where(dead_K[:, None], _reach(sum_KZ, fresh * picked_KZ), new_sum_KZ),
    }


def _reach(mean: jax.Array, goal) -> jax.Array:
    """The target that takes a running mean to `goal` in one step."""
    return (goal - DECAY * mean) / (1 - DECAY)


def make_optimizer(rate: optax.Schedule, weight_decay: float, clip_gradient: float, average_decay: float):
    """adamw for the network, plain descent for what is a running mean; and its rate as a function of its state."""
    network = optax.chain(
        optax.clip_by_global_norm(clip_gradient),
        optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=weight_decay),
    )
    transforms = {"model": network, "codebook": optax.sgd(1 - DECAY), "average": optax.sgd(1 - average_decay)}

    def is_schedule(state):
        return isinstance(state, optax.ScaleByScheduleState)

    def learning_rate(opt_state):
        return rate(next(s.count for s in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(s)))

    return optax.multi_transform(transforms, {name: name for name in transforms}), learning_rate
