"""Is everything sound on a GPU, and how fast is it? The parts of benchmarks/gpu.sh, which runs them all.

    python benchmarks/gpu.py bounds OUT.json          bounds, local bounds and radii of networks of tests/zoo.py
    python benchmarks/gpu.py slopes OUT.json          steepest slopes that they attain (on the CPU)
    python benchmarks/gpu.py check CPU.json SLOPES.json GPU.json OUT.json       against them and attacks (on the CPU)
    python benchmarks/gpu.py traces OUT.json          whether `lb.trace` refuses programs that the device rounds
    python benchmarks/gpu.py proofs OUT.json          proofs of norms and semidefinite matrices, there and here
    python benchmarks/gpu.py steps OUT.json           a CRM step of 6C2F: LipLT, naive, no radius term
    python benchmarks/gpu.py data DIR                 files in the format of CIFAR-10 with made-up images
    python benchmarks/gpu.py speed OUT.json           seconds of lb.liplt, lb.lipsdp, lb.local
    python benchmarks/gpu.py lipsdp OUT.json          lb.lipsdp of the whole 6C2F, all pairs, beside lb.liplt

The device and the precision of products are JAX's (JAX_PLATFORMS, JAX_DEFAULT_MATMUL_PRECISION). `--small`: a trial.
Every part writes its file after each of its rows, so that one that is stopped keeps what it has.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Json, command_line, environment, write_json

import lipbounds as lb

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # zoo, attained

NETS = """relu linear two_branches cnn_batch_norm preactivation_resnet postactivation_resnet u_net scan_stacked
max_pool_images maxmin_mlp gelu_exact half_precision einsum dense_net mlp_mixer log_sum_exp""".split()
EPS, EXAMPLES = 0.1, 6
SIZES = {False: (784, 300, 300, 300, 10), True: (16, 12, 12, 4)}


class Rows:
    """Rows of a part, written to its file as they come."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.rows: list[Json] = []
        self.where = environment("gpu.py")
        self.where["precision"] = str(jax.config.jax_default_matmul_precision)
        self.write()

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        write_json(part, {"where": self.where, "rows": self.rows})
        os.replace(part, self.path)

    def add(self, **row: Any) -> None:
        with self.lock:
            self.rows.append(row)
            print(json.dumps(row), flush=True)
            self.write()


def attempt(work: Callable[[], Any]) -> Json:
    """The result or the error, with seconds."""
    start = time.perf_counter()
    try:
        found = {"value": work()}
    except Exception as error:  # recorded, so that the other rows are run
        found = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    return {**found, "seconds": round(time.perf_counter() - start, 4)}


# --- sound? ----------------------------------------------------------------------------------------------------------


def network(name: str) -> tuple[lb.LureForm, np.ndarray]:
    """A net of the zoo and examples; the labels are what the form says in float64."""
    from zoo import NETS as ZOO
    from zoo import example

    net = ZOO[name]
    fn, x = net.make(0)
    form = lb.trace(fn, x, batched=net.batched)
    shape = np.shape(example(net, x))
    return form, np.random.default_rng(1).standard_normal((EXAMPLES, *shape)).astype(np.float32)


@jax.jit
def _outputs(form: lb.LureForm, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda v: form.evaluate(v, jnp.float64))(x)


@jax.jit
def _margins(form: lb.LureForm, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The margins of the labels, and their gradients."""

    def margin(v: jax.Array, label: jax.Array) -> jax.Array:
        z = form.evaluate(v, jnp.float64)
        return z[label] - jnp.max(jnp.where(jnp.arange(z.size) == label, -jnp.inf, z))

    return jax.vmap(jax.value_and_grad(margin))(x, labels)


def outputs(form: lb.LureForm, x: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(_outputs(form, jnp.asarray(x, jnp.float64)))


def bounds(out: Path, small: bool) -> None:
    rows, later = Rows(out), []
    for name in NETS[:3] if small else NETS:
        made = attempt(lambda name=name: network(name))
        if "error" in made:
            rows.add(net=name, what="trace", **made)
            continue
        form, x = made["value"]
        y = outputs(form, x).argmax(axis=1)
        liplt = attempt(lambda form=form: lb.liplt(form, pairwise=True)).get("value")
        ways: dict[str, Callable[[], Any]] = {
            "naive": lambda form=form: lb.naive(form).value,
            "liplt": lambda liplt=liplt: liplt.value,
            "lipsdp": lambda form=form: lb.lipsdp(form).value,
            "local": lambda form=form, x=x: lb.local(form, x, EPS).value.tolist(),
        }
        if form.num_outputs > 1:
            for local in (False, True):
                ways["radius" + ", local" * local] = lambda form=form, x=x, y=y, local=local, liplt=liplt: (
                    lb.certified_radius(form, x, y, bound=liplt, local=local).radius.tolist()
                )
        for what, work in ways.items():
            rows.add(net=name, what=what, **attempt(work))
        later.append((name, form))

    def slower(item: tuple[str, lb.LureForm]) -> None:
        name, form = item
        found = attempt(lambda: lb.liplt(form, guarantee="probabilistic").value)
        rows.add(net=name, what="liplt, probabilistic", **found)
        rows.add(net=name, what="empirical", **attempt(lambda: lb.empirical(form).value))

    with ThreadPoolExecutor(3) as pool:  # nearly all of it is compilation
        list(pool.map(slower, later))


def slopes(out: Path, small: bool) -> None:
    """The steepest slopes that float64 differences attain, of every net."""
    from attained import Search, attained

    rows = Rows(out)

    def one(name: str) -> None:
        rows.add(net=name, what="slope", **attempt(lambda: attained(Search(network(name)[0])).value))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, NETS[:3] if small else NETS))


def check(cpu: Path, attained: Path, gpu: Path, out: Path) -> None:
    """Rows of the device against those of the CPU, against attained slopes and attacks (all float64, on the CPU)."""
    rows = Rows(out)
    ours, theirs, steepest = (
        {(r["net"], r["what"]): r for r in json.loads(p.read_text())["rows"]} for p in (gpu, cpu, attained)
    )

    def one(name: str) -> None:
        made = attempt(lambda: network(name))
        for (net, what), row in ours.items():
            if net != name:
                continue
            error = row.get("error", made.get("error"))
            if error is not None:
                rows.add(net=name, what=what, held=False, error=error)
                continue
            value = np.asarray(row["value"], np.float64)
            other = np.asarray(theirs.get((name, what), {}).get("value", np.nan), np.float64)
            with np.errstate(invalid="ignore"):
                gap = np.abs(value - other) / np.maximum(np.abs(other), 1e-300)
            gap = np.where(value == other, 0.0, gap)  # radii may be infinite
            upper = theirs.get((name, "lipsdp"), {}).get("value", np.inf)
            slope = steepest.get((name, "slope"), {}).get("value", np.nan)
            held, slack = _holds(what, *made["value"], value, slope, upper)
            rows.add(net=name, what=what, held=held, slack=slack, relative_to_cpu=float(np.max(gap)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, dict.fromkeys(name for name, _ in ours)))


def _holds(
    what: str, form: lb.LureForm, x: np.ndarray, value: np.ndarray, slope: float, upper: float
) -> tuple[bool, float]:
    """Whether nothing contradicts a value, and how near it comes: slope / bound, or the least margin."""
    if what.startswith("radius"):
        margins = _attack(form, x, np.minimum(value, 1e6))
        return bool((margins[value > 0] >= -1e-9).all()), float(margins.min())
    if what == "empirical":  # a lower bound: below every upper one
        slope, value = float(value), np.asarray(upper)
    ratio = (_slopes_in_balls(form, x, EPS) if what == "local" else slope) / value
    return bool((ratio <= 1 + 1e-9).all()), float(np.max(ratio))


def _slopes_in_balls(form: lb.LureForm, x: np.ndarray, eps: float) -> np.ndarray:
    """(N,) the steepest difference quotient of pairs in the balls."""
    rng = np.random.default_rng(2)
    best = np.zeros(len(x))
    flat = x.reshape(len(x), -1).astype(np.float64)
    for _ in range(40):
        step = rng.standard_normal((2, *flat.shape))
        step *= eps * rng.uniform(0, 1, (2, len(x), 1)) / np.linalg.norm(step, axis=2, keepdims=True)
        step[1] = np.where(rng.uniform(size=(len(x), 1)) < 0.5, step[0] * 0.99, step[1])
        a, b = flat + step
        change = outputs(form, a.reshape(x.shape)) - outputs(form, b.reshape(x.shape))
        best = np.maximum(best, np.linalg.norm(change, axis=1) / np.linalg.norm(a - b, axis=1))
    return best


def _attack(form: lb.LureForm, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """(N,) the least margin that gradient steps and random points find within the radii."""
    y = outputs(form, x).argmax(axis=1)
    rng, centre = np.random.default_rng(3), x.astype(np.float64)
    least, wide = np.full(len(x), np.inf), (len(x), *[1] * (x.ndim - 1))

    def size(a: np.ndarray) -> np.ndarray:
        return np.maximum(np.linalg.norm(a.reshape(len(x), -1), axis=1), 1e-300).reshape(wide)

    for _ in range(4):
        step = rng.standard_normal(x.shape)
        for _ in range(12):
            step = step * radius.reshape(wide) * (1 - 1e-12) / size(step)
            with jax.enable_x64(True):
                found = _margins(form, jnp.asarray(centre + step), jnp.asarray(y))
                value, slope = (np.asarray(a) for a in found)
            least = np.minimum(least, value)
            step = step - 0.5 * radius.reshape(wide) * slope / size(slope)
    return least


def traces(out: Path, small: bool) -> None:
    """Programs whose products the device rounds: none of them may be refused."""
    rows = Rows(out)
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    def mlp(widths: tuple[int, ...], **options: Any) -> tuple[Any, Any]:
        weights = [normal(n, m, scale=m**-0.5) for m, n in itertools.pairwise(widths)]

        def fn(x: jax.Array) -> jax.Array:
            for w in weights[:-1]:
                x = jax.nn.relu(jnp.matmul(w, x, **options))
            return jnp.matmul(weights[-1], x, **options)

        return fn, jax.ShapeDtypeStruct((widths[0],), jnp.float32)

    def convolutions() -> tuple[Any, Any]:
        kernels = [normal(3, 3, a, b, scale=(9 * a) ** -0.5) for a, b in ((3, 32), (32, 32), (32, 10))]

        def fn(x: jax.Array) -> jax.Array:
            h = x[None]
            for kernel in kernels:
                h = jax.nn.relu(
                    jax.lax.conv_general_dilated(
                        h, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                    )
                )
            return h.sum(axis=(0, 1, 2))

        return fn, jax.ShapeDtypeStruct((16, 16, 3), jnp.float32)

    def cancelling() -> tuple[Any, Any]:
        w, v = normal(64, 32), normal(4, 64)
        total = v @ jnp.ones((64, 1))  # sums of hidden neurons that nearly cancel
        fn = lambda x: (v - total / 64) @ (100.0 + jax.nn.relu(w @ x))  # noqa: E731
        return fn, jax.ShapeDtypeStruct((32,), jnp.float32)

    def constant_product() -> tuple[Any, Any]:
        a, b, v = normal(300, 400, scale=0.05), normal(400, 200, scale=0.05), normal(5, 300)
        return (lambda x: v @ jax.nn.relu((a @ b) @ x)), jax.ShapeDtypeStruct((200,), jnp.float32)

    wide = (64, 64, 10) if small else (784, 512, 512, 512, 10)
    batched, spec = mlp(wide)
    kinds: dict[str, Callable[[], Any]] = {
        "mlp": lambda: lb.trace(*mlp(wide)),
        "mlp, deep": lambda: lb.trace(*mlp((32, *[64] * (4 if small else 20), 5))),
        "mlp, precision=DEFAULT": lambda: lb.trace(*mlp(wide, precision=jax.lax.Precision.DEFAULT)),
        "convolutions": lambda: lb.trace(*convolutions()),
        "cancelling": lambda: lb.trace(*cancelling()),
        "product of constants": lambda: lb.trace(*constant_product()),
        "batched": lambda: lb.trace(
            jax.vmap(batched), jax.ShapeDtypeStruct((5, *spec.shape), spec.dtype), batched=True
        ),
    }
    for name, make in kinds.items():
        found = attempt(make)
        found.pop("value", None)
        rows.add(what=name, held="error" not in found, **found)
    for name, (fn, spec) in {"mlp": mlp(wide), "convolutions": convolutions()}.items():
        x = jnp.asarray(rng.standard_normal(spec.shape), jnp.float32)
        with jax.default_matmul_precision("highest"):
            exact = np.asarray(jax.jit(fn)(x), np.float64)
        gap = np.abs(np.asarray(fn(x), np.float64) - exact).max() / np.abs(exact).max()
        rows.add(what=f"relative rounding of the device, {name}", value=float(gap))


# --- fast? -----------------------------------------------------------------------------------------------------------


def steps(out: Path, small: bool) -> None:
    """Seconds an epoch of 6C2F at batch 512 (50 000 made-up images), the losses by turns."""
    import crm

    crm.BATCH = 64 if small else 512
    rows, count, net = Rows(out), 1 if small else 50_000 // 512, "784-256-256-10" if small else "6C2F"
    kinds: dict[str, Json] = {"LipLT": crm.LIPLT["LipLT, 5 iterations"], "plain": {"loss": "cross-entropy"}}
    if not small:
        kinds["naive"] = crm.LIPLT["naive, 5 iterations"]
    jobs = {}
    for name, settings in kinds.items():
        found = attempt(lambda settings=settings: crm.Job(net, settings, count))
        job = found.pop("value", None)
        rows.add(loss=name, what="compile and first epoch", **found)
        if job is None:
            continue
        jobs[name] = job
        # at once, so that a section that is stopped has measured something
        for _ in range(1 if small else 3):
            for other, compiled in jobs.items():
                rows.add(loss=other, what="epoch", beside=name, value=compiled(), images=count * crm.BATCH)


def data(folder: Path, small: bool) -> None:
    """Files in the format of CIFAR-10: a class is a faint pattern under noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    count = 64 if small else 10_000
    patterns = rng.integers(-40, 41, (10, 3072))
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
    for name in names:
        labels = rng.integers(0, 10, count)
        noise = rng.integers(40, 216, (count, 3072))
        pixels = np.clip(noise + patterns[labels], 0, 255).astype(np.uint8)
        np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1).tofile(folder / name)


def speed(out: Path, small: bool) -> None:
    """Every verb twice on fresh forms: the second time what is compiled is known already."""
    from lipbounds.training.models import build, spec_for

    rows, rng = Rows(out), np.random.default_rng(0)
    widths = SIZES[small]
    weights = [
        (rng.standard_normal((n, m)) / np.sqrt(m)).astype(np.float32) for m, n in itertools.pairwise(widths)
    ]
    x = rng.standard_normal((5 if small else 100, widths[0])).astype(np.float32)
    arch, shape = ("16-10", (4, 4, 1)) if small else ("6C2F", (32, 32, 3))
    arch = f"{int(np.prod(shape))}-12-10" if small else arch
    model = build(spec_for(arch, shape, 10), 0)

    def dense() -> lb.LureForm:
        return lb.from_weights(weights)

    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    verbs: dict[str, Callable[[], Any]] = {
        f"lipsdp of {'-'.join(map(str, widths))}": lambda: lb.lipsdp(dense(), pairwise=True),
        f"local, {len(x)} images": lambda: lb.local(dense(), x, EPS, pairwise=True),
        f"liplt of {arch}, training's final bound": lambda: lb.liplt(lb.trace(model, image), pairwise=True),
        f"liplt of {arch}, probabilistic": lambda: lb.liplt(
            lb.trace(model, image), pairwise=True, guarantee="probabilistic"
        ),
    }
    for turn, (name, verb) in itertools.product(("first", "again"), verbs.items()):
        found = attempt(verb)
        bound = found.pop("value", None)
        if bound is not None:
            found |= {"guarantee": bound.guarantee, "value": float(np.max(bound.value))}
        rows.add(what=name, turn=turn, **found)


def proofs(out: Path, small: bool) -> None:
    """Proofs of single matrices, first and again, on the device and on the host: seconds and the bounds themselves."""
    from lipbounds._lipsdp.tap_proof import prove_psd
    from lipbounds._norms.matrices import verified_norm
    from lipbounds._text.device import proofs_on

    rows, rng = Rows(out), np.random.default_rng(0)

    def semidefinite(m: np.ndarray) -> float:
        return float(prove_psd(m))

    for shape in [(700, 600)] if small else [(2000, 1000), (2000, 2000), (8192, 4096), (8192, 8192)]:
        a = rng.standard_normal(shape) / np.sqrt(shape[0])
        gram = a.T @ a
        gram.flat[:: len(gram) + 1] += 1e-7
        checks: dict[str, Callable[[], float]] = {
            "norm": lambda a=a: verified_norm(a),
            "positive definite": lambda m=gram: semidefinite(m),
        }
        for what, proof in checks.items():
            for place in ("auto", "auto", "cpu"):
                if place == "cpu" and max(shape) ** 2 * min(shape) > 3e11:
                    continue
                with proofs_on(place) as notes:
                    found = attempt(proof)
                    rows.add(what=what, shape=str(shape), place=place, notes="; ".join(notes), **found)


def lipsdp(out: Path, small: bool) -> None:
    """LipSDP of the whole 6C2F, all pairs, beside LipLT of the same form."""
    import lipsdp_wide

    rows = Rows(out)
    lipsdp_wide.measure(rows.add, part=1, side=8 if small else 32, seconds=295.0)


PARTS: dict[str, Callable[..., None]] = {
    "lipsdp": lipsdp,
    "proofs": proofs,
    "bounds": bounds,
    "slopes": slopes,
    "traces": traces,
    "steps": steps,
    "data": data,
    "speed": speed,
}


def main() -> None:
    parser = command_line(__doc__, out=False)
    parser.add_argument("part", choices=(*PARTS, "check"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if args.part == "check":
        check(*args.paths)
    else:
        PARTS[args.part](*args.paths, small=args.small)


if __name__ == "__main__":
    main()
