"""Our safetensors files against the library's, and headers that lie."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rerampile import InternalError, PlanFormatError
from rerampile.tensor_file import TensorFile, TensorWriter

NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
ARRAYS = hnp.arrays(
    st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.int8, np.uint16, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


def same(a: np.ndarray, b: np.ndarray) -> None:
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@given(st.dictionaries(NAMES, ARRAYS, max_size=5), st.dictionaries(st.text(max_size=4), st.text(max_size=4)))
def test_the_library_reads_what_is_written(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        with TensorWriter(path, [(n, t.dtype, t.shape) for n, t in tensors.items()], metadata) as writer:
            for name in reversed(writer.specs):
                writer.write(name, tensors[name])
        data = path.read_bytes()
        assert writer.sha256.result() == hashlib.sha256(data).hexdigest()
        assert (int.from_bytes(data[:8], "little") + 8) % 64 == 0
        with safetensors.safe_open(path, framework="numpy") as library:
            assert set(library.keys()) == set(tensors)
            assert (library.metadata() or {}) == metadata
            for name, tensor in tensors.items():
                same(library.get_tensor(name), tensor)
        ours = TensorFile(path)
        assert ours.metadata == metadata
        for name, tensor in tensors.items():
            same(ours.read(name), tensor)
            assert ours.specs[name].offset % tensor.dtype.itemsize == 0


@given(st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=5))
def test_what_the_library_writes_is_read(tensors: dict[str, np.ndarray]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        safetensors.numpy.save_file(tensors, path, {"format": "np"})
        file = TensorFile(path)
        assert set(file.specs) == set(tensors)
        for name, tensor in tensors.items():
            same(file.read(name), tensor)
            assert tensor.size == 0 or not file.read(name).flags.writeable


def test_bfloat16(tmp_path: Path) -> None:
    values = np.array([1, -2.5], ml_dtypes.bfloat16)
    with TensorWriter(tmp_path / "t", [("a", values.dtype, values.shape)], {}) as writer:
        writer.write("a", values)
    same(TensorFile(tmp_path / "t").read("a"), values)


def test_a_file_that_does_not_stay_costs_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = list[int]()
    monkeypatch.setattr(os, "fsync", synced.append)
    a, announced = np.zeros(3, np.float32), [("a", np.float32, (3,))]
    found = {}
    for lasting in (True, False):
        with TensorWriter(tmp_path / str(lasting), announced, {}, lasting=lasting) as writer:
            writer.write("a", a)
        found[lasting] = (writer.sha256.result(), len(synced))
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()
    assert found == {True: (hashlib.sha256((tmp_path / "True").read_bytes()).hexdigest(), 1), False: ("", 1)}


def test_a_disk_that_fails_late_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with TensorWriter(tmp_path / "t", [("a", np.float32, (3,))], {}) as writer:
        writer.write("a", np.zeros(3, np.float32))
    with pytest.raises(OSError, match="Input/output error"):
        writer.sha256.result()


def test_a_writer_keeps_its_word(tmp_path: Path) -> None:
    a = np.zeros(3, np.float32)
    announced = [("a", np.float32, (3,)), ("b", np.float32, (3,))]
    twice = pytest.raises(InternalError, match="tensor 'b' was not announced, or is written twice")
    with twice, TensorWriter(tmp_path / "1", announced, {}) as w:
        w.write("b", a)
        w.write("b", a)
    with pytest.raises(InternalError, match="not as announced"), TensorWriter(tmp_path / "2", announced, {}) as w:
        w.write("a", a.astype(np.float64))
    with (
        pytest.raises(InternalError, match="tensor 'b' was never written"),
        TensorWriter(tmp_path / "3", announced, {}) as w,
    ):
        w.write("a", a)
    with pytest.raises(FileExistsError), TensorWriter(tmp_path / "3", announced, {}):
        pass


def file_with(path: Path, header: Any, body: bytes = b"\0" * 64) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


HOSTILE: dict[str, tuple[Any, str]] = {
    "no object": ([1, 2], "safetensors header is not an object"),
    "no JSON": (b"{]", "its header is not JSON"),
    "no text": (b'{"\xff": 1}', "its header is not JSON"),
    "nested": (b'{"a":' * 200_000, "its header is not JSON"),
    "entry is no object": ({"a": 3}, "tensor 'a': unreadable header entry"),
    "entry lacks": ({"a": {"dtype": "F32"}}, "tensor 'a': unreadable header entry"),
    "dtype": (entry(dtype="F7"), "tensor 'a': unreadable header entry"),
    "dtype is a list": (entry(dtype=["F32"]), "tensor 'a': unreadable header entry"),
    "offsets": (entry(data_offsets=[0]), "tensor 'a': unreadable header entry"),
    "infinite": (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}', "unreadable header entry"),
    "fraction": (entry(shape=[4.5]), "tensor 'a': unreadable header entry"),
    "negative": (entry(shape=[-4]), r"bytes \[0, 16\) for shape \[-4\]"),
    "two negatives": (entry(shape=[-2, -2]), r"bytes \[0, 16\) for shape \[-2, -2\]"),
    "before the start": (entry(data_offsets=[-16, 0]), r"bytes \[-16, 0\)"),
    "past the end": (entry(shape=[17], data_offsets=[0, 68]), "expected 68 bytes inside the 64 that the file holds"),
    "too few bytes": (entry(data_offsets=[0, 12]), "expected 16 bytes inside"),
    "huge": (entry(shape=[2**62, 2**62]), "for shape"),
    "huge and empty": (entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "tensor 'a'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case: str, tmp_path: Path) -> None:
    header, message = HOSTILE[case]
    path = file_with(tmp_path / "t.safetensors", header)
    with pytest.raises(PlanFormatError, match=message) as caught:
        TensorFile(path).read("a")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 100, (99).to_bytes(8, "little") + b"{}"])
def test_files_without_a_header(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(PlanFormatError, match="not a safetensors file, or a truncated one"):
        TensorFile(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanFormatError, match="cannot be read: No such file"):
        TensorFile(tmp_path / "none")
    with pytest.raises(PlanFormatError, match="cannot be read: Is a directory"):
        TensorFile(tmp_path)
    file = TensorFile(file_with(tmp_path / "t", entry()))
    with pytest.raises(PlanFormatError, match="no tensor 'b'; it belongs to another plan or is damaged"):
        file.read("b")
