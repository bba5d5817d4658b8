"""Generation with a key-value cache, for any model: prefill of the prompts, then one sampled token per step.

`EasyLM.models` defines the letters of shapes. In this module V is the number of ids that may be sampled.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from EasyLM.errors import UserError
from EasyLM.models.sampling import check_sampling, sample
from EasyLM.vocab import CODEBOOK_SIZE

INITIAL_SLOTS = 256  # first size of the candidates' cache; it then doubles, and each size is compiled once
_PROGRESS_TOKENS = 16  # tokens between two calls of `progress`: one row of an image


class ModelSizes(Protocol):
    """The limits of a model's input."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def max_sequence_length(self) -> int:
        """Maximum length of a sequence, in tokens."""


class Decoder(ModelSizes, Protocol):
    """The interface of a model for generation. It is a hashable static argument of jitted functions.

    Its methods are pure. Caches are pytrees. Axis -2 of each array of the candidates' cache is the slot.
    """

    def prepare(self, params: Any, allowed_ids: int) -> Any:
        """Returns the weights in the form that `step` expects. Those that have this form already are not copied."""

    def prefill(
        self, params: Any, prompts_BP: jax.Array, mask_BP: jax.Array | None, allowed_ids: int
    ) -> tuple[jax.Array, Any]:
        """Returns the logits [B, V] of the token after each prompt, and the cache of the prompts."""

    def empty_cache(self, batch: int, candidates: int, slots: int) -> Any:
        """Returns an empty cache for the candidates."""

    def step(
        self, weights: Any, prompt_cache: Any, cache: Any, tokens_BC: jax.Array, slot: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Writes `tokens_BC` to `slot` of the cache. Returns the logits [B, C, V] of the next token, and the cache."""


def generate(
    decoder: Decoder,
    params: Any,
    prompts_BP: np.ndarray,
    *,
    num_new_tokens: int,
    num_candidates: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    allowed_ids: int = CODEBOOK_SIZE,
    prompt_mask_BP: np.ndarray | None = None,
    progress: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Generates the tokens after each prompt.

    The tokens depend only on the prompt, the seed and the candidate's number, not on the rest of the batch or on
    padding. Equal prompts with equal seeds get equal candidates.

    Args:
      prompts_BP: token ids. `left_padded` pads prompts of different lengths.
      num_new_tokens: N.
      num_candidates: C.
      temperature: 0 selects the most likely token. Values between 0 and 1e-6 are invalid.
      top_k, top_p: see `Sampling`. A top_k of 0 and a top_p of 1 disable them.
      seed: one seed for all prompts, or a sequence with one seed per prompt.
      allowed_ids: only ids below this number are generated. By default these are the image codes.
      prompt_mask_BP: 1 for a token, 0 for padding on the left. None means no padding.
      progress: a function that is called every few tokens with all tokens generated so far, [B, C, n].

    Returns:
      The new tokens, int32 [B, C, N].

    Raises:
      UserError: if a setting is out of range, a prompt is malformed, or the tokens exceed the maximum length.
    """
    sampling = check_sampling(temperature, top_k, top_p)
    prompts_BP = check_tokens(decoder, prompts_BP, prompt_mask_BP, num_new_tokens)
    _check_positive(num_new_tokens=num_new_tokens, num_candidates=num_candidates, allowed_ids=allowed_ids)
    allowed_ids = min(allowed_ids, decoder.vocab_size)
    mask_BP = None if prompt_mask_BP is None or np.all(prompt_mask_BP) else np.asarray(prompt_mask_BP, np.int32)
    keys_BC = _keys(seed, prompts_BP, mask_BP, num_candidates)

    weights = decoder.prepare(params, allowed_ids)  # not jitted: the results of a jitted function are copies
    prompt_cache, tokens_BCS = _prefill(decoder, params, prompts_BP, mask_BP, allowed_ids, sampling, keys_BC)
    cache, done = None, 1
    while done < num_new_tokens:
        if done == tokens_BCS.shape[-1] or cache is None:
            slots = min(max(2 * done, INITIAL_SLOTS), -(-num_new_tokens // _PROGRESS_TOKENS) * _PROGRESS_TOKENS)
            tokens_BCS = jnp.pad(tokens_BCS, ((0, 0), (0, 0), (0, slots - tokens_BCS.shape[-1])))
            cache = _grow_cache(decoder, cache, *tokens_BCS.shape)
        stop = min((done // _PROGRESS_TOKENS + 1) * _PROGRESS_TOKENS, num_new_tokens)
        state = prompt_cache, cache, tokens_BCS
        tokens_BCS, cache = _decode(decoder, weights, *state, done, stop, sampling, keys_BC)
        done = stop
        if progress is not None:
            # A copy, because the next call donates the array; sliced on the host: each slice would be a program.
            progress(np.asarray(jnp.copy(tokens_BCS))[..., :done])
    return np.asarray(tokens_BCS)[..., :num_new_tokens]


def _check_positive(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")


def left_padded(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts of different lengths. Returns tokens and mask, [B, P] each, for `generate`."""
    length = max(len(prompt) for prompt in prompts)
    prompts_BP, mask_BP = np.zeros((2, len(prompts), length), np.int32)
    for row_P, mask_P, prompt in zip(prompts_BP, mask_BP, prompts, strict=True):
        row_P[length - len(prompt) :], mask_P[length - len(prompt) :] = prompt, 1
    return prompts_BP, mask_BP


def check_tokens(
    model: ModelSizes, tokens_BP: np.ndarray, mask_BP: np.ndarray | None, num_new_tokens: int = 0
) -> np.ndarray:
    """Returns the tokens as int32 after validation. The length check includes `num_new_tokens`.

    Raises:
      UserError: if the type, the shape, an id, the length or the mask is invalid.
    """
    tokens_BP = np.asarray(tokens_BP)
    if tokens_BP.ndim != 2 or not tokens_BP.size or tokens_BP.dtype.kind not in "iu":
        raise UserError(
            f"tokens of type {tokens_BP.dtype} and shape {tokens_BP.shape}: must be integers [rows, tokens]"
        )
    if tokens_BP.min() < 0 or tokens_BP.max() >= model.vocab_size:
        wrong = tokens_BP[(tokens_BP < 0) | (tokens_BP >= model.vocab_size)][0]
        raise UserError(f"token id {wrong}: must be from 0 to {model.vocab_size - 1}, the model's vocabulary")
    length = tokens_BP.shape[1] + num_new_tokens
    if length > model.max_sequence_length:
        raise UserError(
            f"{tokens_BP.shape[1]} tokens and {num_new_tokens} new ones: more than the model's "
            f"max_sequence_length={model.max_sequence_length}"
        )
    if mask_BP is not None:
        mask_BP = np.asarray(mask_BP)
        if mask_BP.shape != tokens_BP.shape or not np.isin(mask_BP, (0, 1)).all():
            raise UserError(f"a mask of shape {mask_BP.shape}: must be zeros and ones of shape {tokens_BP.shape}")
        if (np.diff(mask_BP.astype(int), axis=1) < 0).any() or not mask_BP[:, -1].all():
            raise UserError("a mask with zeros after ones: padding is on the left, and each row has a token")
    return tokens_BP.astype(np.int32)


def _keys(seed: int | Sequence[int], prompts_BP: np.ndarray, mask_BP: np.ndarray | None, candidates: int) -> jax.Array:
    """Returns PRNG keys [B, C], derived from the seed, the prompt's tokens and the candidate's number."""
    rows = prompts_BP if mask_BP is None else [row[mask == 1] for row, mask in zip(prompts_BP, mask_BP, strict=True)]
    hashes_B = np.array([zlib.crc32(np.ascontiguousarray(row, "<i4").data) for row in rows], np.uint32)
    seeds_B = np.broadcast_to(np.asarray(seed, np.uint32), len(rows))
    return _fold_keys(seeds_B, hashes_B, np.arange(candidates))


@jax.jit
def _fold_keys(seeds_B, hashes_B, numbers_C):
    keys_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds_B), hashes_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_B, numbers_C)


def _sample(logits_BCV, sampling, keys_BC, number):
    def one(logits_V, key):
        return sample(logits_V, sampling, jax.random.fold_in(key, number))

    return jax.vmap(jax.vmap(one))(logits_BCV, keys_BC)


@partial(jax.jit, static_argnames=("decoder", "allowed_ids"))
def _prefill(decoder, params, prompts_BP, mask_BP, allowed_ids, sampling, keys_BC):
    """Returns the prompts' cache, and the first token of each candidate [B, C, 1]."""
    logits_BV, prompt_cache = decoder.prefill(params, prompts_BP, mask_BP, allowed_ids)
    shape = (*keys_BC.shape, logits_BV.shape[-1])
    return prompt_cache, _sample(jnp.broadcast_to(logits_BV[:, None], shape), sampling, keys_BC, 0)[..., None]


@partial(jax.jit, static_argnames=("decoder", "batch", "candidates", "slots"))
def _grow_cache(decoder, cache, batch, candidates, slots):
    """Returns the candidates' cache with more slots."""
    empty = decoder.empty_cache(batch, candidates, slots)
    if cache is None:
        return empty
    return jax.tree.map(lambda new, old: jax.lax.dynamic_update_slice_in_dim(new, old, 0, -2), empty, cache)


@partial(jax.jit, static_argnames="decoder", donate_argnames=("cache", "tokens_BCS"))
def _decode(decoder, weights, prompt_cache, cache, tokens_BCS, done, stop, sampling, keys_BC):
    """Generates tokens `done` to `stop` - 1."""

    def step(number, carry):
        tokens_BCS, cache = carry
        logits_BCV, cache = decoder.step(weights, prompt_cache, cache, tokens_BCS[..., number - 1], number - 1)
        tokens_BC1 = _sample(logits_BCV, sampling, keys_BC, number)[..., None]
        return jax.lax.dynamic_update_slice_in_dim(tokens_BCS, tokens_BC1, number, -1), cache

    return jax.lax.fori_loop(done, stop, step, (tokens_BCS, cache))
