"""`Prompter`: encodes prompts of images, generates the images that follow, and decodes them.

Shapes: see `evaluation.prompting`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from EasyLM.errors import UserError
from EasyLM.flags import DTYPE_ALIASES, Flag
from EasyLM.models import generate
from EasyLM.models.llama import llama_decode
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.parallel import BATCH_AXES, axis_size, check_whole_sequences, make_mesh
from evaluation.prompting.checkpoint import MODEL_FLAGS, check_codes, load_codec, load_model, read_config
from evaluation.prompting.settings import GenerationSettings, LargestBatch
from tokenizer.formats import ImageTokenizer
from tokenizer.vqgan import CODEC_FLAGS, COMPUTE_DTYPES, Codec

TokenArrays = Sequence[np.ndarray] | np.ndarray  # tokens [P, N] of each prompt; in a sequence P may differ
PROMPTER_FLAGS = {
    **MODEL_FLAGS,
    "vqgan": Flag(
        "",
        "The tokenizer that the model was trained with: a folder or file, as for tokenizer.build. Empty: the one that "
        "ships with the project, if the checkpoint names it.",
        reads_local_disk=True,
    ),
    "resolution": CODEC_FLAGS["resolution"],
    "dtype": Flag(
        "auto",
        "Compute type of the model and the tokenizer. auto: the model computes in bf16 on accelerators and in fp32 on "
        "CPUs; the tokenizer in fp32, as in tokenizer.build.",
        choices=("auto", *COMPUTE_DTYPES),
        # float16 is the release's default. bf16 is as fast and small, and has the range of fp32.
        aliases={**DTYPE_ALIASES, "float16": "bf16", "fp16": "bf16"},
    ),
    "weights": Flag(
        "dtype",
        "Type of the model's weights in memory. dtype: the compute type. int8: int8 with a scale for each output, half "
        "the memory of bf16.",
        choices=("dtype", "int8"),
    ),
    "mesh_dim": Flag("1,-1,1", "Mesh of devices, as for training."),
    "torch_devices": Flag(
        "", "Ignored: all devices compute; CUDA_VISIBLE_DEVICES and --mesh_dim select them.", ignored=True
    ),
}


@dataclasses.dataclass(frozen=True)
class PrompterSettings:
    """Values of PROMPTER_FLAGS."""

    checkpoint: str
    load_llama_config: str = ""
    vqgan: str = ""
    resolution: int = 0
    dtype: str = "auto"
    weights: str = "dtype"
    mesh_dim: str = "1,-1,1"


class Prompter:
    """A tokenizer and a model. All evaluation commands use this class."""

    def __init__(
        self,
        codec: ImageTokenizer,
        config: LLaMAConfig,
        params: Any,
        mesh: jax.sharding.Mesh,
        dtype: jnp.dtype = jnp.float32,
    ):
        """Combines a tokenizer with model settings and parameters from `load_model`, sharded over `mesh`.

        Raises:
          UserError: if the model was trained with a codebook of another size, or its vocabulary is smaller than it.
        """
        check_codes(codec, config)
        self.codec, self.config, self.mesh = codec, config, mesh
        self._params, self._dtype = params, dtype
        self._decoder = llama_decode.LLaMADecoder(config, dtype, mesh)

    @classmethod
    def load(
        cls, settings: PrompterSettings, codec_batch_size: int = 32, largest: LargestBatch | None = None
    ) -> "Prompter":
        """Loads tokenizer and model. Prints first what the model needs.

        Args:
          settings: what to load, and where.
          codec_batch_size: images of the tokenizer's batches, which are padded if needed.
          largest: the largest batch that the program computes; None: one prompt, as long as the model allows.

        Raises:
          UserError: naming the flag or the file that is wrong, or if the largest batch does not fit the devices.
        """
        mesh = make_mesh(settings.mesh_dim)
        check_whole_sequences(mesh)
        codec = _load_codec(settings, codec_batch_size)
        dtype, int8 = compute_dtype(settings.dtype, mesh), settings.weights == "int8"
        config = read_config(settings.checkpoint, settings.load_llama_config)
        max_images, shards = config.max_sequence_length // codec.tokens_per_image, axis_size(mesh, BATCH_AXES)
        batch = (largest or LargestBatch()).in_tokens(max_images, codec.tokens_per_image, shards)
        config, params = load_model(settings.checkpoint, settings.load_llama_config, mesh, dtype, int8, batch)
        return cls(codec, config, params, mesh, dtype)

    @property
    def tokens_per_image(self) -> int:
        return self.codec.tokens_per_image

    @property
    def max_images(self) -> int:
        """Images in the model's longest sequence."""
        return self.config.max_sequence_length // self.tokens_per_image

    @property
    def batch_shards(self) -> int:
        """Shards of a batch on the mesh. Batches are padded with copies to a multiple of this number."""
        return axis_size(self.mesh, BATCH_AXES)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """[..., S, S, 3] -> tokens [..., N]."""
        codes = self.codec.encode(images.reshape(-1, *images.shape[-3:]))
        return codes.reshape(*images.shape[:-3], -1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens [..., N] -> images [..., S, S, 3]."""
        images = self.codec.decode(tokens.reshape(-1, tokens.shape[-1]))
        return images.reshape(*tokens.shape[:-1], *images.shape[1:])

    def generate(
        self,
        prompts: TokenArrays,
        settings: GenerationSettings,
        *,
        seeds: Sequence[int] | None = None,
        progress: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Generates the images that follow each prompt.

        The samples of a prompt depend on its tokens, the settings and its seed only, not on the rest of the batch.
        Images before the window (`settings.context_images`, at most `max_images`) are dropped.

        Args:
          prompts: tokens [P, N] of each prompt; P may differ.
          settings: how to generate.
          seeds: a seed for each prompt, in place of `settings.seed`.
          progress: called every few tokens with the tokens so far, [B, C, n]. See `evaluation.serving.progress`.

        Returns:
          Tokens, int32 [B, C, F, N].

        Raises:
          UserError: for a prompt that is empty or not of shape [P, N], or if the model's longest sequence holds fewer
            than two images.
        """
        window = min(settings.context_images, self.max_images)
        prompts = _last_images(self._checked(prompts), window)
        seeds_B = np.broadcast_to(settings.seed if seeds is None else seeds, len(prompts))
        # The new images that fit into the window (`room`) share one cache. Prompts with different room are generated
        # separately: the samples of one prompt must not depend on the other prompts.
        room_B = np.array([min(window - len(prompt), settings.num_new_images) for prompt in prompts])
        tokens_BCFN = np.empty(
            (len(prompts), settings.num_candidates, settings.num_new_images, self.tokens_per_image), np.int32
        )
        for room in np.unique(room_B):
            rows = np.flatnonzero(room_B == room)
            tokens_BCFN[rows] = self._generate_same_room(
                [prompts[row] for row in rows], settings, seeds_B[rows], window, int(room), progress
            )
        return tokens_BCFN

    def _checked(self, sequences: TokenArrays) -> TokenArrays:
        """Raises UserError if an element is not [P, N]: a single prompt in place of a list of prompts."""
        for shape in map(np.shape, sequences):
            if len(shape) != 2 or shape[1] != self.tokens_per_image:
                raise UserError(f"tokens of shape {shape}: give a list of arrays (images, {self.tokens_per_image})")
        return sequences

    def _generate_same_room(self, prompts, settings, seeds_B, window, room, progress) -> np.ndarray:
        """`generate` for prompts whose first `room` new images fit into the window: [B, C, F, N]."""
        num_candidates = settings.num_candidates
        tokens_BCFN = self._sample(prompts, room, num_candidates, settings, seeds_B, progress)
        for _ in range(room, settings.num_new_images):  # the window moves: each candidate becomes its own prompt
            continued = [
                np.concatenate([prompt_PN, tokens_FN])
                for prompt_PN, tokens_CFN in zip(prompts, tokens_BCFN, strict=True)
                for tokens_FN in tokens_CFN
            ]
            seeds_BC = np.repeat(seeds_B, num_candidates)
            next_images = self._sample(_last_images(continued, window), 1, 1, settings, seeds_BC, progress)
            next_images = next_images.reshape(len(prompts), num_candidates, 1, -1)
            tokens_BCFN = np.concatenate([tokens_BCFN, next_images], axis=2)
        return tokens_BCFN

    def _sample(self, prompts, num_images, num_candidates, settings, seeds_B, progress) -> np.ndarray:
        """The next images of each prompt, from one cache: [B, C, num_images, N]."""
        tokens_BP, mask_BP = generate.left_padded(
            _padded([prompt.reshape(-1) for prompt in prompts], self.batch_shards)
        )
        tokens_BCT = generate.generate(
            self._decoder,
            self._params,
            tokens_BP,
            num_new_tokens=num_images * self.tokens_per_image,
            num_candidates=num_candidates,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=_padded(list(seeds_B), self.batch_shards),
            allowed_ids=self.codec.num_codes,
            prompt_mask_BP=mask_BP,
            progress=None if progress is None else lambda tokens_BCn: progress(tokens_BCn[: len(prompts)]),
        )[: len(prompts)]
        return tokens_BCT.reshape(*tokens_BCT.shape[:2], num_images, -1)

    def log_likelihoods(self, prompts: TokenArrays, targets: TokenArrays) -> np.ndarray:
        """Returns log p, in nats, of each target token after its prompt: [B, F N]. See `score`."""
        return self.score(prompts, targets)[0]

    def score(self, prompts: TokenArrays, targets: TokenArrays) -> tuple[np.ndarray, np.ndarray]:
        """Scores each target token, given its prompt and the target tokens before it.

        `prompts` are tokens [P, N], P may differ; `targets` are tokens [F, N], one F for all.

        Returns:
          log p in nats, and whether no token is more likely, both [B, F N].

        Raises:
          UserError: if a prompt and its target exceed the model's longest sequence, or are not of these shapes.
        """
        rows = [
            np.concatenate([np.asarray(prompt).reshape(-1), np.asarray(target).reshape(-1)])
            for prompt, target in zip(self._checked(prompts), self._checked(targets), strict=True)
        ]
        tokens_BT, mask_BT = generate.left_padded(_padded(rows, self.batch_shards))
        begin = tokens_BT.shape[1] - np.asarray(targets[0]).size
        log_p_BT, is_most_likely_BT = llama_decode.score(
            self.config, self._params, tokens_BT, begin, mask_BT=mask_BT, dtype=self._dtype, mesh=self.mesh
        )
        return log_p_BT[: len(rows)], is_most_likely_BT[: len(rows)]


class PromptSize(NamedTuple):
    """The side of a prompt's images in pixels, and the images of the model's longest sequence."""

    resolution: int
    max_images: int


def prompt_size(settings: PrompterSettings) -> PromptSize:
    """Returns the sizes that `Prompter.load` would have. Loads the tokenizer, but not the model.

    Raises:
      UserError: naming the flag or the file that is wrong.
    """
    codec = _load_codec(settings, 1)
    config = read_config(settings.checkpoint, settings.load_llama_config)
    check_codes(codec, config)
    return PromptSize(codec.resolution, config.max_sequence_length // codec.tokens_per_image)


def _load_codec(settings: PrompterSettings, batch_size: int) -> Codec:
    return load_codec(
        settings.checkpoint,
        settings.load_llama_config,
        settings.vqgan,
        dtype="fp32" if settings.dtype == "auto" else settings.dtype,
        batch_size=batch_size,
        resolution=settings.resolution,
    )


def compute_dtype(name: str, mesh: jax.sharding.Mesh) -> jnp.dtype:
    """Returns the type that `--dtype` means for a model on the devices of a mesh."""
    if name == "auto":
        name = "fp32" if mesh.devices.flat[0].platform == "cpu" else "bf16"
    return COMPUTE_DTYPES[name]


def _last_images(prompts: TokenArrays, window: int) -> list[np.ndarray]:
    """Truncates prompts to their last `window - 1` images. The next image is the last one of the window."""
    if window < 2:
        raise UserError("the model's longest sequence holds fewer than two images: it cannot generate")
    if len(prompts) == 0 or min(map(len, prompts)) == 0:
        raise UserError("empty prompt: give at least one image")
    return [np.asarray(prompt)[-(window - 1) :] for prompt in prompts]


def _padded(rows: list, multiple: int) -> list:
    return rows + rows[-1:] * (-len(rows) % multiple)
