"""Augmentation: exact where it must be, against SciPy elsewhere, and the draws as they are described."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from lipbounds.training.augment import Augmentation, affine, flip

# Compiled as a whole, which is faster here than operation after operation.
affine = jax.jit(affine, static_argnames="fill")
flip = jax.jit(flip)

EVERYTHING = Augmentation(flip=True, degrees=10, translate=0.1)


def moved(x, angle=0.0, shift=(0, 0), fill=0.0):
    """One angle and shift for the whole batch."""
    angles, shifts = np.full(len(x), angle, np.float32), np.tile(np.float32([shift]), (len(x), 1))
    return np.asarray(affine(x, angles, shifts, fill=fill))


@pytest.fixture
def images(rng):
    return rng.random((5, 6, 9, 3), np.float32)


def test_nothing_switched_on_is_the_batch_itself(images):
    x = jnp.asarray(images)
    assert Augmentation()(jax.random.key(0), x) is x


def test_angle_zero_and_shift_zero_change_no_bit(images):
    same = moved(images)
    assert same.dtype == np.float32
    np.testing.assert_array_equal(same, images)


@pytest.mark.parametrize("size", [6, 7])
def test_quarter_turns_are_rot90(size, rng):
    x = rng.random((3, size, size, 2), np.float32)
    for turns in (-1, 1, 2, 3):
        np.testing.assert_allclose(moved(x, 90.0 * turns), np.rot90(x, turns, (1, 2)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shift", [(2, 0), (-1, 0), (0, 3), (0, -2), (3, -4), (6, 0), (0, -40)])
def test_whole_shifts_are_exact(shift, images):
    down, right = shift
    wanted = np.full_like(images, 0.25)
    height, width = images.shape[1:3]
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                wanted[:, row, column] = images[:, row - down, column - right]
    np.testing.assert_array_equal(moved(images, 0.0, shift, fill=0.25), wanted)


def test_a_small_shift_is_a_roll_with_zeros(images):
    rolled = np.roll(images, (1, -2), axis=(1, 2))
    rolled[:, 0], rolled[:, :, -2:] = 0, 0
    np.testing.assert_array_equal(moved(images, 0.0, (1, -2)), rolled)


@pytest.mark.parametrize("fill", [0.0, 0.75])
def test_any_angle_and_shift_agree_with_scipy(fill, images, rng):
    angles = rng.uniform(-180, 180, len(images)).astype(np.float32)
    shifts = rng.uniform(-3, 3, (len(images), 2)).astype(np.float32)
    found = np.asarray(affine(jnp.asarray(images), jnp.asarray(angles), jnp.asarray(shifts), fill=fill))
    centre = (np.array(images.shape[1:3]) - 1) / 2
    for image, angle, shift, new in zip(images, np.deg2rad(angles), shifts, found, strict=True):
        # SciPy's matrix maps new places (row, column) to old ones: the inverse of a turn counter-clockwise.
        back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        offset = centre - back @ (centre + shift)
        for channel in range(image.shape[-1]):
            wanted = scipy.ndimage.affine_transform(
                image[..., channel], back, offset, order=1, mode="grid-constant", cval=fill
            )
            np.testing.assert_allclose(new[..., channel], wanted, rtol=0, atol=2e-5)


def test_rotation_comes_before_translation(rng):
    x = rng.random((2, 8, 8, 1), np.float32)
    np.testing.assert_allclose(
        moved(x, 90.0, (2, 1)), moved(np.rot90(x, 1, (1, 2)), 0.0, (2, 1)), rtol=0, atol=2e-6
    )


def test_half_of_the_images_are_mirrored(rng):
    x = rng.random((4096, 1, 3, 2), np.float32)
    new = np.asarray(flip(jax.random.key(0), jnp.asarray(x)))
    kept = (new == x).all((1, 2, 3))
    np.testing.assert_array_equal(new[~kept], x[~kept][:, :, ::-1])
    assert abs(kept.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(x))


def test_shifts_are_uniform_whole_and_independent():
    x = np.zeros((4096, 21, 41, 1), np.float32)
    x[:, 10, 20] = 1
    new = np.asarray(jax.jit(Augmentation(translate=0.2))(jax.random.key(0), jnp.asarray(x)))
    image, row, column, _ = np.nonzero(new)
    np.testing.assert_array_equal(image, np.arange(len(x)))
    assert (new[image, row, column] == 1).all()
    # 0.2 * 21 = 4.2 and 0.2 * 41 = 8.2, rounded: the ends are reached, nothing lies beyond, inner ones are alike
    for shift, largest in ((row - 10, 4.2), (column - 20, 8.2)):
        values, counts = np.unique(shift, return_counts=True)
        np.testing.assert_array_equal(values, np.arange(-int(largest), int(largest) + 1))
        expected = len(x) / (2 * largest)
        assert (np.abs(counts[1:-1] - expected) < 5 * np.sqrt(expected)).all()
        assert abs(shift.mean()) < 5 * largest / np.sqrt(3 * len(x))
    assert abs(np.corrcoef(row, column)[0, 1]) < 5 / np.sqrt(len(x))


def test_angles_are_uniform_in_degrees():
    x = np.zeros((2048, 41, 41, 1), np.float32)
    x[:, 19:22, 32:37] = 1  # a blob to the right of the centre: the angle can be read off its centroid
    new = np.asarray(jax.jit(Augmentation(degrees=30.0))(jax.random.key(0), jnp.asarray(x)))[..., 0]
    mass = new.sum((1, 2))
    up = -(new.sum(2) @ (np.arange(41) - 20)) / mass
    right = (new.sum(1) @ (np.arange(41) - 20)) / mass
    angles = np.sort(np.rad2deg(np.arctan2(up, right)))
    assert -30.2 < angles[0] < -29.5 and 29.5 < angles[-1] < 30.2
    # Kolmogorov-Smirnov distance to the uniform distribution; 1.95 / sqrt(n) is exceeded once in a thousand
    assert np.abs((angles + 30) / 60 - np.linspace(0, 1, len(angles))).max() < 1.95 / np.sqrt(len(angles))


@pytest.mark.slow
def test_one_key_one_result(images):
    x = jnp.asarray(images)
    first, again, other = (np.asarray(EVERYTHING(jax.random.key(seed), x)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert len({image.tobytes() for image in moved(np.repeat(images[:1], 5, 0))}) == 1
    same = jnp.repeat(x[:1], 5, axis=0)  # every image of a batch draws its own
    assert len({image.tobytes() for image in np.asarray(EVERYTHING(jax.random.key(0), same))}) == 5


def test_what_one_change_draws_does_not_depend_on_the_others(images):
    key, x = jax.random.key(3), jnp.asarray(images)
    both = Augmentation(flip=True, translate=0.3)(key, x)
    one_by_one = Augmentation(translate=0.3)(key, Augmentation(flip=True)(key, x))
    np.testing.assert_array_equal(both, one_by_one)


def test_images_stay_in_their_range(rng):
    x = np.concatenate([rng.random((32, 8, 8, 1)), np.ones((480, 8, 8, 1))]).astype(np.float32)
    for fill in (0.0, 1.0):
        new = np.asarray(jax.jit(Augmentation(True, 180, 0.3, fill))(jax.random.key(0), x))
        assert new.min() >= 0 and new.max() <= 1
    assert new[32:].min() >= 1 - 1e-6  # white images on white: no seam


def test_the_mean_intensity_is_kept(rng):
    x = np.zeros((256, 28, 28, 1), np.float32)
    x[:, 8:20, 8:20] = rng.random((256, 12, 12, 1))
    new = np.asarray(jax.jit(EVERYTHING)(jax.random.key(0), x))
    np.testing.assert_allclose(new.mean((1, 2, 3)), x.mean((1, 2, 3)), rtol=0.03)


def test_scan_compiles_once_and_equals_single_calls(images):
    x, traces = jnp.asarray(images), []

    @jax.jit
    def run(key, x):
        traces.append(None)

        def step(x, key):
            new = EVERYTHING(key, x)
            return new, new.mean()

        return jax.lax.scan(step, x, jax.random.split(key, 3))[0]

    for seed in range(3):
        scanned = run(jax.random.key(seed), x)
        single = x
        for key in jax.random.split(jax.random.key(seed), 3):
            single = EVERYTHING(key, single)
        np.testing.assert_allclose(scanned, single, rtol=0, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.slow
def test_float64_mode_changes_nothing(images):
    x, key = jnp.asarray(images), jax.random.key(0)
    outside = EVERYTHING(key, x)
    with jax.enable_x64():
        inside = EVERYTHING(key, x)
        compiled = jax.jit(EVERYTHING)(key, x)
    assert inside.dtype == compiled.dtype == jnp.float32
    np.testing.assert_allclose(inside, outside, rtol=0, atol=1e-5)
    np.testing.assert_allclose(compiled, outside, rtol=0, atol=1e-5)


def test_half_precision_images_keep_their_type(images):
    new = EVERYTHING(jax.random.key(0), jnp.asarray(images, jnp.bfloat16))
    assert new.dtype == jnp.bfloat16
    wanted = EVERYTHING(jax.random.key(0), jnp.asarray(images))
    np.testing.assert_allclose(new.astype(jnp.float32), wanted, rtol=0, atol=0.02)


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lipbounds.training.augment import Augmentation
assert jax.device_count() == 2
x = np.random.default_rng(0).random((8, 6, 6, 1), np.float32)
key, change = jax.random.key(5), jax.jit(Augmentation(True, 20, 0.2))
batch = NamedSharding(Mesh(np.array(jax.devices()), "n"), PartitionSpec("n"))
alone, shared = change(key, x), change(key, jax.device_put(x, batch))
assert shared.sharding.is_equivalent_to(batch, 4), shared.sharding
np.testing.assert_allclose(np.asarray(shared), np.asarray(alone), rtol=0, atol=1e-5)
"""


@pytest.mark.slow
def test_two_devices_see_what_one_sees():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, cwd=root, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degrees": -1}, "degrees must lie in 0..180, got -1"),
        ({"degrees": float("nan")}, "degrees must lie"),
        ({"translate": 1.5}, "translate is a share"),
        ({"fill": float("inf")}, "fill must be finite"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


@pytest.mark.parametrize("x", [jnp.zeros((4, 4, 1)), jnp.zeros((2, 4, 4, 1), jnp.uint8)])
@pytest.mark.parametrize("change", [Augmentation(flip=True), Augmentation(degrees=5)])
def test_what_is_no_batch_of_float_images_is_refused(change, x):
    with pytest.raises(ValueError, match="expected a batch of floats"):
        change(jax.random.key(0), x)
