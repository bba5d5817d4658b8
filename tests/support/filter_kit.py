"""Images for each rule of `tokenizer.filter`, and what it writes."""

import hashlib
import io
import json
import pathlib

import orjson
from bench_filter import photograph
from PIL import Image
from tokenizer_kit import run_main

from EasyLM.storage import read_lines
from tokenizer.filter import __main__ as command
from tokenizer.filter import measuring


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    """Returns the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Returns an image with the statistics of a photograph, which differs from those of other seeds."""
    return Image.fromarray(photograph(128, seed)).resize((width, height))


def pictures() -> dict[str, bytes]:
    """Returns image files by name, in the order of the names; `REASONS` has those that `SETTINGS` drop."""
    files = {f"good/{i}.png": encoded(photo(i)) for i in range(3)}
    files["blocked.png"] = encoded(photo(10))
    files["flat.png"] = encoded(Image.new("RGB", (64, 64), "red"))
    files["forbidden.png"] = encoded(photo(11))
    files["large/1.jpg"] = encoded(photo(1, 128, 128), "JPEG", quality=90)
    files["small.png"] = encoded(photo(12, 48, 31))
    files["twin/0.png"] = files["good/0.png"]
    files["ugly.png"] = encoded(photo(13))
    files["wide.png"] = encoded(photo(14, 160, 48))
    return dict(sorted(files.items()))


REASONS = {
    "blocked.png": "--blocklist",
    "flat.png": "--min_contrast=2",
    "forbidden.png": "--blocklist",
    "good/1.png": "--near_duplicates=2",
    "small.png": "--min_side=32",
    "twin/0.png": "--exact_duplicates",
    "ugly.png": "--min=aesthetic:5",
    "wide.png": "--max_aspect_ratio=3",
}
SETTINGS = {"min_side": 32, "max_aspect_ratio": 3.0, "near_duplicates": 2, "min": "aesthetic:5", "workers": 1}


def sidecars(names) -> dict[str, bytes]:
    """Returns a JSON file beside each image, with a score that is low for `ugly`."""
    return {
        f"{name.partition('.')[0]}.json": json.dumps({"aesthetic": 4.5 if "ugly" in name else 6}).encode()
        for name in names
    }


def write_blocklist(path: pathlib.Path, files: dict[str, bytes]) -> str:
    """Writes the MD5 of one image, and a hash at distance 2 from the perceptual hash of another one."""
    with Image.open(io.BytesIO(files["forbidden.png"])) as image:
        luminance_SS = measuring.images.to_bytes(image, 32) @ measuring._LUMINANCE
    phash = measuring.perceptual_hash(luminance_SS) ^ 0b101
    path.write_text(f"{hashlib.md5(files['blocked.png']).hexdigest()}\nphash:{phash:016x}\n")
    return str(path)


def run_filter(output, **settings) -> dict:
    """Runs the command; returns its report."""
    run_main(command, output_file=str(output), **{**SETTINGS, **settings})
    return json.loads(pathlib.Path(f"{output}.report.json").read_text())


def kept_names(path) -> list[str]:
    """Returns the names of a keep list in its order."""
    *names, _ = [orjson.loads(line) for _, line in read_lines(str(path))]
    return names
