"""PyTorch's files, with PyTorch: all dtypes and wrappings, and none that runs code or does harm."""
import argparse
import collections
import json
import os
import pathlib
import pickle
import random
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from cb_vit.weights import open_weights
from cb_vit.weights.containers import FormatError, open_file, write_safetensors

torch = pytest.importorskip("torch")
from test_conversion import H, timm_shapes  # noqa: E402
from test_conversion import random as random_arrays  # noqa: E402

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
LEGACY = [False, True]


def save(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


def read(path, **kw):
    return {name: tensor.read() for name, tensor in open_file(path, **kw).tensors.items()}


def state():
    return {"a.weight": torch.arange(6.).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.mark.parametrize("legacy", LEGACY)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(tmp_path, name, legacy):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, name))
    tensors = {"a": tensor, "transposed": tensor.T, "0-d": tensor[0, 1].clone(), "empty": tensor[:0].clone(),
               "größe": tensor, "part": tensor[1:, ::2], "parameter": tensor}
    if tensor.is_floating_point():
        tensors["parameter"] = torch.nn.Parameter(tensor)
    file = open_file(save(tmp_path / "x", tensors, legacy))
    assert file.kind == "torch" and file.tensors.keys() == tensors.keys()
    for key, lazy in file.tensors.items():
        found, expected = lazy.read(), tensors[key].detach().float().numpy()
        assert found.dtype == lazy.dtype == np.dtype(getattr(ml_dtypes, name, name))
        assert found.shape == lazy.shape == expected.shape and found.flags.writeable
        np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_reading_leaves_the_file_as_it_is_and_is_lazy(tmp_path):
    path = save(tmp_path / "x", {f"a{i}": torch.full((1000, 1000), float(i)) for i in range(5)})
    before = (tmp_path / "x").read_bytes()
    tracemalloc.start()
    file = open_file(path)
    for tensor in file.tensors.values():
        array = tensor.read()
        array += 1
        del array
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.5e6 and (tmp_path / "x").read_bytes() == before
    assert file.tensors["a3"].read()[0, 0] == 3
    write_safetensors(tmp_path / "y", file.tensors)
    assert read(str(tmp_path / "y"))["a4"][-1, -1] == 4


def test_a_large_file_is_mapped_not_read(tmp_path):
    path = save(tmp_path / "x", {f"a{i}": torch.ones(25_000_000) for i in range(3)})
    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    file = open_file(path)
    assert resident() - before < 50e6 < 300e6 < os.path.getsize(path)
    assert file.tensors["a2"].read().sum() == 25_000_000


WEIGHTS = ["a.weight", "b"]


@pytest.mark.parametrize("legacy", LEGACY)
@pytest.mark.parametrize("content, kw", [
    (state(), {}), ({"model": state()}, {}), ({"state_dict": state(), "epoch": 3}, {}),
    ({"model": state(), "model_ema": {"other": torch.ones(1)}, "optimizer": {"state": {0: torch.ones(1)}}}, {}),
    ({"model": state(), "state_dict": {"other": torch.ones(1)}}, {}),
    ({"model": {"other": torch.ones(1)}, "model_ema": state()}, {"key": "model_ema"}),
    ({"model": state(), "args": argparse.Namespace(lr=1e-3, drop=[1, 2])}, {}),
    (collections.OrderedDict(state()), {}), (state() | {"epoch": 3, "name": "x", 7: torch.ones(1)}, {}),
], ids=str)
def test_wrappings(tmp_path, content, kw, legacy):
    arrays = read(save(tmp_path / "x", content, legacy), **kw)
    assert sorted(arrays) == WEIGHTS
    np.testing.assert_array_equal(arrays["a.weight"], [[0, 1, 2], [3, 4, 5]])


def test_prefixes_are_taken_off_as_in_every_format(tmp_path):
    arrays = random_arrays({f"_orig_mod.module.{name}": shape for name, shape in timm_shapes().items()})
    names = {name: torch.from_numpy(array) for name, array in arrays.items()}
    found = open_weights(save(tmp_path / "x", {"model": names}), "path", num_heads=H)
    assert found.format == "timm" and any("_orig_mod." in note for note in found.notes)
    assert any("'module.' in front of all names is taken off" in note for note in found.notes)
    path = save(tmp_path / "y", {"state_dict": names | {"loss.weight": torch.ones(3)}})
    with pytest.raises(FormatError, match="a ViT is in 'module': choose with prefix"):
        open_weights(path, "path", num_heads=H)
    for prefix in ("module", "_orig_mod.module", "_orig_mod.module."):
        assert open_weights(path, "path", num_heads=H, prefix=prefix).format == "timm"


SCALARS = [np.float64(81.2), np.int64(3), np.bool_(True), np.float16(1), np.str_("x"), np.datetime64("2026-01-01"),
           np.dtype("f4"), {"best": [np.float32(1), (np.uint8(2),)]}]


@pytest.mark.parametrize("old", [False, True], ids=["NumPy 2", "NumPy 1"])
@pytest.mark.parametrize("legacy", LEGACY)
@pytest.mark.parametrize("scalar", SCALARS, ids=str)
def test_numpys_scalars_beside_the_weights(tmp_path, legacy, scalar, old):
    path = save(tmp_path / "x", {"model": state(), "best_acc": scalar, "args": argparse.Namespace(lr=scalar)}, legacy)
    rename = lambda content: content.replace(b"numpy._core.", b"numpy.core.") if old else content  # noqa: E731
    if legacy:
        pathlib.Path(path).write_bytes(rename(pathlib.Path(path).read_bytes()))
    else:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(path := f"{path}.old", "w") as renamed:
            for name in archive.namelist():
                renamed.writestr(name, rename(archive.read(name)))
    assert sorted(read(path)) == WEIGHTS


@pytest.mark.parametrize("legacy", LEGACY)
@pytest.mark.parametrize("value, message", [
    (np.dtype("O"), "holds NumPy's 'O8', neither number nor text"), (np.dtype("i4,f4"), "holds NumPy's 'V8'"),
    (np.ones(2), "'numpy._core.multiarray._reconstruct'"), (np.array([{}]), "'numpy._core.multiarray._reconstruct'"),
    (np.float64, "'numpy.float64'"), (np.random.default_rng(0), "holds a Python object, 'numpy.random")])
def test_no_more_of_numpy(tmp_path, value, message, legacy):
    with pytest.raises(FormatError, match=f"^{tmp_path}/x: .*{message}"):
        open_file(save(tmp_path / "x", {"model": state(), "x": value}, legacy))


def sharded(folder, count=2, names=WEIGHTS):
    """`pytorch_model.bin` in parts, with an index, as transformers wrote them."""
    shards = {name: f"pytorch_model-{i + 1:05}-of-{count:05}.bin" for i, name in enumerate(names)}
    for name, shard in shards.items():
        save(folder / shard, {name: state()[name]})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 32}, "weight_map": shards}))
    return str(folder / "pytorch_model.bin.index.json")


def test_several_files_with_an_index(tmp_path):
    index = sharded(tmp_path)
    for path in (index, str(tmp_path)):
        file = open_file(path)
        assert file.kind == "torch" and sorted(file.tensors) == WEIGHTS and file.metadata == {"total_size": 32}
        np.testing.assert_array_equal(file.tensors["a.weight"].read(), [[0, 1, 2], [3, 4, 5]])
    save(tmp_path / "pytorch_model.bin", {"whole": torch.ones(1)})
    assert list(open_file(str(tmp_path)).tensors) == ["whole"]


def test_an_index_that_misleads(tmp_path):
    index = sharded(tmp_path)
    second = tmp_path / "pytorch_model-00002-of-00002.bin"
    save(second, {"c": torch.ones(1)})
    with pytest.raises(FormatError, match="'pytorch_model-00002-of-00002.bin' and the index do not agree about 'b'"):
        open_file(index)
    save(second, {"b": Call(os.mkdir, str(tmp_path / "made"))})
    with pytest.raises(FormatError, match="00002.bin: holds a Python object, 'posix.mkdir'"):
        open_file(index)
    assert not (tmp_path / "made").exists()
    write_safetensors(second, {"b": np.ones(1, np.float32)}, overwrite=True)
    with pytest.raises(FormatError, match="of several kinds, safetensors and torch"):
        open_file(index)
    second.unlink()
    with pytest.raises(FormatError, match="00002.bin: cannot be read: No such file"):
        open_file(index)
    with pytest.raises(FormatError, match="names 2 files of 3, so it is incomplete"):
        open_file(sharded(tmp_path, count=3))


def test_the_state_of_an_optimiser(tmp_path):
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(FormatError, match="holds the state of an optimiser and no weights"):
        open_file(save(tmp_path / "x", optimiser.state_dict()))


@pytest.mark.parametrize("content, kw, message", [
    ({"model": state(), "model_ema": state()}, {"key": "ema"},
     "no weights under 'ema'; entries with weights: 'model', 'model_ema'; choose with key="),
    ({"teacher": state(), "student": state()}, {}, "entries with weights: 'teacher', 'student'; choose"),
    ({"epoch": 3}, {}, "holds no weights; entries with weights: none$"), ([1], {}, "holds no weights"),
    (torch.ones(3), {}, "holds no weights"), ({"model": {"epoch": 3}}, {}, "holds no weights"),
    ({"a": torch.ones(2, dtype=torch.complex64)}, {}, "'a' is torch.complex64"),
    ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, {}, "'a' is torch.float8_e4m3fn"),
    ({"a": torch.ones(2).to_sparse()}, {}, "sparse"), ({"a": torch.ones(2, device="meta")}, {}, "only dense"),
    ({"a": torch.ones(1).expand(10**6)}, {}, "'a' is larger than its file"),
    ({"a": torch.ones(1), "b": collections.Counter("x"), "c": ValueError("x")}, {},
     "holds a Python object, 'exceptions.ValueError', and to make it could run code; save the weights alone"),
    ({"a": torch.nn.Linear(2, 2)}, {}, "holds a Python object, 'torch.nn.modules.linear.Linear'"),
])
def test_what_is_refused(tmp_path, content, kw, message):
    with pytest.raises(FormatError, match=message) as error:
        open_file(save(tmp_path / "x", content), **kw)
    assert str(error.value).startswith(f"{tmp_path}/x: ") and "\n" not in str(error.value)


class Call:
    """Pickled, it is a call of `function` on `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {"a": torch.ones(1), "b": x}},
                                  lambda x: argparse.Namespace(x=x)], ids=["bare", "beside", "in a Namespace"])
@pytest.mark.parametrize("legacy", LEGACY)
def test_no_code_is_run(tmp_path, legacy, wrap):
    path = save(tmp_path / "x", wrap(Call(os.mkdir, str(tmp_path / "made"))), legacy)
    with pytest.raises(FormatError, match="holds a Python object, 'posix.mkdir'"):
        open_file(path)
    assert not (tmp_path / "made").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "made").exists()  # so the file was a trap indeed


@pytest.mark.parametrize("offset, shape, strides", [
    (0, (10**6, 10**6), (10**6, 1)), (0, (10**12,), (0,)), (2, (3,), (-1,)), (10**9, (3,), (1,)), (0, (4,), (1,)),
    (0, (0, 2**62), (1, 1)), (0, (1,) * 40, (1,) * 40), (-1, (3,), (1,)),
])
@pytest.mark.parametrize("legacy", LEGACY)
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_tensors_that_do_not_fit_their_storage(tmp_path, legacy, offset, shape, strides):
    tensor = Call(torch._utils._rebuild_tensor_v2, torch.ones(3).storage(), offset, shape, strides, False,
                  collections.OrderedDict())
    with pytest.raises(FormatError):
        open_file(save(tmp_path / "x", {"a": tensor}, legacy))


@pytest.mark.parametrize("legacy", LEGACY)
def test_a_bytearray_of_any_size(tmp_path, legacy):
    with pytest.raises(FormatError, match="holds a bytearray"):
        open_file(save(tmp_path / "x", {"a": torch.ones(1), "b": Call(bytearray, 10**14)}, legacy))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "x"))
    with pytest.raises(FormatError, match="x: is a program .TorchScript., not weights; save the weights alone"):
        open_file(str(tmp_path / "x"))


def test_files_that_torch_does_not_write(tmp_path):
    with open(tmp_path / "pickle", "wb") as file:
        pickle.dump({"a": 1}, file)
    with pytest.raises(FormatError, match="this is a Python pickle"):
        open_file(str(tmp_path / "pickle"))
    save(tmp_path / "good", state())
    with zipfile.ZipFile(tmp_path / "good") as good, zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name))
    with pytest.raises(FormatError, match="is compressed"):
        open_file(str(tmp_path / "x"))
    with pytest.raises(FormatError, match="copy it here first"):
        from cb_vit.weights.containers.torch_files import open_torch
        open_torch("gs://bucket/x.pth")


def test_an_old_pytorch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    with pytest.raises(FormatError, match=r"PyTorch 2.5.1 reads files unsafely; install 2.6 or later"):
        open_file(save(tmp_path / "x", state()))


@pytest.mark.parametrize("legacy", LEGACY)
def test_mutants(tmp_path, legacy):
    """Truncated files and files with bytes changed: weights of a size that the file can hold, or one FormatError."""
    content = {"model": {f"w{i}": torch.arange(4.) for i in range(3)}, "args": argparse.Namespace(lr=1)}
    good, rng, survived = open(save(tmp_path / "x", content, legacy), "rb").read(), random.Random(0), 0
    path = tmp_path / "y"
    for number in range(300):
        mutant = bytearray(good)
        if rng.random() < .2:
            del mutant[rng.randrange(len(good)):]
        else:
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(mutant))
                mutant[at] = rng.choice((rng.randrange(256), mutant[at] ^ 1, 0, 255))
        path.write_bytes(mutant)
        try:
            arrays = read(str(path))
        except FormatError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 600, number
            assert "weights_only" not in str(error), number  # PyTorch's advice to load the file unsafely
            continue
        survived += 1
        assert arrays and all(array.nbytes <= len(mutant) for array in arrays.values()), number
    assert 0 < survived < 300
