"""The examples in the docstrings of the public names run and say what they show."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
import types

import pytest

import lipbounds as lb

NAMES = [
    name
    for name in lb.__all__
    if name not in ("METHODS", "__version__") and not isinstance(getattr(lb, name), types.ModuleType)
]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name(name: str) -> None:
    thing = getattr(lb, name)
    text = inspect.getdoc(thing)
    assert text is not None and text.splitlines()[0].endswith((".", "...", "`.")), (
        "the first line is a sentence"
    )
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert test.examples, f"lb.{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_public_name_is_described(name: str) -> None:
    thing = getattr(lb, name)
    if name == "Estimate" or (isinstance(thing, type) and issubclass(thing, Exception)):
        return  # its fields are those of UpperBound; errors are raised by the library
    text = inspect.getdoc(thing)
    assert text is not None
    _, _, described = text.partition("Args:\n")
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"^ +([\w, ]*, )?{parameter}(, [\w, ]*)?:", described, re.MULTILINE), parameter


LEAKS = """
import numpy as np
import lipbounds as lb

usual = {n for n in vars(lb) if not n.startswith("_")}
form = lb.from_weights([np.eye(2), np.eye(2)])
X, y = np.array([[1.0, 0.5]]), [0]
bound = lb.lipsdp(form, pairwise=True)
lb.bracket(form, X), lb.local(form, X, 0.1), lb.certified_radius(form, X, y, bound=bound, local=True)
lb.compare(form, X, y, methods=["naive", "lipsdp-layer"])
lb.training, lb.analysis, lb.interop
after = {n for n in vars(lb) if not n.startswith("_")}
faces = {"activations", "errors", "norms", "results"}  # modules of their own
public = set(lb.__all__) | faces
print(sorted(usual - public), sorted(after - public), sorted(set(dir(lb)) ^ set(lb.__all__)))
"""


def test_nothing_else_is_public_before_or_after_use() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAKS], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.split("\n")[0] == "[] [] []"
