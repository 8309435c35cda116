"""A file that cannot be used is refused by name, and nothing in a file is executed."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from glai_lightning.datamodules.arrays import read_archive


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


def write_header(path, shape, content=bytes(24), forged_size=None):
    """Write an array whose header claims a shape, and a directory of the archive that claims a size."""
    member = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", member.getvalue() + content)
        if forged_size is not None:
            archive.getinfo("a.npy").file_size = forged_size


def write_larger_than_it_is(path):
    write_header(path, (10, 10))


def write_larger_than_any_memory(path):
    write_header(path, (2**50,))


def write_a_bomb(path):
    write_header(path, (2**50,), forged_size=2**53)


def write_a_second_member(path):
    """A small `a.npy` beside `a`, which numpy reads in its place, and which unpacks to a thousand times its size."""
    bomb, small = io.BytesIO(), io.BytesIO()
    np.save(bomb, np.zeros(10**6))
    np.save(small, np.zeros(3))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bomb.getvalue())
        archive.writestr("a.npy", small.getvalue())


def write_a_shape_that_is_no_number(path):
    write_header(path, (True, 8), bytes(64))


def write_locked(path):
    np.savez(path, a=np.ones(3))
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)


def write_code_in_the_header(path):
    member = b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').mkdir('harm-was-done')".ljust(63) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", member)


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
        (write_larger_than_it_is, "Expected `a` in '.*data.npz' to be an array of numbers, but it cannot be read"),
        (write_larger_than_any_memory, "Expected `a` in '.*data.npz' to "),
        (write_a_bomb, "Expected '.*data.npz' to fit into memory, .* bytes, but its arrays say that they take"),
        (write_a_second_member, "Expected '.*data.npz' to hold one `a`, but it holds 2"),
        (write_a_shape_that_is_no_number, "Expected `a` in '.*data.npz' to be an array of numbers, but it cannot be"),
        (write_locked, "Expected `a` in '.*data.npz' to be readable, but it is damaged: .*password"),
        (write_code_in_the_header, "Expected `a` in '.*data.npz' to be an array of numbers, but it cannot be read"),
        (write_no_member, "Expected '.*data.npz' to hold `a`, but it lacks `a`: it holds `x`, `y`"),
    ],
)
def test_unusable_files_are_refused_with_what_is_wrong(tmp_path, monkeypatch, write, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data.npz"
    write(path)
    with pytest.raises(ValueError, match=message) as raised:
        read_archive(path, required=["a"])
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    assert not Path("harm-was-done").exists()


@pytest.mark.parametrize("name", ["missing.npz", "."])
def test_a_path_without_a_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="Expected `path` to be an existing file, but got"):
        read_archive(tmp_path / name, required=["a"])
