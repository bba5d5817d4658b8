"""Grids and tiles contain every image in order; grids have white gaps."""

import numpy as np

from tokenizer.media import grids

HEIGHT, WIDTH, GAP = 4, 3, 2


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)


def test_a_grid_separates_images_by_white_gaps():
    pixels_nHW3 = random_images(5)
    sheet = grids.grid(pixels_nHW3, columns=3, gap=GAP)
    expected = np.full((2 * HEIGHT + GAP, 3 * WIDTH + 2 * GAP, 3), 255, np.uint8)
    for i, image in enumerate(pixels_nHW3):
        top, left = i // 3 * (HEIGHT + GAP), i % 3 * (WIDTH + GAP)
        expected[top : top + HEIGHT, left : left + WIDTH] = image
    np.testing.assert_array_equal(sheet, expected)


def test_labelled_rows_have_their_images_enlarged_to_the_right_of_the_labels():
    rows = [(f"row {i}", np.full((count, 2, 2, 3), 40 * i, np.uint8)) for i, count in enumerate((3, 2), start=1)]
    sheet = grids.labelled_rows(rows, side=10, label_width=50, gap=4)
    assert sheet.shape == (2 * 10 + 4, 50 + 3 * 10 + 2 * 4, 3)
    for i, (top, count) in enumerate(((0, 3), (14, 2)), start=1):
        assert np.all(sheet[top : top + 10, 50:60] == 40 * i) and sheet[top : top + 10, :50].min() < 100
        assert np.all(sheet[top : top + 10, 78:] == (40 * i if count == 3 else 255))
    assert np.all(sheet[10:14] == 255)


def test_tiles_are_edge_to_edge():
    pixels_RCHW3 = random_images(6).reshape(2, 3, HEIGHT, WIDTH, 3)
    expected = np.concatenate([np.concatenate(row, axis=1) for row in pixels_RCHW3])
    np.testing.assert_array_equal(grids.tile(pixels_RCHW3), expected)
