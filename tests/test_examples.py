"""The notebook is committed without outputs and every cell of it runs; documents say what the code does."""

import base64
import importlib.util
import json
import os
import pathlib
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

import lipbounds as lb
from lipbounds.training.data import digits

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
NOTEBOOK, FORGED = EXAMPLES / "compare_bounds.ipynb", EXAMPLES / "forged_layers.ipynb"
ONNX = EXAMPLES / "certify_onnx.ipynb"
DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "lipsdp.md"
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(notebook)
where = {"metadata": {"path": sys.argv[3]}}
NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
nbformat.write(notebook, sys.argv[2])
"""
MISSING = [name for name in ("nbclient", "ipykernel") if importlib.util.find_spec(name) is None]


def cells(path=NOTEBOOK):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text(source):
    return source if isinstance(source, str) else "".join(source)


def tagged(found, tag):
    (cell,) = (c for c in found if tag in c["metadata"].get("tags", ()))
    return cell


def outputs(cell, kind="text/plain"):
    """What a cell printed and showed, as one text."""
    parts = [o["text"] if "text" in o else o.get("data", {}).get(kind, "") for o in cell["outputs"]]
    return "\n".join(text(part) for part in parts)


@pytest.mark.parametrize("path", [NOTEBOOK, FORGED, ONNX], ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    found = cells(path)
    code = [c for c in found if c["cell_type"] == "code"]
    assert len(code) >= 10 and len(found) - len(code) >= 5
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in code)
    assert len({c["id"] for c in found}) == len(found)
    assert max(text(c["source"]).count("\n") + 1 for c in code) <= 22


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def large_digits(tmp_path):
    """A folder with IDX files made of scikit-learn's digits, enlarged to 28 x 28."""
    data, folder = digits(), tmp_path / "mnist"
    folder.mkdir()
    for part, x, y in (("train", data.train_x, data.train_y), ("t10k", data.test_x, data.test_y)):
        images = np.pad(np.kron(np.rint(x[..., 0] * 255).astype(np.uint8), np.ones((1, 3, 3), np.uint8)), 2)[
            2:-2
        ]
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(y.astype(np.uint8)))
    return tmp_path


def execute(notebook, folder, data=None):
    """The cells of a notebook after all of them ran in `folder`; nothing may be said on stderr."""
    done = folder / "done.ipynb"
    # full optimisation, as a user has it: the notebook trains
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIPBOUNDS_DATA")}
    environment |= {"IPYTHONDIR": str(folder / "ipython")} | ({"LIPBOUNDS_DATA": str(data)} if data else {})
    command = [sys.executable, "-c", EXECUTE, str(notebook), str(done), str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    found = cells(done)
    said = [o for c in found for o in c.get("outputs", ()) if o.get("name") == "stderr"]
    assert said == [], said  # warnings
    return found


def pictures(found):
    shown = [o["data"] for c in found for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    return [base64.b64decode(data["image/png"]) for data in shown]


def quicker(path, folder, **settings):
    """A copy of a notebook with other settings."""
    book = json.loads(path.read_text(encoding="utf-8"))
    tagged(book["cells"], "settings")["source"] = "\n".join(f"{k} = {v}" for k, v in settings.items())
    copy = folder / path.name
    copy.write_text(json.dumps(book), encoding="utf-8")
    return copy


NEEDS = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} to execute a notebook")


@pytest.mark.slow
@NEEDS
@pytest.mark.parametrize("with_mnist", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_notebook_runs(large_digits, tmp_path, with_mnist):
    found = execute(NOTEBOOK, tmp_path, large_digits if with_mnist else None)
    table = outputs(tagged(found, "compare"))
    assert all(name in table for name in ("empirical", "lipsdp", "liplt-optimized", "naive", "verified"))
    assert outputs(tagged(found, "verify")).strip() == "True"
    assert outputs(tagged(found, "refused")).startswith("refused: ")
    if with_mnist:
        assert outputs(tagged(found, "mnist")).startswith("1437 training and 360 test images")
        assert "lipsdp" in outputs(tagged(found, "mnist-compare"))
    images = pictures(found)
    assert len(images) == (6 if with_mnist else 5) and min(map(len, images)) > 5000


QUICK = {
    "EPOCHS": 5,
    "IMAGES": 80,
    "STEPS": 5,
    "QUERIES": 30,
    "EXAMPLES": 16,
    "RATIOS": "[0, 2**-6]",
    "EPS": 0.05,
}


@NEEDS
@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_the_notebook_on_forged_layers_runs(large_digits, tmp_path, full):
    book = FORGED if full else quicker(FORGED, tmp_path, **QUICK)
    found = execute(book, tmp_path, large_digits if full else None)
    assert "jumps" in outputs(tagged(found, "refused"))
    assert "radii of kept columns unchanged: True" in outputs(tagged(found, "radii"))
    assert "of the smoothly forged network" in outputs(tagged(found, "smooth"))
    assert "upper bounds of robust accuracy" in outputs(tagged(found, "study"))
    claims = outputs(tagged(found, "claims"))
    assert claims.count("\n") >= 14 and all(
        word in claims for word in ("holds here", "does not", "AutoAttack")
    )
    words = outputs(tagged(found, "mnist"))
    assert ("MNIST is skipped" in words) != full
    images = pictures(found)
    assert len(images) == 4 and min(map(len, images)) > 5000


QUICK_ONNX = {
    "EPOCHS": 5,
    "IMAGES": 24,
    "STEPS": 10,
    "RESTARTS": 1,
    "ROUNDS": 5,
    "MEAN, STD": "np.float32(0.3), np.float32(0.375)",
}


@pytest.mark.slow
@NEEDS
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_notebook_on_onnx_files_runs(tmp_path, full):
    pytest.importorskip("onnx")
    found = execute(ONNX if full else quicker(ONNX, tmp_path, **QUICK_ONNX), tmp_path)
    for tag in ("load", "state_dict"):
        gap = re.search(r"largest difference of two logits: (\S+)", outputs(tagged(found, tag)))
        assert gap and float(gap[1]) < 1e-4
    least = re.search(r"at least (\S+) times", outputs(tagged(found, "gain")))
    assert least and float(least[1]) > 1.2
    attack = outputs(tagged(found, "attack"))
    flip = re.search(r"found at (\S+) local radii", attack)
    assert attack.startswith("flips inside a certified radius: 0\n") and flip and 1 < float(flip[1]) < 20
    assert "the same radii as above: True" in outputs(tagged(found, "cli"))
    refused = outputs(tagged(found, "refused"))
    for words in (
        "Snake at node '/act'",
        "'height'",
        "certify the logits",
        "Softmax (node '/softmax'), was dropped",
    ):
        assert words in refused
    images = pictures(found)
    assert len(images) == 2 and min(map(len, images)) > 5000


def test_without_mnist_the_notebook_says_so(monkeypatch, capsys):
    monkeypatch.delenv("LIPBOUNDS_DATA", raising=False)
    names = {}
    exec("from lipbounds.training.data import mnist", names)
    exec(text(tagged(cells(), "mnist")["source"]), names)
    assert names["big"] is None
    assert capsys.readouterr().out.startswith("MNIST is skipped: ")
    later = cells()[cells().index(tagged(cells(), "mnist")) + 1 :]
    for cell in later:
        if cell["cell_type"] == "code":
            exec(text(cell["source"]), names)
    assert capsys.readouterr().out == ""


def test_the_documented_file_format_is_the_one_that_is_written(tmp_path):
    """Every header field, metadata string and tensor of a saved certificate stands in docs/lipsdp.md."""
    rng = np.random.default_rng(0)
    form = lb.from_weights([rng.standard_normal(shape) for shape in ((5, 4), (6, 5), (3, 6))])
    lb.save_certificate(lb.lipsdp(form, pairwise=True), tmp_path / "net.cert")
    raw = (tmp_path / "net.cert").read_bytes()
    index = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata = index.pop("__metadata__")
    tensors = {re.sub(r"\d+", lambda m: "{k}" if m.start() > 5 else "{i}", name) for name in index}
    written = {*metadata, *json.loads(metadata["header"]), *tensors}
    documented = set(re.findall(r"`([^`\s]+)`", DOCUMENT.read_text(encoding="utf-8")))
    assert {"proof{i}.D{k}", "pairwise", "value", "digest"} <= written <= documented
    assert {metadata["format"], metadata["version"]} <= documented


def test_networks_are_made_in_a_new_folder_and_by_known_names_only(tmp_path, monkeypatch, capsys):
    from lipbounds.examples import make

    monkeypatch.setattr(make, "make", lambda name, folder: {"name": name, "there": folder.is_dir()})
    monkeypatch.setattr(sys, "argv", ["make", "mlp", "--out", str(tmp_path / "a" / "new")])
    make.main()
    assert json.loads(capsys.readouterr().out) == {"name": "mlp", "there": True}
    (tmp_path / "file").touch()
    for words, said in (
        (["mpl"], "there is no network 'mpl' (did you mean 'mlp'?); there are mlp, cnn"),
        (["mlp", "--out", str(tmp_path / "file")], "is a file, so that"),
    ):
        monkeypatch.setattr(sys, "argv", ["make", *words])
        with pytest.raises(SystemExit):
            make.main()
        assert said in capsys.readouterr().err
