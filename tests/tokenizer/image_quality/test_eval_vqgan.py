"""eval_vqgan reports the metrics of reconstructions, for each folder and in total."""

import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image
from tokenizer_kit import TINY, run_main, tiny_vqgan, write_image

from EasyLM.errors import UserError
from tokenizer import eval_vqgan
from tokenizer.builders import views
from tokenizer.image_quality import psnr, ssim
from tokenizer.media import folders, images
from tokenizer.synthetic import photos, scenes, seed_ranges
from tokenizer.vqgan import PRETRAINED, Codec


@pytest.mark.slow
def test_metrics_and_image_show_the_reconstructions(tmp_path, capsys):
    vqgan = tiny_vqgan(tmp_path / "vqgan")
    counts = {"one": 11, "other": 2}
    for folder, count in counts.items():
        for i in range(count):
            write_image(tmp_path / folder / f"{i:02d}.png", len(folder) + i, 16)
    directories = [str(tmp_path / folder) for folder in counts]
    settings = {"vqgan": vqgan, "batch_size": 8, "columns": 4, "input_dirs": ",".join(directories)}
    run_main(eval_vqgan, **settings, output_json=f"{tmp_path}/f.json", output_picture=f"{tmp_path}/sheet.png")
    results = json.loads((tmp_path / "f.json").read_text())

    codec, used = Codec(vqgan, batch_size=8), set()
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for row, folder in enumerate(directories):
        pixels = np.stack([images.load(path, 16) for path in folders.list_images(folder, "input_dirs")])
        codes = codec.encode(pixels)
        reconstructions = codec.decode(codes)
        used |= set(codes.ravel().tolist())
        assert results[folder]["pictures"] == len(pixels)
        np.testing.assert_allclose(results[folder]["psnr"], psnr(reconstructions, pixels).mean(), rtol=1e-6)
        np.testing.assert_allclose(results[folder]["ssim"], ssim(reconstructions, pixels).mean(), rtol=1e-6)
        assert results[folder]["codes_used"] == len(np.unique(codes)) / TINY.num_embeddings
        assert f"PSNR {results[folder]['psnr']:.2f} dB" in capsys.readouterr().out or row
        np.testing.assert_array_equal(sheet[36 * row : 36 * row + 16, :16], images.to_uint8(pixels[0]))
        np.testing.assert_array_equal(sheet[36 * row + 18 : 36 * row + 34, 18:34], images.to_uint8(reconstructions[1]))
    assert results["all"]["codes_used"] == len(used) / TINY.num_embeddings
    assert sheet.shape == (4 * 18 - 2, 4 * 18 - 2, 3)


@pytest.mark.slow
def test_unusable_images_are_skipped_within_the_allowance(tmp_path, capsys):
    settings = {"vqgan": tiny_vqgan(tmp_path / "vqgan"), "batch_size": 2, "input_dirs": str(tmp_path / "in")}
    for i in range(5):
        write_image(tmp_path / "in" / f"{i}.png", i, 16)
    run_main(eval_vqgan, **settings, output_json=f"{tmp_path}/whole.json")
    for name in ("00.png", "01.png", "9.png"):  # a whole batch, and the last image
        (tmp_path / "in" / name).write_bytes(b"")
    run_main(eval_vqgan, **settings, output_json=f"{tmp_path}/rest.json", max_errors=3)
    whole, rest = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "rest"))
    assert all(rest[name] == pytest.approx(whole[name]) for name in whole) and rest["all"]["pictures"] == 5
    with pytest.raises(UserError, match=r"9\.png: not a readable image.*after 2 others"):
        run_main(eval_vqgan, **settings, max_errors=2)
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.png: neither this image nor any other one of its folder can be read"):
        run_main(eval_vqgan, **settings, max_errors=99)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"output_picture": "p.txt"}, "--output_picture=p.txt: must end with one of .png"),
        ({"output_picture": "/dev/null/p.png"}, "--output_picture=/dev/null/p.png: cannot be written"),
        ({"output_json": "/dev/null/f.json"}, "--output_json=/dev/null/f.json: cannot be written"),
    ],
)
def test_invalid_outputs_are_reported_before_images_are_read(settings, message):
    with pytest.raises(UserError, match=message):
        run_main(eval_vqgan, input_dirs="/nowhere", **settings)


@pytest.mark.parametrize("folders", ["a,b,a", "a,all"])
def test_ambiguous_names_are_refused(folders):
    with pytest.raises(UserError, match=f"--input_dirs={folders}: names must differ"):
        run_main(eval_vqgan, input_dirs=folders)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="--input_dirs is missing"):
        run_main(eval_vqgan)
    with pytest.raises(UserError, match="--input_dirs=/nowhere: no such folder"):
        run_main(eval_vqgan, input_dirs="/nowhere")


def test_shipped_tokenizer_is_small():
    assert sum(file.stat().st_size for file in pathlib.Path(PRETRAINED).iterdir()) <= 4_000_000


@pytest.mark.slow
def test_shipped_tokenizer_reaches_the_psnr_of_its_table():
    """Tests some of the held-out images of pretrained/README.md: at most 1 dB below the means there."""
    table = re.findall(r"^\| (\w[\w, ]*) \| (\d+\.\d+) \|", (pathlib.Path(PRETRAINED) / "README.md").read_text(), re.M)
    first = seed_ranges.training_seed(2)  # --seed=2
    rendered = [scenes.scene(first + i, 32) for i in range(24)]
    colour = np.stack([photos.crop(first + i, 32, held_out=True) for i in range(24)])
    sets = {name: np.stack([scene[name] for scene in rendered]) for name in rendered[0]}
    sets |= {"photographs, colour": colour, "photographs, gray": views.gray(colour)}
    sets["scenes"] = sets.pop("image")
    assert sets.keys() == dict(table).keys()
    codec = Codec(batch_size=24)
    for name, floor in table:
        pixels = sets[name].astype(np.float32) / 255
        assert psnr(codec.decode(codec.encode(pixels)), pixels).mean() > float(floor) - 1, name
