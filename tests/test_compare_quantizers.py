"""The table of quantizers in BENCHMARKS.md is that of the committed results, and the metrics are what they say."""

import json
import pathlib

import compare_quantizers
import numpy as np
import pytest
from tokenizer_kit import smooth_image

from tokenizer.image_quality import frechet_distance
from tokenizer.vqgan import PRETRAINED

ROOT = pathlib.Path(__file__).parent.parent


def test_the_document_has_the_table_of_one_experiment():
    results = json.loads((ROOT / "scripts/compare_quantizers.json").read_text())
    assert compare_quantizers.table(results) in (ROOT / "BENCHMARKS.md").read_text()
    assert results.keys() == compare_quantizers.VARIANTS.keys()
    for name, result in results.items():
        assert tuple(result["flags"]) == compare_quantizers.VARIANTS[name]
        assert result["run"] == results["VQ"]["run"]


@pytest.mark.slow
def test_metrics_of_a_tokenizer():
    images = np.stack([smooth_image(seed, 32) for seed in range(4)]).astype(np.float32) / 255
    metrics = compare_quantizers.measure(PRETRAINED, images)
    assert metrics.keys() == compare_quantizers.COLUMNS.keys()
    assert metrics["codes"] == 1024 and metrics["bits_per_pixel"] == 64 * 10 / 32**2
    assert metrics["psnr"] > 15 and 0 < metrics["codes_used"] <= 4 * 64 / 1024
    originals = compare_quantizers.features(images)
    assert frechet_distance(originals, originals) == pytest.approx(0, abs=1e-3)
    noise = np.clip(images + 0.3 * np.random.default_rng(0).normal(size=images.shape), 0, 1).astype(np.float32)
    assert 0 < metrics["rfd"] < frechet_distance(originals, compare_quantizers.features(noise))
