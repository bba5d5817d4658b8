"""A tokenizer and a model together: prompts of pictures go in, the pictures that follow come out.

Shapes: B prompts, P pictures of a prompt, F new pictures, C candidates, N tokens of an image, S the side in pixels.
Pictures are float32 in [0, 1], RGB, at the tokenizer's resolution.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.models import generate
from EasyLM.models.llama import llama_decode
from EasyLM.parallel import BATCH_AXES, make_mesh
from evaluation.prompting.checkpoint import MODEL_FLAGS, load_model
from tokenizer.vqgan import CODEC_FLAGS, Codec

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
PROMPTER_FLAGS = {
    **MODEL_FLAGS,
    "vqgan": CODEC_FLAGS["vqgan"],
    "dtype": Flag("fp32", "Type of the model's and the tokenizer's computation.", choices=tuple(DTYPES)),
    "mesh_dim": Flag("1,-1,1", "Mesh of devices, as for training."),
}


class Prompter:
    """What every tool that prompts a model is built on."""

    def __init__(self, codec: Codec, config, params, mesh, dtype=jnp.float32):
        """Joins a tokenizer and a model (`load_model`'s settings and parameters, on `mesh`).

        Raises:
          UserError: if the model's vocabulary lacks codes of the tokenizer.
        """
        if config.vocab_size < codec.config.num_embeddings:
            raise UserError(
                f"the tokenizer has {codec.config.num_embeddings} codes, more than the model's vocabulary of "
                f"{config.vocab_size} ids: --vqgan and --checkpoint do not belong together"
            )
        self.codec, self.config, self.mesh = codec, config, mesh
        self._params, self._dtype = params, dtype
        self._decoder = llama_decode.LLaMADecoder(config, dtype, mesh)

    @classmethod
    def load(cls, config, pictures_at_a_time: int = 32) -> "Prompter":
        """The prompter of the flags PROMPTER_FLAGS; the tokenizer computes so many pictures at a time, no fewer.

        Raises:
          UserError: naming the flag or the file that is wrong.
        """
        mesh = make_mesh(config.mesh_dim)
        codec = Codec(config.vqgan, config.dtype, pictures_at_a_time)
        dtype = DTYPES[config.dtype]
        model, params = load_model(config.checkpoint, config.load_llama_config, mesh, dtype)
        return cls(codec, model, params, mesh, dtype)

    @property
    def tokens_per_image(self) -> int:
        return self.codec.config.tokens_per_image

    @property
    def max_pictures(self) -> int:
        """Pictures that the model's longest sequence holds."""
        return self.config.max_sequence_length // self.tokens_per_image

    @property
    def ways(self) -> int:
        """Parts that the mesh splits a batch into. Prompts are filled up with copies to a multiple of it."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """[..., S, S, 3] -> tokens [..., N]."""
        codes = self.codec.encode(pictures.reshape(-1, *pictures.shape[-3:]))
        return codes.reshape(*pictures.shape[:-3], -1)

    def draw(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens [..., N] -> pictures [..., S, S, 3]."""
        pictures = self.codec.decode(tokens.reshape(-1, tokens.shape[-1]))
        return pictures.reshape(*tokens.shape[:-1], *pictures.shape[1:])

    def answer(
        self,
        prompts: Sequence[np.ndarray],
        *,
        new_pictures: int = 1,
        candidates: int = 1,
        context_pictures: int = 16,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        progress: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """The tokens of the pictures that follow each prompt: int32 [B, C, F, N].

        What is drawn for a prompt is a function of its tokens, the settings and the seed: the same in any batch.

        Args:
          prompts: tokens of each prompt, [P, N]; P may differ.
          context_pictures: the window: the picture being drawn and those before it that are seen. Pictures that no
            longer fit, or that the model's longest sequence has no room for, are dropped from the front.
          temperature, top_k, top_p: see `generate.generate`.
          seed: one for all prompts, or one for each.
          progress: called with the tokens so far, [B, C, n], every few tokens.

        Raises:
          UserError: for a setting out of its range or an empty prompt.
        """
        window = min(context_pictures, self.max_pictures)
        if window < 2:
            raise UserError(
                f"context_frames={context_pictures}: must be at least 2, the picture that is drawn and one before it "
                f"(the model's longest sequence holds {self.max_pictures})"
            )
        if new_pictures < 1:
            raise UserError(f"n_new_frames={new_pictures}: must be at least 1")
        prompts = [np.asarray(prompt)[-(window - 1) :] for prompt in prompts]
        if not prompts or min(map(len, prompts)) == 0:
            raise UserError("a prompt without pictures: give at least one")
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        seeds = np.broadcast_to(seed, len(prompts))
        # As many pictures as the window has room for come from one cache. Prompts whose room differs are drawn apart,
        # so that what is drawn for one does not depend on the others.
        room = np.array([min(window - len(prompt), new_pictures) for prompt in prompts])
        answers = np.empty((len(prompts), candidates, new_pictures, self.tokens_per_image), np.int32)
        for count in np.unique(room):
            rows = np.flatnonzero(room == count)
            drawn_RCFN = self._draw_tokens(
                [prompts[row] for row in rows], count, candidates, settings | {"seed": seeds[rows]}, progress
            )
            answers[rows, :, :count] = drawn_RCFN
            for f in range(count, new_pictures):  # the window moves, and each candidate is a prompt of its own
                seen = [
                    np.concatenate([prompts[row], answers[row, c, :f]])[-(window - 1) :]
                    for row in rows
                    for c in range(candidates)
                ]
                each = settings | {"seed": np.repeat(seeds[rows], candidates)}
                drawn = self._draw_tokens(seen, 1, 1, each, progress)
                answers[rows, :, f] = drawn.reshape(len(rows), candidates, -1)
        return answers

    def _draw_tokens(self, prompts, count, candidates, settings, progress) -> np.ndarray:
        """The next `count` pictures of each prompt: [B, C, count, N]."""
        filled = self._filled([prompt.reshape(-1) for prompt in prompts])
        tokens_BP, mask_BP = generate.left_padded(filled)
        tokens_BCT = generate.generate(
            self._decoder,
            self._params,
            tokens_BP,
            num_new_tokens=int(count) * self.tokens_per_image,
            num_candidates=candidates,
            allowed_ids=self.codec.config.num_embeddings,
            prompt_mask_BP=mask_BP,
            progress=None if progress is None else lambda tokens_BCn: progress(tokens_BCn[: len(prompts)]),
            **settings | {"seed": self._filled(list(settings["seed"]))},
        )[: len(prompts)]
        return tokens_BCT.reshape(*tokens_BCT.shape[:2], int(count), -1)

    def _filled(self, rows: list) -> list:
        return rows + rows[-1:] * (-len(rows) % self.ways)

    def log_likelihoods(self, prompts: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> np.ndarray:
        """log p, in nats, of each token of `targets` (tokens [F, N] each, one F for all) after its prompt: [B, F N].

        Raises:
          UserError: if a prompt and its target are longer than the model's longest sequence.
        """
        rows = [
            np.concatenate([np.asarray(prompt).reshape(-1), np.asarray(target).reshape(-1)])
            for prompt, target in zip(prompts, targets, strict=True)
        ]
        tokens_BT, mask_BT = generate.left_padded(self._filled(rows))
        begin = tokens_BT.shape[1] - np.asarray(targets[0]).size
        return llama_decode.log_likelihoods(
            self.config, self._params, tokens_BT, begin, mask_BT=mask_BT, dtype=self._dtype, mesh=self.mesh
        )[: len(rows)]
