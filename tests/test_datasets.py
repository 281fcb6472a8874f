"""Data sources: what they hold, how they are found, and what they say about damaged or missing data."""
import collections
import gzip
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cb_vit.config import ConfigError
from cb_vit.datasets import DataError, Source, check_source, core, open_source, tfrecord
from cb_vit.datasets.contents import describe, report
from cb_vit.pp import builder

ROOT = Path(__file__).resolve().parents[1]
PATH = "config.input.data"
SPLITS = ["train", "test", "train[:50%]", "train[10:31]", "train[-4:]", "train[30%:60%]+test", "test[:3]+train", "all"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


def source(**block):
    return open_source(block, PATH)


def pixels(example):
    return np.asarray(Image.open(io.BytesIO(example["image"])))


def script(code, *args):
    """A fresh Python process that has run nothing of ours yet."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


# A small TFDS data set, and an independent writer of TFRecord files.

def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def write_tfrecord(path, payloads):
    def masked(data):
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    with open(path, "wb") as file:
        for payload in payloads:
            length = struct.pack("<Q", len(payload))
            file.write(length + masked(length) + payload + masked(payload))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A data_dir with `tiny`, 40 + 7 images in 3 shards a split, as array_record."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "tiny"
        url_infos = None

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(None, None, 3)), "file_name": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=list("abcde")),
                "scan": tfds.features.Image(dtype=np.uint16, shape=(None, None, 1), encoding_format="png"),
                "weight": tfds.features.Tensor(shape=(3,), dtype=np.float32)}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(40)), "test": self._generate_examples(range(100, 107))}

        def _generate_examples(self, numbers):
            for i in numbers:
                buffer = io.BytesIO()
                Image.fromarray(np.full((2 + i % 3, 3, 3), i, np.uint8)).save(buffer, "PNG")
                yield i, {"image": io.BytesIO(buffer.getvalue()), "label": i % 5, "file_name": f"n{i}.png",
                          "scan": io.BytesIO(buffer.getvalue()), "weight": np.zeros(3, np.float32)}

    data_dir = tmp_path_factory.mktemp("tiny_array_record")
    Tiny(data_dir=str(data_dir)).download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(num_shards=3))
    return data_dir


@pytest.fixture(scope="session")
def tiny_tfrecord(tiny, tmp_path_factory):
    """The same serialized examples as a TFRecord copy."""
    from array_record.python.array_record_module import ArrayRecordReader

    data_dir = tmp_path_factory.mktemp("tiny_tfrecord")
    folder = data_dir / "tiny" / "1.0.0"
    shutil.copytree(tiny / "tiny" / "1.0.0", folder)
    for shard in folder.glob("*.array_record-*"):
        reader = ArrayRecordReader(str(shard))
        write_tfrecord(str(shard).replace("array_record", "tfrecord"), reader.read_all())
        shard.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    return data_dir


@pytest.fixture
def damaged(tiny_tfrecord, tmp_path):
    """A copy of the TFRecord copy to be damaged: its data_dir, and the second shard of train."""
    shutil.copytree(tiny_tfrecord, tmp_path / "data")
    return tmp_path / "data", tmp_path / "data" / "tiny" / "1.0.0" / "tiny-train.tfrecord-00001-of-00003"


def tiny_source(data_dir, split="train", **block):
    return source(name="tiny", split=split, data_dir=str(data_dir), **block)


# Digits.

@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("digits")
    open_source(dict(name="digits", split="train", data_dir=str(data_dir)), PATH)
    return data_dir


def test_digits_are_sklearns(digits_dir):
    from sklearn.datasets import load_digits

    digits = load_digits()
    splits = {split: source(name="digits", split=split, data_dir=str(digits_dir)) for split in ("train", "test")}
    seen = {}
    for split, data in splits.items():
        assert isinstance(data, Source) and data.num_classes == 10 and data.class_names == tuple("0123456789")
        for i in range(len(data)):
            example = data[i]
            number = int(example["id"])
            image = pixels(example)
            assert image.dtype == np.uint8 and image.shape == (8, 8)
            # The grey levels give the counts back: nothing is lost.
            np.testing.assert_array_equal(np.round(image * (16 / 255)), digits.images[number])
            np.testing.assert_array_equal(image, np.round(digits.images[number] * 255 / 16))
            assert example["label"] == digits.target[number]
            assert seen.setdefault(number, split) == split
    assert sorted(seen) == list(range(1797))
    expected = set(np.random.RandomState(0).permutation(1797)[:360].tolist())
    assert {number for number, split in seen.items() if split == "test"} == expected
    histogram = np.bincount([digits.target[n] for n, split in seen.items() if split == "test"])
    assert len(histogram) == 10 and histogram.min() > 20


OPEN_DIGITS = """
    import logging, sys
    logging.basicConfig(level=logging.INFO)
    from cb_vit.datasets import open_source
    data = open_source(dict(name="digits", split="train+test", data_dir=sys.argv[1]), "config.input.data")
    print(hash(tuple((data[i]["id"], data[i]["label"]) for i in range(len(data)))), len(data), file=sys.stdout)
    assert not {"jax", "tensorflow", "torch"} & set(sys.modules), sys.modules.keys()
"""


def test_digits_prepared_once_by_three_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    processes = [script(OPEN_DIGITS, tmp_path / "data") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert sum("preparing scikit-learn's digits" in err for _, err in outputs) == 1  # the others waited
    answers = {out for out, _ in outputs}
    assert len(answers) == 1 and answers.pop().endswith(" 1797\n")
    assert [entry.name for entry in (tmp_path / "data" / "sklearn_digits").iterdir()] == ["1.0.0"]
    assert not list((tmp_path / "tmp").iterdir())


def test_digits_after_kill_in_the_middle(tmp_path):
    process = script("""
        import sys, time
        from cb_vit.datasets import digits
        png, calls = digits._png, []
        def slow(image):
            calls.append(1)
            if len(calls) == 1500:  # in the second split, with the first one written
                print("now", file=sys.__stdout__, flush=True)
                time.sleep(60)
            return png(image)
        digits._png = slow
        digits.prepare(sys.argv[1])
    """, tmp_path)
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = [entry.name for entry in (tmp_path / "sklearn_digits").iterdir()]
    assert len(left) == 1 and left[0].startswith("incomplete.")
    data = source(name="digits", split="test", data_dir=str(tmp_path))
    assert len(data) == 360 and len({data[i]["id"] for i in range(360)}) == 360
    assert [entry.name for entry in (tmp_path / "sklearn_digits").iterdir()] == ["1.0.0"]


def test_digits_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^config\.input\.data\.data_dir: cannot prepare digits"):
        source(name="digits", split="train", data_dir=str(tmp_path / "file" / "below"))


# TFDS copies.

@pytest.mark.parametrize("split", SPLITS)
def test_both_formats_equal_tfds_own_reader(tiny, tiny_tfrecord, split):
    import tensorflow_datasets as tfds

    reference = tfds.builder_from_directory(tiny / "tiny" / "1.0.0").as_data_source(
        split=split, decoders={"scan": tfds.decode.SkipDecoding()})
    array, record = (tiny_source(data_dir, split, id_key="file_name") for data_dir in (tiny, tiny_tfrecord))
    assert len(array) == len(record) == len(reference)
    for i in np.random.default_rng(0).permutation(len(reference)):
        expected = reference[i]
        assert array[i] == record[i]
        assert array[i]["id"] == expected["file_name"].decode() and array[i]["label"] == expected["label"]
        np.testing.assert_array_equal(pixels(array[i]), expected["image"])
    assert array.num_classes == 5 and array.class_names == tuple("abcde")


def test_ids_name_shard_and_record(tiny, tiny_tfrecord):
    assert tiny_source(tiny, "train[:1]")[0]["id"] == "tiny-train.array_record-00000-of-00003#0"
    assert tiny_source(tiny_tfrecord, "train[1shard]")[2]["id"] == "tiny-train.tfrecord-00001-of-00003#2"


@pytest.mark.parametrize("form", ["tiny", "tiny_tfrecord"])
def test_threads_pickling_and_other_processes(form, request, tmp_path):
    data = tiny_source(request.getfixturevalue(form))
    expected = [data[i] for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(1).integers(40, size=400)
        assert list(pool.map(data.__getitem__, order)) == [expected[i] for i in order]
    again = pickle.loads(pickle.dumps(data))
    assert [again[i] for i in range(40)] == expected
    (tmp_path / "source").write_bytes(pickle.dumps(data))
    (tmp_path / "expected").write_bytes(pickle.dumps(expected))
    finish(script("""
        import pickle, sys, os
        data, expected = (pickle.load(open(f"{sys.argv[1]}/{name}", "rb")) for name in ("source", "expected"))
        assert [data[i] for i in range(40)] == expected
        assert not {"jax", "tensorflow", "torch", "grain"} & set(sys.modules)
        if (child := os.fork()) == 0:
            os._exit([data[i] for i in range(40)] != expected)
        assert os.waitpid(child, 0)[1] == 0
    """, tmp_path))


@pytest.mark.parametrize("index", [-1, 40, 10**9])
def test_no_such_example(tiny, index):
    with pytest.raises(IndexError):
        tiny_source(tiny)[index]


def test_not_prepared_says_how(tmp_path):
    with pytest.raises(ConfigError) as error:
        source(name="imagenet2012:5.1.0", split="train", data_dir=str(tmp_path))
    text = str(error.value)
    assert text.startswith("config.input.data.name: ") and "\n" not in text
    assert f"tfds build imagenet2012 --file_format=array_record --data_dir={tmp_path}" in text
    assert "pip install tensorflow importlib_resources" in text
    assert f"ILSVRC2012_img_val.tar into {tmp_path}/downloads/manual" in text
    with pytest.raises(ConfigError, match="did you mean folder"):
        source(name="foldr", split="train", data_dir=str(tmp_path))


def test_versions_and_configurations(tiny, tmp_path, monkeypatch):
    home = tmp_path / "tiny"
    for version in ("1.0.0", "1.9.0", "1.10.0", "2.0.0.tmp"):
        shutil.copytree(tiny / "tiny" / "1.0.0", home / version)
    shutil.copytree(tiny / "tiny" / "1.0.0", home / "special" / "3.0.0")
    (home / "3.0.0").mkdir()  # begun, not prepared
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name, folder in {"tiny": "1.10.0", "tiny:1.0.0": "1.0.0", "tiny:1.*.*": "1.10.0",
                         "tiny/special": "special/3.0.0", "tiny/special:3.0.0": "special/3.0.0"}.items():
        assert source(name=name, split="test").folder == str(home / folder)
    with pytest.raises(ConfigError, match="found there: tiny:1.0.0, tiny:1.10.0.*tiny/special"):
        source(name="tiny:7.0.0", split="test")


@pytest.mark.parametrize("block, message", [
    (dict(image_key="picture"), r"data\.image_key: .*no Image feature 'picture'; it has .*label \(ClassLabel\)"),
    (dict(label_key="file_name"), r"data\.label_key: .*no ClassLabel feature 'file_name'"),
    (dict(id_key="nmae"), r"data\.id_key: .*no feature 'nmae'"),
    (dict(image_key="scan"), r"data\.image_key: 'scan' holds uint16 pixels"),
    (dict(split="validation"), r"data\.split: no split 'validation'.* Splits: test, train|Splits: train, test"),
    (dict(split="train[:90]"), r"data\.split: cannot take 'train\[:90\]'.*40 examples"),
    (dict(split="train[7:7]"), r"data\.split: 'train\[7:7\]' selects no example"),
])
def test_settings_that_do_not_fit(tiny, block, message):
    with pytest.raises(ConfigError, match=message):
        tiny_source(tiny, **block)


def test_damaged_array_record(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "data")
    shard = tmp_path / "data" / "tiny" / "1.0.0" / "tiny-train.array_record-00000-of-00003"
    data = tiny_source(tmp_path / "data")
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(DataError, match=f"{shard.name}.*record 0"):
        data[0]
    assert data[39]["image"]
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name}: no such file"):
        tiny_source(tmp_path / "data")


# Damaged TFRecord files.

def test_the_writer_of_these_tests():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's polynomial, the check value of the CRC catalogue


def record_bounds(shard):
    offsets = tfrecord.index_file(str(shard))
    return list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))


def test_truncated_anywhere(damaged):
    data_dir, shard = damaged
    whole, bounds = shard.read_bytes(), record_bounds(shard)
    start, end = bounds[5]
    for keep in (1, 11, 12, 13, end - start - 5, end - start - 4, end - start - 1):
        shard.write_bytes(whole[:start + keep])
        with pytest.raises(DataError, match=rf"{shard.name}: record 5 at byte {start}: the file is truncated"):
            tiny_source(data_dir)
    shard.write_bytes(whole[:start])  # at a boundary only the count can tell
    with pytest.raises(DataError, match=rf"{shard.name}: holds 5 records, but dataset_info.json says {len(bounds)}"):
        tiny_source(data_dir)
    shard.write_bytes(whole + whole[:bounds[0][1]])
    with pytest.raises(DataError, match=rf"{shard.name}: holds {len(bounds) + 1} records"):
        tiny_source(data_dir)
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name}: No such file"):
        tiny_source(data_dir)
    assert len(tiny_source(data_dir, "test+train[0shard]")) > 7  # a split that needs no damaged file


def test_flipped_header_is_found_when_indexing(damaged):
    data_dir, shard = damaged
    whole, bounds = shard.read_bytes(), record_bounds(shard)
    for position in range(12):
        for bit in (0, 7):
            broken = bytearray(whole)
            broken[bounds[3][0] + position] ^= 1 << bit
            shard.write_bytes(broken)
            with pytest.raises(DataError, match=rf"{shard.name}: record 3 at byte {bounds[3][0]}: the header is corr"):
                tfrecord.index_file(str(shard))
    with pytest.raises(DataError, match="record 3"):
        tiny_source(data_dir)


def test_flipped_payload_is_found_when_reading(damaged):
    data_dir, shard = damaged
    whole, (start, end) = shard.read_bytes(), record_bounds(shard)[3]
    first = len(tiny_source(data_dir, "train[0shard]"))
    for position in [*range(start + 12, end, 17), *range(end - 5, end)]:
        broken = bytearray(whole)
        broken[position] ^= 4
        shard.write_bytes(broken)
        data = tiny_source(data_dir)
        with pytest.raises(DataError, match=rf"{shard.name}: record 3 at byte {start}: the payload is") as error:
            data[first + 3]
        assert data[first + 2]["image"] and data[first + 4]["image"]
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_file_that_changes_under_an_open_source(damaged):
    data_dir, shard = damaged
    data = tiny_source(data_dir)
    first = len(tiny_source(data_dir, "train[0shard]"))
    bounds = record_bounds(shard)
    os.truncate(shard, bounds[4][0] + 3)
    assert data[first + 3]["image"]
    with pytest.raises(DataError, match=f"{shard.name}: record 4 at byte {bounds[4][0]}: the file is truncated"):
        data[first + 4]


def test_seeking_reads_the_same(tiny_tfrecord, monkeypatch):
    """What is not on a local disk is read by seeking; here on a local file."""
    expected = [tiny_source(tiny_tfrecord)[i] for i in range(40)]
    monkeypatch.setattr(tfrecord, "is_local", lambda path: False)
    monkeypatch.setattr(os, "pread", None)
    for cache in tfrecord.cache_folder().iterdir():
        cache.unlink()
    data = tiny_source(tiny_tfrecord)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(data.__getitem__, range(40))) == expected


# The cache of indexes.

def test_index_comes_from_the_cache(damaged, monkeypatch):
    data_dir, shard = damaged
    expected = [example["image"] for example in map(tiny_source(data_dir).__getitem__, range(40))]
    indexed = []
    real = tfrecord.index_file
    monkeypatch.setattr(tfrecord, "index_file", lambda path: indexed.append(path) or real(path))
    assert [tiny_source(data_dir)[i]["image"] for i in range(40)] == expected and not indexed

    os.utime(shard, ns=(0, 0))  # touched: indexed anew, and only this one
    assert [tiny_source(data_dir)[i]["image"] for i in range(40)] == expected
    assert {Path(path).name for path in indexed} == {shard.name} and len(indexed) == 1
    assert len(list(tfrecord.cache_folder().iterdir())) == 3


def test_stale_index_is_not_used(damaged):
    data_dir, shard = damaged
    data = tiny_source(data_dir)
    first, stat = len(tiny_source(data_dir, "train[0shard]")), shard.stat()
    offsets = tfrecord.index_file(str(shard))
    payloads = [tfrecord.TFRecords([str(shard)], [offsets]).read(0, i) for i in range(len(offsets) - 1)]
    expected = data[first]["image"]
    write_tfrecord(shard, payloads[::-1])  # same size, same count; only the time differs
    assert shard.stat().st_size == stat.st_size
    assert tiny_source(data_dir)[first + len(payloads) - 1]["image"] == expected


@pytest.mark.parametrize("damage", [b"", b"rubbish", b"half", b"objects", b"zeros", b"other end"])
def test_broken_cache_is_rebuilt(damaged, damage):
    data_dir, _ = damaged
    expected = [tiny_source(data_dir)[i] for i in range(40)]
    for cache in tfrecord.cache_folder().iterdir():
        stored = np.load(cache)
        if damage == b"half":
            cache.write_bytes(cache.read_bytes()[:-9])
        elif damage == b"objects":
            np.save(cache, np.array([print], object), allow_pickle=True)
        elif damage == b"zeros":
            np.save(cache, np.r_[stored[:4], 0 * stored[4:-1], stored[-1:]])
        elif damage == b"other end":
            np.save(cache, np.r_[stored[:-1], stored[-1] + 1])
        else:
            cache.write_bytes(damage)
    assert [tiny_source(data_dir)[i] for i in range(40)] == expected
    assert all(np.load(cache).dtype == np.int64 for cache in tfrecord.cache_folder().iterdir())


def test_unwritable_cache_is_a_warning(tiny_tfrecord, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(tiny_source(tiny_tfrecord)) == 40
    assert "cannot keep the index" in caplog.text


# Folders.

def make_folder(root, counts, name="{}.png"):
    for (split, label), count in counts.items():
        (root / split / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(np.full((2, 2, 3), i, np.uint8)).save(root / split / label / name.format(i))


def folder(root, split="train", **block):
    return source(name="folder", root=str(root), split=split, **block)


def test_folder_holds_every_file_with_its_class(tmp_path):
    make_folder(tmp_path, {("train", "dog"): 5, ("train", "cat"): 4, ("train", "Éléphant 象"): 3, ("val", "dog"): 2})
    (tmp_path / "train" / "cat" / "UPPER.JPeG").write_bytes(b"x")
    (tmp_path / "train" / "cat" / ".hidden.png").touch()
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    (tmp_path / "train" / "cat" / "folder.png").mkdir()
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "dog" / "link.png").symlink_to(tmp_path / "val" / "dog" / "0.png")
    os.close(os.open(os.fsencode(tmp_path / "train" / "dog") + b"/\xff.png", os.O_CREAT))  # no UTF-8
    data = pickle.loads(pickle.dumps(folder(tmp_path)))
    assert isinstance(data, Source) and data.class_names == ("cat", "dog", "Éléphant 象") and data.num_classes == 3
    seen = [data[i] for i in range(len(data))]
    assert len(seen) == 7 + 5 + 3 == len({example["id"] for example in seen})
    for example in seen:
        file = Path(example["id"])
        assert file.read_bytes() == example["image"] and file.parent.name == data.class_names[example["label"]]
    assert {folder(tmp_path, "val")[i]["label"] for i in range(2)} == {1}  # numbered as in train


def test_folder_parts_hold_all_classes_and_do_not_overlap(tmp_path):
    make_folder(tmp_path, {("train", f"c{label}"): 40 for label in range(5)})
    ids = [[data[i]["id"] for i in range(len(data))]
           for data in (folder(tmp_path), folder(tmp_path, "train[:50%]"), folder(tmp_path, "train[50%:]"))]
    assert ids[1] + ids[2] == ids[0] and len(set(ids[0])) == 200
    for part in ids[1:]:
        counts = np.unique([Path(name).parent.name for name in part], return_counts=True)[1]
        assert len(counts) == 5 and counts.min() >= 10  # 20 expected, standard deviation 2


def test_folder_order_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    make_folder(tmp_path, {("train", f"c{label}"): 9 for label in range(3)})
    expected = [folder(tmp_path)[i]["id"] for i in range(27)]
    real = os.scandir

    class Backwards(list):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Backwards(sorted(real(path), key=lambda e: e.name, reverse=True)))
    assert [folder(tmp_path)[i]["id"] for i in range(27)] == expected
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    tmp_path.rename(moved)
    assert [folder(moved)[i]["id"].replace("_moved", "") for i in range(27)] == expected
    moved.rename(tmp_path)


def test_folder_layout_errors(tmp_path):
    with pytest.raises(ConfigError, match=rf"^config\.input\.data\.root: {tmp_path}/none is no folder; expected ROOT"):
        folder(tmp_path / "none")
    with pytest.raises(ConfigError, match=rf"\.root: no class folders in {tmp_path}; expected ROOT/train"):
        folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ConfigError, match=rf"\.root: no class folders in {tmp_path}/train; expected"):
        folder(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(ConfigError, match=rf"\.root: no images in the class folders of {tmp_path}/train; expected"):
        folder(tmp_path)
    make_folder(tmp_path, {("train", "cat"): 2, ("val", "dog"): 1})
    with pytest.raises(ConfigError, match=rf"class 'dog' of {tmp_path}/val is not in {tmp_path}/train"):
        folder(tmp_path, "val")
    with pytest.raises(ConfigError, match=r"\.split: no split 'vla' in 'vla'; did you mean val\? Splits: train, val"):
        folder(tmp_path, "vla")
    with pytest.raises(ConfigError, match=r"no split 'train'.*Splits: cat.*expected ROOT/train/<class>"):
        folder(tmp_path / "train")
    with pytest.raises(ConfigError, match="local or mounted disk"):
        folder("gs://bucket/images")


def test_other_layouts_of_folders_are_told(tmp_path):
    make_folder(tmp_path / "splits", {("train", "cat"): 2, ("train", "dog"): 1})
    make_folder(tmp_path, {("classes", "cat"): 1, ("classes", "dog"): 1})
    for root, cause in (
            ("classes", r"holds the classes themselves \(cat, dog\), and no splits; with holdout=0\.1 the splits are"),
            ("splits/train", rf"is a split itself, with the classes cat, dog; give root={tmp_path}/splits:"),
            (".", rf"the splits are one folder deeper; give root={tmp_path}/splits:")):
        with pytest.raises(ConfigError, match=rf"\.root: .*{cause}.*no split 'train'.*expected ROOT/train/<class>"):
            folder(tmp_path / root)
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "train" / "a.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"\.root: no class folders in .*/flat/train, where images lie without one"):
        folder(tmp_path / "flat")


def labels_of(source):
    return [source.class_names[source[i]["label"]] for i in range(len(source))]


@pytest.mark.parametrize("inside", ["", "train"])
def test_part_of_each_class_is_held_out_by_a_rule_of_names(tmp_path, inside):
    """Of a root that holds the classes, and of a `train` that stands alone; one file decides nothing about another."""
    counts = {"ant": 40, "bee": 11, "cat": 2, "dog": 1}
    root = tmp_path / "pictures"
    make_folder(root, {(inside or ".", name): count for name, count in counts.items()})
    train, val = folder(root, holdout=0.2), folder(root, "val", holdout=0.2)
    assert collections.Counter(labels_of(val)) == {"ant": 8, "bee": 2, "cat": 1}  # never a whole class
    assert collections.Counter(labels_of(train)) == {"ant": 32, "bee": 9, "cat": 1, "dog": 1}
    ids = [{source[i]["id"] for i in range(len(source))} for source in (train, val)]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == sum(counts.values())
    assert train.class_names == val.class_names == tuple(counts) and train.contents.counts.tolist() == [32, 9, 1, 1]
    both = folder(root, "train+val", holdout=0.2)
    assert len(both) == sum(counts.values()) and len(folder(root, "train[:50%]", holdout=0.2)) == 22

    other = folder(root, "val", holdout=0.2, holdout_seed=1)
    assert {other[i]["id"] for i in range(len(other))} != ids[1]
    copy = shutil.copytree(root, tmp_path / "elsewhere")
    again = folder(copy, "val", holdout=0.2)
    assert again.contents.fingerprint == val.contents.fingerprint
    make_folder(copy, {(inside or ".", "ant"): 5}, name="new{}.png")
    more = folder(copy, "val", holdout=0.2)
    stayed = {os.path.basename(more[i]["id"]) for i in range(len(more))}
    assert len({os.path.basename(name) for name in ids[1]} - stayed) <= 3

    assert report(val)["held_out"] == {"share": 0.2, "seed": 0}
    assert any("held out as val: 0.2 of the images of each class" in line for line in describe("x", val))


def test_where_there_is_a_split_to_evaluate_on_nothing_is_held_out(tmp_path):
    make_folder(tmp_path, {("train", "cat"): 5, ("train", "dog"): 5, ("test", "cat"): 2, ("test", "dog"): 2})
    lengths = {split: len(folder(tmp_path, split, holdout=0.2)) for split in ("train", "val", "test", "val+test")}
    assert lengths == {"train": 8, "val": 2, "test": 4, "val+test": 6}  # what is called test is left for the end
    with pytest.raises(ConfigError, match=r"no split 'dev'.*Splits: train, val, test \(with those that holdout makes"):
        folder(tmp_path, "dev", holdout=0.2)
    make_folder(tmp_path, {("valid", "cat"): 2, ("valid", "dog"): 2})
    assert len(folder(tmp_path, holdout=0.2)) == 10 and folder(tmp_path, holdout=0.2).contents.held_out is None
    with pytest.raises(ConfigError, match=r"no split 'val' in 'val'; did you mean valid\? Splits: test, train, valid"):
        folder(tmp_path, "val", holdout=0.2)
    make_folder(tmp_path, {(".", "bird"): 2})
    with pytest.raises(ConfigError, match=r"\.root: .* holds splits \(test, train, valid\) and folders of images \(b"):
        folder(tmp_path, "val", holdout=0.2)
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match=rf"\.holdout: is a share .* below 1, got {share}"):
            folder(tmp_path, holdout=share)


def test_folder_reads_what_pillow_reads_safely(tmp_path):
    for i, (suffix, form) in enumerate(dict(jpg="JPEG", jpeg="JPEG", jpe="JPEG", jfif="JPEG", png="PNG", webp="WEBP",
                                            bmp="BMP", tif="TIFF", TIFF="TIFF", gif="GIF").items()):
        (tmp_path / "train" / "c").mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.full((4, 4, 3), 20 * i, np.uint8))
        picture.save(tmp_path / "train" / "c" / f"{i}.{suffix}", form, **(
            dict(save_all=True, append_images=[Image.new("RGB", (4, 4))]) if form in ("GIF", "TIFF") else {}))
    data, decode = folder(tmp_path), builder.build("decode", "pp")
    assert len(data) == 10
    for i in range(10):
        image = decode.host({"image": data[i]["image"]}, np.random.default_rng(0))["image"]
        assert abs(int(image[0, 0, 0]) - 20 * int(Path(data[i]["id"]).stem)) <= 3  # the first frame


def test_folder_says_what_it_leaves_out(tmp_path):
    make_folder(tmp_path, {("train", "a"): 3, ("train", "b"): 2})
    for name in ("a/x.txt", "a/y.TXT", "a/noext", "a/.DS_Store", "b/photo.heic", "readme.md", "b/empty.png"):
        (tmp_path / "train" / name).touch()
    (tmp_path / "train" / "b" / "deeper").mkdir()
    (tmp_path / "train" / "b" / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "train" / "b" / "pipe.png")
    found = folder(tmp_path).contents
    assert found.left_out == {".txt": 2, "without extension": 1, "hidden": 1, ".heic": 1, "outside of class folders": 1,
                              "deeper folders": 1, "broken links": 1, "no files": 1}
    assert found.counts.tolist() == [3, 2] and found.empty == 1
    assert folder(tmp_path, "train[:3]").contents.counts.sum() in (2, 3)


@pytest.mark.parametrize("names, classes, note", [
    (range(12), [str(i) for i in range(12)], "called by numbers and sorted as such"),
    ((10, 9, 2), ["2", "9", "10"], "'2' is class 0; labels='index' makes it class 2"),
    (("a", "10", "9"), ["10", "9", "a"], None),
    (("07", "7"), ["07", "7"], None),
    ((0, 1), ["0", "1"], None)])
def test_folder_sorts_numbers_as_numbers(tmp_path, names, classes, note):
    make_folder(tmp_path, {("train", str(name)): 1 for name in names})
    data = folder(tmp_path)
    said = list(describe("data", data))[1:]
    assert list(data.class_names) == classes and [note in text for text in said] == [True] * bool(note)
    assert all(Path(data[i]["id"]).parent.name == classes[data[i]["label"]] for i in range(len(data)))
    if note:
        numbers = source(name="folder", root=str(tmp_path), split="train", labels="index")
        assert all(numbers[i]["label"] == int(Path(numbers[i]["id"]).parent.name) for i in range(len(numbers)))
        assert not any("labels='index' makes" in line for line in describe("data", numbers))


def test_fingerprint_knows_the_files_and_not_the_place(tmp_path, tiny, tiny_tfrecord):
    make_folder(tmp_path / "one", {("train", "a"): 3, ("train", "b"): 2, ("val", "a"): 1})
    before = folder(tmp_path / "one").contents.fingerprint
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two" / "train" / "a" / "0.png", (0, 0))
    (tmp_path / "two" / "val" / "a" / "0.png").write_bytes(b"of another split")
    assert folder(tmp_path / "two").contents.fingerprint == before
    file = tmp_path / "two" / "train" / "a" / "0.png"
    for change in (lambda: file.write_bytes(file.read_bytes() + b"x"), lambda: file.rename(file.with_name("9.png")),
                   lambda: (tmp_path / "two/train/a").rename(tmp_path / "two/train/z"),
                   lambda: (tmp_path / "two/train/b/1.png").unlink()):
        change()
        now = folder(tmp_path / "two").contents.fingerprint
        assert now != before
        before = now

    shards = {form: tiny_source(where).contents.fingerprint for form, where in (("a", tiny), ("t", tiny_tfrecord))}
    assert len(set(shards.values())) == 2 and tiny_source(tiny, "train[:50%]").contents.fingerprint is not None
    shutil.copytree(tiny, tmp_path / "copy")
    assert tiny_source(tmp_path / "copy").contents.fingerprint == shards["a"]
    shard = next((tmp_path / "copy").rglob("*.array_record*"))
    shard.write_bytes(shard.read_bytes() + b"x")
    assert tiny_source(tmp_path / "copy").contents.fingerprint != shards["a"]


def test_folder_without_train_and_file_that_vanishes(tmp_path):
    make_folder(tmp_path, {("val", "b"): 1, ("test", "a"): 2})
    assert folder(tmp_path, "val").class_names == folder(tmp_path, "test").class_names == ("a", "b")
    data = folder(tmp_path, "val+test")
    gone = data[0]["id"]
    os.unlink(gone)
    with pytest.raises(DataError, match=gone):
        data[0]


# Made-up data.

def fake(split="train", **block):
    return source(name="fake", split=split, **block)


def test_fake_is_a_function_of_split_and_index():
    data = fake(num_examples=50)
    assert isinstance(data, Source) and len(data) == 50 and data[3]["image"].shape == (32, 32, 3)
    again = pickle.loads(pickle.dumps(fake("train[20:40]", num_examples=50)))
    for i in (19, 0, 7):
        assert again[i]["id"] == f"train#{20 + i}" and again[i]["label"] == data[20 + i]["label"]
        np.testing.assert_array_equal(again[i]["image"], data[20 + i]["image"])
    images = [data[i]["image"].tobytes() for i in range(50)]
    test = fake("test", num_examples=50)
    assert len({*images, *(test[i]["image"].tobytes() for i in range(50))}) == 100


@pytest.mark.parametrize("encoded", [False, True])
def test_fake_can_be_learned(encoded):
    def load(split):
        data = fake(split, num_examples=200, image_size=16, encoded=encoded)
        examples = [data[i] for i in range(200)]
        return (np.stack([pixels(e) if encoded else e["image"] for e in examples]).astype(float),
                np.array([e["label"] for e in examples]))

    (train, labels), (test, answers) = load("train"), load("test")
    means = np.stack([train[labels == c].mean(0) for c in range(10)])
    nearest = ((test[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == answers).mean() > 0.95


@pytest.mark.parametrize("encoded", [False, True])
def test_fake_broken_images_do_not_decode(encoded):
    data = fake(num_examples=10, encoded=encoded, broken=(2, 5))
    for i in range(10):
        if i in (2, 5):
            with pytest.raises(OSError):
                pixels(data[i])
        else:
            assert isinstance(data[i]["image"], bytes) == encoded


# Settings.

@pytest.mark.parametrize("block, message", [
    (dict(split="train"),
     r"data\.name: required: digits, fake, folder, idx, first_of, real, objectnet, or a dataset of TFDS"),
    (dict(name="fake", split="train", num_exmaples=3), r"num_exmaples: unknown; did you mean num_examples\?"),
    (dict(name="fake", split="train", num_classes=0), r"data\.num_classes: must be 1 or more, got 0"),
    (dict(name="fake", split="train", broken=(2000,)), r"data\.broken: 2000 is outside"),
    (dict(name="digits"), r"data\.split: required"),
    (dict(name="digits", split="train", data_dirr="x"), r"data_dirr: unknown; did you mean data_dir\?"),
    (dict(name="digits", split="train", data_dir="gs://b/x"), r"data\.data_dir: .*local or mounted"),
    (dict(name="folder", split="train"), r"data\.root: required"),
    (dict(name="folder", split="train[:", root="/"), r"data\.split: cannot read 'train\[:'"),
    (dict(name="imagenet2012", split="train[:1.5.1%]"), r"data\.split: cannot read"),
    (dict(name="imagenet2012", split="train", splt="x"), r"data\.splt: unknown; did you mean split\?"),
    (dict(name="bv:coco", split="train"), r"data\.name: cannot read 'bv:coco'"),
])
def test_wrong_settings_are_found_without_files(block, message):
    with pytest.raises(ConfigError, match=message):
        check_source(block, PATH)


def test_config_dicts_and_unset_keys():
    import ml_collections
    from ml_collections.config_dict import placeholder

    block = ml_collections.ConfigDict(dict(name="fake", split="test", num_examples=placeholder(int)))
    assert check_source(block, PATH).num_examples == 1024 and len(open_source(block, PATH)) == 1024


@pytest.mark.parametrize("split, expected", [
    ("train", range(0, 30)), ("train[:50%]", range(0, 15)), ("train[99%:]", []), ("train[-5:]", range(25, 30)),
    ("train[2shard]", range(25, 30)), ("train[20:]+test[:1]", [*range(20, 30), 100]),
    ("all", [*range(30), *range(100, 104)]),
])
def test_splits_are_slices(split, expected):
    parts = {"train": [("a", 10), ("b", 15), ("c", 5)], "test": [("d", 4)]}
    first = {"a": 0, "b": 10, "c": 25, "d": 100}
    if not len(expected):
        with pytest.raises(ConfigError, match="selects no example"):
            core.select(split, {"train": [10, 15, 5], "test": [4]}, PATH)
        return
    spans = core.select(split, {"train": [10, 15, 5], "test": [4]}, PATH)
    refined = spans.refine(parts)
    assert len(spans) == len(refined) == len(expected)
    for i, number in enumerate(expected):
        span, within = refined.locate(i)
        assert first[refined.spans[span].name] + within == number


def test_names_alone_do_not_import_tfds():
    finish(script("""
        import sys
        from cb_vit.datasets import open_source
        data = open_source(dict(name="fake", split="train", num_examples=4), "config.input.data")
        data[0]
        assert not {"tensorflow_datasets", "jax", "PIL", "sklearn"} & set(sys.modules)
    """))


def test_more_shards_than_open_files(damaged):
    """Reading never runs out of files: the limit is raised, or shards would fail far into a run."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        core.allow_open_files(2000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(3000, limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# --- MNIST's files. ----------------------------------------------------------------------------------------------

def write_idx(folder, split="train", images=7, labels=None, compress=True, height=4, width=3):
    """The two files of a split; returns their arrays."""
    rng = np.random.default_rng(images)
    arrays = {f"{split}-images-idx3-ubyte": rng.integers(0, 256, (images, height, width), np.uint8),
              f"{split}-labels-idx1-ubyte": np.arange(images if labels is None else labels, dtype=np.uint8) % 3}
    for name, array in arrays.items():
        data = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
        (folder / f"{name}{'.gz' * compress}").write_bytes(gzip.compress(data) if compress else data)
    return list(arrays.values())


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files_are_read_as_they_are_published(tmp_path, compress):
    images, labels = write_idx(tmp_path, compress=compress)
    opened = source(name="idx", root=str(tmp_path), split="train[2:]")
    assert isinstance(opened, Source) and (len(opened), opened.num_classes) == (5, 3)
    for i, example in enumerate(pickle.loads(pickle.dumps(opened))[j] for j in range(5)):
        assert example["image"].shape == (4, 3, 3) and example["label"] == labels[i + 2]
        assert (example["image"] == images[i + 2][:, :, None]).all()
        assert example["id"] == f"{tmp_path} train#{i + 2}"


def test_idx_is_known_by_what_is_in_the_files(tmp_path):
    def contents(**changes):
        write_idx(tmp_path, **changes)
        return source(name="idx", root=str(tmp_path), split="train").contents

    packed = contents(compress=True)
    for file in tmp_path.glob("*.gz"):
        file.unlink()
    assert packed.counts.tolist() == [3, 2, 2] and contents(compress=False).fingerprint == packed.fingerprint
    assert contents(compress=False, height=5).fingerprint != packed.fingerprint


def test_idx_files_that_cannot_be(tmp_path):
    def refused(kind, match, **changes):
        with pytest.raises(kind, match=match):
            source(**dict(name="idx", root=str(tmp_path), split="train") | changes)

    refused(ConfigError, "config.input.data.root: .*nowhere is no folder", root=str(tmp_path / "nowhere"))
    refused(ConfigError, "config.input.data.root: neither train-images-idx3-ubyte nor .*gz is in")
    write_idx(tmp_path)
    refused(ConfigError, "config.input.data.split: no split 'val' in 'val'.*Splits: train, test", split="val")
    write_idx(tmp_path, labels=6)
    refused(DataError, "7 images and 6 labels in train")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = gzip.decompress(file.read_bytes())
    huge = whole[:4] + b"\xff" * 12 + whole[16:]
    for damaged, match in ((whole[:-1], "84 bytes, and holds 83"), (whole + b"0", "holds more"), (whole[:9], "begins"),
                           (b"no", "begins"), (b"\0\0\x0d" + whole[3:], "begins"), (huge, "bytes, and holds 84")):
        file.write_bytes(gzip.compress(damaged))
        refused(DataError, f"train-images.*{match}")
    file.write_bytes(gzip.compress(whole)[:-20])
    refused(DataError, "train-images-idx3-ubyte.gz: ")
    file.write_bytes(b"not gzip")
    refused(DataError, "train-images-idx3-ubyte.gz: ")
