"""The contact sheet."""

import numpy as np

from evaluation.tasks import contact_sheet


def test_images_are_in_a_grid_and_shorter_rows_are_right_aligned():
    colours, size = np.eye(3), 20
    squares = [np.broadcast_to(colour, (4, 4, 3)) for colour in colours]
    rows = [contact_sheet.Row("one", ["a", "b", "c"], squares), contact_sheet.Row("two", ["b", "c"], squares[:2])]
    sheet = np.asarray(contact_sheet.contact_sheet(rows, size, framed="c"))
    step = size + contact_sheet.GAP
    title = contact_sheet.CAPTION + contact_sheet.GAP
    for row, (first, count) in enumerate([(0, 3), (1, 2)]):
        for i in range(count):
            left, top = contact_sheet.MARGIN + (first + i) * step, contact_sheet.GAP + (row + 1) * title + row * step
            assert (sheet[top : top + size, left : left + size] == (255 * colours[i]).astype(int)).all()
            frame = tuple(sheet[top - 2, left + size // 2])
            assert (frame == contact_sheet.FRAME) == (i == count - 1)
    below_first_row = contact_sheet.GAP + title + step + title
    assert (sheet[below_first_row:, contact_sheet.MARGIN : contact_sheet.MARGIN + step] == 255).all()
