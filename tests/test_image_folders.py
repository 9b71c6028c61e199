"""Tiny-ImageNet from a small tree in the official layout, and what is wrong with such trees."""

import numpy as np
import pytest
from PIL import Image

from lipbounds.training.data import tiny_imagenet
from lipbounds.training.image_folders import class_folders

WNIDS = ["n02", "n01", "n03"]


def jpeg(path, color, mode="RGB", size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, quality=100)


@pytest.fixture
def tiny(tmp_path):
    """Three classes of two images, 6 wide and 8 high; the red channel of an image says its class."""
    folder = tmp_path / "tiny-imagenet-200"
    for number, wnid in enumerate(WNIDS):
        for i in range(2):
            jpeg(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", (80 * number, 100, 10 * i))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t5\t5\n")
    jpeg(folder / "val" / "images" / "val_0.JPEG", 90, mode="L")
    jpeg(folder / "val" / "images" / "val_1.JPEG", (0, 100, 200))
    lines = ["val_1.JPEG\tn03\t0\t0\t5\t5", "val_0.JPEG\tn01\t0\t0\t5\t5"]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (folder / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\ttench\n")
    return folder


@pytest.mark.parametrize("inside", [True, False])
def test_tiny_imagenet(tiny, inside):
    seen = []
    data = tiny_imagenet(
        tiny if inside else tiny.parent, progress=lambda what, share: seen.append((what, share))
    )
    assert data.name == "tiny-imagenet" and data.input_shape == (8, 6, 3)
    assert data.class_names == ("tench", "goldfish, Carassius auratus", "n03")
    np.testing.assert_array_equal(data.train_y, [0, 0, 1, 1, 2, 2])
    # the colours were chosen by class and number; JPEG moves them by a few levels
    np.testing.assert_allclose(data.train_pixels[:, 4, 3, 0], [0, 0, 80, 80, 160, 160], atol=4)
    np.testing.assert_allclose(data.train_pixels[:, 4, 3, 2], [0, 10] * 3, atol=4)
    np.testing.assert_array_equal(data.test_y, [2, 1])
    np.testing.assert_allclose(data.test_pixels[0, 4, 3], [0, 100, 200], atol=4)
    np.testing.assert_array_equal(data.test_pixels[1], np.full((8, 6, 3), data.test_pixels[1, 0, 0, 0]))
    assert abs(int(data.test_pixels[1, 0, 0, 0]) - 90) <= 4
    assert seen == [("reading training images", 0.0), ("reading validation images", 6 / 8)]


def test_tiny_imagenet_without_words(tiny):
    (tiny / "words.txt").unlink()
    assert tiny_imagenet(tiny).class_names == tuple(WNIDS)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("wnids.txt", r"no wnids\.txt in"),
        ("val/val_annotations.txt", r"no val/val_annotations\.txt in"),
        (
            "val/images/val_0.JPEG",
            r"1 of 2 images that .*val_annotations\.txt lists are missing.*val_0\.JPEG",
        ),
    ],
)
def test_a_missing_tiny_imagenet_file_is_named(tiny, path, message):
    (tiny / path).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        tiny_imagenet(tiny)


def test_missing_and_empty_class_folders(tiny):
    for path in (tiny / "train" / "n01" / "images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*\.JPEG in .*n01"):
        tiny_imagenet(tiny)
    (tiny / "train" / "n01" / "images").rmdir()
    with pytest.raises(
        FileNotFoundError, match=r"lacks the folders of 1 of 3 classes.*n01.*cs231n\.stanford\.edu"
    ):
        tiny_imagenet(tiny)


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((6, 8), 300, np.uint16)).save(tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png .*its pixels have more than 8 bits"):
        class_folders(tmp_path, 1)


def append(text):
    return lambda path: path.write_bytes(path.read_bytes() + text)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train/n03/images/n03_1.JPEG", lambda path: path.write_bytes(path.read_bytes()[:-90]), "not a JPEG"),
        (
            "train/n02/images/n02_0.JPEG",
            lambda path: path.write_bytes(b"nothing"),
            "not a JPEG that can be decoded",
        ),
        ("val/images/val_1.JPEG", lambda path: Image.new("RGB", (6, 8)).save(path, "PNG"), "not a JPEG"),
        (
            "val/images/val_1.JPEG",
            lambda path: jpeg(path, 0, size=(8, 8)),
            "8 x 6 pixels, .*val_1.JPEG has 8 x 8: all",
        ),
        (
            "train/n01/images/n01_0.JPEG",
            lambda path: jpeg(path, 0, size=(6, 9)),
            "9 x 6 pixels, .*8 x 6: all",
        ),
        ("val/images/val_7.JPEG", lambda path: jpeg(path, 0), "does not list 1 images, such as"),
        ("val/val_annotations.txt", append(b"val_0.JPEG\tn02\n"), "line 3: val_0.JPEG is listed twice"),
        (
            "val/val_annotations.txt",
            append(b"val_2.JPEG\tn99\t0\n"),
            "line 3: no file and class of wnids.txt",
        ),
        ("val/val_annotations.txt", append(b"val_2.JPEG\n"), "line 3: no file and class"),
        ("wnids.txt", append(b"n01\n"), "none twice"),
        ("wnids.txt", lambda path: path.write_bytes(b""), "at least one class"),
        ("words.txt", append(b"\xff"), "is not a text file"),
    ],
)
def test_a_wrong_tiny_imagenet_file_is_one_plain_error(tiny, name, change, message):
    change(tiny / name)
    with pytest.raises(ValueError, match=message) as caught:
        tiny_imagenet(tiny)
    assert str(tiny / name) in str(caught.value)


def test_a_class_folder_that_is_not_listed(tiny):
    jpeg(tiny / "train" / "n04" / "images" / "n04_0.JPEG", 0)
    with pytest.raises(ValueError, match=r"holds 1 folders that wnids\.txt does not list, such as n04"):
        tiny_imagenet(tiny)


def test_validation_images_of_another_size_than_the_training_images(tiny):
    for name in ("val_0", "val_1"):
        jpeg(tiny / "val" / "images" / f"{name}.JPEG", 0, size=(6, 6))
    with pytest.raises(ValueError, match=r"training images of shape \(8, 6, 3\), test images \(6, 6, 3\)"):
        tiny_imagenet(tiny)


@pytest.mark.slow
def test_the_real_tiny_imagenet(official):
    data = official(tiny_imagenet)
    assert data.train_pixels.shape == (100_000, 64, 64, 3) and data.test_pixels.shape == (10_000, 64, 64, 3)
    assert (np.bincount(data.train_y) == 500).all() and (np.bincount(data.test_y) == 50).all()


@pytest.mark.parametrize("name", ["../elsewhere", "n" * 300, "n\0", "/n01"])
def test_what_is_no_name_of_a_class_is_refused(tiny, name):
    (tiny / "wnids.txt").write_text("\n".join([*WNIDS, name]) + "\n")
    with pytest.raises(ValueError, match="no name of a class"):
        tiny_imagenet(tiny)


def test_images_so_large_that_all_together_would_fill_the_memory(tiny):
    jpeg(tiny / "train" / "n02" / "images" / "n02_0.JPEG", 90, size=(2000, 8))
    with pytest.raises(ValueError, match="8 x 2000 pixels, more than 1024 a side"):
        tiny_imagenet(tiny)
