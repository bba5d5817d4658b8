"""Plans the 7B model on one GPU and prints the table of the README: `python scripts/card_table.py --plan=inference`.

XLA compiles for an H100 that need not exist (extra `gpu`): the released tokenizer, generation of an image after 15
images, as `Prompter` does it, and train steps, as `llama_plan` does. Other GPUs are assumed to need the same memory.
The plans are kept in --results.
"""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from plan_table import made_plan

from EasyLM.errors import choose
from EasyLM.flags import Flag, run
from EasyLM.models import generate
from EasyLM.models.llama import inference_model, llama_config
from EasyLM.models.llama.llama_decode import LLaMADecoder
from EasyLM.models.sampling import check_sampling
from EasyLM.parallel import make_mesh
from EasyLM.planning.plan import peak_bytes
from EasyLM.planning.topologies import Topology, compiling_for, make_topology
from EasyLM.storage import write_json
from EasyLM.vocab import CODEBOOK_SIZE
from tokenizer.vqgan import VQGAN, VQGANConfig, codec

FLAGS = {
    "plan": Flag("", "Comma list of what to plan: inference, training; empty: only print the table."),
    "topology": Flag("h100:1", "The device that XLA compiles for."),
    "preset": Flag("vqlm_7b", "The model of inference.", choices=tuple(llama_config.PRESETS)),
    "results": Flag("scripts/card_table.json", "File of the plans, which is read and updated."),
    "time_limit": Flag(1200.0, "Seconds for one plan of training.", above=0),
}
_IMAGE, _IMAGES = 256, 16  # tokens of an image; images of the longest sequence, the generated one included
_CODEC_BATCH = 32  # images of a batch of the tokenizer
TOKENIZER = f"tokenizer, {_CODEC_BATCH} images"
CARDS = (24, 40, 80, 141)  # GB
_SHARE = 0.95  # of a card's memory for JAX, with XLA_CLIENT_MEM_FRACTION=0.95
INFERENCE = [(weights, candidates) for weights in ("bf16", "int8") for candidates in (1, 4)]
_FULL_REMAT = "--llama.remat_block=nothing_saveable"
_LORA = "--lora.rank=16"
# What is trained, rows of a batch, and flags of llama_plan
TRAINING: list[tuple[str, int, tuple[str, ...]]] = [
    ("full", 1, (_FULL_REMAT,)),
    *(("LoRA, rank 16", rows, (_LORA, _FULL_REMAT)) for rows in (1, 2)),
    *(("LoRA, rank 16, `auto` on 80 GB", rows, (_LORA,)) for rows in (1, 2)),
]


def main(config: ConfigDict) -> None:
    """Plans what the flags choose, and prints the table of all plans."""
    plans: dict[str, dict] = {}
    if os.path.exists(config.results):
        with open(config.results) as file:
            plans = json.load(file)
    chosen = [part for part in config.plan.split(",") if part]
    for part in chosen:
        choose("--plan", part, ("inference", "training"))
    if "training" in chosen:
        for trained, rows, flags in TRAINING:
            plans[training_key(trained, rows)] = made_plan(
                config.preset, config.topology, rows, flags, config.time_limit
            )
            write_json(config.results, plans)
    if "inference" in chosen:
        compiler = Compiler(make_topology(config.topology))
        plans[TOKENIZER] = tokenizer_plan(VQGANConfig(), compiler, _CODEC_BATCH)
        for weights, candidates in INFERENCE:
            plans[key_of(weights, candidates)] = inference_plan(config.preset, compiler, weights, candidates)
            write_json(config.results, plans)
    print(table(plans))


def key_of(weights: str, candidates: int) -> str:
    """Returns the key of a plan of inference in the file."""
    return f"{weights}, {candidates} candidates"


def training_key(trained: str, rows: int) -> str:
    """Returns the key of a plan of training in the file."""
    return f"{trained}, {rows} x 4096 tokens"


class Compiler:
    """Compiles for the one device of a topology, from shapes alone."""

    def __init__(self, topology: Topology):
        self.topology, self.mesh = topology, make_mesh("1,1,1", list(topology.devices)[:1])

    def shapes(self, tree: Any) -> Any:
        """Returns a tree of shapes with the device's sharding."""
        sharding = NamedSharding(self.mesh, P())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def results(self, function: Any, *arguments: Any) -> Any:
        """Returns the shapes of the results of a jitted function."""
        with compiling_for(self.topology.platform):
            return self.shapes(function.eval_shape(*arguments))

    def peak(self, function: Any, *arguments: Any) -> int:
        """Returns the bytes that a jitted function needs, its arguments included."""
        with compiling_for(self.topology.platform):
            lowered = function.trace(*arguments).lower(lowering_platforms=(self.topology.platform,))
            return peak_bytes(lowered.compile().memory_analysis(), self.topology.platform)

    def plan(self, **values: int) -> dict[str, Any]:
        """Returns a plan with what it was made with."""
        return {"topology": self.topology.device_kind, "jax": jax.__version__, **values}


def inference_plan(preset: str, compiler: Compiler, weights: str, candidates: int) -> dict[str, Any]:
    """Compiles the generation of one image, and returns the memory of its two programs.

    Bytes: `prefill` reads the prompt; `decode` generates, and holds the keys and values of the prompt.
    """
    config, shapes = llama_config.PRESETS[preset], compiler.shapes
    params = shapes(inference_model.parameter_shapes(config, jnp.bfloat16, int8=weights == "int8"))
    decoder, sampling = LLaMADecoder(config, jnp.bfloat16, compiler.mesh), check_sampling(1.0, 0, 1.0)
    prompt = shapes(jax.ShapeDtypeStruct((1, (_IMAGES - 1) * _IMAGE), jnp.int32))
    keys = shapes(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (1, candidates))))
    prefill = generate._prefill, decoder, params, prompt, None, CODEBOOK_SIZE, sampling, keys
    prepared = shapes(jax.eval_shape(lambda params: decoder.prepare(params, CODEBOOK_SIZE), params))
    cache = shapes(jax.eval_shape(lambda: decoder.empty_cache(1, candidates, _IMAGE)))
    tokens = shapes(jax.ShapeDtypeStruct((1, candidates, _IMAGE), jnp.int32))
    number = shapes(jax.ShapeDtypeStruct((), jnp.int32))
    prompt_cache = compiler.results(*prefill)[0]
    decode = generate._decode, decoder, prepared, prompt_cache, cache, tokens, number, number, sampling, keys
    weight_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return compiler.plan(weights=weight_bytes, prefill=compiler.peak(*prefill), decode=compiler.peak(*decode))


def tokenizer_plan(config: VQGANConfig, compiler: Compiler, batch_size: int) -> dict[str, Any]:
    """Compiles a tokenizer, and returns the memory for a batch of images, in bytes."""
    graph, state = nnx.split(nnx.eval_shape(lambda: VQGAN(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    state = compiler.shapes(state)
    pixels = jax.ShapeDtypeStruct((batch_size, config.resolution, config.resolution, 3), jnp.float32)
    codes = jax.ShapeDtypeStruct((batch_size, config.tokens_per_image), jnp.int32)
    peaks = {
        "encode": compiler.peak(codec._encode, graph, state, compiler.shapes(pixels)),
        "decode": compiler.peak(codec._decode, graph, state, compiler.shapes(codes)),
    }
    return compiler.plan(weights=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)), **peaks)


def table(plans: dict[str, dict]) -> str:
    """Returns the plans as a table in Markdown."""
    lines = [
        f"| 7B model | memory | {' | '.join(f'{card} GB' for card in CARDS)} |",
        f"|---|---|{'---|' * len(CARDS)}",
    ]
    for weights, candidates in INFERENCE:
        if plan := plans.get(key_of(weights, candidates)):
            noun = "candidate" if candidates == 1 else "candidates"
            lines.append(_row(f"answer, {weights}, {candidates} {noun}", answer_bytes(plan, plans[TOKENIZER])))
    for trained, rows, _ in TRAINING:
        if plan := plans.get(training_key(trained, rows)):
            lines.append(_row(f"fine-tuning, {training_key(trained, rows)}", plan["peak_bytes_per_device"]))
    return "\n".join(lines)


def answer_bytes(model: dict, tokenizer: dict) -> int:
    """Returns the memory of an answer. Model and tokenizer compute one after the other; the weights of both stay."""
    generation = tokenizer["weights"] + max(model["prefill"], model["decode"])
    return max(generation, model["weights"] + max(tokenizer["encode"], tokenizer["decode"]))


def _row(name: str, used: int) -> str:
    fits = ["yes" if used <= _SHARE * card * 1e9 else "no" for card in CARDS]
    return f"| {name} | {used / 1e9:.1f} GB | {' | '.join(fits)} |"


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
