"""Mistakes that users make, each run to see what it is answered: `python -m tests.mistakes` writes docs/mistakes.md."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from typing import Any

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "mistakes.md"

SETUP = """
import collections

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

import lipbounds as lb

W = np.sin(np.arange(10 * 192)).reshape(10, 192).astype(np.float32) / 9
model = lambda x: W @ x.reshape(-1)
X = (np.arange(16 * 192).reshape(16, 8, 8, 3) * 37 % 256 / 255).astype(np.float32)
y = np.arange(16) % 10
mean, std = 0.5, 0.25
form = lb.trace(model, X[0])
small = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
other = lb.from_weights([[[3.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
bound = lb.naive(form)
spec = jax.ShapeDtypeStruct((8, 8, 3), np.float32)
variables = {"params": {}}
net = collections.namedtuple("Transformed", "init apply")(None, lambda params, rng, x: x)
lb.save_certificate(lb.lipsdp(small), "small.certificate")
"""

#: (section, (code, ...)): each is a mistake of one line. `$` begins a command.
MISTAKES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Units and layout", (
        "lb.certified_radius(form, 255 * X, y, bound=bound)",
        "lb.certified_radius(form, (X - mean) / std, y, bound=bound)",
        "lb.certified_radius(form, (255 * X).astype(np.uint8), y, bound=bound)",
        "lb.certified_radius(form, 255 * X, y, bound=bound, input_range=(0, 1))",
        "lb.certified_radius(form, X.transpose(0, 3, 1, 2), y, bound=bound)",
        "lb.certified_radius(form, X[0], y, bound=bound)",
        "lb.certified_radius(form, X.reshape(16, -1), y, bound=bound)",
        "lb.certified_radius(form, X[..., 0], y, bound=bound)",
        "lb.certified_radius(form, X * np.nan, y, bound=bound)",
        "lb.certified_radius(form, X, y, bound=bound, input_range=255)",
    )),
    ("Labels", (
        "lb.certified_radius(form, X, np.eye(10)[y], bound=bound)",
        "lb.certified_radius(form, X, y.astype(float), bound=bound)",
        "lb.certified_radius(form, X, y + 1, bound=bound)",
        "lb.certified_radius(form, X, y[:3], bound=bound)",
    )),
    ("Tracing", (
        "lb.trace(lambda x: x.reshape(len(x), -1) @ W.T, X)",
        "lb.trace(lambda x: x.reshape(len(x), -1) @ W.T, X[0])",
        "lb.trace(flax.linen.Dense(10), X[0])",
        "lb.trace(torch.nn.Module(), X[0])",
        "lb.trace((model, spec), spec)",
        "lb.trace(net, X[0])",
        "lb.trace(net.apply, X[0])",
        "lb.trace(variables, X[0])",
        "lb.trace([W], X[0])",
        "lb.trace(lambda x, t: model(x) + t, X[0])",
        "lb.trace(lambda a, b: a + b, (np.zeros(4), np.zeros(4)))",
        'lb.trace(lambda x: {"logits": model(x), "features": x}, X[0])',
        "lb.trace(lambda x: (model(x), x), X[0])",
        "lb.trace(model, (255 * X[0]).astype(np.uint8))",
        "lb.trace(lambda x: jnp.argmax(model(x)), X[0])",
        "lb.trace(lambda x: jax.nn.softmax(model(x)) ** 2 / x.sum(), X[0])",
        "lb.trace(lambda x: model(x) if x.sum() > 0 else model(-x), X[0])",
    )),
    ("Bounds and radii", (
        "lb.lipsdp(model)",
        "lb.liplt(small, norm=3)",
        "lb.lipsdp(small, norm=1)",
        'lb.liplt(small, guarantee="sure")',
        "lb.certified_radius(model, X, y)",
        "lb.certified_radius(other, [[1.0, 0.5]], [0], bound=lb.naive(small))",
        'lb.certified_radius(small, [[1.0, 0.5]], [0], bound=lb.liplt(small, guarantee="estimate"))',
        "lb.certified_radius(small, [[1.0, 0.5]], [0], eps=0.1)",
        "lb.local(small, [[1.0, 0.5]], 0)",
        'lb.compare(small, methods=["lipsdb"])',
        'lb.save_certificate(lb.liplt(small), "liplt.certificate")',
        'lb.load_certificate("small.certificate", other)',
        'lb.save_radii(bound, "radii.csv")',
    )),
    ("Files and commands", (
        'lb.load("net.pt")',
        "$ lipbounds certify net.pt",
        "$ lipbounds certify net.safetensors --data bytes.npz",
        "$ lipbounds certify net.safetensors --data floats.npz",
        "$ lipbounds certify net.safetensors --data floats.npz --input-range 0 1",
        "$ lipbounds certify net.safetensors --data first.npz",
        "$ lipbounds certify net.safetensors --data three.npz",
        "$ lipbounds certify net.safetensors --data table.csv",
        "$ lipbounds certify net.safetensors --data shifted.npz",
        "$ lipbounds certify net.safetensors --images x.npy",
        "$ lipbounds certify net.safetensors --eps small",
        "$ lipbounds certify net.safetensors --at-eps",
        "$ lipbounds certify net.safetensors --certificate net.certificate --method liplt",
        "$ lipbounds train crm --dataset mine --out runs/mine",
    )),
)  # fmt: skip


@contextlib.contextmanager
def workshop() -> Iterator[dict[str, Any]]:
    """A folder with the files of the mistakes, and the names that they use."""
    place = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            names: dict[str, Any] = {}
            exec(compile(SETUP, "setup", "exec"), names)
            _write_files()
            yield names
        finally:
            os.chdir(place)


@contextlib.contextmanager
def _stubbed(names: dict[str, Any]) -> Iterator[None]:
    """A stub of torch.nn, by whose name its modules are known."""
    stub, before = types.ModuleType("torch.nn"), sys.modules.get("torch.nn")
    stub.Module = type("Module", (), {"__call__": lambda self, x: x})  # type: ignore[attr-defined]
    sys.modules["torch.nn"], names["torch"] = stub, types.SimpleNamespace(nn=stub)
    try:
        yield
    finally:
        del sys.modules["torch.nn"], names["torch"]
        if before is not None:
            sys.modules["torch.nn"] = before


def _write_files() -> None:
    import numpy as np

    from lipbounds.training.models import ModelSpec, build
    from lipbounds.training.store import save_model

    spec = ModelSpec("mlp", (8, 8, 1), {"widths": "64-10"})
    model = build(spec)
    save_model("net.safetensors", model, spec)
    x = (np.arange(32 * 64).reshape(32, 8, 8, 1) * 37 % 256).astype(np.uint8)
    floats = (x / 255).astype(np.float32)
    y = np.asarray(model(floats)).argmax(1)
    np.savez("bytes.npz", x=x[:4], y=y[:4])
    np.savez("floats.npz", x=255 * floats[:4], y=y[:4])
    np.savez("first.npz", x=floats[:4].transpose(0, 3, 1, 2), y=y[:4])
    np.savez("three.npz", a=floats, b=floats, c=y)
    np.savez("shifted.npz", x=floats, y=(y + 1) % 10)
    np.save("x.npy", floats)
    pathlib.Path("table.csv").write_text("0,1,2\n")
    pathlib.Path("net.pt").write_bytes(b"")
    pathlib.Path("net.certificate").write_bytes(b"")


def answer(code: str, names: dict[str, Any]) -> str:
    """What a mistake is answered: "warning: ..." or "ErrorType: ...", with the notes of the error; "" for nothing."""
    if code.startswith("$ "):
        return _command(code[2:].split())
    with _stubbed(names) if "torch" in code else contextlib.nullcontext():
        return _call(code, names)


def _call(code: str, names: dict[str, Any]) -> str:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            exec(compile(code, "mistake", "exec"), names)
        except Exception as error:
            first = str(error) if type(error).__module__.startswith("lipbounds") or _own(error) else "..."
            first = first.partition("\n-----")[0]  # where JAX says that it filters tracebacks
            return "\n".join([f"{type(error).__name__}: {first}", *_notes(error)])
    return "\n".join(
        f"{w.category.__name__}: {w.message}" for w in seen if "lipbounds" in w.category.__module__
    )


def _notes(error: BaseException) -> list[str]:
    return [note for note in getattr(error, "__notes__", ()) if "JAX_TRACEBACK_FILTERING" not in note]


def _own(error: BaseException) -> bool:
    """Whether lipbounds wrote the message (JAX's own differ between its versions)."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and "lipbounds" in place.tb_frame.f_globals.get("__name__", "")


def _command(words: list[str]) -> str:
    from typer.testing import CliRunner

    from lipbounds._cli.main import app

    cheap = (
        ["--method", "naive", "--no-pairwise"]
        if words[1] == "certify" and "--certificate" not in words
        else []
    )
    result = CliRunner().invoke(app, [*words[1:], *cheap])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    text = re.sub(r"[╭╮╰╯─│]", " ", result.stderr)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    usage = [line for line in lines if not line.startswith(("Usage:", "Try ", "Error"))]
    return " ".join(usage)


def page() -> str:
    """docs/mistakes.md."""
    parts = [
        "# Mistakes, and what is said about them\n",
        "Every line below was run: this page is written by `python -m tests.mistakes`, and a test compares it with",
        'what is said today. "..." stands for a message of JAX. `model` is a function of one image (8, 8, 3), `form`',
        "its traced form, `X` holds 16 images in [0, 1] and `y` their labels; files are what their names say.",
    ]
    with workshop() as names:
        for section, mistakes in MISTAKES:
            parts += [f"\n## {section}\n", "| you write | you read |", "|---|---|"]
            parts += [f"| `{_cell(code)}` | {_cell(answer(code, names), breaks=True)} |" for code in mistakes]
    return "\n".join(parts) + "\n"


def _cell(text: str, breaks: bool = False) -> str:
    text = text.replace("|", "\\|")
    if breaks:
        text = re.sub(r"([*_<>\[\]`])", r"\\\1", text)
    return "<br>".join(line.strip() for line in text.splitlines())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
