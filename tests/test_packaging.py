"""What is installed is what stands in the repository."""

import importlib
import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib

import pytest

import lipbounds
from lipbounds._text.version import __version__

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MAPPED = {"training": "lipbounds.training", "analysis": "lipbounds.analysis"}


def folders_with_code() -> set[str]:
    """Every package of the three folders, by its installed name."""
    names = set()
    for top in ("lipbounds", *MAPPED):
        for init in (ROOT / top).rglob("__init__.py"):
            first, *rest = init.parent.relative_to(ROOT).parts
            names.add(".".join((MAPPED.get(first, first), *rest)))
    return names


def test_package_list_matches_the_folders():
    assert set(SETUPTOOLS["packages"]) == folders_with_code()


def test_folders_are_mapped_to_installed_names():
    nested = {name: name.replace("lipbounds.", "", 1).replace(".", "/") for name in SETUPTOOLS["packages"]}
    wanted = {name: path for name, path in nested.items() if path.split("/")[0] in MAPPED}
    assert SETUPTOOLS["package-dir"] == wanted


def test_package_data_is_listed():
    listed = {
        path.relative_to(ROOT)
        for name, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / SETUPTOOLS["package-dir"].get(name, name.replace(".", "/"))).glob(pattern)
    }
    data = {
        path.relative_to(ROOT)
        for top in ("lipbounds", *MAPPED)
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data == listed


@pytest.mark.parametrize("name", sorted(SETUPTOOLS["packages"]))
def test_packages_import_from_this_checkout(name):
    module = importlib.import_module(name)
    folder = SETUPTOOLS["package-dir"].get(name, name.replace(".", "/"))
    assert module.__file__ is not None
    assert pathlib.Path(module.__file__).parent == ROOT / folder


@pytest.mark.parametrize("folder", sorted(MAPPED))
def test_a_folder_refuses_its_bare_name(folder):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"ImportError: this folder is the package lipbounds.{folder}" in done.stderr


def test_training_and_analysis_are_kept_out_of_every_room():
    """The contract of import-linter that `.ci/run` checks names each room; what a room offers has a name in it."""
    (contract,) = (c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "forbidden")
    rooms = {name for name in folders_with_code() if name.startswith("lipbounds._")} - {"lipbounds._cli"}
    assert contract["forbidden_modules"] == [f"{room}.*" for room in sorted(rooms)]
    for room in rooms:
        module = importlib.import_module(room)
        assert all(hasattr(module, name) for name in getattr(module, "__all__", ()))


def test_one_version():
    assert importlib.metadata.version("lipbounds") == __version__
    assert lipbounds.__version__ == __version__
