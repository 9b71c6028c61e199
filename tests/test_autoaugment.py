"""AutoAugment: every operation against Pillow, the draws against the policy, what is left alone and what is refused."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from lipbounds.training import augment
from lipbounds.training.augment import Augmentation
from lipbounds.training.autoaugment import CHANGES, POLICY, _fixed, _matrix, amount, autoaugment, moved

PLACES = ("shear x", "shear y", "translate x", "translate y", "rotate")
NAMES = (*PLACES, *CHANGES)
CASES = list(itertools.product(NAMES, range(-9, 10)))
HEIGHT, WIDTH = 33, 21
ENHANCERS = {
    "colour": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
    "brightness": ImageEnhance.Brightness,
}


def pillow(image: Image.Image, name: str, m: int) -> Image.Image:
    """An operation with magnitude m, its sign included, as the table of the module describes it."""
    if name in PLACES[:4]:
        shift = int((image.width if name == "translate x" else image.height) * 150 / 331 * m / 9)
        coefficients = {
            "shear x": (1, m / 30, 0, 0, 1, 0),
            "shear y": (1, 0, 0, m / 30, 1, 0),
            "translate x": (1, 0, -shift, 0, 1, 0),
            "translate y": (1, 0, 0, 0, 1, -shift),
        }
        grey = 9 if image.mode == "L" else (9, 9, 9)
        return image.transform(image.size, Image.Transform.AFFINE, coefficients[name], fillcolor=grey)
    if name == "rotate":
        return image.rotate(10 * m / 3, fillcolor=9 if image.mode == "L" else (9, 9, 9))
    if name in ENHANCERS:
        return ENHANCERS[name](image).enhance(1 + m / 10)
    if name == "posterise":
        return ImageOps.posterize(image, 8 - round(abs(m) / 9 * 4))
    if name == "solarise":
        return ImageOps.solarize(image, math.ceil(255 - 255 * abs(m) / 9 - 1e-9))
    plain = {"invert": ImageOps.invert, "autocontrast": ImageOps.autocontrast, "equalise": ImageOps.equalize}
    return plain[name](image)


@functools.partial(jax.jit, static_argnames="fill")
def every(levels: Any, matrices: Any, amounts: Any, fill: int) -> list[jax.Array]:
    places = moved(levels, matrices, fill)
    return [places] * len(PLACES) + [change(levels, amounts) for change in CHANGES.values()]


def operated(levels: np.ndarray, cases: list[tuple[str, int]], fill: int = 0) -> np.ndarray:
    """Every image after its operation; "" for none."""
    matrices = np.int32([_fixed(_matrix(name, m, *levels.shape[1:3])) for name, m in cases])
    found = every(levels, matrices, np.int32([amount(name, m) for name, m in cases]), fill)
    every_one = [*map(np.asarray, found), levels]
    index = [(*NAMES, "").index(name) for name, _ in cases]
    return np.stack([every_one[k][i] for i, k in enumerate(index)])


@pytest.mark.parametrize("channels", [3, 1])
def test_every_operation_is_that_of_pillow(channels: int, rng: np.random.Generator) -> None:
    """Exactly, or one level above where Pillow's floats round a whole number down."""
    shape = (len(CASES), HEIGHT, WIDTH, channels)
    low, high = rng.integers(0, 120, shape[:1]), rng.integers(130, 256, shape[:1])
    noise = rng.integers(low[:, None, None, None], high[:, None, None, None], shape, np.int32)
    levels = np.where(rng.random(shape) < 0.3, 0.5 * noise + 30, noise).astype(np.int32)
    levels[:: len(levels) // 7] = 77  # of one level: nothing to stretch or to equalise
    found = operated(levels, CASES, fill=9)
    above: dict[str, float] = {}
    changed: dict[str, float] = {}
    for before, after, (name, m) in zip(levels, found, CASES, strict=True):
        picture = Image.fromarray(before.astype(np.uint8).squeeze())
        wanted = np.asarray(pillow(picture, name, m), np.int32).reshape(after.shape)
        exact = name not in (*ENHANCERS, "autocontrast")
        assert np.isin(after - wanted, [0] if exact else [0, 1]).all(), (name, m)
        above[name] = above.get(name, 0.0) + (after != wanted).mean() / 19
        changed[name] = changed.get(name, 0.0) + (wanted != before).mean() / 19
    assert max(above.values()) < 0.01, above
    idle = {"colour"} if channels == 1 else set()
    assert {name for name, share in changed.items() if share < 0.1} == idle, changed


def test_magnitudes_are_ten_equal_steps() -> None:
    """The ends of the ranges of Table 6 of the paper, and what lies between."""
    assert [amount("posterise", m) for m in range(10)] == [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]
    assert [amount("solarise", m) for m in (0, 3, 9)] == [255, 170, 0]
    assert [amount("contrast", m) for m in (-9, 0, 9)] == [1, 10, 19]
    assert _matrix("translate x", 9, 10, 331)[2] == -150 and _matrix("translate y", 9, 331, 10)[5] == -150
    assert _matrix("shear x", 9, 8, 8)[1] == 0.3 and _matrix("rotate", 9, 8, 8)[0] == math.cos(math.pi / 6)


def outcomes() -> tuple[list[tuple[tuple[str, int], tuple[str, int]]], np.ndarray]:
    """What a sub-policy may do, in either direction or not at all, and how probable it is."""
    steps, chances = [], []
    for pair in POLICY:
        options = []
        for name, p, m in pair:
            options.append([(("", 0), 1 - p), ((name, m), p / 2), ((name, -m), p / 2)])
        for (first, p), (second, q) in itertools.product(*options):
            steps.append((first, second))
            chances.append(p * q / len(POLICY))
    return steps, np.array(chances)


def test_images_are_drawn_as_the_policy_says(rng: np.random.Generator) -> None:
    """Copies of one image: every result is one of the policy's, as often as it says; untouched ones keep every bit."""
    steps, chances = outcomes()
    assert len(POLICY) == 25 and chances.sum() == pytest.approx(1)
    copies, height, width = 4096, 9, 8
    image = rng.integers(20, 200, (1, height, width, 3), np.int32)
    once = operated(np.repeat(image, len(steps), 0), [first for first, _ in steps])
    twice = operated(once, [second for _, second in steps])
    expected: dict[bytes, float] = {}
    for result, chance in zip(twice, chances, strict=True):
        key = result.astype(np.uint8).tobytes()
        expected[key] = expected.get(key, 0.0) + chance * copies

    x = np.repeat(((image + 0.3) / 255).astype(np.float32), copies, 0)
    new = np.asarray(jax.jit(autoaugment)(jax.random.key(1), x))
    assert new.dtype == np.float32 and new.min() >= 0 and new.max() <= 1
    counts: dict[bytes, int] = {}
    for result in np.round(255 * new).astype(np.uint8):
        counts[result.tobytes()] = counts.get(result.tobytes(), 0) + 1
    assert set(counts) <= {key for key, number in expected.items() if number > 0}
    often = {key: number for key, number in expected.items() if number >= 5}
    assert len(often) > 50
    statistic = sum((counts.get(key, 0) - number) ** 2 / number for key, number in often.items())
    assert statistic < len(often) + 5 * math.sqrt(2 * len(often))

    untouched = (new == x).all((1, 2, 3))
    share = sum(chance for chance, step in zip(chances, steps, strict=True) if step == (("", 0), ("", 0)))
    assert abs(untouched.mean() - share) < 5 * math.sqrt(share / copies)
    np.testing.assert_allclose(new[~untouched], np.round(255 * new[~untouched]) / 255, rtol=2e-7)


def test_it_comes_between_crop_and_cutout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a key of its own."""
    seen, keys = [], set()

    def noted(name: str) -> Any:
        def change(key: Any, x: Any, *rest: Any) -> Any:
            seen.append((name, *rest))
            keys.add(np.asarray(jax.random.key_data(key)).tobytes())
            return x

        return change

    for name in ("crop", "autoaugment", "cutout"):
        monkeypatch.setattr(augment, name, noted(name))
    x, key = jnp.ones((3, 8, 8, 1)), jax.random.key(0)
    assert Augmentation(crop=3, cutout=4, fill=0.25, autoaugment=True)(key, x) is x
    assert seen == [("crop", 3, 0.25, False), ("autoaugment", 0.25), ("cutout", 4, 0.25)] and len(keys) == 3


@pytest.mark.parametrize(
    "x", [jnp.zeros((2, 4, 4, 2)), jnp.zeros((4, 4, 3)), jnp.zeros((2, 4, 4, 3), jnp.uint8)]
)
def test_what_has_no_colours_is_refused(x: jax.Array) -> None:
    with pytest.raises(ValueError, match="AutoAugment needs a batch of floats .* with 1 or 3 channels, got"):
        autoaugment(jax.random.key(0), x)


# ---------------------------------------------------------------------------------------------------------- slow
SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lipbounds.training.augment import Augmentation
assert jax.device_count() == 2
x = np.random.default_rng(0).random((64, 9, 7, 3), np.float32)
key, change = jax.random.key(5), Augmentation(flip=True, crop=2, cutout=2, autoaugment=True)
batch = NamedSharding(Mesh(np.array(jax.devices()), "n"), PartitionSpec("n"))
alone, shared = jax.jit(change)(key, x), jax.jit(change)(key, jax.device_put(x, batch))
assert shared.sharding.is_equivalent_to(batch, 4), shared.sharding
np.testing.assert_array_equal(np.asarray(shared), np.asarray(alone))
with jax.enable_x64():
    double = jax.jit(change)(key, x)
assert double.dtype == np.float32
np.testing.assert_array_equal(np.asarray(double), np.asarray(alone))
"""


@pytest.mark.slow
def test_two_devices_and_float64_mode_see_the_same() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, cwd=root, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_policy_is_the_published_one() -> None:
    """The table was compared with torchvision's once; this says when it changes."""
    assert hashlib.sha256(repr(POLICY).encode()).hexdigest()[:16] == "b9478bd3ad58c6cc"
