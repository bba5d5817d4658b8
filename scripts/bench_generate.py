"""Compares generation speed with transformers' `generate`: `python scripts/bench_generate.py` (extra: `torch`).

On a CPU: vqlm_100m, float32, random weights, a prompt of 1,024 tokens and 256 new ones, sampled from the image codes.
Each core is a device, and the heads are split over the devices (see evaluation/EVAL.md).
Both sides have the same weights (exported by this project, loaded by transformers with its KV cache) and alternate,
so that other load on the machine slows both. Greedy tokens are compared first. For four candidates of a prompt the
peer uses `num_return_sequences=4`, which computes the prompt for each candidate in one batch; the LVM release calls
`generate` for each candidate, which takes four times as long as one. Bounds: 2 and 5 times the peer's speed.

On a GPU: vqlm_1b and vqlm_7b, bf16, random weights, batches of 1, 16 and 64 prompts of 1 and 3,840 tokens. The limit
of a step is the time to read the weights and the filled caches once at the rate of a large copy, measured in the same
run. If torch has the GPU too, the peer is transformers with a static cache and compilation.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

# On a CPU each core is a device, which computes with one thread.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs room on the same GPU
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from EasyLM.checkpoints import Entry, stacking
from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from EasyLM.models import generate
from EasyLM.models.llama import convert_easylm_to_hf, costs, hf_layout, llama_config, llama_model
from EasyLM.models.llama.llama_decode import LLaMADecoder
from EasyLM.models.llama.partition_rules import PARTITION_RULES
from EasyLM.parallel import make_mesh, shardings
from EasyLM.vocab import CODEBOOK_SIZE

BOUNDS = {1: 2.0, 4: 5.0}  # candidates -> times the peer's speed, on a CPU
GPU_MODELS, GPU_BATCHES, GPU_PROMPTS, GPU_SHARE = ("vqlm_1b", "vqlm_7b"), (1, 16, 64), (1, 3840), 0.7

FLAGS = {
    "load_llama_config": Flag("", "Comma list of presets; empty: vqlm_100m on a CPU, vqlm_1b,vqlm_7b on a GPU."),
    "candidates": Flag("1,4", "Comma list of numbers of candidates, on a CPU."),
    "prompt_tokens": Flag(1024, "Length of the prompt, on a CPU.", least=1),
    "new_tokens": Flag(256, "Tokens to generate.", least=2),
    "rounds": Flag(3, "Runs of each side; the medians are printed.", least=1),
    "peer": Flag(True, "Measure transformers too."),
}


def main(config: ConfigDict) -> None:
    """Measures each model on this machine's GPU, or on its CPU."""
    cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", cores)
    gpu = jax.default_backend() == "gpu"
    names = config.load_llama_config or (",".join(GPU_MODELS) if gpu else "vqlm_100m")
    for name in names.split(","):
        model = llama_config.load_config(name)
        print(f"{name} on {jax.devices()[0].device_kind} ({cores} cores)", flush=True)
        (on_gpu if gpu else on_cpu)(config, model)


def on_cpu(config: ConfigDict, model: llama_config.LLaMAConfig) -> None:
    """Measures both sides alternately, for each number of candidates."""
    params = random_params(model, jnp.float32)
    peer = Peer(model, params, jnp.float32) if config.peer else None
    devices = jax.devices()[: math.gcd(jax.device_count(), model.num_attention_heads)]
    mesh = make_mesh("1,1,-1", devices)
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


def on_gpu(config: ConfigDict, model: llama_config.LLaMAConfig) -> None:
    """Compares each batch and prompt with the limit of the memory bandwidth, and with the peer."""
    params = random_params(model, jnp.bfloat16)
    bandwidth = copy_rate()
    print(f"copying: {bandwidth / 1e12:.2f} TB/s")
    cases = [(batch, length) for length in GPU_PROMPTS for batch in GPU_BATCHES]
    room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))
    ours = {}
    for batch, length in cases:
        needed = memory(model, batch, length, config.new_tokens)
        if needed > room:
            print(f"batch {batch:2} prompt {length:4}: needs {needed / 1e9:.0f} GB, this card has {room / 1e9:.0f}")
            continue
        prompts_BP = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (batch, length)).astype(np.int32)

        def tokens(count, params=params, prompts_BP=prompts_BP):
            decoder = LLaMADecoder(model, jnp.bfloat16)
            return generate.generate(decoder, params, prompts_BP, num_new_tokens=count)

        step, prefill = step_seconds(tokens, config)
        limit = step_bytes(model, batch, length + config.new_tokens / 2) / bandwidth
        verdict = "ok" if limit / step >= GPU_SHARE else "MISSED"
        print(
            f"batch {batch:2} prompt {length:4}: {batch / step:8.0f} tokens/s, {step * 1e3:6.2f} ms per step, prompt "
            f"{prefill:.3f} s; {limit / step:.1%} of the limit (bound: {GPU_SHARE:.0%}) {verdict}",
            flush=True,
        )
        ours[batch, length] = prompts_BP, step
    if not config.peer or not _torch_has_gpu():
        return
    peer = Peer(model, params, jnp.bfloat16, "cuda")
    for (batch, length), (prompts_BP, step) in ours.items():
        peer_step, _ = step_seconds(lambda count, p=prompts_BP: peer(p, 1, count, static=True), config)
        print(
            f"batch {batch:2} prompt {length:4}: transformers {peer_step * 1e3:6.2f} ms per step, "
            f"{peer_step / step:.2f}"
        )


def _torch_has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def step_seconds(tokens: Callable[[int], Any], config: ConfigDict) -> tuple[float, float]:
    """Returns the seconds of a step and of the prompt, from the times of `tokens(1)` and `tokens(new_tokens)`."""
    tokens(config.new_tokens), tokens(1)  # compile
    seconds = in_turns({"all": lambda: tokens(config.new_tokens), "first": lambda: tokens(1)}, config.rounds)
    return (seconds["all"] - seconds["first"]) / (config.new_tokens - 1), seconds["first"]


def step_bytes(model: llama_config.LLaMAConfig, batch: int, length: float) -> float:
    """Returns the bytes that a step reads in bf16: the weights without the embedding, and the caches of all tokens."""
    weights = costs.num_parameters(model) - model.vocab_size * model.hidden_size
    return 2 * (weights + batch * length * 2 * model.num_hidden_layers * model.hidden_size)


def memory(model: llama_config.LLaMAConfig, batch: int, length: int, new_tokens: int) -> float:
    """Returns the peak memory in bytes, in bf16. The peak occurs after the prompt.

    It consists of the weights as loaded and as unstacked for the steps, the prompt's cache stacked and by layer, the
    candidates' cache, and the activations of one layer.
    """
    weights = 2 * costs.num_parameters(model)
    caches = step_bytes(model, batch, 2 * length + new_tokens) - step_bytes(model, batch, 0)
    return 2 * weights + caches + 2 * batch * length * (6 * model.hidden_size + 3 * model.intermediate_size)


def copy_rate() -> float:
    """Returns the bytes per second, read and written, of a copy of 4 GB."""
    array = jnp.zeros(2**31, jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    seconds = in_turns({"copy": lambda: add(array).block_until_ready()}, 5)["copy"]
    return 2 * array.nbytes / seconds


def in_turns(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each side's calls, which alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_params(model: llama_config.LLaMAConfig, dtype: Any) -> dict:
    """Returns random parameters."""

    def make(key):
        return jax.tree.map(lambda x: x.astype(dtype), llama_model.init_params(model, key))

    return jax.jit(make)(jax.random.key(0))


class Peer:
    """transformers' LLaMA with the same weights."""

    def __init__(self, model: llama_config.LLaMAConfig, params: dict, dtype: Any, device: str = "cpu"):
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
            torch_dtype = {jnp.float32: torch.float32, jnp.bfloat16: torch.bfloat16}[dtype]
            self._model = transformers.LlamaForCausalLM.from_pretrained(output_dir, dtype=torch_dtype).to(device).eval()

    def __call__(
        self,
        prompts_BP: np.ndarray,
        candidates: int,
        new_tokens: int,
        temperature: float = 1.0,
        static: bool = False,
    ) -> np.ndarray:
        """Generates like the LVM release. Returns the new tokens of each row."""
        prompts = self._torch.tensor(np.asarray(prompts_BP), dtype=self._torch.long, device=self._model.device)
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        if static:
            settings["cache_implementation"] = "static"
        with self._torch.no_grad():
            rows = self._model.generate(
                prompts,
                attention_mask=self._torch.ones_like(prompts),
                max_new_tokens=new_tokens,
                num_return_sequences=candidates,
                suppress_tokens=list(range(CODEBOOK_SIZE, self._model.config.vocab_size)),
                **settings,
            )
        return rows[:, prompts.shape[1] :].cpu().numpy()


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
