"""Shared by the tests of the tokenizer: a tiny model on disk, test images, and commands run in-process."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from EasyLM import flags
from tokenizer.vqgan import VQGAN, VQGANConfig, grid_vectors, weights

TINY = VQGANConfig(
    resolution=16,
    hidden_channels=4,
    channel_mult=(1, 2),
    num_res_blocks=1,
    z_channels=4,
    quantized_embed_dim=4,
    num_embeddings=32,
    norm_groups=2,
)


def tiny_vqgan(directory) -> str:
    """Writes a fixed model that uses many different codes; returns its folder."""
    weights.save(_tiny_model(), str(directory))
    return str(directory)


@functools.cache
def _tiny_model() -> VQGAN:
    model = random_vqgan(TINY)
    rng = np.random.default_rng(0)
    pixels = np.stack([smooth_image(seed, TINY.resolution) / np.float32(255) for seed in range(8)])
    vectors_MZ = np.asarray(nnx.jit(lambda model, pixels: model.encode(pixels)[0])(model, pixels)).reshape(-1, 4)
    model.quantize.embedding[...] = jnp.asarray(rng.permutation(vectors_MZ)[: TINY.num_embeddings])
    return model


def random_vqgan(config: VQGANConfig) -> VQGAN:
    """Returns a model of random parameters, except for the codes of a grid.

    It does not use the model's initializers, whose compilation takes longer than a test.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    flat = []
    for path, leaf in nnx.to_flat_state(state):
        shape = leaf.get_value().shape
        array = np.ones(shape) if path[-1] == "scale" else rng.standard_normal(shape) * np.prod(shape[:-1]) ** -0.5
        if path == ("quantize", "embedding") and config.quantizer != "vq":
            array = grid_vectors(config)
        flat.append((path, leaf.replace(jnp.asarray(array, jnp.float32))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def smooth_image(seed: int, size: int) -> np.ndarray:
    """Returns smoothly varying random colours, uint8 [size,size,3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def write_image(path, seed: int, size: int = 20) -> None:
    """Writes a `smooth_image` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(smooth_image(seed, size)).save(path)


def run_main(module, **settings) -> None:
    """Validates the flags and runs `module.main`. `settings` replace defaults (`a__b=1` for `--a.b=1`)."""
    config = flags.defaults(module.FLAGS)
    for name, value in settings.items():
        *groups, leaf = name.split("__")
        part = config
        for group in groups:
            part = part[group]
        assert leaf in part, name
        part[leaf] = value
    flags.validate(module.FLAGS, config)
    module.main(config)
