"""LPIPS equals that of torch: VGG16 and the lpips package, rewritten here, with random weights."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from EasyLM.errors import UserError
from tokenizer.image_quality import lpips
from tokenizer.vqgan.weights import from_file


@pytest.fixture
def narrow(monkeypatch):
    """Narrows VGG16."""
    monkeypatch.setattr(lpips, "STAGES", ((4, 4), (6, 6), (8, 8, 8), (8, 8, 8), (8, 8, 8)))


def test_names_and_shapes_equal_torchvision():
    names = [name for name in lpips.shapes() if name.endswith("weight")]
    layers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    expected = [f"features.{i}.weight" for i in layers] + [f"lin{i}.model.1.weight" for i in range(5)]
    assert sorted(names) == sorted(expected)
    assert sum(np.prod(s) for n, s in lpips.shapes().items() if n.startswith("features")) == 14_714_688
    assert lpips.shapes()["features.10.weight"] == (256, 128, 3, 3)
    assert lpips.shapes()["lin3.model.1.weight"] == (1, 512, 1, 1)


def torch_lpips(torch, tensors, one, other):
    from torch.nn import functional as F

    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    taps, total = {2: 0, 7: 1, 14: 2, 21: 3, 28: 4}, 0
    sides = [((2 * torch.tensor(x) - 1 - shift) / scale).permute(0, 3, 1, 2) for x in (one, other)]
    for i in (0, 2, "pool", 5, 7, "pool", 10, 12, 14, "pool", 17, 19, 21, "pool", 24, 26, 28):
        if i == "pool":
            sides = [F.max_pool2d(x, 2, 2) for x in sides]
            continue
        weight, bias = (torch.tensor(tensors[f"features.{i}.{name}"]) for name in ("weight", "bias"))
        sides = [F.relu(F.conv2d(x, weight, bias, padding=1)) for x in sides]
        if i in taps:
            units = [x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in sides]
            linear = torch.tensor(tensors[f"lin{taps[i]}.model.1.weight"])
            total = total + F.conv2d((units[0] - units[1]) ** 2, linear).mean((1, 2, 3))
    return total


@pytest.mark.slow
def test_equals_torch(narrow, tmp_path):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal(shape).astype(np.float32) * 0.5 for name, shape in lpips.shapes().items()}
    linear = {name: np.abs(array) for name, array in made.items() if name.startswith("lin")}
    vgg = {name: array for name, array in made.items() if name.startswith("features")}
    torch.save({name: torch.tensor(array) for name, array in vgg.items()}, tmp_path / "vgg16.pth")
    save_file({**linear, "another": np.zeros(1, np.float32)}, tmp_path / "lpips.safetensors")
    params = lpips.load(f"{tmp_path}/vgg16.pth,{tmp_path}/lpips.safetensors")
    one, other = rng.random((2, 3, 32, 32, 3), np.float32)
    ours = jax.jit(lpips.distance)(params, one, other)
    expected = torch_lpips(torch, vgg | linear, one, other)
    assert expected.min() > 0.01
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


@pytest.mark.slow
def test_equal_images_have_zero_distance_and_a_finite_gradient(narrow):
    params = {name: from_file(np.zeros(shape, np.float32)) for name, shape in lpips.shapes().items()}
    black = np.zeros((1, 16, 16, 3), np.float32)
    value, slope = jax.jit(jax.value_and_grad(lambda x: lpips.distance(params, x, black).sum()))(black)
    assert value == 0 and np.all(np.isfinite(slope))


def test_one_file_with_all_weights_may_have_a_comma_in_its_name(narrow, tmp_path):
    made = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(lpips.shapes().items())}
    save_file(made, tmp_path / "vgg16, lpips.safetensors")
    params = lpips.load(f"{tmp_path}/vgg16, lpips.safetensors")
    assert [float(array.max()) for array in params.values()] == list(range(len(made)))


def test_missing_and_invalid_files_are_named(narrow, tmp_path):
    with pytest.raises(UserError, match=r"vgg\.pth: no such file"):
        lpips.load(f"{tmp_path}/vgg.pth")
    save_file({"features.0.weight": np.zeros((4, 3, 3, 3), np.float32)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"features\.0\.bias is missing"):
        lpips.load(f"{tmp_path}/part.safetensors")
    save_file({"features.0.weight": np.zeros((5, 3, 3, 3), np.float32)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"features\.0\.weight has shape \(5, 3, 3, 3\), not \(4, 3, 3, 3\)"):
        lpips.load(f"{tmp_path}/part.safetensors")
