"""Images whose classes stand in a file: tables of any shape, and ImageNet as Kaggle gives it."""
import collections
import os
import pickle
import shutil
import time

import pytest

from cb_vit.config import ConfigError
from cb_vit.datasets import DataError, Source, check_source, label_table, open_source
from cb_vit.datasets.labels import wnids

PATH = "config.input.data"


def put(file, content=b"x"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def folder(root, split="train", **block):
    return open_source(dict(name="folder", root=str(root), split=split) | block, PATH)


def examples(source):
    """(file name, class) of each, in order."""
    return [(os.path.basename(example["id"]), source.class_names[example["label"]])
            for example in map(source.__getitem__, range(len(source)))]


# ImageNet as Kaggle gives it.

CLASSES = wnids()[:3]
INSIDE = "ILSVRC/Data/CLS-LOC"


@pytest.fixture
def kaggle(tmp_path):
    """A small ImageNet of Kaggle's, and the same in class folders."""
    lines = ["ImageId,PredictionString"]
    for number, wnid in enumerate(CLASSES * 4):
        name, content = f"ILSVRC2012_val_{number:08d}", b"v" * number
        put(tmp_path / "kaggle" / INSIDE / "val" / f"{name}.JPEG", content)
        put(tmp_path / "kaggle" / INSIDE / "test" / f"ILSVRC2012_test_{number:08d}.JPEG")
        put(tmp_path / "sorted" / "val" / wnid / f"{name}.JPEG", content)
        lines.insert(1 + number % 2, f"{name},{wnid} 85 1 499 272 {wnid} 1 2 3 4 ")
        for root in (tmp_path / "kaggle" / INSIDE, tmp_path / "sorted"):
            put(root / "train" / wnid / f"{wnid}_{number}.JPEG", b"t" * number)
    put(tmp_path / "kaggle" / "LOC_val_solution.csv", "\n".join(lines) + "\n")
    return tmp_path / "kaggle"


@pytest.mark.parametrize("inside", ["", "ILSVRC", "ILSVRC/Data", INSIDE])
def test_kaggles_imagenet_is_that_in_class_folders(kaggle, inside):
    """Classes, order and fingerprint alike, so that a run goes on with either."""
    for split in ("train", "val", "train+val", "val[:50%]"):
        ours, sorted_ = folder(kaggle / inside, split), folder(kaggle.parent / "sorted", split)
        assert isinstance(ours, Source) and ours.class_names == sorted_.class_names == CLASSES
        assert examples(ours) == examples(sorted_) and ours.contents.fingerprint == sorted_.contents.fingerprint
        assert pickle.loads(pickle.dumps(ours))[3] == ours[3] and not ours.contents.left_out


def test_a_sorted_val_needs_no_file(kaggle):
    shutil.rmtree(kaggle / INSIDE / "val")
    shutil.copytree(kaggle.parent / "sorted" / "val", kaggle / INSIDE / "val")
    (kaggle / "LOC_val_solution.csv").unlink()
    assert examples(folder(kaggle, "val")) == examples(folder(kaggle.parent / "sorted", "val"))


def test_kaggles_imagenet_in_part(kaggle):
    solution = kaggle / "LOC_val_solution.csv"
    whole = solution.read_text().splitlines()
    solution.write_text("\n".join(whole[:-1]))
    val = folder(kaggle, "val")
    assert len(val) == 11 and val.contents.left_out == {"not in LOC_val_solution.csv": 1}
    for lines, message in (
            ([*whole, "ILSVRC2012_val_1,n01440764", "gone,n01440764"],
             "line 14: 'ILSVRC2012_val_1' is no image in .*/val, nor are those of 1 other lines"),
            ([*whole, "x,tench 1 2 3 4"], "line 14: PredictionString begins with 'tench'"),
            ([*whole, whole[3]], r"line 14: 'ILSVRC2012_val_\d+' stands in line 4 already")):
        solution.write_text("\n".join(lines))
        with pytest.raises(DataError, match=rf"LOC_val_solution\.csv: {message}"):
            folder(kaggle, "val")
    solution.write_text("\n".join(whole))
    shutil.rmtree(kaggle / INSIDE / "train" / CLASSES[1])
    with pytest.raises(DataError, match=f"class '{CLASSES[1]}' of val is not in train, which gives the classes"):
        folder(kaggle, "val")
    shutil.rmtree(kaggle / INSIDE / "train")
    assert folder(kaggle, "val").class_names == CLASSES
    with pytest.raises(ConfigError, match=r"\.split: no split 'test'.*Splits: val .*its test has no labels"):
        folder(kaggle, "test")
    solution.unlink()
    with pytest.raises(ConfigError, match=r"\.root: .*there is no LOC_val_solution\.csv.*put it beside ILSVRC"):
        folder(kaggle, "val")


# Tables.

ROWS = [("a.jpg", "cat"), ("b.JPG", "dog"), ("c d.png", "cat"), ("é.webp", "dog"), ("sub/e.jpeg", "cat")]


@pytest.fixture
def images(tmp_path):
    for name, _ in ROWS:
        put(tmp_path / "images" / name, name)
    return tmp_path / "images"


def table(separator, rows=ROWS, head=None, end="\n"):
    return end.join(separator.join(row) for row in ([head] if head else []) + rows) + end


STEMS = [(name.rsplit(".", 1)[0], label) for name, label in ROWS]


@pytest.mark.parametrize("content", [
    table(",", head=("file", "label")), table(","), table(";", end="\r\n"), table("\t", end="\r"), table(" "),
    table("   "), table(",", head=("Image_ID", "breed"), rows=STEMS), "\n\n" + table(", ", head=("x", "path", "class"),
    rows=[("1", *row) for row in ROWS]), "\ufeff" + table(",", head=("label", "file name"),
    rows=[row[::-1] for row in ROWS]), table("\t").encode("utf-16"),
    table(",", rows=[(f'"./{name}"', f'"{label}"') for name, label in ROWS]),
    table(",", head=("a", "file", "label", ""), rows=[("?", *row, "") for row in ROWS])])
def test_tables_of_any_shape_say_the_same(images, content):
    put(images.parent / "labels", content)
    found = folder(images, labels_file="../labels")
    assert sorted(examples(found)) == sorted((os.path.basename(name), label) for name, label in ROWS)
    assert found.class_names == ("cat", "dog") and found.contents.left_out == {"deeper folders": 1}
    for i in range(5):
        assert open(found[i]["id"], "rb").read() == found[i]["image"]


def test_order_and_fingerprint_are_of_files_and_classes(images):
    put(images.parent / "one.csv", table(","))
    put(images.parent / "two.txt", table("\t", rows=ROWS[::-1], head=("file", "label")))
    one, two = (folder(images, labels_file=str(images.parent / name)) for name in ("one.csv", "two.txt"))
    assert examples(one) == examples(two) and one.contents.fingerprint == two.contents.fingerprint
    put(images.parent / "one.csv", table(",", rows=[*ROWS[1:], ("a.jpg", "dog")]))
    assert folder(images, labels_file="../one.csv").contents.fingerprint != two.contents.fingerprint


@pytest.mark.parametrize("content, message", [
    ("", "is empty; a line is a file and its class"),
    ("file,label\n", "has no line after the names of its columns"),
    ("file,label\na.jpg,1\nz.jpg,1\ny.jpg,1\n", "line 3: 'z.jpg' is no image in .*, nor are those of 1 other lines"),
    ("A.jpg,1\n", r"line 1: 'A.jpg' is no image in .* \(there is 'a.jpg', written otherwise\)"),
    ("photo,breed\na.jpg,1\n", "line 1: 'photo' is no image .*names columns, set image_key and label_key"),
    ("note.txt,1\n", "line 1: 'note.txt' is no image in .*, but something else, or hidden"),
    ("a.jpg,1\n../images/b.JPG,1\n", "line 2: '../images/b.JPG' is no path below the root"),
    ("/etc/x.jpg,1\n", "line 1: '/etc/x.jpg' is no path below"), ("sub\\e.jpeg,1\n", r"line 1: 'sub\\\\e.jpeg' is no"),
    ("a.jpg,1\na.jpg,2\n", "line 2: 'a.jpg' stands in line 1 already"),
    ("a.jpg,1\na,1\n", "line 2: 'a' stands in line 1 already"),
    ("twin,1\n", "line 1: 'twin' may be twin.gif or twin.png; write which"),
    ("a.jpg,1\nb.JPG,\n", "line 2: no class"), ("a.jpg,-1\n", "line 1: -1 is no class"),
    (",1\n", "line 1: no file"), ("a.jpg,1,\n", "line 1: no split"),
    ("file,label\na.jpg,1,2\n", "line 2: has 3 columns, and the first line 2"),
    ("a.jpg,1,2,3\n", "line 1: 4 columns without names"),
    ('file,label\n"a.jpg,1\nb.JPG,1\n', "line 3: .*a quote that opens must close"),
    ("a.jpg,1\né.webp,1\n".encode("latin-1"), "line 2: is no text in UTF-8"),
    (b"a.jpg,1\nb\0.JPG,1\n", "line 2: is no text in UTF-8"),
    ("490\n361\n", "line 1: has one column, '490'.*an order of their own: give LOC_val_solution.csv"),
    ("n01440764\nn01443537\n", "line 1: has one column, 'n01440764'; a line is a file and its class$"),
    ("file,label,split\na.jpg,1,train\nb.JPG,2,val\n", "line 3: class '2' of val is not in train, which gives")])
def test_lines_that_cannot_be(images, content, message):
    for name in ("note.txt", "twin.png", "twin.gif"):
        put(images / name)
    put(images.parent / "labels", content)
    with pytest.raises(DataError, match=f"/labels: {message}"):
        folder(images, "all", labels_file="../labels")


def test_columns_are_chosen_where_they_are_not_clear(images):
    put(images.parent / "labels", "photo,Site,sex,group\na.jpg,x,m,train\nb.JPG,y,f,val\n")
    chosen = dict(labels_file="../labels", image_key="photo", label_key="Site")
    assert folder(images, **chosen).class_names == ("x", "y")
    assert len(folder(images, "train", **chosen)) == 2
    with pytest.raises(DataError, match="class 'y' of val is not in train"):
        folder(images, "val", split_key="group", **chosen)
    for key, value, message in (("label_key", "site", "no column 'site'; .* photo, Site, sex, group"),
                                ("label_key", None, "which column is the class?")):
        with pytest.raises(ConfigError, match=rf"^config\.input\.data\.{key}: {message}".replace("?", r"\?")):
            folder(images, **chosen | {key: value})
    put(images.parent / "labels", "file,label,class\na.jpg,1,2\n")
    with pytest.raises(ConfigError, match=r"\.label_key: 2 columns may be meant; .*file, label, class"):
        folder(images, labels_file="../labels")
    with pytest.raises(ConfigError, match=r"\.label_key: names a column of labels_file, and there is none"):
        check_source(dict(name="folder", root="/", split="train", label_key="x"), PATH)
    for name in ("nowhere.csv", "{split}.tsv"):
        with pytest.raises(ConfigError, match=rf"\.labels_file: there is no file .*{name}; give its path"):
            folder(images, labels_file=name)
    os.mkfifo(images.parent / "pipe")
    with pytest.raises(DataError, match="pipe: it is a pipe"):
        folder(images, labels_file="../pipe")


@pytest.mark.parametrize("name", ["labels.csv", "labels"])
def test_a_file_of_labels_beside_the_images_is_not_left_out(images, name):
    put(images / name, table(","))
    put(images / "other.csv")
    assert folder(images, labels_file=name).contents.left_out == {".csv": 1, "deeper folders": 1}


def test_splits_are_a_column_or_files_or_held_out(images):
    splits = ["train", "train", "val", "train", "val"]
    put(images.parent / "labels", table(",", [(*row, split) for row, split in zip(ROWS, splits, strict=True)]))
    put(images / "more.gif")
    train, val = (folder(images, split, labels_file="../labels", holdout=0.5) for split in ("train", "val"))
    assert sorted(examples(val)) == [("c d.png", "cat"), ("e.jpeg", "cat")] and val.contents.held_out is None
    assert len(train) == 3 and train.contents.left_out == {"not in labels": 1, "deeper folders": 1}
    with pytest.raises(ConfigError, match=r"no split 'test'.*Splits: train, val \(those of labels\)"):
        folder(images, "test", labels_file="../labels")

    put(images.parent / "labels", table(","))
    with pytest.raises(ConfigError, match=r"Splits: train \(labels has no column of splits; with holdout=0.1 they are"):
        folder(images, "val", labels_file="../labels")
    parts = [folder(images, split, labels_file="../labels", holdout=0.4) for split in ("train", "val")]
    assert collections.Counter(examples(parts[0]) + examples(parts[1])) == collections.Counter(
        (os.path.basename(name), label) for name, label in ROWS)
    assert {label for _, label in examples(parts[1])} == {"cat", "dog"} and parts[1].contents.held_out["share"] == 0.4

    put(images.parent / "val.txt", table(" ", ROWS[2:3]))
    put(images.parent / "train.txt", table(" ", ROWS[:2]))
    put(images.parent / "other.txt", "of another kind\n")
    assert examples(folder(images, "val", labels_file="../{split}.txt")) == [("c d.png", "cat")]
    assert folder(images, "val", labels_file="../{split}.txt").class_names == ("cat", "dog")
    assert examples(folder(images, "val", labels_file="../val.txt")) == [("c d.png", "cat")]  # called as the file


def test_what_is_no_split_of_a_folder_that_is_held_out_of(tmp_path):
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "flat/train/1.jpg"):
        put(tmp_path / name)
    with pytest.raises(ConfigError, match=r"\.split: no split 'test'.*Splits: train, val \(with those that holdout m"):
        folder(tmp_path, "test", holdout=0.5)
    with pytest.raises(ConfigError, match="images lie without one; a labels_file can tell their classes"):
        folder(tmp_path / "flat")


def test_lists_of_caffe_are_relative_to_their_split(tmp_path):
    put(tmp_path / "train" / "n1" / "a.JPEG")
    put(tmp_path / "train" / "n2" / "b.JPEG")
    put(tmp_path / "val" / "v.JPEG")
    put(tmp_path / "train.txt", "n1/a.JPEG 10\nn2/b.JPEG 9\n")
    put(tmp_path / "val.txt", "v.JPEG 10\n")
    both = folder(tmp_path, "train+val", labels_file="{split}.txt")
    assert both.class_names == ("9", "10") and [label for _, label in examples(both)].count("10") == 2
    assert examples(folder(tmp_path, "val", labels_file="{split}.txt")) == [("v.JPEG", "10")]


def test_a_list_of_wordnets_numbers_is_that_of_imagenets_val(tmp_path, monkeypatch):
    monkeypatch.setattr(label_table, "ILSVRC_VAL", 3)
    for number in (1, 2, 3):
        put(tmp_path / f"ILSVRC2012_val_{number:08d}.JPEG")
    put(tmp_path / "list.txt", f"{CLASSES[2]}\n{CLASSES[0]}\n{CLASSES[2]}\n")
    assert sorted(examples(folder(tmp_path, labels_file="list.txt"))) == [
        ("ILSVRC2012_val_00000001.JPEG", CLASSES[2]), ("ILSVRC2012_val_00000002.JPEG", CLASSES[0]),
        ("ILSVRC2012_val_00000003.JPEG", CLASSES[2])]


def test_many_lines_are_quick(tmp_path):
    put(tmp_path / "labels.csv", "id,label\n" + "".join(f"{i:05d},{i % 7}\n" for i in range(10_000)))
    begin = time.process_time()
    assert len(label_table.read_rows(str(tmp_path / "labels.csv"), label_table.Keys(), PATH)) == 10_000
    assert time.process_time() - begin < 3  # a tenth of a second, where types are not checked at every call
