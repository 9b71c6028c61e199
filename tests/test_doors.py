"""Every block of docs/doors.md runs as it stands, and what a user writes instead is answered by what to write."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pathlib
import re
import sys
import types
from typing import Any

import jax.numpy as jnp
import new_user
import numpy as np
import pytest

import lipbounds as lb
from lipbounds._lipsdp.certificate import parameter_digest

DOORS = new_user.doors()
NEEDS = {"Equinox": "equinox", "Haiku": "haiku", "PyTorch": "torch"}
#: Installed everywhere the tests run, and cheap enough to run by default.
USUAL = ("Flax linen",)


def test_the_page_has_a_block_for_every_door() -> None:
    for door in ("Flax nnx", "Flax linen", "Equinox", "Haiku", "PyTorch", "Weights in NumPy", *USUAL):
        assert door in DOORS
    for name, blocks in DOORS.items():
        assert new_user.lines_of(blocks) <= new_user.LINES, f"{name} is long"


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        pytest.param(name, blocks, id=name, marks=() if name in USUAL else pytest.mark.slow)
        for name, blocks in DOORS.items()
    ],
)
def test_door(
    name: str,
    blocks: list[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        if name != "PyTorch":
            pytest.skip(f"{package} is not installed")
        pytest.importorskip("onnx")
        from onnx_nets import Net

        net = Net(("batch", 64))  # as the first block would export it
        h = net.Relu(net.Gemm("x", net.w(32, 64), net.w(32), transB=1))
        model = net.done(net.Gemm(h, net.w(10, 32), net.w(10), transB=1))
        (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
        blocks = blocks[1:]
    for block in blocks:
        exec(compile(block, f"docs/doors.md: {name}", "exec"), {"__name__": "door"})
    said = capsys.readouterr().out
    assert re.search(r"Radii: \d+ examples, l2, verified", said)


@pytest.mark.parametrize("name", lb.examples.DIGITS)
def test_what_is_installed_belongs_together(name: str) -> None:
    from lipbounds.training import Config

    example = lb.examples.digits(name)
    claims = lb.load(example.certificate)
    assert claims.network == parameter_digest(example.form) and claims.guarantee == "verified"
    assert claims.pairwise.shape == (10, 10) and abs(claims.value / example.measured["bound"] - 1) < 2e-9
    assert Config.from_json(example.settings).loss == "crm" and example.x.shape[1:] == (8, 8, 1)
    sizes = sum(path.stat().st_size for path in example.weights.parent.glob("digits_*"))
    assert sizes < 2**20
    with pytest.raises(ValueError, match="there is no example 'vit'; there are mlp, cnn"):
        lb.examples.digits("vit")


@pytest.mark.slow
@pytest.mark.parametrize("name", lb.examples.DIGITS)
def test_what_is_installed_holds(name: str) -> None:
    example = lb.examples.digits(name)
    radii = lb.certified_radius(example.form, example.x, example.y, bound=example.bound)
    assert radii.guarantee == "verified" and radii.correct.mean() == example.measured["clean_accuracy"]
    for eps, share in example.measured["certified_accuracy"].items():
        assert abs(radii.accuracy(float(eps)) - share) <= 1 / 360


# ------------------------------------------------------------------------------------------ the wrong door
class FakeTorch(types.ModuleType):
    """The part of torch.nn by which its modules are known."""

    class Module:
        def __call__(self, x: Any) -> Any:
            return x


def _mlp(x: Any) -> Any:
    return jnp.ones((3, 4)) @ x


def test_a_torch_module_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    nn = FakeTorch("torch.nn")
    monkeypatch.setitem(sys.modules, "torch.nn", nn)
    with pytest.raises(
        TypeError, match=r"is a PyTorch module: .*torch\.onnx\.export\(model\.eval\(\), .*load_onnx"
    ):
        lb.trace(nn.Module(), np.zeros(4, np.float32))


def test_a_linen_module_needs_its_variables() -> None:
    import flax.linen as nn

    with pytest.raises(
        TypeError, match=r"lb\.trace\(lambda x: model\.apply\(variables, x\[None\]\)\[0\], X\[0\]\)"
    ):
        lb.trace(nn.Dense(3), np.zeros(4, np.float32))


class Transformed(tuple):  # as haiku.transform returns it
    __slots__ = ()
    init = apply = staticmethod(lambda params, rng, x: x)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        ((_mlp, "spec"), r"a pair \(fn, spec\), as load_onnx returns it: fn, spec = load_onnx\(path\), then"),
        (Transformed(), r"init and apply.*lambda x: net\.apply\(params, None, x\[None\]\)\[0\]"),
        ({"params": {"kernel": 0}}, "a dict of parameters, not a function of one example"),
        ([np.ones((3, 4))], r"lb\.from_weights\(weights, biases\)"),
        (lambda x, t: x, r"takes 2 arguments \(x, t\): .*lambda x: fn\(x, t\)"),
        (lambda params, rng, x: x, r"takes 3 arguments \(params, rng, x\): .*lambda x: fn\(params, rng, x\)"),
        (None, "got NoneType, which is not callable"),
    ],
    ids=["load_onnx", "haiku", "parameters", "weights", "two inputs", "apply", "None"],
)
def test_what_is_no_function_of_one_example(fn: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        lb.trace(fn, np.zeros(4, np.float32))


def test_two_inputs_are_joined_or_one_is_fixed() -> None:
    pair = (np.zeros(4, np.float32), np.zeros(2, np.float32))
    with pytest.raises(
        TypeError, match=r"a tuple of 2 arrays.*lambda x: fn\(x, other\).*lambda x: fn\(x\[:4\], x\[4:\]\)"
    ):
        lb.trace(lambda a, b: a[:2] + b, pair)


def test_errors_of_the_function_say_that_it_got_one_example() -> None:
    for fn, x, words in (
        (
            _mlp,
            np.zeros((5, 4), np.float32),
            r"one example of shape \(5, 4\); of a batch pass one row, X\[0\]",
        ),
        (
            lambda x: x.reshape(x.shape[0], -1) @ jnp.ones((192, 3)),
            np.zeros((8, 8, 3), np.float32),
            r"if it takes batches, trace lambda x: fn\(x\[None\]\)\[0\]",
        ),
    ):
        with pytest.raises(TypeError) as caught:
            lb.trace(fn, x)
        assert re.search(words, "\n".join(caught.value.__notes__))


def test_a_batch_and_structured_outputs() -> None:
    with pytest.raises(ValueError, match=r"returned shape \(5, 3\): pass one example such as X\[0\]"):
        lb.trace(lambda x: x @ jnp.ones((4, 3)), np.zeros((5, 4), np.float32))
    for out, place in (
        (lambda x: {"logits": x, "features": x}, r"\['logits'\]"),
        (lambda x: (x, x), r"\[0\]"),
    ):
        with pytest.raises(
            ValueError, match=rf"choose what to bound, for example `lambda x: fn\(x\){place}`"
        ):
            lb.trace(out, np.zeros(4, np.float32))


# ------------------------------------------------------------------------------------------ own data
def _images(folder: pathlib.Path, pixels: np.ndarray, labels: np.ndarray) -> pathlib.Path:
    from PIL import Image

    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / str(label) / f"{number:03}.png")
    return folder


def test_own_data_of_every_kind_are_the_same_images(tmp_path: pathlib.Path) -> None:
    from lipbounds._cli.data import ExampleFiles, Examples

    rng, shape = np.random.default_rng(0), (8, 8, 1)
    pixels, y = rng.integers(0, 256, (12, *shape)).astype(np.uint8), np.arange(12) // 4
    x = pixels / np.float32(255)
    np.savez(tmp_path / "named.npz", photos=x, digits=y.reshape(-1, 1))
    np.savez(tmp_path / "split.npz", x_train=x[:2], y_train=y[:2], x_test=x, y_test=y)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    rows = np.concatenate([pixels.reshape(12, -1), y[:, None]], axis=1)
    header = ",".join([*(f"p{i}" for i in range(64)), "label"])
    np.savetxt(tmp_path / "t.csv", rows, "%d", ",", header=header, comments="")
    folder = _images(tmp_path / "classes", pixels, y)
    sources = [
        Examples(str(tmp_path / "named.npz")),
        Examples(str(tmp_path / "split.npz")),
        ExampleFiles(images=tmp_path / "x.npy", labels=tmp_path / "y.npy"),
        Examples(str(tmp_path / "t.csv"), (0.0, 1.0)),
        Examples(str(folder)),
    ]
    for source, (images, labels) in itertools.zip_longest(sources, (s.read(shape, 3) for s in sources)):
        np.testing.assert_array_equal(images, x, err_msg=source.name)
        np.testing.assert_array_equal(labels, y, err_msg=source.name)
        assert images.dtype == np.float32
    first, _ = Examples(str(folder), (-1.0, 1.0)).read((1, 8, 8), 3)
    np.testing.assert_allclose(first, 2 * x.transpose(0, 3, 1, 2) - 1, atol=1e-6)
    grey, _ = Examples(str(folder)).read((8, 8), 3)
    np.testing.assert_array_equal(grey, x[..., 0])


def test_numbers_without_a_point_are_bytes_only_where_they_are_whole(tmp_path: pathlib.Path) -> None:
    from lipbounds._cli.data import Examples

    (tmp_path / "t.csv").write_text("label,a,b,c,d\n0,3e0,25e-1,0,1\n")
    images, _ = Examples(str(tmp_path / "t.csv"), (0.0, 255.0)).read((2, 2, 1), 3)
    assert images.ravel().tolist() == [3.0, 2.5, 0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "1,2,3\n4,5,6\n", "its first line must name the columns, that of the labels `label`"),
        ("b.csv", "label,a\n0,1\n", "must have 4 columns of an example of shape .* and one of labels, not 2"),
        ("c.csv", "label,a,b,c,d\n0,1,2,x,3\n", "must hold numbers, as many in every line"),
        ("d.csv", "label,a,b,c,d\n0.5,0,0,0,1\n", "the column 'label' must hold whole numbers"),
        ("e.csv", "", "its first line must name the columns"),
        ("f.csv", "label,a,b,c,d\n0,0,0,0,1\n0,0,0,0\n", "names in the first, 5: example 1 .from 0. has 4"),
        ("g.csv", "label,a,b,c\n0,0,0,0,1\n", "and one of labels, not 4"),
        ("h.csv", "label,a,b,c,d\n0,0,0,0,1\n,,,,\n", "must hold numbers"),
    ],
)
def test_tables_that_are_refused(name: str, content: str, words: str, tmp_path: pathlib.Path) -> None:
    from lipbounds._cli.data import Examples

    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        Examples(str(tmp_path / name)).read((2, 2, 1), 3)


def test_tables_of_other_programs(tmp_path: pathlib.Path) -> None:
    from lipbounds._cli.data import Examples

    path = tmp_path / "t.csv"
    text = '\ufeff"a","b","c","d","Label"\r\n"0.5","0","0","1","2"\r\n\r\n  \r\n'
    path.write_bytes(text.encode())
    images, labels = Examples(str(path)).read((2, 2, 1), 3)
    assert images.ravel().tolist() == [0.5, 0.0, 0.0, 1.0] and labels.tolist() == [2]
    path.write_text("label,a,b,c,d\n")
    assert Examples(str(path)).read((2, 2, 1), 3)[0].shape == (0, 2, 2, 1)


def test_labels_in_a_column_are_labels_under_any_name(tmp_path: pathlib.Path) -> None:
    from lipbounds._cli.data import Examples

    np.savez(tmp_path / "t.npz", x=np.zeros((3, 2, 2, 1), np.float32), y=np.array([[2], [0], [1]]))
    assert Examples(str(tmp_path / "t.npz")).read((2, 2, 1), 3)[1].tolist() == [2, 0, 1]
    form = lb.from_weights([np.eye(2)])
    with pytest.raises(ValueError, match=r"dtype int64; take y.reshape\(-1\)$"):
        lb.certified_radius(form, [[1.0, 0.5]], np.array([[0]]))


def test_pickled_arrays_are_called_so(tmp_path: pathlib.Path) -> None:
    from lipbounds._text.files import read_npy

    np.save(tmp_path / "x.npy", np.array([1, "a"], object))
    with pytest.raises(ValueError, match="x.npy: holds pickled objects, which are not read; save a plain"):
        read_npy(tmp_path / "x.npy")


def test_a_folder_without_some_classes_says_what_it_counts(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lipbounds._cli.data import Examples

    pixels = np.zeros((2, 8, 8, 1), np.uint8)
    _images(tmp_path, pixels, np.array([3, 5]))
    assert Examples(str(tmp_path)).read((8, 8, 1), 10)[1].tolist() == [0, 1]
    said = capsys.readouterr().err
    assert "has 2 folders, the network has 10 classes: 3 is class 0, 5 is class 1; give an .npz file" in said
    for outputs in (1, 2):
        Examples(str(tmp_path)).read((8, 8, 1), outputs)
        assert not capsys.readouterr().err
    (tmp_path / "3" / "._0.png").write_bytes(b"of another system")
    assert len(Examples(str(tmp_path)).read((8, 8, 1), 2)[1]) == 2


@pytest.mark.parametrize(
    ("arrays", "given", "words"),
    [
        ({"x": np.zeros((2, 8, 8, 1), np.uint8)}, (0.0, np.inf), "--input-range needs two finite numbers"),
        ({"x": np.r_[np.nan, np.arange(127) % 17 / 16].reshape(2, 8, 8, 1)}, None, ""),
    ],
    ids=["endless range of bytes", "NaN"],
)
def test_values_that_are_not_finite(
    arrays: dict[str, Any], given: Any, words: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lipbounds._cli.data import Examples

    np.savez(tmp_path / "t.npz", y=np.array([0, 1]), **arrays)
    examples = Examples(str(tmp_path / "t.npz"), given)
    if words:
        with pytest.raises(ValueError, match=words):
            examples.read((8, 8, 1), 3)
    else:
        examples.read((8, 8, 1), 3)  # refused by whoever takes them, and no units are told
    assert not capsys.readouterr().err


def test_folders_that_are_refused(tmp_path: pathlib.Path) -> None:
    from lipbounds._cli.data import Examples

    with pytest.raises(FileNotFoundError, match="one folder of images per class"):
        Examples(str(tmp_path)).read((8, 8, 1), 3)
    os.mkdir(tmp_path / "cats")
    with pytest.raises(FileNotFoundError, match="cats holds no images"):
        Examples(str(tmp_path)).read((8, 8, 1), 3)
    (tmp_path / "cats" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png is not an image that can be decoded"):
        Examples(str(tmp_path)).read((8, 8, 1), 3)
    with pytest.raises(ValueError, match=r"the model takes inputs of shape \(64,\): give an \.npz file"):
        Examples(str(tmp_path)).read((64,), 3)


def test_training_takes_own_images(tmp_path: pathlib.Path) -> None:
    from lipbounds.training import Config
    from lipbounds.training.data import load

    rng = np.random.default_rng(0)
    pixels, y = rng.integers(0, 256, (24, 8, 8, 1)).astype(np.uint8), np.arange(24) % 2
    np.savez(tmp_path / "a.npz", x=pixels, y=y)
    np.savez(tmp_path / "b.npz", photos=(pixels / np.float32(255))[..., 0], kinds=y)
    np.savez(tmp_path / "c.npz", x_train=pixels[:12], y_train=y[:12], x_test=pixels[12:], y_test=y[12:])
    folder = _images(tmp_path / "classes", pixels, y)
    for name, tests in (("a.npz", 4), ("b.npz", 4), ("c.npz", 12), ("classes", 4)):
        data = load(str(tmp_path / name))
        assert len(data.test_y) == tests and len(data.train_y) == 24 - tests and data.input_shape == (8, 8, 1)
        assert sorted(np.concatenate([data.train_y, data.test_y])) == sorted(y)
        images = np.concatenate([data.train_pixels, data.test_pixels])
        assert {i.tobytes() for i in images} == {p.tobytes() for p in pixels}, name
    assert load(str(folder)).class_names == ("0", "1")
    config = Config.usual(str(tmp_path / "a.npz"), arch="64-8-2")
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(
        ValueError, match=r"dataset must be one of digits, .* \(or a path: an \.npz file, or a folder"
    ):
        Config(dataset="mine")
    with pytest.raises(ValueError, match="unknown data set 'mine'.*or a path: an .npz file"):
        load("mine")


def test_own_images_that_are_refused(tmp_path: pathlib.Path) -> None:
    from lipbounds.training.data import load

    pixels, y = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 2
    for name, arrays, words in (
        ("chw", {"x": pixels.transpose(0, 3, 1, 2), "y": y}, r"x\.transpose\(0, 2, 3, 1\)"),
        ("units", {"x": pixels - 0.3, "y": y}, "bytes divided by 255 .* from -0.3 to -0.3. Floats"),
        (
            "levels",
            {"x": pixels + 0.3, "y": y},
            "from 0.3 to 0.3, and not all of them are multiples of 1/255",
        ),
        ("labels", {"x": pixels, "y": y / 2}, "labels must be integers"),
        ("few", {"x": pixels[:4], "y": y[:4]}, "no class has 5 images"),
        ("three", {"a": pixels, "b": y, "c": y}, "must hold x and y, or x_train.* it holds a, b, c"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=words):
            load(str(tmp_path / f"{name}.npz"))
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load(str(tmp_path / "absent.npz"))
