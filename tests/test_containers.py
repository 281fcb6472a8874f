"""Weight files: what is written is read back, reading is lazy, and no file, however damaged, does harm."""
import gc
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from cb_vit.weights.containers import (
    FormatError,
    Tensor,
    npz,
    open_file,
    opening,
    parameters,
    split_subtree,
    write_npz,
    write_safetensors,
)
from cb_vit.weights.dialects.prefixes import take_off

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [*map(np.dtype, ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")), BFLOAT16]
WRITERS = {"safetensors": write_safetensors, "npz": write_npz}


def every_kind_of_array():
    rng = np.random.default_rng(0)
    arrays = {f"params/{dtype.name}": rng.integers(0, 2, (2, 3)).astype(dtype) for dtype in DTYPES}
    return arrays | {"0-d": np.array(2.5, np.float32), "empty": np.zeros((0, 3), BFLOAT16), "größe/核": np.ones(1),
                     "transposed": np.arange(6.).reshape(2, 3).T, "bf16 0-d": np.array(-1.5, BFLOAT16)}


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def read(path, **kw):
    tensors = open_file(path, **kw).tensors
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    assert all((arrays[name].shape, arrays[name].dtype) == (t.shape, t.dtype) for name, t in tensors.items())
    return arrays


# Round trips


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_written_is_read_back(tmp_path, kind):
    arrays, path = every_kind_of_array(), str(tmp_path / "file.xyz")  # the name does not matter
    WRITERS[kind](path, arrays)
    found = read(path)
    assert open_file(path).kind == kind and found.keys() == arrays.keys()
    assert all(equal(found[name], arrays[name]) for name in arrays)
    assert all(array.flags.owndata or array.base.flags.owndata for array in found.values())
    assert all(array.flags.writeable for array in found.values())


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_arrays_give_the_same_bytes_whether_they_come_from_memory_or_a_file(tmp_path, kind):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    WRITERS[kind](one, every_kind_of_array())
    WRITERS[kind](two, open_file(one).tensors)
    WRITERS[kind](one, {name: a.astype(a.dtype.newbyteorder(">")) if a.dtype != BFLOAT16 else a
                        for name, a in every_kind_of_array().items()}, overwrite=True)
    contents = [(tmp_path / name).read_bytes() for name in ("one", "two")]
    if kind == "npz":  # which keeps the order in which it was given
        contents = [{name: np.load(file)[name].tobytes() for name in np.load(file).files} for file in (one, two)]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("write", WRITERS.values())
def test_how_an_array_lies_in_memory_does_not_matter(tmp_path, write):
    array = np.arange(6.).reshape(2, 3)
    write(tmp_path / "one", {"a": array.T, "b": array[:, ::2]})
    write(tmp_path / "two", {"a": array.T.copy(), "b": array[:, ::2].copy()})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_npz_is_closed_with_its_last_array(tmp_path, recwarn):
    write_npz(tmp_path / "x", {"a": np.ones(1)})
    tensor = open_file(str(tmp_path / "x")).tensors["a"]
    gc.collect()
    assert equal(tensor.read(), np.ones(1))
    del tensor
    gc.collect()
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]


def test_numpy_reads_and_writes_the_same_npz(tmp_path):
    arrays = every_kind_of_array()
    write_npz(tmp_path / "ours.npz", arrays)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as theirs:
        for name, array in arrays.items():
            found = theirs[name].view(BFLOAT16) if array.dtype == BFLOAT16 else theirs[name]
            assert equal(found, array)
    np.savez(tmp_path / "theirs.npz", **arrays)
    np.savez_compressed(tmp_path / "small.npz", **arrays, big_endian=np.arange(3, dtype=">f4"))
    for name in ("theirs.npz", "small.npz"):
        found = read(str(tmp_path / name))
        assert all(equal(found[key], arrays[key]) for key in arrays)
    assert equal(found["big_endian"], np.arange(3, dtype="f4"))


def test_the_safetensors_library_reads_and_writes_the_same_files(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = {name: np.ascontiguousarray(a) for name, a in every_kind_of_array().items() if a.ndim}
    numpy.save_file(arrays, tmp_path / "theirs", metadata={"format": "np"})
    write_safetensors(tmp_path / "ours", arrays, {"format": "np"})
    assert (tmp_path / "ours").read_bytes()[8:] and open_file(str(tmp_path / "ours")).metadata == {"format": "np"}
    ours, theirs = numpy.load_file(tmp_path / "ours"), read(str(tmp_path / "theirs"))
    assert all(equal(ours[name], arrays[name]) and equal(theirs[name], arrays[name]) for name in arrays)


def test_arrays_are_aligned_in_safetensors(tmp_path):
    write_safetensors(tmp_path / "x", {"a": np.zeros(3, "u1"), "b": np.zeros(1, "f8"), "c": np.zeros(1, "f2")})
    content = (tmp_path / "x").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:start])
    sizes = {"U8": 1, "F64": 8, "F16": 2}
    assert start % 8 == 0 and all(e["data_offsets"][0] % sizes[e["dtype"]] == 0 for e in entries.values())


def test_map_is_lazy():
    calls = []
    tensor = Tensor((2, 3), np.dtype("f4"), lambda: calls.append(1) or np.arange(6, dtype="f4").reshape(2, 3))
    mapped = tensor.map(np.transpose, (3, 2))
    assert mapped.shape == (3, 2) and mapped.dtype == "f4" and not calls
    np.testing.assert_array_equal(mapped.read(), [[0, 3], [1, 4], [2, 5]])


# Memory


@pytest.mark.parametrize("kind", [*WRITERS, "compressed"])
def test_one_array_at_a_time(tmp_path, kind):
    path, arrays = str(tmp_path / "big"), {f"a{i}": np.full((640, 2048), i, "f4") for i in range(10)}  # 10 × 5.2 MB
    arrays["a3"] = arrays["a3"].T
    if kind == "compressed":
        np.savez_compressed(tmp_path / "big.npz", **arrays)
        path += ".npz"
    else:
        WRITERS[kind](path, arrays)
    size = arrays["a0"].nbytes
    del arrays
    tracemalloc.start()
    try:
        file = open_file(path)
        assert tracemalloc.get_traced_memory()[1] < 2e6
        for i, tensor in enumerate(file.tensors.values()):
            assert (array := tensor.read()).nbytes == size and len(np.unique(array[::100])) == 1, i
            del array
        assert tracemalloc.get_traced_memory()[1] < 1.1 * size + 4e6
        tracemalloc.reset_peak()
        write_safetensors(tmp_path / "copy", file.tensors)
        assert tracemalloc.get_traced_memory()[1] < 2.1 * size + 4e6  # a transposed array needs its copy
    finally:
        tracemalloc.stop()


# Whole or not at all


@pytest.mark.parametrize("write", WRITERS.values())
def test_no_file_is_replaced_unasked_or_by_half(tmp_path, write):
    path = tmp_path / "file"
    write(path, {"a": np.ones(3)})
    before = path.read_bytes()

    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(FormatError, match=f"^{path}: is already there; .* overwrite=True"):
        write(path, {"a": np.zeros(3)})
    with pytest.raises(FormatError, match="cannot be written: No space left"):
        write(path, {"a": np.zeros(3), "b": Tensor((2,), np.dtype("f4"), fail)}, overwrite=True)
    with pytest.raises(FormatError, match="complex64, which is not supported"):
        write(path, {"a": np.zeros(3, "c8")}, overwrite=True)
    with pytest.raises(FormatError, match="object, which is not supported"):
        write(path, {"a": np.array([print])}, overwrite=True)
    with pytest.raises(FormatError, match="cannot be written"):
        write(tmp_path / "nowhere" / "file", {"a": np.zeros(3)})
    with pytest.raises(FormatError, match=f"^{tmp_path}: is already there; choose another name$"):
        write(tmp_path, {"a": np.zeros(3)}, overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["file"]
    write(path, {"a": np.zeros(3)}, overwrite=True)
    assert equal(read(str(path))["a"], np.zeros(3)) and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_kill_while_writing_leaves_the_old_file(tmp_path, kind):
    path = tmp_path / "file"
    path.write_text("old")
    result = subprocess.run([sys.executable, "-c", f"""
import os, numpy as np
from cb_vit.weights.containers import write_{kind}
os.replace = lambda *paths: os.kill(os.getpid(), 9)
write_{kind}({str(path)!r}, {{"a": np.ones(100)}}, overwrite=True)
"""], capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    assert path.read_text() == "old"


def test_names_that_a_format_cannot_hold(tmp_path):
    with pytest.raises(FormatError, match="__metadata__; rename"):
        write_safetensors(tmp_path / "x", {"__metadata__": np.ones(1)})
    with pytest.raises(FormatError, match="zero byte"):
        write_npz(tmp_path / "x", {"a\0b": np.ones(1)})
    assert not os.listdir(tmp_path)


# Parts of a file


@pytest.mark.parametrize("path, expected", [
    ("file.npz:img", ("file.npz", "img")), ("a/b:img/vit", ("a/b", "img/vit")), ("file.npz:img/", ("file.npz", "img")),
    ("gs://bucket/file.npz:img", ("gs://bucket/file.npz", "img")), ("C:\\x\\f.npz:img", ("C:\\x\\f.npz", "img")),
    ("hf://timm/vit/model.npz:img", ("hf://timm/vit/model.npz", "img")), ("file.npz", ("file.npz", None)),
    *((path, (path, None)) for path in (
        "gs://bucket/file.npz", "gs://bucket", "hf://timm/vit", "hf-hub:timm/vit.x", "C:\\x\\file.npz", "C:/x/file.npz",
        "C:file.npz", "http://host:8080/file.npz", "file.npz:", "")),
])
def test_split_subtree(path, expected):
    assert split_subtree(path) == expected


def test_a_colon_in_the_name_of_a_file_that_is_there(tmp_path):
    path = str(tmp_path / "file:img")
    (tmp_path / "file:img").touch()
    assert split_subtree(path) == (path, None)
    assert split_subtree(path + ":txt") == (path, "txt")


@pytest.mark.parametrize("names, expected", [
    (("params/head/bias", "opt/0/mu/head/bias", "chrono/x"), ["head/bias"]),
    (("opt/target/head/bias", "opt/state/step"), ["head/bias"]),
    (("head/bias", "cls"), ["head/bias", "cls"]),
    (("params/x", "opt/target/y"), ["x"]),
])
def test_parameters_of_big_vision_files_of_all_ages(tmp_path, names, expected):
    write_npz(tmp_path / "x.npz", {name: np.ones(1) for name in names})
    assert list(parameters(open_file(str(tmp_path / "x.npz")))) == expected


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("write", WRITERS.values())
def test_a_part(tmp_path, prefix, write):
    path = str(tmp_path / "x")
    write(path, {f"{prefix}img/head/bias": np.ones(1), f"{prefix}txt/cls": np.zeros(1), f"{prefix}t": np.ones(1)})
    part = lambda prefix: take_off(parameters(open_file(path)), prefix, lambda names: False, path)  # noqa: E731
    tensors, notes = part("img")
    assert list(tensors) == ["head/bias"] and "2 of the file's 3 arrays are not under 'img'" in notes[0]
    assert equal(part("txt/")[0]["cls"].read(), np.zeros(1))
    with pytest.raises(FormatError, match=f"^{path}: has no part 'im'; its parts: 'img', 'txt'$"):
        part("im")


# Folders and indexes


def sharded(folder, weight_map, **index):
    for shard in ("one.safetensors", "two.safetensors"):
        write_safetensors(folder / shard, {f"{shard[:3]}.{i}": np.full(2, i, "f4") for i in range(2)}, overwrite=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **index}, indent=2))
    return folder / "model.safetensors.index.json"


MAP = {"one.0": "one.safetensors", "one.1": "one.safetensors", "two.0": "two.safetensors", "two.1": "two.safetensors"}


def test_several_files_with_an_index(tmp_path):
    index = sharded(tmp_path, MAP, metadata={"total_size": 32})
    for path in (str(index), str(tmp_path), f"{tmp_path}/"):
        file = open_file(path)
        assert file.metadata == {"total_size": 32} and file.kind == "safetensors" and file.tensors.keys() == MAP.keys()
        assert equal(file.tensors["two.1"].read(), np.ones(2, "f4"))
    write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(1)})
    assert list(open_file(str(tmp_path)).tensors) == ["a"]


@pytest.mark.parametrize("weight_map, message", [
    ({**MAP, "x": "../one.safetensors"}, r"'\.\./one.safetensors'; an index may name only files beside it"),
    ({**MAP, "x": ".."}, "files beside it"), ({**MAP, "x": ""}, "files beside it"),
    ({**MAP, "x": "/etc/passwd"}, "files beside it"), ({**MAP, "x": "..\\one"}, "files beside it"),
    ({**MAP, "x": "C:one"}, "files beside it"), ({**MAP, "x": "one\0"}, "files beside it"),
    ({**MAP, "x": "absent"}, "absent: cannot be read: No such file"), ({**MAP, "x": 3}, "cannot be read"),
    ({**MAP, "x": "one.safetensors"}, "do not agree about 'x'"), (dict(list(MAP.items())[1:]), "about 'one.0'"),
    ([], "no weight_map"), (None, "no weight_map"), ({}, "its weight_map is empty, so it holds no arrays"),
    ({"a": "model-00001-of-00003.bin", "b": "model-00002-of-00003.bin"}, "names 2 files of 3, so it is incomplete"),
    ({"a": "model.safetensors.index.json"}, "is index, where one of several files should be safetensors or torch"),
])
def test_an_index_that_misleads(tmp_path, weight_map, message):
    with pytest.raises(FormatError, match=message):
        open_file(str(sharded(tmp_path, weight_map)))


def test_an_index_that_is_cut_off(tmp_path):
    index = sharded(tmp_path, MAP)
    index.write_text(index.read_text()[:-20])
    with pytest.raises(FormatError, match="index.json: the index is not JSON .*; the file is damaged"):
        open_file(str(index))


@pytest.mark.parametrize("content, message", [
    (b"", "the file is empty"), (b"\2" + bytes(7) + b"[]", "not a weight file"), (b"\2" + bytes(7) + b"{]", "not JSON"),
    (b"PK\3\4" + bytes(99), "damaged or incomplete")])
def test_a_part_that_is_no_safetensors_file(tmp_path, content, message):
    index = str(sharded(tmp_path, MAP))
    (tmp_path / "two.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=f"two.safetensors: .*{message}"):
        open_file(index)


# Things that are no weight files


@pytest.mark.parametrize("content, message", [
    (b"", "the file is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
    (b"\n <!DOCTYPE html><html>", "web page"), (b"<html>", "web page"), (b"\xef\xbb\xbf<?xml", "web page"),
    (b"\x93NUMPY\x01\x00", "single NumPy array"), (b"\x89HDF\r\n\x1a\n", "HDF5"), (b"\x1f\x8b\x08", "gzip"),
    (b"\x80\x04\x95", "pickle, which could run code"), (b"{}", "no index of weights"), (b"{", "not JSON"),
    (b'{"hidden_size": 384, "architectures": []}', "no index of weights"),
    (b"PK\x03\x04", "not a zip file"), (b"PK\x05\x06" + bytes(18), "holds no arrays"),
    (bytes(100), "not a weight file"), (b"hello", "not a weight file"),
])
def test_what_is_no_weight_file(tmp_path, content, message):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(FormatError, match=message) as error:
        open_file(str(tmp_path / "x.npz"))
    assert str(error.value).startswith(f"{tmp_path}/x.npz: ") and "\n" not in str(error.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="this folder holds none of model.safetensors, "):
        open_file(str(tmp_path))
    with pytest.raises(FormatError, match="absent: cannot be read: No such file"):
        open_file(str(tmp_path / "absent"))
    with pytest.raises(FormatError, match="pipe: this is no file"):
        open_file(str(tmp_path / "pipe"))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("read\nme.txt", "x")
    with pytest.raises(FormatError, match=r"neither an .npz nor a PyTorch file; it holds 'read\\nme.txt'"):
        open_file(str(tmp_path / "zip"))
    write_npz(tmp_path / "good", {"a": np.ones(1)})
    with pytest.raises(FormatError, match="key='model' is for PyTorch files; this is npz"):
        open_file(tmp_path / "good", key="model")


def test_torch_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    (tmp_path / "old.pth").write_bytes(opening.TORCH_LEGACY + b"rest")
    for name in ("x.pth", "old.pth"):
        with pytest.raises(FormatError, match="needs PyTorch to be read; pip install torch"):
            open_file(str(tmp_path / name))


# Hostile files


def raw_safetensors(header, payload=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + payload


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("content, message", [
    (raw_safetensors(b"{" + b" " * 99)[:50], "truncated or damaged"),
    ((100_000_001).to_bytes(8, "little") + b"{}", "not a weight file"),
    (raw_safetensors(b"{]"), "not JSON"), (raw_safetensors(b'{"a": "\xff"}'), "not JSON"),
    (raw_safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "not JSON"),
    (raw_safetensors(b'{"\\ud800": 1}'), "not JSON"), (raw_safetensors(b'{"a": 1' + b"0" * 5000 + b"}"), "not JSON"),
    (raw_safetensors(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "a name stands twice"),
    (raw_safetensors({"a": 3}), "'a' should have dtype, shape"),
    (raw_safetensors({"a": {"dtype": "F32"}}), "'a' should have dtype, shape"),
    (raw_safetensors({"a": entry(dtype="F8_E4M3", end=2)}, bytes(2)), "'F8_E4M3', which is not supported"),
    (raw_safetensors({"a": entry(dtype=["F32"])}, bytes(8)), r"which is not supported"),
    (raw_safetensors({"a": entry((3,))}, bytes(8)), "do not span the 12 bytes"),
    (raw_safetensors({"a": entry((-2,), 0, 8)}, bytes(8)), "whole numbers"),
    (raw_safetensors({"a": entry((True, 2))}, bytes(8)), "whole numbers"),
    (raw_safetensors({"a": entry((2.,))}, bytes(8)), "whole numbers"),
    (raw_safetensors({"a": entry((2,), 8, 0)}, bytes(8)), "do not span"),
    (raw_safetensors({"a": {**entry(), "data_offsets": [0, 8, 8]}}, bytes(8)), "do not span"),
    (raw_safetensors({"a": entry((0, 10**30), 0, 0)}), "more than 2.63 bytes"),
    (raw_safetensors({"a": entry((1,) * 33, 0, 4)}, bytes(4)), "impossible shape"),
    (raw_safetensors({"a": entry(), "b": entry((2,), 4, 12)}, bytes(12)), "'b' begins at byte 4 .*, not at 8"),
    (raw_safetensors({"a": entry(), "b": entry()}, bytes(8)), "'b' begins at byte 0"),
    (raw_safetensors({"a": entry((2,), 4, 12)}, bytes(12)), "'a' begins at byte 4"),
    (raw_safetensors({"a": entry()}, bytes(9)), "truncated or damaged"),
    (raw_safetensors({"a": entry((10**12,), 0, 4 * 10**12)}, bytes(9)), "truncated or damaged"),
    (raw_safetensors({"a": entry(), "__metadata__": {"x": 1}}, bytes(8)), "__metadata__ should be strings"),
    (raw_safetensors({"a": entry(), "__metadata__": []}, bytes(8)), "__metadata__ should be strings"),
    (raw_safetensors({"x" * 9999 + "\n": entry((3,))}, bytes(8)), "do not span"),
])
def test_hostile_safetensors(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FormatError, match=message) as error:
        open_file(str(tmp_path / "x"))
    assert len(str(error.value)) < 500 + len(str(tmp_path)) and "\n" not in str(error.value)


def npy(array=None, header=None, version=(1, 0), payload=b""):
    buffer = io.BytesIO()
    if array is not None:
        np.lib.format.write_array(buffer, array, allow_pickle=True)
        return buffer.getvalue()
    return (b"\x93NUMPY" + bytes(version) + len(header).to_bytes(2 if version == (1, 0) else 4, "little")
            + header.encode() + payload)


def npy_header(shape="(2,)", descr="'<f4'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


@pytest.mark.parametrize("content, message", [
    (npy(np.array([{}])), "is object, which is not"), (npy(np.array(["text"])), "<U4, which is not supported"),
    (npy(np.zeros(2, "c8")), "complex64, which is not supported"), (npy(np.zeros(2, "f4,i4")), "not supported"),
    (npy(np.zeros(2, "V1")), "not supported"), (npy(np.zeros(2, "M8[s]")), "not supported"),
    (npy(np.zeros(2, "g")), "not supported"),
    (npy(header=npy_header("(3,)"), payload=bytes(8)), "needs 12 bytes and has 8"),
    (npy(header=npy_header("(10000000000,)"), payload=bytes(8)), "needs 40000000000 bytes and has 8"),
    (npy(header=npy_header("(-2,)"), payload=bytes(8)), "impossible shape"),
    (npy(header=npy_header("(0, 10**30)"), payload=b""), "cannot be read"),
    (npy(header=npy_header(f"(0, {10**30})"), payload=b""), "more than 2.63 bytes"),
    (npy(header=npy_header(f"({'1,' * 33})"), payload=bytes(4)), "impossible shape"),
    (npy(header=npy_header("(2.,)"), payload=bytes(8)), "cannot be read"),
    (npy(header=npy_header(descr="__import__('os')"), payload=bytes(8)), "cannot be read"),
    (npy(header="(" * 9000), "cannot be read"), (npy(header="-" * 9000 + "1"), "cannot be"),
    (npy(header="{" + " " * 20_000 + "}"), "cannot be read"), (npy(header="\0"), "cannot be read"),
    (npy(header="{'descr':"), "cannot be read"), (npy(header=npy_header()[:-9], version=(2, 0)), "cannot be read"),
    (npy(header=npy_header(), version=(3, 0)), r"version \(3, 0\)"), (b"", "cannot be read"),
    (b"\x80\x04.", "cannot be read"),
])
def test_hostile_npy_in_an_npz(tmp_path, content, message):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("params/a.npy", content)
    with pytest.raises(FormatError, match=message) as error:
        open_file(str(tmp_path / "x"))
    assert str(error.value).startswith(f"{tmp_path}/x: ") and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_archives(tmp_path, monkeypatch):
    def fails(message):
        with pytest.raises(FormatError, match=message):
            open_file(str(tmp_path / "x"))

    good = npy(np.zeros(10_000))
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("a.npy", good)
        archive.writestr("a.npy", good)
    fails("'a' is in it twice")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "x", "w", method) as archive:
            archive.writestr("a.npy", good)
        fails("'a' is compressed in a way that NumPy does not use")
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", good)
    assert read(str(tmp_path / "x"))["a"].shape == (10_000,)
    monkeypatch.setattr(npz, "HARMLESS", 50_000)
    fails("over 100 times its size")
    content = bytearray((tmp_path / "x").read_bytes())
    write_npz(tmp_path / "large", {"a": np.ones(10_000)})
    assert read(str(tmp_path / "large"))["a"].shape == (10_000,)
    monkeypatch.undo()
    for start, field in ((content.index(b"PK\3\4"), 6), (content.index(b"PK\1\2"), 8)):
        content[start + field] |= 1
    (tmp_path / "x").write_bytes(content)
    fails("encrypted")


def test_damaged_values_in_an_npz_are_noticed(tmp_path):
    write_npz(tmp_path / "x", {"a": np.arange(9999.), "b": np.arange(3.)})
    content = bytearray((tmp_path / "x").read_bytes())
    content[content.index(np.arange(9999.).tobytes()) + 50_000] ^= 1
    (tmp_path / "x").write_bytes(content)
    file = open_file(str(tmp_path / "x"))
    assert equal(file.tensors["b"].read(), np.arange(3.))
    with pytest.raises(FormatError, match="Bad CRC-32"):
        file.tensors["a"].read()


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_shrinks_after_it_was_opened(tmp_path, kind):
    WRITERS[kind](tmp_path / "x", {"a": np.arange(10_000.)})
    tensor = open_file(str(tmp_path / "x")).tensors["a"]
    os.truncate(tmp_path / "x", 50_000)
    with pytest.raises(FormatError, match="x: cannot be read"):
        tensor.read()


# Chance


def mutate(content, header, rng):
    """A truncated file, or one with one to three bytes changed, taken out or put in among its first `header` ones."""
    content = bytearray(content)
    if rng.random() < .2:
        return bytes(content[:rng.randrange(len(content))])
    for _ in range(rng.randint(1, 3)):
        at = header(rng)
        action = rng.random()
        if action < .15:
            del content[at:at + rng.randint(1, 4)]
        elif action < .3:
            content[at:at] = rng.choice(([rng.randrange(256)], b"9" * 20, b'"', b"{", b"[", b"\0" * 8))
        else:
            content[at % len(content)] = rng.choice((rng.randrange(256), content[at % len(content)] ^ 1, 0, 255, 0x30))
    return bytes(content)


def try_mutants(path, content, header, arrays, count):
    """Read `count` mutants; returns how many could be read. Each gives arrays or a FormatError, and stays small."""
    rng, read_all = random.Random(0), 0
    for number in range(count):
        mutant = mutate(content, header, rng)
        path.write_bytes(mutant)
        tracemalloc.start()
        try:
            found = read(str(path))
        except FormatError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 600, number
            continue
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 10 * len(mutant) + 500_000, number
        read_all += 1
        assert sum(array.nbytes for array in found.values()) <= len(mutant), number
        for name in found.keys() & arrays.keys():
            if (found[name].dtype, found[name].shape) == (arrays[name].dtype, arrays[name].shape):
                assert equal(found[name], arrays[name]), number
    return read_all


FEW = {"params/a": np.arange(40, dtype="f4").reshape(5, 8), "params/b": np.arange(4).astype(BFLOAT16),
       "c": np.array(3., "f4"), "d": np.zeros((0, 2), "i8")}


def test_mutants_of_safetensors(tmp_path):
    write_safetensors(tmp_path / "x", FEW, {"format": "np"})
    content = (tmp_path / "x").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    survived = try_mutants(tmp_path / "y", content, lambda rng: rng.randrange(start), FEW, 400)
    assert 2 < survived < 200  # names and metadata may change, hardly anything else


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_mutants_of_npz(tmp_path, save):
    with open(tmp_path / "x", "wb") as file:
        save(file, **FEW)
    content = (tmp_path / "x").read_bytes()
    survived = try_mutants(tmp_path / "y", content, lambda rng: rng.randrange(len(content)), FEW, 250)
    assert 0 < survived < 125  # dates and the like
