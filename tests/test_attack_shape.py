"""What all attacks share: targets, counts, networks of every kind, oracles, survivors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from test_cache import compilations

import lipbounds as lb
from lipbounds import analysis
from lipbounds.analysis import gradient_lipschitz, landscape, pgd, smooth
from lipbounds.analysis.attack_network import answers
from lipbounds.analysis.attack_search import Found, search

W = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32)


def linear(batch):
    return batch.reshape(len(batch), -1) @ W


@pytest.fixture
def data():
    x = np.random.default_rng(5).random((9, 2, 3, 1), np.float32)
    y = np.asarray(linear(x)).argmax(1)
    y[4] = (y[4] + 1) % 4  # one is wrong from the start
    return x, y


ATTACKS = [
    pytest.param(analysis.pgd, {"steps": 6, "loss": "ce"}, id="pgd"),
    pytest.param(analysis.fgsm, {}, id="fgsm"),
    pytest.param(analysis.mi_fgsm, {"steps": 6}, id="mi_fgsm"),
    pytest.param(analysis.square, {"queries": 30}, id="square"),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("attack", "options"), ATTACKS)
def test_a_target_is_what_the_network_then_says(data, attack, options):
    x, y = data
    target = analysis.random_targets(y, 4, seed=1)
    assert (target != y).all() and set(target) == {0, 1, 2, 3}
    found = attack(linear, x, y, 0.6, norm=math.inf, target=target, **options)
    said = linear(found.adversarial).argmax(1)
    assert 2 <= found.success.sum() < 9 and not found.success[4]
    np.testing.assert_array_equal(found.success, found.correct & (said == target))
    np.testing.assert_array_equal(found.target, target)
    assert (
        np.isfinite(found.distance[found.success]).all()
        and (found.distance <= 0.6).sum() == found.success.sum()
    )
    assert found.success_rate == found.success.sum() / 8


@pytest.mark.parametrize(("attack", "options"), ATTACKS)
def test_counts_end_with_the_first_success(data, attack, options):
    x, y = data
    found = attack(linear, x, y, np.linspace(0.001, 0.5, 9), norm=math.inf, batch_size=4, **options)
    name, limit = ("queries", 30) if found.queries is not None else ("steps", options.get("steps", 1))
    counts = getattr(found, name)
    assert getattr(found, {"steps": "queries", "queries": "steps"}[name]) is None
    assert counts[4] == 0 and (counts[found.correct & ~found.success] == limit).all()
    assert (counts[found.success] >= 1).all() and (counts <= limit).all()
    assert limit == 1 or (counts[found.success] < limit).any()


@pytest.mark.slow
def test_a_count_is_the_number_of_steps_that_suffice(data):
    x, y = data
    options = {"norm": math.inf, "step_size": 0.02}
    found = analysis.pgd(linear, x, y, 0.2, steps=10, **options)
    assert len(set(found.steps[found.success])) > 1
    for steps in range(1, 10):
        fewer = analysis.pgd(linear, x, y, 0.2, steps=steps, **options)
        np.testing.assert_array_equal(fewer.success, found.success & (found.steps <= steps))


@pytest.mark.slow
def test_a_tie_reaches_no_target():
    def fn(x):  # two classes that are tied wherever x <= 1/2
        return jnp.concatenate([jax.nn.relu(x - np.float32(0.5)), jnp.zeros_like(x)], axis=1)

    x, y = np.float32([[1.0]]), np.zeros(1, int)
    assert analysis.pgd(fn, x, y, 0.6).success[0]
    assert not analysis.pgd(fn, x, y, 0.6, target=[1]).success[0]


@pytest.mark.slow
def test_momentum_is_the_sum_of_normalised_gradients(data):
    x, y = data
    settings = {"norm": math.inf, "low": -9.0, "high": 9.0, "steps": 4, "step_size": 0.05}

    def curved(batch):
        return jnp.sin(3 * linear(batch))

    def loss(point):
        return -jnp.take_along_axis(jax.nn.log_softmax(curved(point)), y[:, None], 1).sum()

    y = np.asarray(curved(x)).argmax(1)
    found = analysis.mi_fgsm(curved, x, y, 0.12, momentum=0.5, **settings)
    plain = analysis.mi_fgsm(curved, x, y, 0.12, momentum=0.0, **settings)
    np.testing.assert_array_equal(
        plain.margin, analysis.pgd(curved, x, y, 0.12, loss="ce", **settings).margin
    )
    point, velocity, least = x, np.zeros_like(x), np.full(9, np.inf)
    for _ in range(4):
        g = np.asarray(jax.grad(loss)(jnp.asarray(point)))
        velocity = 0.5 * velocity + g / np.abs(g).sum(axis=(1, 2, 3), keepdims=True)
        point = np.clip(point + 0.05 * np.sign(velocity), x - 0.12, x + 0.12).astype(np.float32)
        z = np.array(curved(point))
        own = z[np.arange(9), y]
        z[np.arange(9), y] = -np.inf
        least = np.minimum(least, own - z.max(1))
    np.testing.assert_allclose(found.margin, least, atol=1e-4)
    assert not np.array_equal(found.margin, plain.margin)


# -------------------------------------------------------------------------------------------- networks of every kind
def kinds():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(4, use_bias=False)(x.reshape(len(x), -1))

    module = Linen()
    variables = {"params": {"Dense_0": {"kernel": W}}}
    dense = nnx.Linear(6, 4, use_bias=False, rngs=nnx.Rngs(0))
    dense.kernel[...] = W
    return {
        "nnx": nnx.Sequential(lambda x: x.reshape(len(x), -1), dense),
        "linen": module.bind(variables),
        "lambda": lambda x: module.apply(variables, x),
        "form": lb.trace(lambda x: x.ravel() @ W, np.zeros((2, 3, 1), np.float32)),
    }


@pytest.mark.parametrize("kind", ["nnx", "linen", "lambda", "form"])
def test_networks_of_every_kind_are_attacked_alike(data, kind):
    x, y = data
    by_function = analysis.pgd(linear, x, y, 0.2, steps=3)
    found = analysis.pgd(kinds()[kind], x, y, 0.2, steps=3)
    np.testing.assert_allclose(found.margin, by_function.margin, atol=1e-5)


def test_an_onnx_network_is_attacked(data, tmp_path):
    onnx = pytest.importorskip("onnx")
    from lipbounds.interop import load_onnx

    nodes = [
        onnx.helper.make_node("Flatten", ["x"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "w"], ["z"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [value("x", onnx.TensorProto.FLOAT, ["n", 2, 3, 1])],
        [value("z", onnx.TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(W, "w")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "net.onnx")
    x, y = data
    found = analysis.pgd(load_onnx(tmp_path / "net.onnx")[0], x, y, 0.2, steps=3)
    np.testing.assert_allclose(found.margin, analysis.pgd(linear, x, y, 0.2, steps=3).margin, atol=1e-5)


def test_a_linen_module_without_weights_is_refused(data):
    with pytest.raises(ValueError, match=r"no weights by itself: pass module.bind\(variables\)"):
        analysis.pgd(linen.Dense(3), *data, 0.1)


# ------------------------------------------------------------------------------------------- oracles, survivors, order
def halfway(problem):
    """An attack that asks twice for half of the examples: it moves them by eps in the first coordinate."""
    x, eps, low, high = (np.asarray(part) for part in problem.where)
    points = x.copy()
    points[:, 0, 0, 0] = np.clip(x[:, 0, 0, 0] + eps, low, high)
    asked = np.arange(len(x)) % 2 == 0
    first = problem.margins(points, asked)
    assert np.isfinite(first[asked]).all()
    problem.margins(points, asked)
    return Found(points, queries=2 * asked)


def test_an_oracle_is_asked_for_what_is_needed_and_for_nothing_twice(data):
    x, y = data
    asked = []

    def labels(batch):
        assert isinstance(batch, np.ndarray) and batch.dtype == np.float32
        asked.append(len(batch))
        return np.argmax(batch.reshape(len(batch), -1) @ W, axis=1)

    settings = analysis.AttackSettings(norm=math.inf, batch_size=6)
    run = {"needs": "labels"}
    found = search("half", halfway, analysis.Oracle(labels), x, y, 0.4, settings, "none", **run)
    known = search("half", halfway, linear, x, y, 0.4, settings, "none", **run)
    assert asked == [6, 3, 3, 3, 1, 1, 6, 2]  # x, two questions in each of two batches, what is returned
    np.testing.assert_array_equal(found.success, known.success)
    np.testing.assert_array_equal(found.adversarial, known.adversarial)
    np.testing.assert_array_equal(found.queries, known.queries)
    assert set(found.margin) <= {-1.0, 1.0} and found.correct.sum() == 8
    by_logits = analysis.Oracle(lambda batch: batch.reshape(len(batch), -1) @ W)
    aimed = {"target": (y + 1) % 4, **run}
    scored = search("half", halfway, by_logits, x, y, 0.4, settings, "none", **aimed)
    np.testing.assert_allclose(
        scored.margin, search("half", halfway, linear, x, y, 0.4, settings, "none", **aimed).margin, atol=1e-5
    )
    with pytest.raises(ValueError, match="needs gradients, which an Oracle does not have"):
        analysis.pgd(analysis.Oracle(labels), x, y, 0.1)
    with pytest.raises(ValueError, match="needs logits"):
        analysis.square(analysis.Oracle(labels), x, y, 0.1)
    with pytest.raises(
        ValueError, match=r"must answer with 6 integer labels or logits \(6, K\), got an array \(\)"
    ):
        search("half", halfway, analysis.Oracle(lambda batch: 3), x, y, 0.4, settings, "none", **run)


def test_only_those_asked_for_are_attacked_with_their_own_numbers(data):
    x, y = data
    seen = []

    def find(problem):
        seen.extend(np.asarray(problem.index).tolist())
        return halfway(problem)

    only = np.isin(np.arange(9), [1, 4, 7, 8])
    settings = analysis.AttackSettings(norm=math.inf, batch_size=2)
    found = search("half", find, linear, x, y, 0.4, settings, "none", only=only)
    assert seen == [1, 7, 8, 8]  # 4 is wrong, the last batch is padded
    np.testing.assert_array_equal((found.adversarial != x).any(axis=(1, 2, 3)), only & found.correct)
    nothing = search("half", find, linear, x, y, 0.4, settings, "none", only=np.zeros(9, bool))
    assert not nothing.success.any() and nothing.queries is not None and not nothing.queries.any()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (np.zeros(3, int), "target: must hold 9 integer labels"),
        (np.full(9, 7), r"labels must lie in 0..3, got 7..7"),
        (None, "the target of example 0 is its own label"),
    ],
)
def test_bad_targets_are_refused(data, target, message):
    x, y = data
    with pytest.raises(ValueError, match=message):
        analysis.pgd(linear, x, y, 0.1, steps=1, target=y if target is None else target)


@pytest.mark.parametrize("inner", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_function_is_the_network_that_it_is_now(inner):
    """What it closes over may change between two calls; where nothing has, nothing is compiled again."""
    w = np.float32([[3.0, 0.0], [0.0, 4.0]])
    scale = [1.0]

    def net(batch):
        shifted = batch - np.float32(0.5)
        return (jax.jit(lambda b: b @ w)(shifted) if inner else shifted @ w) * scale[0]

    def said():
        made = pgd(net, x, y, 0.05, steps=2)
        smoothed = smooth(net, x, 0.01, 10, 50, y=y).accuracy()
        slope = float(gradient_lipschitz(net, x, y, 0.0).value.max())
        return [made.correct.mean(), smoothed, np.mean(answers(net, x) == y)], slope

    x = np.float32([[0.9, 0.5], [0.8, 0.45], [0.7, 0.3]])
    y = np.zeros(3, int)
    shares, slope = said()
    assert shares == [1.0] * 3
    with compilations() as names:
        said()
    assert not [name for name in names if "_tally" in name or "_advance" in name or "logits_of" in name]
    scale[0] = 2.0
    assert said()[1] != pytest.approx(slope, rel=0.1)
    w *= -1
    assert said()[0] == [0.0] * 3


def test_modules_that_hold_functions_and_objects_without_a_hash_are_networks(data):
    class Held(nnx.Module):
        def __init__(self, act):
            self.act, self.layer = act, nnx.Linear(6, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(self.act(x.reshape(len(x), -1)))

    class Unhashable:
        __hash__ = None

        def __call__(self, batch):
            return linear(batch)

    x, y = data
    sign = [1.0]
    held = Held(lambda v: sign[0] * v)
    for sign[0] in (1.0, -1.0):
        z = np.asarray(held(x))
        margin = np.sort(z, axis=1)[:, -1] - np.sort(z, axis=1)[:, -2]
        np.testing.assert_allclose(pgd(held, x, z.argmax(axis=1), 0.0, steps=0).margin, margin, rtol=1e-4)
        assert landscape(held, x, z.argmax(axis=1), [0.0]).accuracy == 1.0
    assert pgd(Unhashable(), x, y, 0.1, steps=1).correct.sum() == 8
