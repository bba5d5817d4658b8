"""A codebook is a setting of the tokenizer: large ones and grids go from images to generated images."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import train
from tokenizer_kit import TINY, random_vqgan, run_main, write_image

from EasyLM.data import records
from EasyLM.errors import UserError
from EasyLM.models.llama import convert_easylm_to_hf
from evaluation.prompting import GenerationSettings, Prompter, PrompterSettings
from tokenizer import build, detokenize, inspect
from tokenizer.vqgan import weights

FSQ = {"quantizer": "fsq", "fsq_levels": (8, 5, 5, 5)}


def _write_vqgan(directory, num_codes, **settings) -> str:
    """Writes a random tokenizer whose codes are spread like the vectors of its encoder."""
    model = random_vqgan(dataclasses.replace(TINY, num_embeddings=num_codes, **settings))
    if model.config.quantizer == "vq":
        codes_KZ = np.random.default_rng(0).normal(size=(num_codes, TINY.quantized_embed_dim))
        model.quantize.embedding[...] = jnp.asarray(codes_KZ, jnp.float32)
    weights.save(model, directory)
    return str(directory)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "quantizer", "smaller"), [(16384, {}, 8192), (1000, FSQ, 256)])
def test_a_codebook_of_another_size_from_images_to_images(tmp_path, size, quantizer, smaller):
    """`smaller`: a smaller size, with which the ids of this one are not valid."""
    vqgan, sentences = _write_vqgan(tmp_path / "vqgan", size, **quantizer), tmp_path / "sentences.jsonl"
    for number in range(6):
        write_image(tmp_path / "images" / f"{number}.png", number)
    images = str(tmp_path / "images")
    run_main(build, input_dir=images, output_file=str(sentences), vqgan=vqgan, workers=1, batch_size=8)
    ids = np.concatenate([tokens for tokens, _ in records.read_records(str(sentences), size)])
    assert len(ids) == 6 * TINY.tokens_per_image and ids.max() >= smaller
    inspected = tmp_path / "inspect.json"
    run_main(inspect, input_files=str(sentences), codebook_size=size, tokens_per_image=64, output_json=str(inspected))
    assert json.loads(inspected.read_text())["bad_lines"] == 0
    run_main(detokenize, input_file=str(sentences), output_dir=str(tmp_path / "decoded"), vqgan=vqgan, limit=1)

    settings = {"update_llama_config": "dict(hidden_size=32,intermediate_size=64,max_sequence_length=128)"}
    run = train(
        tmp_path,
        **settings,
        llama__codebook_size=size,
        mesh_dim="1,-1,1",
        total_steps=2,
        save_model_freq=2,
        train_dataset__text_processor__fields="<|bos|>,{tokens},<|eos|>",
        train_dataset__json_dataset__path=str(sentences),
        train_dataset__json_dataset__batch_size=8,
        train_dataset__json_dataset__seq_length=32,
        checkpointer__save_optimizer_state=False,
    )
    model = str(tmp_path / "model")
    run_main(convert_easylm_to_hf, load_checkpoint=f"params::{run}/streaming_params", output_dir=model)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    names = ("codebook_size", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    assert [config[name] for name in names] == [size, size + 100, size, size + 1, size]

    prompter = Prompter.load(PrompterSettings(checkpoint=model, vqgan=vqgan))
    tokens_BCFN = prompter.generate(ids.reshape(6, 1, 64)[:2], GenerationSettings(num_new_images=1, seed=1))
    assert tokens_BCFN.max() < size and tokens_BCFN.max() >= smaller
    assert prompter.decode(tokens_BCFN[:, 0, 0]).shape == (2, 16, 16, 3)
    small = _write_vqgan(tmp_path / "small", smaller)
    with pytest.raises(UserError, match=f"^--vqgan={small}: wrong tokenizer"):
        Prompter.load(PrompterSettings(checkpoint=model, vqgan=small))
