"""Measures transformers' `generate` as `gpu_day.decode` measures ours: static cache, with and without compilation.

The weights are random, and the model is made on the device; the speed does not depend on them.
"""

import numpy as np
from ml_collections import ConfigDict

from EasyLM.flags import Flag, run
from EasyLM.models.llama import llama_config
from EasyLM.vocab import CODEBOOK_SIZE
from gpu_day.decode import SETTINGS, case_name, parse_cases, step_and_prompt_seconds
from gpu_day.measure import emit, reason

FLAGS = {**SETTINGS, "compiled": Flag("False,True", "Comma list: whether torch.compile is used.")}


class Peer:
    """transformers' model on the GPU if there is one, else on the CPU."""

    def __init__(self, model: llama_config.LLaMAConfig):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        self.torch, self.vocab_size = torch, model.vocab_size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            max_position_embeddings=model.max_sequence_length,
            bos_token_id=model.bos_token_id,
            eos_token_id=None,
            pad_token_id=model.pad_token_id,
        )
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(self.device):
            self.model = LlamaForCausalLM(config).eval()

    def tokens(self, prompts_BP: np.ndarray, count: int, compiled: bool) -> None:
        """Generates `count` tokens after each prompt, as our side does: sampled from the image codes."""
        prompts = self.torch.tensor(prompts_BP, dtype=self.torch.long, device=self.device)
        with self.torch.no_grad():
            rows = self.model.generate(
                prompts,
                attention_mask=self.torch.ones_like(prompts),
                max_new_tokens=count,
                do_sample=True,
                top_k=0,
                suppress_tokens=list(range(CODEBOOK_SIZE, self.vocab_size)),
                cache_implementation="static",
                disable_compile=not compiled,
            )
        rows.cpu()


def main(config: ConfigDict) -> None:
    """Measures each case with and without compilation. A case that fails is a record too."""
    peer = Peer(llama_config.PRESETS[config.preset])
    for compiled in config.compiled.split(","):
        variant = f"transformers, {'compiled' if compiled == 'True' else 'not compiled'}"
        for rows, length in parse_cases(config.cases):
            case = {"preset": config.preset, "rows": rows, "prompt": length, "variant": variant}
            prompts_BP = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (rows, length))

            def tokens(count, prompts_BP=prompts_BP, compiled=compiled == "True"):
                peer.tokens(prompts_BP, count, compiled)

            try:
                measured = step_and_prompt_seconds(tokens, config.new_tokens, config.rounds)
            except Exception as error:  # such as no C compiler for torch.compile
                measured = {"error": reason(error)}
            emit("decode", case_name(case), **case, **measured)


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
