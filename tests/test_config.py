"""Configurations: what is refused and how, presets, defaults, and whether architecture and data fit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import typing
from typing import Any

import jax
import pytest
from flax import nnx

from lipbounds.training.config import Config, defaults, from_text
from lipbounds.training.data import DATASETS
from lipbounds.training.models import ModelSpec, build, spec_for
from lipbounds.training.presets import PRESETS, preset

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
HINTS = typing.get_type_hints(Config)
CHOICES = {name: field.metadata["choices"] for name, field in FIELDS.items() if field.metadata["choices"]}
LIMITS = {name: field.metadata["limits"] for name, field in FIELDS.items() if field.metadata["limits"]}


# --------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("name", sorted(CHOICES))
def test_a_choice_is_one_of_those_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be one of .*got 'nothing'") as caught:
        Config(**{name: "nothing"})
    for known in CHOICES[name]:
        assert known in str(caught.value)
        assert getattr(Config(**{name: known}), name) == known


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"loss must be one of .* \(did you mean 'cross-entropy'\?\)"):
        Config(loss="crossentropy")


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_every_number_has_a_range(name: str) -> None:
    low, high = LIMITS[name]
    kind = HINTS[name]
    outside: list[float] = [low - 1] if kind is int else [low - 1e-3 * (1 + abs(low)), math.nan, math.inf]
    if math.isfinite(high):
        outside.append(high + 1 if kind is int else high * 1.001 + 1e-3)
    assert math.isfinite(high) or kind is float
    for value in outside:
        with pytest.raises(ValueError, match=rf"^{name} must be (at least|between) "):
            Config(**{name: kind(value)})
    # the edges themselves, with what else must hold beside them
    beside = {
        "epochs": {"warmup": 0},
        "learning_rate": {"final_learning_rate": 0.0},
    }.get(name, {})
    assert getattr(Config(**{**beside, name: kind(low)}), name) == low


def test_every_number_and_every_word_is_checked() -> None:
    numbers = {name for name, hint in HINTS.items() if hint in (int, float)}
    assert numbers == set(LIMITS)
    words = {name for name, hint in HINTS.items() if hint is str}
    assert words == {*CHOICES, "arch", "milestones"}  # arch is checked against the data


def test_every_setting_says_what_it_is_in_one_place() -> None:
    groups = {"data", "network", "loss", "optimiser", "run"}
    assert {field.metadata["group"] for field in FIELDS.values()} == groups
    for name, field in FIELDS.items():
        text = field.metadata["help"]
        assert text[:1].isupper() and text.endswith(".") and len(text) > 10, name
        assert f"    {name}: {text}" in (Config.__doc__ or "")
    assert "activation: Activation function. One of relu, maxmin, clipped-relu, tanh, gelu." in (
        Config.__doc__ or ""
    )


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_type_is_checked(name: str) -> None:
    hint = HINTS[name]
    wrong: list[Any] = [[1], {}, None if hint != (str | None) else 3]
    wrong += [True] if hint is not bool else [1, "yes"]
    wrong += ["1"] if hint in (int, float) else []
    wrong += [1.0] if hint is int else []
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got ") as caught:
            Config(**{name: value})
        assert repr(value) in str(caught.value)


def test_an_integer_stands_for_a_float() -> None:
    config = Config(lam=15, t=5)
    assert type(config.lam) is type(config.t) is float and config.lam == 15.0
    assert config == Config(lam=15.0, t=5.0)


@pytest.mark.parametrize("name", ["lam", "epochs"])
def test_a_number_beyond_floats_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Config(**{name: 10**400})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 1e-6}, "final_learning_rate 1e-05 is above learning_rate 1e-06"),
        ({"epochs": 5, "warmup": 6}, r"warmup \(6\) and decay_from \(0\) must be at most epochs \(5\)"),
        ({"epochs": 5, "decay_from": 6}, r"warmup \(1\) and decay_from \(6\) must be at most epochs \(5\)"),
        (
            {"milestones": "2,5", "schedule": "cosine"},
            "milestones belong to schedule=multi-step, not to cosine: leave them out",
        ),
        ({"milestones": "3,x"}, "milestones must be whole numbers with commas, such as 50,75, got '3,x'"),
        *(
            (
                {"milestones": text, "epochs": 5},
                rf"rise, from at least 1 to less than epochs \(5\), got '{text}'",
            )
            for text in ("2,5", "3,2", "0,2", "2,2")
        ),
        (
            {"epochs": 5, "average": "swa", "average_from": 5},
            r"average_from \(5\) must be below epochs \(5\)",
        ),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**fields)


# ------------------------------------------------------------------------------------------------------- JSON
@pytest.mark.parametrize("fields", [{"schedule": name} for name in ("constant", "halving", "multi-step")])
def test_a_final_rate_is_compared_only_where_it_is_reached(fields: dict[str, Any]) -> None:
    assert Config(learning_rate=5e-6, **fields).final_learning_rate > 5e-6
    assert Config(learning_rate=5e-6, epochs=3, decay_from=3)
    with pytest.raises(ValueError, match="final_learning_rate 1e-05 is above"):
        Config(learning_rate=5e-6, epochs=3, decay_from=2)


def test_json_round_trip() -> None:
    config = Config(dataset="cifar10", arch="6C2F", lam=3, flip=True, data_dir="data", precision="float64")
    text = json.dumps(config.to_json(), allow_nan=False)
    assert Config.from_json(json.loads(text)) == config
    assert set(config.to_json()) == set(FIELDS)


def test_unknown_settings_are_all_listed_with_what_may_be_meant() -> None:
    with pytest.raises(ValueError) as caught:
        Config.from_json({"lamda": 3, "epoch": 2, "lam": 1.0, "zzz": 0}, "my.json")
    text = str(caught.value)
    assert text.startswith("my.json has unknown settings: ")
    assert "'epoch' (did you mean 'epochs'?)" in text and "'lamda' (did you mean 'lam'?)" in text
    assert "'zzz'." in text and all(name in text for name in FIELDS)


def test_what_is_wrong_in_a_file_names_the_file() -> None:
    with pytest.raises(ValueError, match=r"^my\.json: epochs must be int, got '5'"):
        Config.from_json({"epochs": "5"}, "my.json")
    with pytest.raises(ValueError, match=r"my\.json must be a JSON object of settings, got list"):
        Config.from_json([], "my.json")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"my\.json must be a JSON object of settings, got list"):
        from_text("[1]", "my.json")
    with pytest.raises(ValueError, match=r"my\.json is not JSON: .*line 1"):
        from_text("{lam: 1}", "my.json")
    with pytest.raises(ValueError, match=r"my\.json is not JSON: its values are nested too deeply"):
        from_text('{"a":' * 100_000, "my.json")
    assert from_text('{"lam": 1}', "my.json") == {"lam": 1}


# --------------------------------------------------------------------------------------------------- presets
SHAPES = {
    "digits": (8, 8, 1, 10),
    "mnist": (28, 28, 1, 10),
    "cifar10": (32, 32, 3, 10),
    "cifar100": (32, 32, 3, 100),
    "tiny-imagenet": (64, 64, 3, 200),
}


OURS = "mnist-784-512-512-10"
LIPSCHITZ = ("mnist-4C3F-cholesky", "mnist-lipnext", "cifar10-lipnext")
ATTACKED = ("cifar10-resnet18", "cifar10-wrn-34-10", "cifar100-resnet18", "tiny-imagenet-resnet50")


@pytest.mark.parametrize("name", ATTACKED)
def test_presets_of_robust_losses_keep_the_shape_of_their_schedule(name: str) -> None:
    config = Config.from_json(preset(name))
    assert name == f"{config.dataset}-{config.arch}" and config.robust and config.attack_eps == 8 / 255
    *shape, classes = SHAPES[config.dataset]
    assert config.spec(tuple(shape), classes).architecture == "batch_norm"
    assert (config.epochs, config.edges) == (100, (50, 75))
    assert Config.from_json(preset(name, 40)).edges == (20, 30)
    assert Config.from_json(preset(name, 2)).edges == (1,)  # 1 and 1.5, which rounds to the end
    assert Config.from_json(preset(name, 1)).edges == ()


@pytest.mark.parametrize("name", LIPSCHITZ)
def test_presets_of_layers_of_norm_one_fit_their_images(name: str) -> None:
    config = Config.from_json(preset(name))
    assert config.loss == "margin" and config.constants == "naive" and not config.validate_every
    *shape, classes = SHAPES[config.dataset]
    spec = config.spec(tuple(shape), classes)
    model = nnx.eval_shape(lambda: build(spec))
    assert {layer.kind for _, layer in nnx.iter_modules(model) if hasattr(layer, "kind")} in (
        {"cholesky", "unit"},
        {"stiefel", "unit"},
    )


def test_presets_are_valid_and_named_after_the_rows_of_the_paper() -> None:
    rows = {"mnist-4C3F", "cifar10-6C2F", "tiny-imagenet-8C2F"}
    crm = {OURS, *rows, *(f"{name}-published" for name in rows)}
    assert crm == {name for name in PRESETS if name not in (*LIPSCHITZ, *ATTACKED)}
    for name in crm:
        config = Config.from_json(preset(name))
        assert name.removesuffix("-published") == f"{config.dataset}-{config.arch}" and config.loss == "crm"
        assert (config.constants, config.epochs) == (("recursion", 160) if name == OURS else ("liplt", 400))
        *shape, classes = SHAPES[config.dataset]
        spec = config.spec(tuple(shape), classes)
        assert spec.architecture == ("mlp" if name == OURS else config.arch)
        short = Config.from_json(preset(name, 40))
        parts = {"warmup": config.warmup, "decay_from": config.decay_from}
        assert short.epochs == 40 and short.ramp == config.ramp
        assert short.decay_from == round(config.decay_from * 40 / config.epochs)
        assert short.warmup == min(config.warmup, 1)  # ten of 400, one, or none
        assert dataclasses.replace(short, epochs=config.epochs, **parts) == config
        assert Config.from_json(preset(name, 1)).epochs == 1
        if name in rows:
            assert (config.initialisation, config.ramp) == ("unit", 5) and config.warmup <= 1
            old = Config.from_json(preset(f"{name}-published"))
            assert (old.initialisation, old.warmup, old.ramp, old.lam) == ("published", 10, 0, 30.0)
    changed = preset("mnist-4C3F")
    lam = changed["lam"]
    changed["lam"] = 1.0
    assert preset("mnist-4C3F")["lam"] == lam > 1
    with pytest.raises(
        ValueError, match=r"unknown preset 'mnist-4c3f' \(did you mean 'mnist-4C3F'\?\); known: "
    ):
        preset("mnist-4c3f")


@pytest.mark.parametrize("dataset", sorted(DATASETS))
def test_what_suits_a_data_set_is_valid_for_it(dataset: str) -> None:
    config = Config.from_json(defaults(dataset))
    assert config.dataset == dataset
    *shape, classes = SHAPES[dataset]
    spec = config.spec(tuple(shape), classes)
    out = jax.eval_shape(lambda x: build(spec)(x), jax.ShapeDtypeStruct((2, *shape), "float32"))
    assert out.shape == (2, classes)


def test_defaults_give_way_to_what_is_asked_for() -> None:
    assert Config.from_json(defaults("digits") | {"r0": 9.0}).r0 == 9.0
    assert defaults("no such thing") == {"dataset": "no such thing"}
    for odd in ([1], None, {}):
        with pytest.raises(ValueError, match="dataset must be"):
            Config.from_json(defaults(odd))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "uses"),
    [
        ({"loss": "cross-entropy"}, False),
        ({"loss": "crm", "lam": 0.0}, False),
        ({"loss": "crm"}, True),
        ({"loss": "gloro", "lam": 0.0}, True),
        ({"loss": "lipschitz-margin", "lam": 0.0}, True),
    ],
)
def test_whether_a_bound_stands_in_the_loss(fields: dict[str, Any], uses: bool) -> None:
    assert Config(**fields).uses_constants is uses


# -------------------------------------------------------------------------------------------- architectures
@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("784-10", "784-10 does not fit: an image has 8 x 8 x 1 = 64 pixels and there are 10 classes"),
        ("64-9", "widths start with 64 and end with 10"),
        ("64--10", "at least two positive numbers"),
        ("64-0-10", "at least two positive numbers"),
        ("64-", "at least two positive numbers"),
        ("7C7F", "unknown architecture '7C7F': give widths such as \"784-512-10\", or one of .*4C3F"),
        ("mlp", "unknown architecture 'mlp'"),
    ],
)
def test_architectures_that_do_not_fit(arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(arch=arch).spec((8, 8, 1), 10)


def test_a_spec_holds_what_the_configuration_says() -> None:
    config = Config(arch="64-12-10", activation="maxmin", mean=0.5, std=0.25)
    found = config.spec((8, 8, 1), 10)
    assert found == ModelSpec(
        "mlp", (8, 8, 1), {"widths": "64-12-10", "activation": "maxmin", "mean": 0.5, "std": 0.25}
    )
    assert spec_for("4C3F", (28, 28, 1), 10).arguments["classes"] == 10
    assert build(found)(jax.numpy.zeros((2, 8, 8, 1))).shape == (2, 10)


def test_8C2F_has_the_published_layers() -> None:
    """Tiny-ImageNet's network of arXiv 2310.00116: eight convolutions and two dense layers (200 classes)."""
    model = nnx.eval_shape(lambda: build(spec_for("8C2F", (64, 64, 3), 200)))
    found = sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
    layers = [
        (3, 64, 3),
        (64, 64, 3),
        (64, 64, 4),
        (64, 128, 3),
        (128, 128, 3),
        (128, 128, 4),
        (128, 256, 3),
        (256, 256, 4),
    ]
    size = 64
    for (_, _, kernel), stride, padding in zip(
        layers, (1, 1, 2, 1, 1, 2, 1, 2), (1, 0, 0, 1, 1, 0, 1, 0), strict=True
    ):
        size = (size + 2 * padding - kernel) // stride + 1
    dense = [size * size * 256, 256, 200]
    wanted = [(k, k, a, b) for a, b, k in layers] + [(b,) for _, b, _ in layers]
    wanted += [*itertools.pairwise(dense), *((b,) for b in dense[1:])]
    assert found == sorted(wanted) and len(found) == 20
