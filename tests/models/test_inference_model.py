"""Parameters with separate layers: they are loaded through little host memory, and used without a copy."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_kit import random_params
from convert_kit import export

from EasyLM.checkpoints import entries, loading
from EasyLM.models.llama import inference_model
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.models.llama.llama_decode import LLaMADecoder
from EasyLM.parallel import make_mesh
from evaluation.prompting import load_model

CONFIG = LLaMAConfig(
    vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=24, num_attention_heads=4
)
SHARD_MB = 1.5


def test_decoding_uses_the_weights_without_a_copy():
    config = LLaMAConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2)  # fmt: skip
    shapes = inference_model.parameter_shapes(config, jnp.float32)
    params = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), shapes)
    weights = LLaMADecoder(config).prepare(params, 60)
    pointers = [{x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)} for tree in (params["params"], weights)]
    assert len(pointers[1] - pointers[0]) == 1, "of all weights, only the head is cut"
    assert weights["lm_head"]["kernel"].shape == (16, 60)


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """A model as a streaming file, and as a Hugging Face directory of several shards."""
    folder = tmp_path_factory.mktemp("models")
    random_params(folder, CONFIG)
    spec = f"params::{folder}/streaming_params"
    exported = export(spec, folder / "hf", max_shard_mb=SHARD_MB)
    assert len(list((folder / "hf").glob("*.safetensors"))) > 5
    return {"streaming": spec, "safetensors": str(exported)}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["streaming", "safetensors"])
def test_host_memory_of_a_load_is_less_than_a_shard(specs, monkeypatch, name, int8):
    """Counts the host memory that is alive at any time, where devices copy it. (CPU devices adopt it.)"""
    alive = {"bytes": 0, "peak": 0}
    host_memory, device_put = entries.host_memory, jax.device_put

    def counted(shape, dtype):
        array = host_memory(shape, dtype)

        def released(size=array.nbytes):
            alive["bytes"] -= size

        alive["bytes"] += array.nbytes
        alive["peak"] = max(alive["peak"], alive["bytes"])
        weakref.finalize(array.base if array.base is not None else array, released)
        return array

    monkeypatch.setattr(entries, "host_memory", counted)
    monkeypatch.setattr(loading, "host_memory", counted)
    monkeypatch.setattr(jax, "device_put", lambda part, device: device_put(np.array(part), device))
    _, params = load_model(specs[name], "", make_mesh("1,1,1", jax.devices()[:1]), jnp.bfloat16, int8)
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    assert sum(sizes) > 2 * SHARD_MB * 1e6
    assert max(sizes) <= alive["peak"] < 1.2 * SHARD_MB * 1e6
