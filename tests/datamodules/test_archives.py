"""A file that cannot be used is refused by name, and nothing in a file is executed."""

import zipfile

import numpy as np
import pytest

from glai_lightning.datamodules.archives import read_archive


def test_the_keys_asked_for_are_read_and_others_are_left_alone(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, a=np.arange(3), b=np.ones(2), other=np.array([None]))
    arrays = read_archive(str(path), required=["a"], optional=["b", "c"])
    assert {key: array.tolist() for key, array in arrays.items()} == {"a": [0, 1, 2], "b": [1.0, 1.0]}


def write_garbage(path):
    path.write_bytes(b"no archive at all")


def write_nothing(path):
    path.write_bytes(b"")


def write_single_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def write_cut_short(path):
    np.savez(path, a=np.ones(1000))
    path.write_bytes(path.read_bytes()[:4000])


def write_flipped_bytes(path):
    np.savez_compressed(path, a=np.arange(1000))
    content = bytearray(path.read_bytes())
    content[200:240] = bytes(40)
    path.write_bytes(content)


def write_objects(path):
    np.savez(path, a=np.array([{"harm": "possible"}], dtype=object))


def write_foreign_member(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "text")


def write_no_member(path):
    np.savez(path, x=np.ones(1), y=np.ones(1))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_garbage, "Expected `path` to be an .npz archive, but '.*data.npz' is not one"),
        (write_nothing, "Expected `path` to be an .npz archive"),
        (write_single_array, "Expected `path` to be an .npz archive"),
        (write_cut_short, "is not one, or is cut short"),
        (write_flipped_bytes, "Expected `a` in '.*data.npz' to be readable, but it is damaged"),
        (write_objects, "Expected `a` in '.*data.npz' to be an array of numbers, but"),
        (write_foreign_member, "Expected `a` in '.*data.npz' to be an array, but it is some other file"),
        (write_no_member, "Expected '.*data.npz' to hold `a`, but it lacks `a`: it holds `x`, `y`"),
    ],
)
def test_unusable_files_are_refused_with_what_is_wrong(tmp_path, write, message):
    path = tmp_path / "data.npz"
    write(path)
    with pytest.raises(ValueError, match=message) as raised:
        read_archive(path, required=["a"])
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


@pytest.mark.parametrize("name", ["missing.npz", "."])
def test_a_path_without_a_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="Expected `path` to be an existing file, but got"):
        read_archive(tmp_path / name, required=["a"])
