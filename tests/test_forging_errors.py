"""Thresholds on disk, and what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from forge_nets import Net, Wrapper, same
from safetensors import safe_open
from safetensors.numpy import save

from lipbounds.analysis.forging import forge, load_forged, track


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x(rng):
    return rng.normal(size=(37, 6)).astype(np.float32)


# ----------------------------------------------------------------------------------------------------- on disk
@pytest.mark.parametrize("kind", ["hard", "smooth"])
def test_saved_and_loaded(net, x, tmp_path, kind):
    forged = forge(net, x, {"layers.0": 0.1, "layers.2": 1 / 3}, kind=kind, tau=0.3, where="*")
    path = forged.save(tmp_path / "gates.safetensors")
    same(load_forged(net, path), forged)
    assert load_forged(net, path).c_r == forged.c_r and load_forged(net, path).tau == 0.3
    with safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == ["peaks", "thresholds"]


def other_models():
    class Other(Net):
        pass

    renamed = Wrapper(Net())
    conv = nnx.Sequential(nnx.Conv(6, 8, (), rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    return [
        (
            Net((6, 8, 9, 3)),
            r"which has layers\.1: Linear with kernel \(8, 8\).*this one has layers\.1.*\(8, 9\)",
        ),
        (Net((6, 8, 8)), r"does not call layers\.2: Linear"),
        (renamed, r"does not call layers\.1: Linear"),
        (Net((5, 8, 8, 3)), r"cannot be called on examples of shape \(6,\)"),
        (conv, r"which has layers\.1|does not call layers\.1|cannot be called"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_thresholds_of_another_network_are_refused(net, x, tmp_path, number):
    path = forge(net, x, 0.1).save(tmp_path / "gates.safetensors")
    model, message = other_models()[number]
    with pytest.raises(ValueError, match=message):
        load_forged(model, path)
    tracked = track(net, x)
    with pytest.raises(ValueError, match=message):
        forge(model, tracked)


def test_files_that_are_no_such_file(net, x, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_forged(net, tmp_path / "none")
    path = tmp_path / "bad"
    good = forge(net, x, 0.1).save(tmp_path / "good")
    with safe_open(good, framework="numpy") as file:
        header = json.loads(file.metadata()["lipbounds-forged"])
    numbers = np.ones(2, np.float32)
    for change, tensors, message in (
        ({"version": 2}, {"peaks": numbers, "thresholds": numbers}, "version 2"),
        ({"kind": "soft"}, {"peaks": numbers, "thresholds": numbers}, "kind must be"),
        ({"tau": "x"}, {"peaks": numbers, "thresholds": numbers}, "could not convert"),
        ({}, {"peaks": numbers, "thresholds": numbers[:1]}, "thresholds are not 2 finite numbers"),
        ({}, {"peaks": numbers * np.nan, "thresholds": numbers}, "peaks are not 2 finite numbers"),
        ({}, {"peaks": numbers}, "thresholds"),
        ({"sites": [{"path": "layers.1"}]}, {"peaks": numbers, "thresholds": numbers}, "layer"),
    ):
        path.write_bytes(save(tensors, metadata={"lipbounds-forged": json.dumps({**header, **change})}))
        with pytest.raises(ValueError, match=f"holds no forged thresholds.*{message}"):
            load_forged(net, path)
    for content in (b"", b"nonsense", save({"a": numbers})):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match="holds no forged thresholds that can be read, as .*: (it lacks|not a)"
        ):
            load_forged(net, path)


# ------------------------------------------------------------------------------------------------------- errors
class Whole(nnx.Module):
    """No layer below the root that a gate can stand before."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones((6, 2)))

    def __call__(self, x):
        return x @ self.w[...]


X = np.ones((5, 6), np.float32)
ERRORS = {
    "a function": (lambda x: x, X, {}, TypeError, r"takes a flax nnx\.Module, got function"),
    "no layer": (Whole(), X, {}, ValueError, "calls no layer that can be forged"),
    "root layer": (nnx.Linear(6, 2, rngs=nnx.Rngs(0)), X, {}, ValueError, "calls no layer that can be forged"),
    "one layer": (Net((6, 2)), X, {}, ValueError, r"reads the network's input, layers\.0: choose with `where`"),
    "where nothing": (Net(), X, {"where": lambda path, layer: False}, ValueError, "`where` picks none of the layers"),
    "pattern": (Net(), X, {"where": ["layers.1", "x*"]}, ValueError, r"'x\*' matches none of the layers layers\.0"),
    "no pattern": (Net(), X, {"where": []}, ValueError, "at least one"),
    "c_r < 0": (Net(), X, {"c_r": -0.1}, ValueError, r"c_r must be a number in \[0, 1\), got -0\.1"),
    "c_r NaN": (Net(), X, {"c_r": math.nan}, ValueError, r"c_r must be a number in \[0, 1\), got nan"),
    "c_r 1": (Net(), X, {"c_r": 1}, ValueError, r"c_r must be a number in \[0, 1\), got 1"),
    "c_r text": (Net(), X, {"c_r": "0.1"}, ValueError, r"c_r must be a number in \[0, 1\)"),
    "c_r of no layer": (Net(), X, {"c_r": {"layers.7": 0.1}}, ValueError, r"'layers\.7' matches none of the layers"),
    "c_r empty": (Net(), X, {"c_r": {}}, ValueError, "at least one"),
    "c_r beside where": (
        Net(), X, {"c_r": {"layers.1": 0.1}, "where": "layers.2"}, ValueError,
        r"c_r names layers\.1; the tracked layers are layers\.2",
    ),
    "kind": (Net(), X, {"kind": "soft"}, ValueError, "kind must be one of hard, smooth, got 'soft'"),
    "tau": (Net(), X, {"tau": 0.0}, ValueError, r"tau must be a number > 0, got 0\.0"),
    "tau tiny": (Net(), X, {"kind": "smooth", "tau": 1e-38}, ValueError, "too small for float32"),
    "quantile": (Net(), X, {"quantile": 0.0}, ValueError, r"quantile must lie in \(0, 1\]"),
    "batch size": (Net(), X, {"batch_size": 0}, ValueError, "batch_size must be a whole number >= 1, got 0"),
    "empty iterator": (Net(), iter(()), {}, ValueError, "data hold no examples"),
    "empty array": (Net(), X[:0], {}, ValueError, "data hold no examples"),
    "a number": (Net(), np.float32(3), {}, ValueError, "got a single number"),
    "not iterable": (Net(), 3, {}, TypeError, "data must be an array"),
    "a dict": (Net(), {"x": X}, {}, TypeError, "data must be an array"),
    "lists": (Net(), [[1.0, 2.0, 3.0]], {}, ValueError, "every batch must be an array"),
    "text": (Net(), np.array(["a"]), {}, ValueError, "data must hold numbers"),
    "shape": (Net(), X[:, :4], {}, ValueError, r"cannot be called on examples of shape \(4,\)"),
    "shapes": (Net(), [X, X[:, :4]], {"batch_size": 5}, ValueError, r"every example must have shape \(6,\)"),
    "dtypes": (Net(), [X, X.astype(np.float16)], {}, ValueError, "every example must have shape"),
    "NaN": (Net(), X * np.nan, {}, ValueError, "data hold values that are NaN or infinite"),
    "overflow": (Net(), X.astype(np.float64) * 1e300, {}, ValueError, "NaN or infinite in float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    model, data, keywords, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        forge(model, data, **keywords)


def test_more_errors(net, x):
    forged = forge(net, x)
    for again in (forged, forged.network, forge(net, x, 0), Wrapper(forged)):
        with pytest.raises(ValueError, match="the model is forged already: use with_c_r"):
            forge(again, x)
    with pytest.raises(ValueError, match="data were tracked already"):
        forge(net, track(net, x), where="*")
    with pytest.raises(
        ValueError, match=r"every example must have shape \(6,\) and dtype float32, got \(5,\)"
    ):
        forged.inputs(x[:, :5])
    with pytest.raises(ValueError, match="got -1"):
        forged.with_c_r(-1)
    big = Net()
    big.layers[1].kernel[...] = jnp.full((8, 8), 3e38)
    with pytest.raises(ValueError, match=r"activations in front of layers\.2 are not finite for example 0"):
        forge(big, x)
    assert "3 layers" not in repr(forged) and "2 layers" in repr(forged) and "layers.2" in str(forged)


@pytest.mark.parametrize(
    "keywords", [{"c_r": -1}, {"c_r": {"a": 2}}, {"quantile": 2}, {"kind": ""}, {"batch_size": 0}]
)
def test_settings_are_checked_before_the_data_are_read(net, keywords):
    data = iter([X])
    with pytest.raises(ValueError, match="must"):
        forge(net, data, **keywords)
    assert next(data) is X


def test_float64_data_are_taken_in_float32(net, x):
    forged = forge(net, x.astype(np.float64), 0.1)
    assert forged.thresholds == forge(net, x, 0.1).thresholds and forged.example == ((6,), "float32")
    assert forged.inputs(x.astype(np.float64))["layers.1"].shape == (37, 8)


def test_a_gate_before_integers_is_refused(net, x):
    with jax.numpy_dtype_promotion("standard"):
        whole = x.astype(np.int32)
        assert list(forge(net, whole, 0.1).gates) == ["layers.1", "layers.2"]
        with pytest.raises(ValueError, match=r"layers\.0 reads int32: scale the data to floating point"):
            forge(net, whole, 0.1, where="layers.0")


def test_types_that_numpy_has_not_are_named(net, x, tmp_path):
    good = forge(net, x, 0.1).save(tmp_path / "good")
    length = int.from_bytes(good.read_bytes()[:8], "little")
    header = json.loads(good.read_bytes()[8 : 8 + length])
    size = header["peaks"]["shape"][0]
    tensors = {
        name: {"dtype": "F8_E4M3", "shape": [size], "data_offsets": [k * size, (k + 1) * size]}
        for k, name in enumerate(("peaks", "thresholds"))
    }
    text = json.dumps({"__metadata__": header["__metadata__"], **tensors}).encode()
    (tmp_path / "bad").write_bytes(len(text).to_bytes(8, "little") + text + bytes(2 * size))
    with pytest.raises(ValueError, match="is of type F8_E4M3, which NumPy does not have"):
        load_forged(net, tmp_path / "bad")
