"""Compiled programs that the command line keeps: where, when not, and what a broken file does."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from command import run
from jax.experimental.compilation_cache import compilation_cache

from lipbounds._cli import programs


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """No folder chosen for jax, as in a fresh process; the folder that LIPBOUNDS_CACHE names."""
    chosen = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    monkeypatch.setenv(programs.VARIABLE, str(tmp_path / "kept"))
    monkeypatch.setitem(programs._SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0)
    yield tmp_path / "kept"
    jax.config.update("jax_compilation_cache_dir", chosen)
    compilation_cache.reset_cache()


def compiled() -> tuple[int, int]:
    """(programs read from a folder, programs looked for in vain) of a function that is new to this process."""
    seen = {"/jax/compilation_cache/cache_hits": 0, "/jax/compilation_cache/cache_misses": 0}

    def count(event: str, **_: object) -> None:
        if event in seen:
            seen[event] += 1

    jax.monitoring.register_event_listener(count)
    try:
        jax.jit(lambda x: jnp.sin(x) * 7)(jnp.float32(3))
    finally:
        jax.monitoring.unregister_event_listener(count)
    hits, misses = seen.values()
    return hits, misses


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.rglob("*-cache"))


def test_programs_are_kept_for_the_next_process_and_jax_is_left_as_it_was(bare: pathlib.Path) -> None:
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    with programs.kept() as folder:
        assert folder is not None and folder.parent == bare and folder.stat().st_mode & 0o777 == 0o700
        assert compiled()[1] > 0
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    kept = entries(bare)
    assert kept and jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before
    with programs.kept():
        hits, misses = compiled()
    assert hits > 0 and misses == 0 and entries(bare) == kept
    assert compiled() == (0, 0)  # outside nothing is kept


def test_a_file_that_another_process_is_writing_is_no_error(bare: pathlib.Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with programs.kept():
            compiled()
            for path in entries(bare):
                path.write_bytes(path.read_bytes()[:20])
            jax.clear_caches()
            compiled()
    assert not said


@pytest.mark.parametrize("why", ["not wanted", "off", "chosen for jax", "no folder can be made"])
def test_where_nothing_is_kept(bare: pathlib.Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "off":
        monkeypatch.setenv(programs.VARIABLE, "OFF")
    elif why == "chosen for jax":
        jax.config.update("jax_compilation_cache_dir", str(bare / "other"))
    elif why == "no folder can be made":
        bare.write_text("a file")
    chosen = jax.config.jax_compilation_cache_dir
    with programs.kept(why != "not wanted") as folder:
        assert folder is None and jax.config.jax_compilation_cache_dir == chosen
    assert not entries(bare)


def test_the_folder_is_that_of_the_users_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv(programs.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert programs.user_folder() == pathlib.Path("/caches/lipbounds")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert programs.user_folder() == pathlib.Path("/home/me/.cache/lipbounds")
    monkeypatch.setattr("sys.platform", "darwin")
    assert programs.user_folder() == pathlib.Path("/home/me/Library/Caches/lipbounds")
    monkeypatch.setenv(programs.VARIABLE, "~/here")
    assert programs.user_folder() == pathlib.Path("/home/me/here")


def test_the_oldest_programs_go(tmp_path: pathlib.Path) -> None:
    for age, name in enumerate(["new", "middle", "old"]):
        path = tmp_path / "folder" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - age, 1000 - age))
    programs._prune(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["middle", "new"]


def test_the_command_line_keeps_programs_unless_told(bare: pathlib.Path) -> None:
    run("--no-cache", "verify", "none.certificate", "--model", "none.safetensors", code=2)
    assert not bare.exists()
    run("verify", "none.certificate", "--model", "none.safetensors", code=2)
    assert bare.is_dir() and jax.config.jax_compilation_cache_dir is None
    text = " ".join(run("--help").stdout.split())
    assert "--no-cache" in text and programs.VARIABLE in text
