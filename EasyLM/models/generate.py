"""Generation: a prompt is read once, then tokens are drawn one by one from a cache. Knows no model.

Shapes: B prompts, P tokens of a prompt (padded on the left), C candidates of a prompt, N new tokens, S slots of the
candidates' cache, V ids that may be drawn.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from EasyLM.errors import UserError
from EasyLM.vocab import CODEBOOK_SIZE

_FIRST_SLOTS = 256  # the candidates' cache doubles from here: each size is compiled once, and attention reads no more
_LEAST_TEMPERATURE = 1e-6  # logits divided by less may overflow
_MOST_K = 2**31 - 1  # as a traced int32; above any vocabulary, so it is the same as off
_CHUNK = 16  # tokens between two reports of progress: a row of a picture


class Decoder(Protocol):
    """A model as generation needs it: hashable, with pure methods, so that it is a static argument of what is jitted.

    The caches are pytrees. Each array of the candidates' cache has its slots along axis -2.
    """

    vocab_size: int
    max_sequence_length: int

    def prepare(self, params, allowed_ids: int) -> Any:
        """The weights as `step` wants them."""

    def prefill(self, params, prompts_BP: jax.Array, mask_BP: jax.Array | None, allowed_ids: int):
        """Logits [B, V] of the token after each prompt, and the prompts' cache."""

    def empty_cache(self, batch: int, candidates: int, slots: int) -> Any:
        """The candidates' cache, before their first token."""

    def step(self, weights, prompt_cache, cache, tokens_BC: jax.Array, slot: jax.Array):
        """Logits [B, C, V] of the token after `tokens_BC`, which are put into `slot`, and the cache with them."""


@partial(jax.tree_util.register_dataclass, data_fields=("temperature", "top_k", "top_p"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. None: not at all (temperature: greedy). The values are traced, whether they are None not.

    Attributes:
      temperature: divides the logits, at least 1e-6.
      top_k: only the k most likely ids (and what ties with the last).
      top_p: of these, the fewest most likely ids that together have this probability (arXiv 1904.09751).
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def generate(
    decoder: Decoder,
    params,
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
    """The tokens that follow each prompt: int32 [B, C, N].

    What is drawn is a function of the prompt, the seed and the candidate's number: the same in any batch and with any
    padding. Equal prompts of a batch get equal candidates.

    Args:
      prompts_BP: token ids; prompts of different lengths: see `left_padded`.
      temperature: 0 takes the most likely token; values between 0 and 1e-6 are refused.
      top_k, top_p: see `Sampling`; 0 and 1 turn them off.
      seed: one for all prompts, or one for each.
      allowed_ids: only ids below this one are drawn (and below the vocabulary's end): image codes by default.
      prompt_mask_BP: 1 for a token, 0 for padding on the left; None: no padding.
      progress: called every few tokens with all tokens so far, [B, C, n].

    Raises:
      UserError: for a setting out of its range, a malformed prompt, or more tokens than the model's longest sequence.
    """
    sampling = check_sampling(temperature, top_k, top_p)
    prompts_BP = check_tokens(decoder, prompts_BP, prompt_mask_BP, num_new_tokens)
    for name, value in (
        ("num_new_tokens", num_new_tokens),
        ("num_candidates", num_candidates),
        ("allowed_ids", allowed_ids),
    ):
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    allowed_ids = min(allowed_ids, decoder.vocab_size)
    mask_BP = None if prompt_mask_BP is None or np.all(prompt_mask_BP) else np.asarray(prompt_mask_BP, np.int32)
    keys_BC = _keys(seed, prompts_BP, mask_BP, num_candidates)

    weights = _prepare(decoder, params, allowed_ids)
    prompt_cache, tokens_BCS = _first(decoder, params, prompts_BP, mask_BP, allowed_ids, sampling, keys_BC)
    cache, done = None, 1
    while done < num_new_tokens:
        if done == tokens_BCS.shape[-1] or cache is None:
            slots = min(max(2 * done, _FIRST_SLOTS), -(-num_new_tokens // _CHUNK) * _CHUNK)
            tokens_BCS = jnp.pad(tokens_BCS, ((0, 0), (0, 0), (0, slots - tokens_BCS.shape[-1])))
            cache = _grown(decoder, cache, *tokens_BCS.shape)
        stop = min(done // _CHUNK * _CHUNK + _CHUNK, num_new_tokens)
        tokens_BCS, cache = _continue(decoder, weights, prompt_cache, cache, tokens_BCS, done, stop, sampling, keys_BC)
        done = stop
        if progress is not None:
            progress(np.asarray(tokens_BCS[..., :done]))
    return np.asarray(tokens_BCS[..., :num_new_tokens])


def left_padded(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as one array [B, P], and its mask: what `generate` takes."""
    length = max(len(prompt) for prompt in prompts)
    prompts_BP, mask_BP = np.zeros((2, len(prompts), length), np.int32)
    for row_P, mask_P, prompt in zip(prompts_BP, mask_BP, prompts, strict=True):
        row_P[length - len(prompt) :], mask_P[length - len(prompt) :] = prompt, 1
    return prompts_BP, mask_BP


def check_sampling(temperature: float, top_k: int, top_p: float) -> Sampling:
    """The settings as users give them (0, 0 and 1 for off), checked.

    Raises:
      UserError: naming the setting, its value and its range.
    """
    if temperature != 0 and not _LEAST_TEMPERATURE <= temperature < np.inf:
        raise UserError(
            f"temperature={temperature}: must be 0 (the most likely token), or finite and at least {_LEAST_TEMPERATURE}"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1 (off)")
    if top_k < 0:
        raise UserError(f"top_k={top_k}: must be 0 (off) or above")
    if temperature == 0:
        return Sampling()
    return Sampling(float(temperature), min(top_k, _MOST_K) or None, float(top_p) if top_p < 1 else None)


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that users cannot give: all programs take the same ones."""
    if not 0 <= seed < 2**31:
        raise UserError(f"seed={seed}: must be 0..{2**31 - 1}")


def check_tokens(model, tokens_BP: np.ndarray, mask_BP: np.ndarray | None, num_new_tokens: int = 0) -> np.ndarray:
    """The tokens as int32, if they and `num_new_tokens` more fit the model; its sizes are taken from `model`.

    Raises:
      UserError: naming what is wrong.
    """
    tokens_BP = np.asarray(tokens_BP)
    if tokens_BP.ndim != 2 or not tokens_BP.size or tokens_BP.dtype.kind not in "iu":
        raise UserError(f"tokens of type {tokens_BP.dtype} and shape {tokens_BP.shape}: give integers [rows, tokens]")
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
            raise UserError(f"a mask of shape {mask_BP.shape}: give zeros and ones of shape {tokens_BP.shape}")
        if (np.diff(mask_BP.astype(int), axis=1) < 0).any() or not mask_BP[:, -1].all():
            raise UserError("a mask with zeros after ones: padding goes on the left, and each row has a token")
    return tokens_BP.astype(np.int32)


def sample(logits_V: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """One token id."""
    if sampling.temperature is None:
        return logits_V.argmax().astype(jnp.int32)
    logits_V = logits_V.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None or sampling.top_p is not None:
        logits_V = jnp.where(logits_V >= _smallest_kept(logits_V, sampling), logits_V, -jnp.inf)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)


def _smallest_kept(logits_V, sampling: Sampling):
    sorted_V = jnp.sort(logits_V, descending=True)
    if sampling.top_k is not None:
        sorted_V = jnp.where(jnp.arange(len(sorted_V)) < sampling.top_k, sorted_V, -jnp.inf)
    kept_V = sorted_V > -jnp.inf
    if sampling.top_p is not None:
        probabilities_V = jax.nn.softmax(sorted_V)
        kept_V &= jnp.cumsum(probabilities_V) - probabilities_V < sampling.top_p
        kept_V = kept_V.at[0].set(True)  # also by a top_p that float32 has no number for
    return jnp.where(kept_V, sorted_V, jnp.inf).min()


def _keys(seed: int | Sequence[int], prompts_BP: np.ndarray, mask_BP: np.ndarray | None, candidates: int) -> jax.Array:
    """A key for each candidate [B, C], from the seed, the prompt's tokens and the candidate's number."""
    rows = prompts_BP if mask_BP is None else [row[mask == 1] for row, mask in zip(prompts_BP, mask_BP, strict=True)]
    hashes_B = np.array([zlib.crc32(np.ascontiguousarray(row, "<i4")) for row in rows], np.uint32)
    seeds, place_B = np.unique(np.broadcast_to(seed, len(rows)), return_inverse=True)
    keys_B = jnp.stack([jax.random.key(int(number)) for number in seeds])[place_B]
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, hashes_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_B, np.arange(candidates))


def _sample(logits_BCV, sampling, keys_BC, number):
    def one(logits_V, key):
        return sample(logits_V, sampling, jax.random.fold_in(key, number))

    return jax.vmap(jax.vmap(one))(logits_BCV, keys_BC)


@partial(jax.jit, static_argnames=("decoder", "allowed_ids"))
def _prepare(decoder, params, allowed_ids):
    return decoder.prepare(params, allowed_ids)


@partial(jax.jit, static_argnames=("decoder", "allowed_ids"))
def _first(decoder, params, prompts_BP, mask_BP, allowed_ids, sampling, keys_BC):
    """The prompts' cache, and the first token of each candidate [B, C, 1]."""
    logits_BV, prompt_cache = decoder.prefill(params, prompts_BP, mask_BP, allowed_ids)
    shape = (*keys_BC.shape, logits_BV.shape[-1])
    return prompt_cache, _sample(jnp.broadcast_to(logits_BV[:, None], shape), sampling, keys_BC, 0)[..., None]


@partial(jax.jit, static_argnames=("decoder", "batch", "candidates", "slots"))
def _grown(decoder, cache, batch, candidates, slots):
    empty = decoder.empty_cache(batch, candidates, slots)
    if cache is None:
        return empty
    return jax.tree.map(lambda new, old: jax.lax.dynamic_update_slice_in_dim(new, old, 0, -2), empty, cache)


@partial(jax.jit, static_argnames="decoder", donate_argnames=("cache", "tokens_BCS"))
def _continue(decoder, weights, prompt_cache, cache, tokens_BCS, done, stop, sampling, keys_BC):
    """Fills `tokens_BCS` from `done` to `stop`."""

    def draw(number, carry):
        tokens_BCS, cache = carry
        logits_BCV, cache = decoder.step(weights, prompt_cache, cache, tokens_BCS[..., number - 1], number - 1)
        tokens_BC1 = _sample(logits_BCV, sampling, keys_BC, number)[..., None]
        return jax.lax.dynamic_update_slice_in_dim(tokens_BCS, tokens_BC1, number, -1), cache

    return jax.lax.fori_loop(done, stop, draw, (tokens_BCS, cache))
