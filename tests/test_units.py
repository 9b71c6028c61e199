"""Units and layouts that look wrong are said with their mend, and only where examples look like images."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from command import run

import lipbounds as lb
from lipbounds._form.units import as_range, doubts, image_layout, shape_mend
from lipbounds.training.data import digits

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
LABELS = np.arange(40) % 3


@pytest.fixture(scope="module")
def colour() -> Any:
    """Images (8, 8, 3), three classes."""
    weights = jnp.asarray(RNG.standard_normal((3, 192)), jnp.float32)
    return lb.trace(lambda x: weights @ x.reshape(-1), jnp.zeros((8, 8, 3)))


def said(call: Any) -> list[str]:
    """The warnings of a call, each at a line of this file."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    assert all(w.category is lb.UnitsWarning and w.filename == __file__ for w in seen), seen
    return [str(w.message) for w in seen]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((28, 28, 1), "HWC"),
        ((3, 32, 32), "CHW"),
        ((28, 28), "HW"),
        ((784,), "flat"),
        ((3072,), "flat"),
        ((6,), None),
        ((100, 3), None),
        ((2, 2, 1), None),
        ((70,), None),
        ((), None),
    ],
)
def test_what_may_be_an_image(shape: tuple[int, ...], layout: str | None) -> None:
    assert image_layout(shape) == layout


@pytest.mark.parametrize(
    ("x", "shape", "words"),
    [
        (BYTES.astype(float), (8, 8, 3), "pixels that were not scaled: its values reach 255.*pass X / 255"),
        (BYTES.reshape(40, -1).astype(float), (192,), "pass X / 255"),
        (BYTES.reshape(40, -1)[:, :64] % 17, (64,), "pass X / 16"),
        (BYTES / 100.0, (8, 8, 3), "pass X / 255"),
        ((BYTES / 255 - 0.5) / 0.25, (8, 8, 3), "normalised already: its values reach from -2 to 2"),
    ],
    ids=["bytes", "flat bytes", "digits", "interpolated", "normalised"],
)
def test_doubts(x: np.ndarray, shape: tuple[int, ...], words: str) -> None:
    import re

    assert re.search(words, doubts(x, shape) or "nothing said")


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (BYTES / 255, (8, 8, 3)),
        (RNG.standard_normal((40, 8, 8, 3)), (8, 8, 3)),
        (255 * RNG.random((40, 64)), (64,)),  # features of any scale
        (RNG.integers(0, 256, (40, 6)), (6,)),
        (RNG.integers(-1, 2, (40, 8, 8, 3)), (8, 8, 3)),  # a board
        (RNG.integers(0, 2, (40, 64)), (64,)),
        (1.5 * RNG.random((40, 8, 8, 3)), (8, 8, 3)),
        (np.zeros((0, 8, 8, 3)), (8, 8, 3)),
    ],
    ids=["scaled", "gauss", "features", "six bytes", "board", "one-hot", "bright", "empty"],
)
def test_no_doubts(x: np.ndarray, shape: tuple[int, ...]) -> None:
    assert doubts(x, shape) is None


def test_every_verb_warns_where_it_is_called_and_believes_input_range(colour: Any) -> None:
    x = BYTES[:2].astype(float)
    y, bound = LABELS[:2], lb.naive(colour)
    calls = {
        "certified_radius": lambda **o: lb.certified_radius(colour, x, y, bound=bound, **o),
        "local": lambda **o: lb.local(colour, x, 1.0, bound=bound, **o),
        "margins": lambda **o: lb.margins(colour, x, y, 1.0, **o),
        "empirical": lambda **o: lb.empirical(colour, x, steps=0, **o),
        "compare": lambda **o: lb.compare(colour, x, y, [bound], **o),
    }
    for name, call in calls.items():
        with (
            warnings.catch_warnings(),
            pytest.raises(lb.UnitsWarning, match=r"pass X / 255; pass input_range="),
        ):
            warnings.simplefilter("error")  # so that nothing is computed
            call()
        with pytest.raises(ValueError, match=r"X reaches from 0 to 255, outside input_range=\(0, 1\)"):
            call(input_range=(0, 1))
        if name in ("certified_radius", "compare"):
            (text,) = said(call)  # once, at the line of the caller
            assert text.endswith("pass X / 255; pass input_range=(low, high) if these units are meant.")
            assert said(lambda call=call: call(input_range=(0, 255))) == [], name


def test_normalised_images_matter_only_where_there_is_a_length(colour: Any) -> None:
    x = (BYTES / 255 - 0.5) / 0.25
    assert (
        "Put the normalisation into the function"
        in said(lambda: lb.certified_radius(colour, x, LABELS, bound=lb.naive(colour)))[0]
    )
    assert doubts(x, (8, 8, 3), in_units=False) is None


@pytest.mark.parametrize("wrong", [3, (1, 0), (0, 0), "01", (0, float("nan")), (0, 1, 2)])
def test_a_range_is_two_numbers(wrong: Any, colour: Any) -> None:
    with pytest.raises(ValueError, match="input_range must be two numbers low < high, such as"):
        as_range("ab" if wrong == "01" else wrong)


@pytest.mark.parametrize(
    ("got", "shape", "mend"),
    [
        ((5, 3, 32, 32), (32, 32, 3), "the channels come first in X: X.transpose(0, 2, 3, 1)"),
        ((5, 32, 32, 3), (3, 32, 32), "the channels come last in X: X.transpose(0, 3, 1, 2)"),
        ((5, 28, 28), (28, 28, 1), "the channel axis is missing: X[..., None]"),
        ((5, 28, 28), (1, 28, 28), "the channel axis is missing: X[:, None]"),
        ((5, 28, 28, 1), (28, 28), "there is a channel axis too many: X.reshape(-1, 28, 28)"),
        ((28, 28, 1), (28, 28, 1), "one example is a batch of one: X[None]"),
        ((5, 28, 28, 1), (784,), "where the entries are in the same order: X.reshape(-1, 784)"),
        ((5, 784), (28, 28, 1), "where the entries are in the same order: X.reshape(-1, 28, 28, 1)"),
    ],
)
def test_shapes_tell_the_mend(got: tuple[int, ...], shape: tuple[int, ...], mend: str) -> None:
    assert shape_mend("X", got, shape) == f"; {mend}"
    x = eval(mend.partition(": ")[2], {"X": np.zeros(got)})
    assert x.shape[1:] == shape


def test_shapes_that_tell_nothing() -> None:
    assert shape_mend("X", (5, 7), (6,)) == shape_mend("X", (5, 8, 8, 3), (8, 9, 3)) == ""


def test_wrong_layouts_and_bytes_are_errors_with_their_mend(colour: Any) -> None:
    x = BYTES / 255
    for call in (
        lambda x: lb.certified_radius(colour, x, LABELS),
        lambda x: lb.empirical(colour, x),
        lambda x: lb.compare(colour, x, LABELS),
    ):
        with pytest.raises(ValueError, match=r"X\.transpose\(0, 2, 3, 1\)"):
            call(x.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"got uint8: cast it first: X\.astype\('float32'\) / 255 where"):
        lb.certified_radius(colour, BYTES, LABELS)


# --------------------------------------------------------------------------------------------- the command line
def _certify(*words: Any, code: int = 0) -> Any:
    return run("certify", *words, "--method", "naive", "--no-pairwise", code=code)


def test_certify_says_units_norm_and_what_is_certified(model_file: Any, form: Any, tmp_path: Any) -> None:
    found = _certify(model_file, "--eps", "8/255", "0.1", "--json", tmp_path / "r.json")
    radii = lb.certified_radius(form, digits().test_x, digits().test_y, bound=lb.naive(form))
    assert f"clean:     {100 * radii.correct.mean():.1f} % classified as labelled" in found.stdout
    assert "eps 0.0313725 (l2) " in found.stdout and "norm:      l2, as --norm was not given" in found.stdout
    middle = float(np.quantile(radii.radius, 0.5, method="lower"))
    assert f"radius:    median {middle:.4f}"[:24] in found.stdout
    assert found.stderr == ""
    explicit = _certify(model_file, "--eps", "8/255", "--norm", "2").stdout
    assert "as --norm was not given" not in explicit and "(l2)" in explicit
    assert lb.load(tmp_path / "r.json").radius.tolist() == radii.radius.tolist()


def test_certify_warns_of_units_and_scales_bytes(model_file: Any, form: Any, tmp_path: Any) -> None:
    data = digits()
    x, y = data.test_x[:20], data.test_y[:20]
    bytes_ = np.round(x * 255).astype(np.uint8)
    for name, images in {"floats": 255 * x, "bytes": bytes_, "fine": bytes_ / np.float32(255)}.items():
        np.savez(tmp_path / f"{name}.npz", pictures=images, classes=y)  # two arrays of any names
    found = _certify(model_file, "--data", tmp_path / "floats.npz")
    assert "x / 255, or give --input-range LOW HIGH if these units are meant" in found.stderr
    assert (
        _certify(model_file, "--data", tmp_path / "floats.npz", "--input-range", "0", "255").stderr.count(
            "units"
        )
        == 0
    )
    refused = _certify(model_file, "--data", tmp_path / "floats.npz", "--input-range", "0", "1", code=1)
    assert "x reaches from 0 to 255, outside --input-range (0, 1)" in refused.stderr
    refused = _certify(model_file, "--data", tmp_path / "bytes.npz", code=1)
    assert "--input-range 0 1 to divide the bytes by 255" in refused.stderr
    for name, words in (("bytes", ("--input-range", "0", "1")), ("fine", ())):
        _certify(model_file, "--data", tmp_path / f"{name}.npz", *words, "--json", tmp_path / f"{name}.json")
    assert lb.load(tmp_path / "bytes.json").radius.tolist() == lb.load(tmp_path / "fine.json").radius.tolist()


def test_certify_wonders_about_a_clean_accuracy_of_chance(model_file: Any, tmp_path: Any) -> None:
    data = digits()
    np.savez(tmp_path / "shifted.npz", x=data.test_x, y=(data.test_y + 1) % 10)
    found = _certify(model_file, "--data", tmp_path / "shifted.npz")
    assert "by guessing among 10 classes: is the normalisation missing (--mean, --std)" in found.stderr
    found = _certify(model_file, "--data", tmp_path / "shifted.npz", "--mean", "0.1")
    assert "are --mean and --std right" in found.stderr


def test_files_of_other_libraries_name_the_export(tmp_path: Any) -> None:
    for name, words in (
        ("net.pt", "torch.onnx.export(model.eval()"),
        ("net.h5", 'model.export("net.onnx", format="onnx")'),
        ("net.pkl", "loading it would run code"),
    ):
        (tmp_path / name).write_bytes(b"")
        assert words in _certify(tmp_path / name, code=1).stderr
