"""Data of others' forms becomes a prepared data set: the same images, order and names; whole or not at all."""
import io
import json
import os
import re
import resource
import signal
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import refusal
from PIL import Image

from cb_vit.config import ConfigError
from cb_vit.datasets import open_source, preparing
from cb_vit.datasets.incoming import by_split
from cb_vit.io import CannotWrite
from cb_vit.pp import images
from cb_vit.tools import cli, import_data

PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = [PNG + bytes([number]) * 50 for number in range(12)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(file, pictures, labels, names=None, struct=True, label="label"):
    """A file as Hugging Face's library writes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(bytes=data, path=f"n{i}.png") for i, data in enumerate(pictures)] if struct else pictures
    columns = pa.table({"image": pa.array(cells, STRUCT if struct else pa.binary()), label: labels})
    noted = {"info": {"features": {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}}}
    pq.write_table(columns.replace_schema_metadata({b"huggingface": json.dumps(noted).encode()} if names else None),
                   file, row_group_size=5)
    return file


def tar(file, entries):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in entries:
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content or b""))
    return file


def samples(numbers, label=lambda i: str(i % 3)):
    """Entries of a webdataset."""
    return [entry for i in numbers for entry in (
        (f"./{i:04d}.PNG", PICTURES[i]), (f"./{i:04d}.cls", label(i).encode() + b"\n"),
        (f"./{i:04d}.json", json.dumps({"species": "xyz"[i % 3]}).encode()))]


def run(src, folder, *args, name="flowers"):
    import_data.main(cli.parse(import_data, [str(src), f"--name={name}", f"--data_dir={folder}", *args]))


def refused(src, folder, *args, name="bad"):
    """What the command says; and that it leaves nothing behind."""
    said = refusal(import_data, src, f"--name={name}", f"--data_dir={folder}", *args)
    assert not (folder / name).exists()
    return said


def read(folder, split="train", name="flowers"):
    source = open_source(dict(name=name, data_dir=str(folder), split=split, id_key="id"), "data")
    found = [source[i] for i in range(len(source))]
    return source.class_names, [e["image"] for e in found], [e["label"] for e in found], [e["id"] for e in found]


@pytest.fixture
def flowers(tmp_path):
    names = ["rose", "daisy", "tulip"]
    data = tmp_path / "flowers" / "data"
    parquet(data / "train-00000-of-00002.parquet", PICTURES[:7], [i % 3 for i in range(7)], names)
    parquet(data / "train-00001-of-00002.parquet", PICTURES[7:], [2] * 5, names)
    parquet(data / "validation-00000-of-00001-0123abcd.parquet", PICTURES[:2], [1, -1], names)
    return tmp_path / "flowers"


def test_parquet_is_kept_as_it_is(flowers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparing, "SHARD_BYTES", 300)
    run(flowers, tmp_path / "tfds")
    ids = [f"n{i}.png" for i in [*range(7), *range(5)]]
    assert read(tmp_path / "tfds") == (("rose", "daisy", "tulip"), PICTURES, [0, 1, 2, 0, 1, 2, 0] + [2] * 5, ids)
    assert read(tmp_path / "tfds", "validation")[1:3] == (PICTURES[:2], [1, -1])
    said, progress = capsys.readouterr()
    assert f"data=dict(name='flowers', data_dir='{tmp_path}/tfds', split='validation', id_key='id')" in said
    assert "train: 12 examples of 3 classes" in said and not progress  # a bar is for a terminal
    files = os.listdir(tmp_path / "tfds" / "flowers" / "1.0.0")
    assert len([name for name in files if name.startswith("flowers-train.array_record")]) > 2


def test_what_is_there_is_replaced_only_where_asked(flowers, tmp_path):
    run(flowers, tmp_path / "tfds")
    args = [flowers, "--name=flowers", f"--data_dir={tmp_path / 'tfds'}"]
    assert refusal(import_data, *args).endswith("is already there; choose another name, or --overwrite it")
    (flowers / "data" / "validation-00000-of-00001-0123abcd.parquet").unlink()
    home = tmp_path / "tfds" / "flowers"
    (home / "incomplete.of_a_killed_one").mkdir()
    run(flowers, tmp_path / "tfds", "--overwrite")
    assert len(read(tmp_path / "tfds", "all")[1]) == 12 and os.listdir(home) == ["1.0.0"]
    parquet(flowers / "data" / "train-00001-of-00002.parquet", [b"<html>"], [0], ["rose", "daisy", "tulip"])
    assert "row 0: no image format" in refusal(import_data, *args, "--overwrite")
    assert len(read(tmp_path / "tfds")[1]) == 12 and os.listdir(home) == ["1.0.0"]  # the earlier one stays
    (home / "2.0.0").mkdir()
    assert "is no import of this program's" in refusal(import_data, *args, "--overwrite")


def test_a_full_disk_leaves_nothing(flowers, tmp_path):
    big = [PNG + os.urandom(30_000) for _ in range(40)]
    parquet(flowers / "data" / "train-00001-of-00002.parquet", big, [0] * 40, ["rose", "daisy", "tulip"])
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(CannotWrite, match="cannot be written: File too large; raise ulimit -f"):
            run(flowers, tmp_path / "tfds")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "tfds" / "flowers").exists()


def test_labels_without_names_name_themselves(tmp_path):
    parquet(tmp_path / "a" / "part.parquet", PICTURES[:3], [10, 2, 2], struct=False, label="kind")
    assert "which column is meant? " in refused(tmp_path / "a", tmp_path)
    assert "image (binary), kind (int64)" in refused(tmp_path / "a", tmp_path, "--label_key=knd")
    run(tmp_path / "a" / "part.parquet", tmp_path / "tfds", "--label_key=kind")
    names, _, labels, ids = read(tmp_path / "tfds")
    assert names == tuple(map(str, range(11))) and labels == [10, 2, 2] and ids[2] == "part.parquet#2"
    parquet(tmp_path / "b" / "train.parquet", PICTURES[:3], ["10", "9", "10"])
    run(tmp_path / "b", tmp_path / "tfds", name="texts")
    assert read(tmp_path / "tfds", name="texts")[::2] == (("9", "10"), [1, 0, 1])


@pytest.mark.parametrize("pictures, labels, message", [
    ([PICTURES[0], b"some text"], [0, 1], "row 1: no image format that is read here, .*; it is text, no image"),
    ([PICTURES[0], None], [0, 1], "row 1: 'image' holds no image, only the path 'n1.png'; embed"),
    (PICTURES[:2], [0, None], "row 1: no label"), (PICTURES[:2], [0.0, 1.5], "row 0: label 0.0 is no number or name"),
    (PICTURES[:2], [0, -2], "row 1: label -2 is outside"), (PICTURES[:2], [0, 10**12], "row 1: label 10{12} is out"),
    (PICTURES[:2], [True, False], "row 0: label True is no"), ([], pa.array([], pa.int64()), "train holds no example"),
    (PICTURES[:2], [-1, -1], "--classes: no example has a label"), (PICTURES[:2], ["a", "b "], "class 'b '")])
def test_rows_that_cannot_be(tmp_path, pictures, labels, message):
    parquet(tmp_path / "x" / "train.parquet", pictures, labels)
    assert re.search(message, refused(tmp_path / "x", tmp_path))


@pytest.mark.parametrize("form", images.FORMATS)
def test_every_format_that_is_read_is_taken(form):
    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, form)
    images.check_encoded(file.getvalue())
    for content in (b"", file.getvalue()[1:], b"%PDF-1.4", b"\0" * 40):
        with pytest.raises(ValueError, match="no image format that is read here"):
            images.check_encoded(content)


def test_files_that_are_not_whole_or_of_one_set(flowers, tmp_path):
    data = flowers / "data"
    (data / "train-00000-of-00002.parquet").rename(tmp_path / "away.parquet")
    assert "train-00001-of-00002.parquet and its kin: number 0 of 2 is not there" in refused(flowers, tmp_path)
    whole = (tmp_path / "away.parquet").read_bytes()
    for content in (whole[:-9], b"", b"PAR1"):
        (data / "train-00000-of-00002.parquet").write_bytes(content)
        assert "train-00000-of-00002.parquet: is no whole parquet file" in refused(flowers, tmp_path)
    parquet(data / "train-00000-of-00002.parquet", PICTURES[:2], [0, 1], ["daisy", "rose", "tulip"])
    assert "has other columns or classes than" in refused(flowers, tmp_path)
    parquet(data / "more.parquet", PICTURES[:2], [0, 1])
    assert "more.parquet does not tell its split" in refused(flowers, tmp_path)
    for part in "ab":
        parquet(tmp_path / "sets" / part / "test.parquet", PICTURES[:1], [0])
    assert "holds test 2 times" in refused(tmp_path / "sets", tmp_path)
    tar(tmp_path / "sets" / "a" / "x.tar", samples([0]))
    assert "holds .parquet and .tar files" in refused(tmp_path / "sets" / "a", tmp_path)
    (tmp_path / "nothing").mkdir()
    assert "holds no .parquet or .tar file" in refused(tmp_path / "nothing", tmp_path)
    assert "is not there" in refused(tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("names, splits", [
    (["train_small-00000-of-00001", "test/0"], {"train_small": 1, "test": 1}), (["Set-TEST-1"], {"test": 1}),
    (["x-10", "x-9"], {"train": 2}), (["train/val-1"], "train/val-1.tar tells of two splits, val and train"),
    (["x-train-val"], "tells of two splits, train and val"), (["dev", "test"], "dev.tar does not tell its split"),
    (["a/x", "b/x"], "holds train 2 times"), (["train-0-of-2", "train-1-of-3"], "their numbers are not of one set")])
def test_files_tell_their_split(tmp_path, names, splits):
    for name in names:
        tar(tmp_path / f"{name}.tar", [])
    if isinstance(splits, dict):
        found = by_split(str(tmp_path), ".tar")
        assert {split: len(files) for split, files in found.items()} == splits
        assert [os.path.basename(file) for file in found.get("train", [])] in ([], ["x-9.tar", "x-10.tar"])
    else:
        with pytest.raises(ConfigError, match=splits):
            by_split(str(tmp_path), ".tar")


@pytest.mark.parametrize("name, message", [
    ("", "--name: not given"), ("Flowers", "small letters"), ("a/b", "small letters"), ("folder", "is a kind of data"),
    ("foldr", "did you mean folder")])
def test_names_that_no_config_could_use(flowers, tmp_path, name, message):
    assert message in refusal(import_data, flowers, f"--name={name}", f"--data_dir={tmp_path}")


def test_tars_are_kept_as_they_are(tmp_path):
    tar(tmp_path / "w" / "set-train-0000.tar", samples(range(5)))
    tar(tmp_path / "w" / "set-train-0001.tar", [("._0005.png", b"of a Mac"), *samples(range(5, 12))])
    tar(tmp_path / "w" / "test" / "0.tar", samples([3]))
    run(tmp_path / "w", tmp_path / "tfds")
    assert read(tmp_path / "tfds") == (("0", "1", "2"), PICTURES, [i % 3 for i in range(12)],
                                       [f"{i:04d}" for i in range(12)])
    assert read(tmp_path / "tfds", "test")[1] == [PICTURES[3]]
    (tmp_path / "w" / "classnames.txt").write_bytes("\ufeffrose\r\ndaisy\r\ntulip\r\n".encode())
    run(tmp_path / "w", tmp_path / "tfds", name="named")
    assert read(tmp_path / "tfds", name="named")[::2] == (("rose", "daisy", "tulip"), [i % 3 for i in range(12)])
    (tmp_path / "names").write_text("z\ny\nx\n")
    run(tmp_path / "w", tmp_path / "tfds", f"--classes={tmp_path / 'names'}", "--label_key=species", name="json")
    assert read(tmp_path / "tfds", name="json")[::2] == (("z", "y", "x"), [2 - i % 3 for i in range(12)])
    (tmp_path / "names").write_text("z\ny\n")
    said = refused(tmp_path / "w", tmp_path, f"--classes={tmp_path / 'names'}")
    assert "set-train-0000.tar: 0002: label 2 is outside 0 … 1" in said


@pytest.mark.parametrize("entries, message", [
    (samples([0, 1]) + samples([0]), "0000 stands there twice, with other entries between"),
    (samples([0])[:1] * 2, "0000.PNG stands there twice"), (samples([0])[1:], "0000 has no image (its entries are cls"),
    ([("a.png", PNG), ("a.jpg", PNG), ("a.cls", b"0")], "a has jpg and png"), ([("a.png", PNG)], "a: no label"),
    ([("a.png", PNG), ("a.json", b"{")], "a: its label cannot be read"),
    (samples(range(2), "a{}".format)[:2] + samples([1]), "label 1 is of another kind than 'a0'"),
    ([("a.png", b"no"), ("a.cls", b"0")], "a: no image format"), ([("a.png", None)], "a.png is a link or a device"),
    ([("../a.png", PNG), ("../a.cls", b"0")], "../a.png lies outside")])
def test_entries_that_cannot_be(tmp_path, entries, message):
    tar(tmp_path / "x" / "train.tar", entries)
    assert message in refused(tmp_path / "x", tmp_path)


def test_a_tar_that_was_cut_anywhere_is_not_whole(tmp_path):
    file = tar(tmp_path / "x" / "train.tar", samples(range(3)))
    whole = file.read_bytes()
    for content in (b"", whole[:700], whole[:1024], whole[:3072], whole[:3 * 3072], whole[:3072] + b"x" * 7000,
                    b"\x1f\x8b" + whole):
        file.write_bytes(content)
        said = refused(tmp_path / "x", tmp_path)
        assert "is no whole tar file" in said or "is truncated or damaged at byte" in said, (len(content), said)


def test_an_extension_of_several_parts_can_be_the_image(tmp_path):
    entries = [(f"{i:04d}.{part}", content) for i in range(3) for part, content in (
        ("input.png", PICTURES[i]), ("target.png", PICTURES[i + 3]), ("cls", str(i).encode()))]
    src = tar(tmp_path / "src" / "train.tar", entries)
    assert "which --image_key can choose" in refused(src, tmp_path)
    run(src, tmp_path, "--image_key=.Input.PNG")
    assert read(tmp_path)[1] == PICTURES[:3]


@pytest.mark.parametrize(("file", "split"), [
    ("test/data-00000-of-00001.parquet", "test"), ("extra-00000-of-00001.parquet", "extra"), ("a.parquet", "train")])
def test_a_folder_called_as_splits_are_tells_more_than_a_name_that_is_none(tmp_path, file, split):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert list(by_split(str(tmp_path), ".parquet")) == [split]
