"""Crops of photographs and their augmentation."""

import numpy as np

from tokenizer.builders import views
from tokenizer.synthetic import photos


def test_crops_are_functions_of_a_seed_and_held_out_photographs_are_disjoint():
    assert not set(photos.TRAINING) & set(photos.HELD_OUT)
    crop = photos.crop(3, 40)
    assert crop.shape == (40, 40, 3) and crop.std() > 5
    assert np.array_equal(crop, photos.crop(3, 40))
    gray = views.gray(crop)
    assert np.all(gray == gray[..., :1])
    assert np.all(np.abs(gray[..., 0] - (0.2989 * crop[..., 0] + 0.587 * crop[..., 1] + 0.114 * crop[..., 2])) <= 0.5)


def test_photographs_smaller_than_a_crop_are_enlarged():
    """The smallest photographs have fewer than 512 rows."""
    assert all(photos.crop(seed, 512).shape == (512, 512, 3) for seed in range(12))


def test_recolour_changes_hues_and_hardly_changes_gray_images():
    crops = [photos.crop(seed, 40) for seed in range(40)]
    recoloured = [photos.recolour(crop, seed) for seed, crop in enumerate(crops)]
    assert np.array_equal(recoloured[0], photos.recolour(crops[0], 0))
    colourful = [np.ptp(crop.astype(int), axis=-1).mean() > 20 for crop in crops]
    assert 10 < sum(colourful) < 40
    for crop, changed_crop, has_colour in zip(crops, recoloured, colourful, strict=True):
        assert changed_crop.shape == crop.shape and changed_crop.dtype == np.uint8
        changed = np.abs(changed_crop.astype(int) - crop).mean()
        assert changed > 1 if has_colour else changed < 40
