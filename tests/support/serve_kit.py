"""What the tests of the service and of the page share: an engine of a tiny tokenizer and a tiny model."""

import functools
import io
import struct
import tempfile
import zlib

import jax
from PIL import Image
from tokenizer_kit import TINY, smooth_image, tiny_vqgan

from EasyLM import flags
from EasyLM.models.llama import llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.parallel import make_mesh
from evaluation.prompting.prompter import Prompter
from evaluation.serving.engine import ENGINE_FLAGS, Engine
from tokenizer.vqgan import Codec

CODES = TINY.num_embeddings
MODEL = LLaMAConfig(
    vocab_size=CODES,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_sequence_length=4 * TINY.tokens_per_image,
)


@functools.cache
def tiny_prompter() -> Prompter:
    """A model with opinions, on one device: another prompt gives another picture."""
    device = jax.devices()[:1]
    with tempfile.TemporaryDirectory() as directory:
        codec = Codec(tiny_vqgan(directory), batch_size=2, devices=device)
    params = jax.jit(llama_model.init_params, static_argnums=0)(MODEL, jax.random.key(1))
    scales = {1: 1, 2: 5, 3: 3}  # as it is, all tokens are about as likely
    return Prompter(codec, MODEL, jax.tree.map(lambda x: scales[x.ndim] * x, params), make_mesh("1,1,1", device))


def tiny_engine(prompter=None, **settings) -> Engine:
    """An engine with other values for some of its flags."""
    config = flags.defaults(ENGINE_FLAGS)
    config.update({"warm_up": "", "max_batch": 4, **settings})
    return Engine(prompter or tiny_prompter(), config)


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG file whose header promises more than it is wise to unpack; nothing follows it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + b"\0\0\0\0IDAT"


def png(seed: int, size: int = 20, **options) -> bytes:
    """A file of `smooth_image`."""
    file = io.BytesIO()
    Image.fromarray(smooth_image(seed, size)).save(file, "PNG", **options)
    return file.getvalue()
