"""Compares generation speed with transformers' `generate`: `python scripts/bench_generate.py` (extra: `torch`).

For a CPU; `gpu_day.sh` measures a GPU. vqlm_100m, float32, random weights, a prompt of 1,024 tokens and 256 new ones,
sampled from the image codes. Each core is a device, and the heads are split over the devices (see evaluation/EVAL.md).
Both sides have the same weights (exported by this project, loaded by transformers with its KV cache) and alternate,
so that other load on the machine slows both. Greedy tokens are compared first. For four candidates of a prompt the
peer uses `num_return_sequences=4`, which computes the prompt for each candidate in one batch; the LVM release calls
`generate` for each candidate, which takes four times as long as one. Bounds: 2 and 5 times the peer's speed.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

# On a CPU each core is a device, which computes with one thread.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import jax
import numpy as np
from ml_collections import ConfigDict

from EasyLM.checkpoints import Entry, stacking
from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from EasyLM.models import generate
from EasyLM.models.llama import convert_easylm_to_hf, hf_layout, inference_model, llama_config, llama_model
from EasyLM.models.llama.llama_decode import LLaMADecoder
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import make_mesh, shardings
from EasyLM.vocab import CODEBOOK_SIZE

BOUNDS = {1: 2.0, 4: 5.0}  # candidates -> times the peer's speed

FLAGS = {
    "load_llama_config": Flag("vqlm_100m", "Comma list of presets."),
    "candidates": Flag("1,4", "Comma list of numbers of candidates."),
    "prompt_tokens": Flag(1024, "Length of the prompt.", least=1),
    "new_tokens": Flag(256, "Tokens to generate.", least=2),
    "rounds": Flag(3, "Runs of each side; the medians are printed.", least=1),
    "peer": Flag(True, "Measure transformers too."),
}


def main(config: ConfigDict) -> None:
    """Measures each model."""
    cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", cores)
    for name in config.load_llama_config.split(","):
        model = llama_config.load_config(name)
        print(f"{name} on {jax.devices()[0].device_kind} ({cores} cores)", flush=True)
        compare(config, model)


def compare(config: ConfigDict, model: llama_config.LLaMAConfig) -> None:
    """Measures both sides alternately, for each number of candidates."""
    params = jax.jit(partial(llama_model.init_params, model))(jax.random.key(0))
    peer = Peer(model, params) if config.peer else None
    devices = jax.devices()[: math.gcd(jax.device_count(), model.num_attention_heads)]
    mesh = make_mesh("1,1,-1", devices)
    params = inference_model.separate_layers(params, model.num_hidden_layers)
    params = jax.device_put(params, shardings(mesh, PARTITION_RULES, params))
    prompt_P = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, config.prompt_tokens).astype(np.int32)

    def ours(candidates: int, new_tokens: int = config.new_tokens, temperature: float = 1.0) -> np.ndarray:
        return generate.generate(
            LLaMADecoder(model, mesh=mesh),
            params,
            prompt_P[None],
            num_new_tokens=new_tokens,
            num_candidates=candidates,
            temperature=temperature,
        )

    if peer:
        same = np.array_equal(ours(1, 16, 0.0)[0, 0], peer(prompt_P[None], 1, 16, temperature=0.0)[0])
        print(f"the first 16 greedy tokens are {'the same' if same else 'NOT THE SAME'}")
    peer_seconds_for_one = None  # candidate
    for candidates in map(int, config.candidates.split(",")):
        bound = BOUNDS.get(candidates, 0.0)
        ours(candidates)  # compiles
        sides = {"ours": lambda c=candidates: ours(c)}
        if peer:
            sides["peer"] = lambda c=candidates: peer(prompt_P[None], c, config.new_tokens)
        seconds = in_turns(sides, config.rounds)
        prefill = in_turns({"ours": lambda c=candidates: ours(c, 1)}, config.rounds)["ours"]
        step = (seconds["ours"] - prefill) / (config.new_tokens - 1)
        print(
            f"{candidates} candidate(s): {rate(candidates, config, seconds['ours'])} "
            f"(prompt {prefill:.2f} s, then {step * 1e3:.1f} ms per step)"
        )
        if peer:
            peer_seconds_for_one = seconds["peer"] if candidates == 1 else peer_seconds_for_one
            ratio = seconds["peer"] / seconds["ours"]
            print(f"    transformers: {rate(candidates, config, seconds['peer'])}")
            print(f"    ratio {ratio:.2f} (bound: at least {bound}) {'ok' if ratio >= bound else 'MISSED'}", flush=True)
            if peer_seconds_for_one and candidates > 1:
                ratio = candidates * peer_seconds_for_one / seconds["ours"]
                print(f"    against {candidates} calls (the LVM release's way): {ratio:.2f}")


def rate(rows: int, config: ConfigDict, seconds: float) -> str:
    """Formats tokens per second."""
    return f"{rows * config.new_tokens / seconds:7.1f} tokens/s in {seconds:6.2f} s"


def in_turns(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each side's calls, which alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Peer:
    """transformers' LLaMA with the same weights."""

    def __init__(self, model: llama_config.LLaMAConfig, params: dict):
        try:
            import torch
            import transformers
        except ImportError:
            raise UserError("--peer=True needs torch and transformers: pip install -e .[torch]") from None
        transformers.logging.set_verbosity_error()
        self._torch = torch
        with tempfile.TemporaryDirectory() as directory:
            output_dir = os.path.join(directory, "hf")
            entries = [_entry(*parts) for parts in stacking.file_order(params)]
            tensors = hf_layout.hf_tensors(model, entries, "parameters", None)
            convert_easylm_to_hf.export(model, tensors, output_dir)
            self._model = transformers.LlamaForCausalLM.from_pretrained(output_dir, dtype=torch.float32).eval()

    def __call__(
        self,
        prompts_BP: np.ndarray,
        candidates: int,
        new_tokens: int,
        temperature: float = 1.0,
    ) -> np.ndarray:
        """Generates like the LVM release. Returns the new tokens of each row."""
        prompts = self._torch.tensor(np.asarray(prompts_BP), dtype=self._torch.long)
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with self._torch.no_grad():
            rows = self._model.generate(
                prompts,
                attention_mask=self._torch.ones_like(prompts),
                max_new_tokens=new_tokens,
                num_return_sequences=candidates,
                suppress_tokens=list(range(CODEBOOK_SIZE, self._model.config.vocab_size)),
                **settings,
            )
        return rows[:, prompts.shape[1] :].numpy()


def _entry(key, stacked, layer) -> Entry:
    """Returns an array of the parameters as an entry of a checkpoint file."""

    def read_into(out):
        np.copyto(out, stacked.array if layer is None else stacked.array[layer])

    return Entry(key, stacked.file_shape, np.dtype(stacked.array.dtype), read_into)


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
