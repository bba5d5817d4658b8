"""The palette of 64 colours and the images that consist of it."""

import numpy as np

from tokenizer.synthetic import palette

SIZE = 32


def _colours(image: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in image.reshape(-1, image.shape[-1]).tolist()}


def test_palette_has_64_colours_that_are_far_apart():
    colours = palette.COLOURS.astype(int)
    assert colours.shape == (64, 3) and len(_colours(palette.COLOURS)) == 64
    distance = np.abs(colours[:, None] - colours).max(-1)
    assert distance[~np.eye(64, dtype=bool)].min() == 75


def test_flat_images_are_functions_of_a_seed_and_most_have_palette_colours_only():
    images = [palette.flat_image(seed, SIZE) for seed in range(60)]
    assert all(image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8 for image in images)
    assert all(np.array_equal(image, palette.flat_image(seed, SIZE)) for seed, image in enumerate(images[:5]))
    flat = [_colours(image) <= _colours(palette.COLOURS) for image in images]
    assert 30 < sum(flat) < 60  # the others are marked scenes and ramps
    counts = {len(_colours(image)) for image, is_flat in zip(images, flat) if is_flat}
    assert {1, 2} < counts and max(counts) > 10


def test_enlarged_tiles_are_constant():
    tiles = np.arange(64).reshape(8, 8)
    pixels = palette.enlarge(tiles, SIZE)
    assert pixels.shape == (SIZE, SIZE)
    assert np.array_equal(pixels, np.kron(tiles, np.ones((4, 4), int)))
    assert palette.enlarge(tiles, 30).shape == (30, 30)


def test_ramp_maps_black_and_white_to_its_colours_and_gray_between_them():
    low, high = palette.COLOURS[3], palette.COLOURS[60]
    image = palette.ramp(np.array([[0, 255, 51]], np.uint8), low, high)
    assert np.array_equal(image[0, 0], low) and np.array_equal(image[0, 1], high)
    assert np.abs(image[0, 2] - (0.8 * low + 0.2 * high)).max() <= 0.5
