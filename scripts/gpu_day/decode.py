"""Measures prompts and generated tokens of one preset in bf16 with random weights."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from EasyLM.flags import Flag, run
from EasyLM.models import generate
from EasyLM.models.llama import costs, inference_model, llama_config, llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.llama_decode import LLaMADecoder
from EasyLM.vocab import CODEBOOK_SIZE
from gpu_day.measure import emit, peak_bytes, reason
from gpu_day.profile import time_by_kernel

SETTINGS = {
    "preset": Flag("vqlm_1b", "Preset of the model.", choices=tuple(llama_config.PRESETS)),
    "cases": Flag("1x16,4x3840", "Comma list of prompts x tokens of a prompt."),
    "new_tokens": Flag(256, "Tokens to generate: those of an image.", least=2),
    "rounds": Flag(3, "Runs of each measurement; the medians count.", least=1),
}
_TRACED_TOKENS = 32
FLAGS = {**SETTINGS, "variant": Flag("", "Name of the compiler options in the environment, for the records.")}


def main(config: ConfigDict) -> None:
    """Measures each case. A case that fails is a record too."""
    model = llama_config.PRESETS[config.preset]
    params = inference_model.separate_layers(random_params(model), model.num_hidden_layers)
    decoder = LLaMADecoder(model, jnp.bfloat16)
    for rows, length in parse_cases(config.cases):
        case = {"preset": config.preset, "rows": rows, "prompt": length, "variant": config.variant}
        prompts_BP = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (rows, length)).astype(np.int32)

        def tokens(count, prompts_BP=prompts_BP):
            return generate.generate(decoder, params, prompts_BP, num_new_tokens=count)

        try:
            measured = step_and_prompt_seconds(tokens, config.new_tokens, config.rounds)
        except Exception as error:  # such as too little memory
            emit("decode", case_name(case), **case, error=reason(error))
            continue
        emit(
            "decode",
            case_name(case),
            **case,
            **measured,
            step_bytes=step_bytes(model, rows, length + config.new_tokens / 2),
            prompt_flops=2 * rows * length * (costs.num_matmul_parameters(model) - model.vocab_size * model.hidden_size)
            + 2 * rows * length**2 * model.num_hidden_layers * model.hidden_size,
            peak_bytes=peak_bytes(),
        )
        count = min(_TRACED_TOKENS, config.new_tokens)
        traced = time_by_kernel(lambda tokens=tokens, count=count: tokens(count))
        emit("kernels", f"prompt and {count} tokens, {case_name(case)}", milliseconds=traced)


def parse_cases(text: str) -> list[tuple[int, int]]:
    """Parses "1x16,4x3840" to pairs of rows and prompt tokens."""
    return [tuple(map(int, case.split("x"))) for case in text.split(",")]


def case_name(case: dict) -> str:
    """Returns the name of a record."""
    variant = f", {case['variant']}" if case["variant"] else ""
    return f"{case['preset']}, {case['rows']} x {case['prompt']}{variant}"


def random_params(model: LLaMAConfig) -> dict:
    """Returns random parameters in bf16."""

    def make(key):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), llama_model.init_params(model, key))

    return jax.jit(make)(jax.random.key(0))


def step_and_prompt_seconds(tokens: Callable[[int], Any], new_tokens: int, rounds: int) -> dict[str, float]:
    """Returns seconds of the prompt with its first token, of each further token, and of compilation.

    Args:
      tokens: generates a number of tokens and waits for them.
    """
    begin = time.perf_counter()
    tokens(new_tokens), tokens(1)
    compile_seconds = time.perf_counter() - begin
    seconds = {count: [] for count in (new_tokens, 1)}
    for _ in range(rounds):
        for count, values in seconds.items():
            begin = time.perf_counter()
            tokens(count)
            values.append(time.perf_counter() - begin)
    total, prompt = (float(np.median(seconds[count])) for count in (new_tokens, 1))
    step = (total - prompt) / (new_tokens - 1)
    return {"step_seconds": step, "prompt_seconds": prompt, "compile_seconds": compile_seconds}


def step_bytes(model: LLaMAConfig, rows: int, length: float) -> float:
    """Returns the bytes that a step reads in bf16: the weights without the embedding, and the caches of all tokens."""
    weights = costs.num_parameters(model) - model.vocab_size * model.hidden_size
    return 2 * (weights + rows * length * 2 * model.num_hidden_layers * model.kv_heads * model.head_dim)


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
