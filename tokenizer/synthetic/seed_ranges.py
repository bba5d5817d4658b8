"""Ranges of scene seeds for training and for evaluation.

A block is 10^6 consecutive seeds. `tokenizer.render --seed=B` and `tokenizer.mappings --seed=B` use block B, so two
values of --seed share no scene. Blocks from `FIRST_HELD_OUT` on are reserved for evaluation:

    blocks        seeds             used by
    0..499        0..499,999,999    tokenizer.render and tokenizer.mappings: training sets and your own test sets
    500 + S       500,000,000...    evaluation.fewshot --benchmark=rendered --seed=S, for S < 400
    900           900,000,000...    examples on the page of the service
    501 + S       901,000,000...    evaluation.fewshot --benchmark=rendered --seed=S, for S >= 400
"""

from EasyLM.errors import UserError

SEEDS_PER_BLOCK = 10**6
FIRST_HELD_OUT = 500
_PAGE_EXAMPLES_BLOCK = 900


def training_seed(block: int) -> int:
    """Returns the first seed of a training block.

    Raises:
      UserError: if the block is reserved for evaluation.
    """
    if block >= FIRST_HELD_OUT:
        raise UserError(
            f"scenes {block * SEEDS_PER_BLOCK:,}..{(block + 1) * SEEDS_PER_BLOCK - 1:,} are reserved for evaluation "
            f"(evaluation.fewshot --benchmark=rendered, examples of the service): choose 0..{FIRST_HELD_OUT - 1}"
        )
    return block * SEEDS_PER_BLOCK


def benchmark_seeds(seed: int, count: int) -> range:
    """Returns the seeds of `count` scenes of the rendered benchmark, disjoint for different `seed`."""
    assert seed >= 0
    block = FIRST_HELD_OUT + seed
    first = (block + (block >= _PAGE_EXAMPLES_BLOCK)) * SEEDS_PER_BLOCK
    return range(first, first + count)


def page_example_seed(index: int) -> int:
    """Returns the seed of an example on the page of the service."""
    assert 0 <= index < SEEDS_PER_BLOCK
    return _PAGE_EXAMPLES_BLOCK * SEEDS_PER_BLOCK + index
