"""Trains a model to look up: the first stage of `scripts/make_demo_model.sh gpu`.

    PYTHONPATH=. python scripts/demo_model/lookup.py --output_file=build/lookup --dtype=bf16

A sentence has pairs of pictures, [input, answer, input, answer, ...], of random symbols. Symbols are codes of the
model's vocabulary. Each cell of an input is drawn by itself. The answer permutes k of the n symbols of the sentence,
with a permutation that is drawn anew for each sentence, and k uniform in 0..n. Nothing but the earlier pairs predicts
the answers. In the last levels, the cells of half of the sentences also move, by a geometry that training sentences may
use (`tokenizer.mappings.held_out`): the next code of an answer is then that of a neighbour in the input, in a direction
that the earlier pairs show. Sentences are made on the device.

The levels begin with few symbols and small pictures, where the lookup is found within some thousand steps, and end with
all codes and pictures of 64 codes. A level ends when the answers of the last quarter of a sentence are right. When the
lookup is found depends on the seed: a seed that does not finish a level in time is followed by the next one.

Shapes: B sentences, T tokens, M most symbols of a sentence, C cells of the largest picture, G geometries.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from EasyLM.checkpoints.stacking import file_order
from EasyLM.checkpoints.streaming import write_entry
from EasyLM.flags import Flag, run
from EasyLM.models.llama import llama_config, llama_model, training_task
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.parallel import make_mesh
from EasyLM.storage import atomic_file, check_output
from tokenizer.mappings import held_out
from tokenizer.mappings.steps import Geometry
from tokenizer.synthetic import palette

FLAGS = {
    "output_file": Flag("", "File of the parameters, for --load_checkpoint=params::FILE.", required=True),
    "load_llama_config": Flag("json::scripts/demo_model/settings.json", "The model, as in llama_train."),
    "dtype": Flag("fp32", "Type of the computation.", choices=("fp32", "bf16")),
    "seeds": Flag("0,1,2", "Comma list of seeds, tried in this order."),
    "lr": Flag(1.5e-3, "Learning rate, after 200 steps of warm-up.", above=0),
    "tokens_per_step": Flag(8192, "Tokens of a batch.", least=1024),
    "level_seconds": Flag(70.0, "A seed that does not finish a level in this time is given up.", above=0),
    "time_limit": Flag(225.0, "Seconds in total, after which the furthest parameters are written.", above=0),
}

_STEPS = 10  # of a call of the compiled program
_CALLS = 10  # between two measurements
_WARMUP_STEPS = 200
_WEIGHT_DECAY = 0.01
_TARGET = 0.7  # accuracy that ends a level; an exchanged symbol that is not among the earlier pairs is not predictable
_TEST_SENTENCES = 64

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Level:
    """A distribution of sentences.

    Attributes:
      symbols: the number of codes that occur, from 0 on.
      fewest, most: symbols of a sentence.
      size: codes of a picture.
      length: tokens of a sentence.
      moves: whether the cells of half of the sentences move. The pictures must have all cells.
    """

    symbols: int
    fewest: int
    most: int
    size: int
    length: int
    moves: bool = False


LEVELS = (
    Level(12, 12, 12, 1, 128),
    Level(12, 12, 12, 2, 128),
    Level(12, 12, 12, 4, 128),
    Level(12, 12, 12, 8, 128),
    Level(24, 8, 24, 8, 128),
    Level(64, 8, 32, 8, 128),
    Level(64, 8, 32, 16, 1024),
    Level(64, 8, 64, 32, 1024),
    Level(64, 8, 64, 64, 1024, moves=True),
    Level(1024, 8, 64, 64, 1024, moves=True),
)
EXCHANGE, MOVE = TESTS = ("exchange", "move")
_MOST, _CODES = max(level.most for level in LEVELS), max(level.symbols for level in LEVELS)
_CELLS = palette.TILES**2


def main(config: ConfigDict) -> None:
    """Trains one seed after the other until one finishes all levels, and writes the parameters that came furthest."""
    check_output(config.output_file, "output_file")
    # The values of the backward pass of such batches need little memory: none is recomputed.
    model = dataclasses.replace(llama_config.load_config(config.load_llama_config), remat_block="")
    trainer = Trainer(model, config.dtype, config.lr, config.tokens_per_step)
    end, furthest = time.monotonic() + config.time_limit, (-1, None)
    for seed in [int(seed) for seed in config.seeds.split(",")]:
        finished, params = trainer.train(seed, config.level_seconds, end)
        furthest = max(furthest, (finished, params), key=lambda pair: pair[0])
        if finished == len(LEVELS) or time.monotonic() > end:
            break
    with atomic_file(config.output_file) as file:
        for key, stacked, layer in file_order(furthest[1]["params"]):
            write_entry(file, key, jax.device_get(stacked.array if layer is None else stacked.array[layer]))
    print(f"{config.output_file}: parameters after {furthest[0]} of {len(LEVELS)} levels")


class Trainer:
    """The compiled programs, one for each length of sentences."""

    def __init__(self, model: LLaMAConfig, dtype: str, rate: float, tokens_per_step: int):
        self._model, self._tokens_per_step = model, tokens_per_step
        mesh, compute = make_mesh("1,1,1", jax.devices()[:1]), training_task.COMPUTE_DTYPES[dtype]
        loss_fn = llama_model.make_loss_fn(model, compute, mesh)
        schedule = optax.linear_schedule(0.0, rate, _WARMUP_STEPS)
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=_WEIGHT_DECAY)
        )
        self._steps = jax.jit(partial(_train, loss_fn, self._optimizer), static_argnums=(3, 4), donate_argnums=(0, 1))
        self._accuracy = jax.jit(
            partial(accuracy, partial(llama_model.apply, model, dtype=compute, mesh=mesh)), static_argnums=(2, 3, 5)
        )

    def train(self, seed: int, level_seconds: float, end: float) -> tuple[int, Params]:
        """Trains a seed.

        Args:
          end: `time.monotonic()` at which to stop.

        Returns:
          The number of levels that it finished, and the parameters.
        """
        params = jax.jit(partial(llama_model.init_params, self._model))(jax.random.key(seed))
        state, calls = self._optimizer.init(params), 0
        for number, level in enumerate(LEVELS):
            batch_size, values = max(self._tokens_per_step // level.length, 1), traced(level)
            level_end, test_key = None, jax.random.key(2**31 + number)  # compiling does not count
            while True:
                key = jax.random.fold_in(jax.random.key(seed), calls)
                params, state, loss = self._steps(params, state, key, batch_size, level.length, values)
                calls += 1
                jax.block_until_ready(loss)
                level_end = level_end or min(end, time.monotonic() + level_seconds)
                if calls % _CALLS == 0 or time.monotonic() > level_end:
                    accuracies = {
                        test: self._accuracy(params, test_key, _TEST_SENTENCES, level.length, values, test)
                        for test in (TESTS if level.moves else (EXCHANGE,))
                    }
                    texts = [f"{test} {early:.2f} and {late:.2f}" for test, (early, late) in accuracies.items()]
                    print(
                        f"seed {seed}, step {calls * _STEPS}, {level}: loss {loss:.3f}, accuracy in the first and the "
                        f"last quarter: {', '.join(texts)}",
                        flush=True,
                    )
                    if all(late > _TARGET for _, late in accuracies.values()):
                        break
                if time.monotonic() > level_end:
                    return number, params
        return len(LEVELS), params


def traced(level: Level) -> dict[str, int]:
    """Returns the values of a level that are arguments of the compiled program."""
    return {name: value for name, value in dataclasses.asdict(level).items() if name != "length"}


def sentences(
    key: jax.Array, count: int, length: int, level: Mapping[str, jax.Array], test: str = ""
) -> tuple[jax.Array, jax.Array]:
    """Draws sentences.

    Args:
      level: see `traced`.
      test: `EXCHANGE`: all n symbols are exchanged, and no cell moves. `MOVE`: no symbol is exchanged, and the cells of
        all sentences move. Otherwise k is uniform in 0..n, and 0 in half of the sentences whose cells move.

    Returns:
      Tokens int32 [B,T], and whether a token belongs to an answer, bool [T].
    """
    keys, moving_keys = jax.random.split(key, 5), jax.random.split(jax.random.fold_in(key, 5))
    most_1M = jnp.arange(_MOST)[None]
    codes_BM = _first(keys[0], count, _CODES, level["symbols"])[:, :_MOST]
    n_B1 = jax.random.randint(keys[1], (count, 1), level["fewest"], level["most"] + 1)
    k_B1 = jax.random.randint(keys[2], (count, 1), 0, n_B1 + 1)
    moves_B1 = level["moves"] & jax.random.bernoulli(moving_keys[0], 0.5, (count, 1))
    k_B1 = jnp.where(moves_B1 & (jnp.arange(count) % 2 == 0)[:, None], 0, k_B1)
    if test:
        k_B1, moves_B1 = (n_B1, moves_B1 & False) if test == EXCHANGE else (n_B1 * 0, moves_B1 | True)
    images_BM = jnp.where(most_1M < k_B1, _first(keys[3], count, _MOST, k_B1), most_1M)
    period, place = 2 * level["size"], jnp.arange(length) % (2 * level["size"])
    is_answer_T = place >= level["size"]
    sources_BC = jnp.where(moves_B1, geometries(moving_keys[1], count), jnp.arange(_CELLS)[None])
    place_BT = jnp.where(is_answer_T[None], sources_BC[:, place % level["size"]], place[None])
    cell_BT = (jnp.arange(length) // period * level["size"])[None] + place_BT
    cells_BT = jnp.take_along_axis((jax.random.uniform(keys[4], (count, length)) * n_B1).astype(jnp.int32), cell_BT, 1)
    answers_BT = jnp.take_along_axis(images_BM, cells_BT, 1)
    chosen_BT = jnp.where(is_answer_T[None], answers_BT, cells_BT)
    return jnp.take_along_axis(codes_BM, chosen_BT, 1), is_answer_T


def geometries(key: jax.Array, count: int) -> jax.Array:
    """Draws a geometry for each sentence: the cell of the input for each cell of the answer, int32 [B,C]."""
    sources_GC, shares_G = _trained_geometries()
    return jnp.asarray(sources_GC)[jax.random.choice(key, len(shares_G), (count,), p=shares_G)]


def _trained_geometries() -> tuple[np.ndarray, np.ndarray]:
    """Returns the cells of the input [G,C] of all geometries for training, and shares [G]: half do not shift."""
    cells = np.arange(_CELLS).reshape(palette.TILES, palette.TILES)
    trained = np.argwhere(~held_out.GEOMETRIES)
    sources_GC = np.stack([Geometry(*geometry).apply(cells, {}).ravel() for geometry in trained.tolist()])
    shifts = trained[:, 1:].any(1)
    return sources_GC, np.where(shifts, 1 / shifts.sum(), 1 / (~shifts).sum()) / 2


def _first(key: jax.Array, count: int, size: int, first: jax.Array) -> jax.Array:
    """Returns permutations [count,size] of range(size) that permute range(first) and its complement."""
    return jnp.argsort(jax.random.uniform(key, (count, size)) + (jnp.arange(size)[None] >= first), axis=1)


def _train(loss_fn: Callable, optimizer, params, state, key, count: int, length: int, level) -> tuple:
    """Makes `_STEPS` updates. Only answers are in the loss."""

    def step(carry, key):
        params, state = carry
        tokens_BT, is_answer_T = sentences(key, count, length, level)
        masks_T = jnp.roll(is_answer_T, -1).at[-1].set(False)
        batch = {
            "input_tokens": tokens_BT,
            "target_tokens": jnp.roll(tokens_BT, -1, 1),
            "loss_masks": jnp.broadcast_to(masks_T.astype(jnp.float32), tokens_BT.shape),
        }
        (loss, _), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), jax.random.split(key, _STEPS))
    return params, state, losses.mean()


def accuracy(
    apply: Callable,
    params: Params | None,
    key: jax.Array,
    count: int,
    length: int,
    level: Mapping[str, jax.Array],
    test: str,
) -> tuple[jax.Array, jax.Array]:
    """Returns the accuracy of answers in the first and in the last quarter of the sentences of a test."""
    tokens_BT, is_answer_T = sentences(key, count, length, level, test)
    is_right_BT = apply(params, tokens_BT)[:, :-1].argmax(-1) == tokens_BT[:, 1:]
    place_T = jnp.arange(length)
    quarters = [place_T < length // 4, place_T >= length - length // 4]
    early, late = [
        (is_right_BT * (part & is_answer_T)[None, 1:]).sum(1) / (part & is_answer_T).sum() for part in quarters
    ]
    return early.mean(), late.mean()


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
