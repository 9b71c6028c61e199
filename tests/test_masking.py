"""The five checks: an honest network passes, masked ones fail the checks that must see it."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipbounds.analysis import masking
from lipbounds.analysis.autoattack import Stage
from lipbounds.analysis.masking import gradient_masking
from lipbounds.training.data import digits

NAMES = [
    "white-box beats black-box",
    "iterative beats one-step",
    "accuracy falls to 0",
    "transfer from the original",
    "smoothed certificates",
]
SETTINGS = {
    "eps": 0.12,
    "grid": (0.06, 0.12, 0.5),
    "steps": 15,
    "restarts": 2,
    "queries": 250,
    "samples": 200,
}


@pytest.fixture(scope="module")
def trained():
    """(fn, x, y): a network with one hidden layer on digits, and 80 test images."""
    data = digits()
    x = jnp.asarray(data.train_x.reshape(len(data.train_x), -1), jnp.float32)
    target = jax.nn.one_hot(data.train_y, 10, dtype=jnp.float32)
    key = jax.random.key(0)
    start = [
        jax.random.normal(key, (64, 32), jnp.float32) / 6,
        jax.random.normal(key, (32, 10), jnp.float32) / 6,
    ]

    def logits(weights, b):
        return jax.nn.relu((b - np.float32(0.3)) @ weights[0]) @ weights[1]

    @jax.jit
    def train(weights):
        def loss(weights):
            return -(target * jax.nn.log_softmax(logits(weights, x))).sum(1).mean()

        def step(weights, _):
            return jax.tree.map(lambda w, g: w - np.float32(0.5) * g, weights, jax.grad(loss)(weights)), None

        return jax.lax.scan(step, weights, None, length=300)[0]

    weights = train(start)
    return lambda b: logits(weights, b), data.test_x[:80].reshape(80, -1), data.test_y[:80]


@pytest.fixture(scope="module")
def honest(trained):
    fn, x, y = trained
    return gradient_masking(fn, fn, x, y, **SETTINGS)


@pytest.mark.slow
def test_an_honest_network_passes(honest):
    assert [check.name for check in honest] == NAMES and len(honest) == 5
    assert [check.verdict for check in honest] == ["passes"] * 5, honest
    assert honest.failed == () and 70 <= honest[0].images <= 80 == honest[4].images


@pytest.mark.slow
def test_the_figures_are_those_of_the_attacks(honest, trained):
    from lipbounds.analysis.attacks import fgsm, pgd
    from lipbounds.analysis.rays import rays
    from lipbounds.analysis.smoothing import smooth
    from lipbounds.analysis.square import square

    fn, x, y = trained
    white = pgd(fn, x, y, 0.12, norm=math.inf, steps=15, restarts=2)
    black = square(fn, x, y, 0.12, norm=math.inf, queries=250)
    one, figures = honest["white-box beats black-box"], honest["iterative beats one-step"].figures
    labels = rays(fn, x, y, 0.12, queries=250)
    assert one.figures["pgd"] == white.accuracy and one.figures["square"] == black.accuracy
    assert one.figures["rays"] == labels.accuracy
    for k, (name, other) in enumerate((("square", black), ("rays", labels))):
        assert one.figures["only_pgd"][k] == int((white.success & ~other.success).sum())
        assert one.figures[f"only_{name}"] == [int((other.success & ~white.success).sum())]
    assert figures["eps"] == [0.06, 0.12, 0.5, 1.0] and figures["pgd"][1] == white.accuracy
    assert figures["fgsm"][1] == fgsm(fn, x, y, 0.12, norm=math.inf, loss="margin").accuracy
    transfer = honest[3].figures  # of a network to itself
    assert transfer["transfer"] == transfer["white_box"] == transfer["original_white_box"]
    smoothed = smooth(fn, x, 0.12, n=200, y=y)
    assert honest[4].figures["model"]["certified"] == [smoothed.accuracy(r) for r in (0.0, 0.12, 0.24)]
    assert honest[4].figures["model"] == honest[4].figures["original"]


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("mask", ["rounded", "saturated"])
def test_a_masked_network_fails(trained, mask):
    fn, x, y = trained
    masked = {
        "rounded": lambda b: fn(jnp.round(b * 16) / 16),
        "saturated": lambda b: fn(b) * np.float32(1e4),
    }[mask]
    found = gradient_masking(masked, fn, x, y, loss="ce", **SETTINGS)
    assert {NAMES[0], NAMES[2], NAMES[3]} <= set(found.failed) and NAMES[4] not in found.failed, found
    assert "breaks what PGD does not" in found[0].reason and min(found[0].figures["p_value"]) < 1e-6
    assert "withstand PGD on the whole box, where 1% may" in found[2].reason
    assert "3 fail" in repr(found)
    if mask == "saturated":  # the margin's gradient does not saturate
        clear = gradient_masking(masked, fn, x, y, loss="margin", **SETTINGS)
        assert not clear.failed


@pytest.mark.slow
def test_a_worse_smoothed_network_fails_the_fifth_check(trained):
    fn, x, y = trained

    def brittle(b):  # right at the images, wrong wherever there is noise
        off = jnp.abs(b * 16 - jnp.round(b * 16)).max(axis=1, keepdims=True) > np.float32(1e-3)
        return jnp.where(off, -fn(b), fn(b))

    found = gradient_masking(brittle, fn, x, y, **SETTINGS)
    assert NAMES[4] in found.failed and "the smoothed original is certified" in found[4].reason


@pytest.mark.slow
def test_without_an_original_two_checks_say_why(trained):
    fn, x, y = trained
    found = gradient_masking(fn, None, x, y, **SETTINGS | {"queries": 20, "steps": 3})
    assert [found[k].verdict for k in (3, 4)] == ["inconclusive"] * 2
    assert "no original network" in found[3].reason and "no original network" in found[4].reason
    assert set(found[4].figures) == {"radius_l2", "guarantee", "model"}


@pytest.mark.slow
def test_few_images_and_attacks_that_break_nothing_are_inconclusive(trained):
    fn, x, y = trained
    small = SETTINGS | {"queries": 5, "steps": 2, "samples": 10}
    few = gradient_masking(fn, fn, x[:5], y[:5], **small)
    assert {check.verdict for check in few} == {"inconclusive"} and "at least 10 are needed" in few[0].reason
    tiny = gradient_masking(fn, fn, x, y, **small | {"eps": 1e-6, "grid": [1e-6]})
    assert tiny[0].verdict == tiny[3].verdict == "inconclusive" and "nothing to compare" in tiny[0].reason


@pytest.mark.slow
def test_l2_and_its_grid(trained):
    fn, x, y = trained
    found = gradient_masking(fn, None, x, y, eps=1.0, norm=2, steps=10, queries=100, samples=20)
    assert found.settings["grid"] == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0] and found.settings["norm"] == "2"
    assert [check.verdict for check in found][:3] == ["passes"] * 3, found


@pytest.mark.slow
def test_the_record(honest):
    text, page, markdown = repr(honest), honest._repr_html_(), honest._repr_markdown_()
    assert "5 pass, 0 fail, 0 inconclusive (eps 0.12 in l-inf, level 0.05)" in text
    for name in NAMES:
        assert name in text and name in page and name in markdown
    assert page.count("<tr>") == 6 and markdown.count("\n|") == 7
    data = json.loads(json.dumps(honest.to_json(), allow_nan=False))
    assert [check["name"] for check in data["checks"]] == NAMES
    assert data["settings"]["grid"] == [0.06, 0.12, 0.5, 1.0] and data["settings"]["norm"] == "inf"
    assert data["checks"][0]["figures"]["pgd"] == honest[0].figures["pgd"]
    with pytest.raises(KeyError, match="no check 'x'; there are white-box"):
        honest["x"]


# ----------------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize(
    ("pairs", "images", "level", "verdict"),
    [
        ([(0, 0)], 100, 0.05, "passes"),
        ([(3, 3)], 100, 0.05, "passes"),
        ([(4, 0)], 100, 0.05, "inconclusive"),  # p = 1/16
        ([(5, 0)], 100, 0.05, "fails"),  # p = 1/32
        ([(5, 0)], 100, 0.025, "inconclusive"),
        ([(0, 9), (5, 0)], 100, 0.05, "fails"),
        ([(0, 9), (2, 1)], 100, 0.05, "inconclusive"),
        ([(60, 40)], 1000, 0.05, "fails"),
        ([(55, 45)], 1000, 0.05, "inconclusive"),
        ([(9, 0)], 9, 0.05, "inconclusive"),
    ],
)
def test_verdicts(pairs, images, level, verdict):
    found, reason = masking._decide(pairs, images, level, "what")
    assert found == verdict and bool(reason) == (verdict != "passes")


def test_the_p_value_is_the_tail_of_a_fair_coin():
    assert masking.p_value((7, 3)) == pytest.approx(sum(math.comb(10, k) for k in range(7, 11)) / 2**10)
    assert masking.p_value((0, 0)) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.0}, "eps must be one number > 0"),
        ({"eps": np.ones(80)}, "eps must be one number > 0"),
        ({"eps": math.inf}, "eps must be one number > 0"),
        ({"grid": []}, "grid must hold numbers > 0"),
        ({"grid": [0.1, -0.1]}, "grid must hold numbers > 0"),
        ({"grid": [math.nan]}, "grid must hold numbers > 0"),
        ({"level": 0.0}, r"level must be in \(0, 1\)"),
        ({"norm": 1}, "norm 2 or inf, not 1"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"sigma": -1.0}, "sigma must be a number > 0"),
        ({"queries": 0}, "queries must be"),
        ({"y": np.full(80, 10)}, "labels must lie in 0..9"),
    ],
)
def test_bad_input_is_refused(trained, change, message):
    fn, x, y = trained
    given = {
        "x": x,
        "y": y,
        "steps": 1,
        "restarts": 1,
        "queries": 1,
        "samples": 1,
        "eps": 0.1,
        "grid": [0.1],
    } | change
    with pytest.raises(ValueError, match=message):
        gradient_masking(fn, None, given.pop("x"), given.pop("y"), **given)


@pytest.mark.slow
def test_labels_alone_break_what_hides_from_logits_too(trained):
    """Logits that are constant between steps give Square nothing to go by either; RayS needs the label only."""
    fn, x, y = trained

    def staircase(b):
        return jax.nn.one_hot(fn(b).argmax(axis=1), 10, dtype=jnp.float32)

    found = gradient_masking(staircase, fn, x, y, **SETTINGS | {"queries": 1000})[0]
    assert found.verdict == "fails" and found.reason.startswith("RayS breaks what PGD does not"), found
    assert found.figures["rays"] < found.figures["square"] <= found.figures["pgd"]


def test_the_level_is_split_over_the_comparisons():
    """One radius of three, where FGSM breaks 5 images that PGD does not: p = 1/32 is below 0.05, not below 0.05/3."""

    def attack(broken):
        success, zeros = np.arange(40) < broken, np.zeros(40)
        distance = np.where(success, 0.1, np.inf)
        return masking.Attack(
            np.ones(40, bool), success, distance, zeros[:, None], zeros, zeros, 2.0, "margin"
        )

    many, single = [attack(10) for _ in range(3)], [attack(10), attack(15), attack(10)]
    check = masking._steps(many, single, [0.1, 0.2, 0.4], 0.05)
    assert check.verdict == "inconclusive" and "5 images, the reverse 0, p = 0.031" in check.reason
    assert masking._steps(many[:1], single[1:2], [0.1], 0.05).verdict == "fails"
    black = {"Square": attack(10), "RayS": attack(15)}
    assert masking._white_and_black(attack(10), black, 0.05).verdict == "inconclusive"
    assert masking._white_and_black(attack(10), black, 0.07).verdict == "fails"


@pytest.mark.parametrize(("more", "verdict"), [(0, "passes"), (12, "fails"), (3, "inconclusive")])
def test_autoattack_beside_pgd(more, verdict):
    """AutoAttack breaks what PGD breaks, and `more`."""
    correct = np.arange(40) < 36
    attacks = []
    for broken in (10, 10 + more):
        success = np.arange(40) < broken
        distance = np.where(success, 0.1, np.inf)
        fields = {
            "adversarial": np.zeros((40, 2), np.float32),
            "margin": np.zeros(40),
            "eps": np.full(40, 0.1),
        }
        attacks.append({"correct": correct, "success": success, "distance": distance, "norm": 2.0, **fields})
    white = masking.Attack(**attacks[0], loss="margin")
    strong = masking.AutoAttack(
        **attacks[1], loss="autoattack", stages=(Stage("APGD-CE", 36, 10 + more, (26 - more) / 40, 1.0),)
    )
    check = masking._strength(white, strong, 0.05)
    assert check.verdict == verdict and check.images == 36
    assert check.figures["only_autoattack"] == [more] and check.figures["only_pgd"] == [0]
    assert check.figures["autoattack"] == {"clean": 0.9, "APGD-CE": (26 - more) / 40}


@pytest.mark.slow
def test_autoattack_is_the_sixth_check(trained):
    fn, x, y = trained
    found = gradient_masking(fn, None, x[:40], y[:40], auto=True, **SETTINGS)
    assert [check.name for check in found] == [*NAMES, "PGD as strong as AutoAttack"]
    assert found[5].verdict in ("passes", "inconclusive") and found.settings["auto"] is True
    assert found[5].figures["pgd"] == found[0].figures["pgd"] >= found[5].figures["autoattack"]["Square"]
    json.dumps(found.to_json())
    with pytest.raises(ValueError, match="at least 4 classes"):
        gradient_masking(lambda b: fn(b)[:, :3], None, x[:4], y[:4] % 3, auto=True, **SETTINGS)
