"""Batch size, devices and CPU cores do not affect the codes. Batches are prefetched."""

import jax
import numpy as np
import pytest
from tokenizer_kit import TINY

from EasyLM.errors import UserError
from tokenizer.synthetic import scenes
from tokenizer.vqgan import Codec, device_batches
from tokenizer.vqgan import codec as codec_module


@pytest.mark.slow
def test_batch_size_devices_and_cores_do_not_affect_codes(tiny, pixels, monkeypatch):
    assert jax.device_count() == 8
    monkeypatch.setattr(device_batches, "available_cores", lambda: 2)
    codec = Codec(tiny, batch_size=8)  # one image per device; the last batch is partial
    codes = codec.encode(pixels)
    other = Codec(tiny, batch_size=7, devices=jax.devices()[:1])
    assert other.batch_size == 8, "a CPU device takes one chunk per core"
    np.testing.assert_array_equal(other.encode(pixels), codes)
    # float32 rounding through twenty layers is about 1e-6; one step of 8 bits is 4e-3
    np.testing.assert_allclose(other.decode(codes), codec.decode(codes), rtol=0, atol=1e-5)
    assert codec.encode(pixels[:0]).shape == (0, TINY.tokens_per_image)
    monkeypatch.setattr(codec_module, "MAX_CHUNK_PIXELS", 2 * TINY.resolution**2)  # more chunks than cores
    chunks = Codec(tiny, batch_size=11, devices=jax.devices()[:1])
    assert chunks.batch_size == 12
    np.testing.assert_array_equal(chunks.encode(pixels), codes)


def test_next_batch_is_dispatched_before_a_result_is_fetched(tiny, pixels):
    codec = Codec(tiny, batch_size=8)
    fetched = []

    def batches():
        for batch in (pixels[:8], pixels[8:], pixels[:3]):
            fetched.append(len(batch))
            yield batch

    results = codec.encode_batches(batches())
    first = next(results)
    assert fetched == [8, 3]
    np.testing.assert_array_equal(np.concatenate([first, *results]), codec.encode(pixels)[[*range(11), 0, 1, 2]])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_batch_size_does_not_affect_codes_of_the_shipped_tokenizer(dtype):
    """XLA can round a batch of one image differently, which would change the codes of some images in bfloat16."""
    pixels = (
        np.stack([image for seed in range(60) for image in scenes.scene(seed, 32).values()]).astype(np.float32) / 255
    )
    codes = Codec(dtype=dtype).encode(pixels)
    one = jax.devices()[:1]
    for batch_size, devices in ((1, None), (1, one), (3, one), (16, one)):
        ours = Codec(dtype=dtype, batch_size=batch_size, devices=devices).encode(pixels)
        np.testing.assert_array_equal(ours, codes, err_msg=f"{batch_size} {devices}")


@pytest.mark.slow
def test_bf16_stays_near_float32(tiny, pixels):
    codes = Codec(tiny).encode(pixels)
    difference = Codec(tiny, "bf16").decode(codes) - Codec(tiny).decode(codes)
    assert 0 < np.abs(difference).max() < 0.1


def test_arrays_that_are_no_pixels_or_codes_are_refused(tiny, pixels):
    """Image files hold integers: as pixels in [0, 1] they would be a white image."""
    codec = Codec(tiny)
    with pytest.raises(UserError, match=r"^pixels of type uint8: must be floating point, in \[0, 1\]$"):
        codec.encode((pixels * 255).astype(np.uint8))
    with pytest.raises(UserError, match=r"^an array of shape \(11, 8, 16, 3\): must be \(n, 16, 16, 3\)$"):
        codec.encode(pixels[:, :8])
    codes = np.full((1, TINY.tokens_per_image), TINY.num_embeddings)
    with pytest.raises(UserError, match=r"^codes from 32 to 32: must be from 0 to 31, the codes of this tokenizer$"):
        codec.decode(codes)
