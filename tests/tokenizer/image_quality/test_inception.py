"""Features for FID equal those of torch: pytorch-fid's InceptionV3, rewritten here, with random weights."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizer_kit import run_main, tiny_vqgan, write_image

from EasyLM.errors import UserError
from tokenizer import eval_vqgan
from tokenizer.image_quality import FeatureStatistics, frechet_distance, inception
from tokenizer.image_quality.fid import NUM_FEATURES
from tokenizer.media import folders, images
from tokenizer.vqgan import Codec

DIVISOR = 8


@pytest.fixture
def narrow(monkeypatch):
    """Narrows the network to an eighth of the channels, and its input to a side that ends in 3x3 positions."""

    def narrowed(step):
        if isinstance(step, inception.Conv):
            return step._replace(out=step.out // DIVISOR)
        return step if callable(step) else type(step)(map(narrowed, step))

    monkeypatch.setattr(inception, "NETWORK", narrowed(inception.NETWORK))
    monkeypatch.setattr(inception, "SIDE", 139)


def random_tensors() -> dict[str, np.ndarray]:
    """Returns weights with which features neither vanish nor explode."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in inception.shapes().items():
        if len(shape) == 4:
            array = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            array = rng.uniform(0.5, 1.5, shape)
        else:
            array = rng.standard_normal(shape) * 0.1
        tensors[name] = array.astype(np.float32)
    return tensors


def torch_features(tensors, pixels_nHW3, side):
    """Computes the features of pytorch-fid, block by block."""
    import torch
    from torch.nn import functional as F

    def conv(name, x, stride=1, padding=0):
        part = {leaf: torch.tensor(tensors[f"{name}.{leaf}"]) for leaf in ("conv.weight", "bn.weight", "bn.bias")}
        mean, variance = (torch.tensor(tensors[f"{name}.bn.running_{leaf}"]) for leaf in ("mean", "var"))
        x = F.conv2d(x, part["conv.weight"], stride=stride, padding=padding)
        return F.relu(F.batch_norm(x, mean, variance, part["bn.weight"], part["bn.bias"], eps=0.001))

    def chain(name, x, *paddings, stride=1):
        for i, padding in enumerate(paddings, 1):
            x = conv(f"{name}_{i}", x, stride if i == len(paddings) else 1, padding)
        return x

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def halve(x):
        return F.max_pool2d(x, 3, 2)

    x = F.interpolate(torch.tensor(pixels_nHW3).permute(0, 3, 1, 2), (side, side), mode="bilinear", align_corners=False)
    x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", 2 * x - 1, stride=2))
    x = halve(conv("Conv2d_2b_3x3", x, padding=1))
    x = halve(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)))
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        wide, double = chain(f"{m}.branch5x5", x, 0, 2), chain(f"{m}.branch3x3dbl", x, 0, 1, 1)
        x = torch.cat([conv(f"{m}.branch1x1", x), wide, double, conv(f"{m}.branch_pool", average(x))], 1)
    double = chain("Mixed_6a.branch3x3dbl", x, 0, 1, 0, stride=2)
    x = torch.cat([conv("Mixed_6a.branch3x3", x, 2), double, halve(x)], 1)
    row, column = (0, 3), (3, 0)
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        single = chain(f"{m}.branch7x7", x, 0, row, column)
        double = chain(f"{m}.branch7x7dbl", x, 0, column, row, column, row)
        x = torch.cat([conv(f"{m}.branch1x1", x), single, double, conv(f"{m}.branch_pool", average(x))], 1)
    long = chain("Mixed_7a.branch7x7x3", x, 0, row, column, 0, stride=2)
    x = torch.cat([chain("Mixed_7a.branch3x3", x, 0, 0, stride=2), long, halve(x)], 1)
    row, column = (0, 1), (1, 0)
    for m in ("Mixed_7b", "Mixed_7c"):
        single, double = conv(f"{m}.branch3x3_1", x), chain(f"{m}.branch3x3dbl", x, 0, 1)
        singles = [conv(f"{m}.branch3x3_2{side}", single, padding=p) for side, p in (("a", row), ("b", column))]
        doubles = [conv(f"{m}.branch3x3dbl_3{side}", double, padding=p) for side, p in (("a", row), ("b", column))]
        pooled = average(x) if m == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([conv(f"{m}.branch1x1", x), *singles, *doubles, conv(f"{m}.branch_pool", pooled)], 1)
    return x.mean((2, 3)).numpy()


def test_names_and_shapes_equal_the_file():
    """InceptionV3 of torchvision without heads: its number of parameters, and shapes that distinguish the blocks."""
    shapes = inception.shapes()
    convolutions = [name for name in shapes if name.endswith(".conv.weight")]
    assert len(convolutions) == 94 and len(shapes) == 5 * 94
    assert sum(np.prod(shape) for name, shape in shapes.items() if "running" not in name) == 21_785_568
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1),
        "Mixed_5c.branch_pool.conv.weight": (64, 256, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7dbl_2.conv.weight": (128, 128, 7, 1),
        "Mixed_6e.branch7x7_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
        "Mixed_7c.branch3x3dbl_3b.bn.running_var": (384,),
    }
    assert {name: shapes[name] for name in expected} == expected


def check_against_torch(path, count, height, width):
    torch = pytest.importorskip("torch")
    tensors = random_tensors()
    extra = {"fc.weight": torch.zeros(8, 8), "AuxLogits.conv0.conv.weight": torch.zeros(1)}
    extra["Mixed_5b.branch1x1.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save({name: torch.tensor(array) for name, array in tensors.items()} | extra, path)
    pixels = np.random.default_rng(1).random((count, height, width, 3), np.float32)
    ours = inception.Inception(str(path), batch_size=8)(pixels)
    expected = torch_features(tensors, pixels, inception.SIDE)
    scale = np.abs(expected).mean()
    assert 0.05 < scale < 50
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4 * scale)
    return ours


@pytest.mark.slow
def test_features_of_a_narrow_network_are_those_of_torch(narrow, tmp_path):
    """Images larger than the network's side, more than a batch: covers resizing without antialiasing and padding."""
    features = check_against_torch(tmp_path / "inception.pth", 9, 150, 190)
    assert features.shape == (9, NUM_FEATURES // DIVISOR) and features.dtype == np.float32
    assert features.std(axis=0).mean() > 0.01 * features.mean()


@pytest.mark.slow
def test_features_of_the_full_network_are_those_of_torch(tmp_path):
    assert check_against_torch(tmp_path / "inception.pth", 1, 40, 24).shape == (1, NUM_FEATURES)


def test_missing_and_invalid_files_are_named(narrow, tmp_path):
    with pytest.raises(UserError, match=r"^/none\.pth: no such file"):
        inception.load("/none.pth")
    tensors, path = random_tensors(), f"{tmp_path}/inception.safetensors"
    removed = tensors.pop("Conv2d_1a_3x3.bn.bias")
    save_file({**tensors, "another": removed}, path)
    with pytest.raises(UserError, match=r"missing keys: Conv2d_1a_3x3\.bn\.bias; unexpected keys: another"):
        inception.load(path)
    save_file({**tensors, "Conv2d_1a_3x3.bn.bias": np.zeros(5, np.float32)}, path)
    with pytest.raises(UserError, match=r"Conv2d_1a_3x3\.bn\.bias has shape \(5,\); .* requires \(4,\)"):
        inception.load(path)


@pytest.fixture
def network(narrow, tmp_path):
    """A file of weights, and its network."""
    path = f"{tmp_path}/inception.safetensors"
    save_file(random_tensors(), path)
    return path, inception.Inception(path, batch_size=8)


def fid(network, a, b) -> float:
    return frechet_distance(FeatureStatistics.of(network(a)), FeatureStatistics.of(network(b)))


@pytest.mark.slow
def test_rfid_compares_originals_and_reconstructions_of_each_folder_and_of_all(network, tmp_path, capsys, caplog):
    path, network = network
    for folder, count in {"one": 11, "other": 4}.items():
        for i in range(count):
            write_image(tmp_path / folder / f"{i:02d}.png", len(folder) + i, 16)
    vqgan, directories = tiny_vqgan(tmp_path / "vqgan"), [f"{tmp_path}/one", f"{tmp_path}/other"]
    settings = {"vqgan": vqgan, "batch_size": 8, "inception_weights": path, "output_json": f"{tmp_path}/f.json"}
    run_main(eval_vqgan, **settings, input_dirs=",".join(directories))
    metrics = json.loads((tmp_path / "f.json").read_text())

    parts = [np.stack([images.load(file, 16) for file in folders.list_images(folder, "")]) for folder in directories]
    for name, pixels in zip([*directories, "all"], [*parts, np.concatenate(parts)], strict=True):
        codec = Codec(vqgan, batch_size=8)
        expected = fid(network, pixels, codec.decode(codec.encode(pixels)))
        assert expected > 1e-3
        np.testing.assert_allclose(metrics[name]["rfid"], expected, rtol=1e-4)
        assert f"rFID {metrics[name]['rfid']:.2f}" in capsys.readouterr().out or name != directories[0]
        assert f"{name}: FID of {len(pixels)} images, fewer than the 2048" in caplog.text
