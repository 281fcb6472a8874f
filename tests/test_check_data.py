"""The look at every image: one example of each finding, and only where it is due."""
import csv
import io
import shutil

import numpy as np
import pytest
from helpers import refusal
from PIL import Image

from cb_vit.analysis.survey import Survey, Surveyor
from cb_vit.config import Failure
from cb_vit.tools import check_data, cli

RNG = np.random.default_rng(0)


def photo(width=60, height=50):
    return Image.fromarray(RNG.integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture
def root(tmp_path):
    """Three classes to train on, of eight sound photographs each, and two of them to evaluate on."""
    for split, names in (("train", "abc"), ("val", "ab")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(8 if split == "train" else 2):
                photo().save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def look(root, capsys, *flags, config="folder"):
    """The findings, as (kind, file, what), and what is printed."""
    failed = None
    given = [f"--config={config}:root={root},size=32", f"--output={root / 'found.csv'}", "--overwrite", *flags]
    try:
        check_data.main(cli.parse(check_data, given))
    except Failure as error:
        failed = str(error)
    table = list(csv.DictReader(io.StringIO((root / "found.csv").read_text())))
    return {(row["kind"], row["example"].removeprefix(f"{root}/"), row["what"]) for row in table}, \
        capsys.readouterr().out, failed


def test_sound_data_has_nothing_to_find(root, capsys):
    found, printed, failed = look(root, capsys)
    assert not found and failed is None and "nothing is broken, tiny, there twice or odd" in printed
    assert "config.input.data: 24 images, 60×50 to 60×50 pixels, the shorter side 50 in the median" in printed
    assert "28 images" in printed


def test_each_finding_is_named_and_counted(root, capsys):
    train, val = root / "train", root / "val"
    exif = Image.Exif()
    exif[0x112] = 6
    photo().save(train / "a" / "turned.jpg", exif=exif)
    shutil.copy(train / "a" / "0.png", val / "a" / "same.png")
    Image.open(train / "a" / "1.png").save(train / "b" / "one.bmp")  # other bytes, the same pixels
    shutil.copy(train / "c" / "2.png", train / "c" / "twice.png")
    (train / "b" / "empty.png").touch()
    (train / "b" / "cut.png").write_bytes((train / "b" / "0.png").read_bytes()[:200])
    photo(20, 9).save(train / "c" / "small.png")
    photo(300, 60).save(train / "c" / "strip.png")
    photo().save(train / "c" / "webp.jpg", format="WEBP")
    Image.new("L", (60, 60), 7).save(train / "c" / "flat.png")
    photo().save(train / "a" / "many.gif", save_all=True, append_images=[photo()])
    clear = photo().convert("RGBA")
    clear.putalpha(9)
    clear.save(train / "b" / "clear.png")
    photo().convert("RGBA").save(train / "b" / "opaque.png")
    Image.fromarray(RNG.integers(0, 60000, (50, 50), np.uint16)).save(train / "b" / "deep.png")

    found, printed, failed = look(root, capsys)
    # Of two that are the same, the order of the data says which comes second.
    pair = next(file for kind, file, _ in found if kind == "contradiction")
    assert pair in ("train/a/1.png", "train/b/one.bmp")
    twice = next(file for kind, file, _ in found if kind == "duplicate")
    assert twice in ("train/c/2.png", "train/c/twice.png")
    expected = {("leaked", "val/a/same.png"), ("contradiction", pair), ("duplicate", twice),
                ("broken", "train/b/empty.png"), ("broken", "train/b/cut.png"), ("tiny", "train/c/small.png"),
                ("odd", "train/c/strip.png"), ("odd", "train/c/webp.jpg"), ("odd", "train/c/flat.png"),
                ("odd", "train/a/many.gif"), ("odd", "train/b/clear.png"), ("odd", "train/b/deep.png")}
    assert {finding[:2] for finding in found} == expected
    assert failed == ("the data has images that are broken and in two sets and under two classes; mend them, or leave "
                      "them out")
    assert "broken: 2, cannot be read" in printed and "20×9 pixels" in printed
    assert f"the same pixels as {train / 'a' / '0.png'} of config.input.data" in printed

    assert not {finding for finding in found if "turned" in finding[1]}  # that config turns it
    found, _, _ = look(root, capsys, config="imagenette")
    assert ("odd", "train/a/turned.jpg", "is stored turned (EXIF orientation 6), and taken so; decode(exif=True) turns "
            "it") in found


def test_many_findings_are_cut_short_and_what_cannot_be_done_is_said(root, capsys):
    for number in range(12):
        photo(8, 8).save(root / "train" / "a" / f"small{number}.png")
    found, printed, _ = look(root, capsys)
    assert len(found) == 12 and printed.count("8×8 pixels\n") == 10 and "and 2 more; --all" in printed
    assert look(root, capsys, "--all")[1].count("8×8 pixels\n") == 12
    assert not look(root, capsys, "--smallest=8")[0]
    config = f"--config=folder:root={root}"
    assert "found.csv is already there; choose" in refusal(check_data, config, f"--output={root / 'found.csv'}")
    assert "there is no folder" in refusal(check_data, config, f"--output={root / 'no' / 'found.csv'}")
    assert refusal(check_data).startswith("--config: not given")
    assert "is no folder" in refusal(check_data, f"--config=folder:root={root / 'nowhere'}")


def test_an_image_without_a_label_contradicts_none():
    class Two:
        class_names, num_classes = ("a", "b"), 2

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"image": np.full((9, 9, 3), 7, np.uint8), "label": (0, -1, 1)[index], "id": str(index)}

    survey = Survey()
    for index in range(3):
        survey.add(Surveyor("x", Two(), True, 1)(index))
    assert [(f.kind, f.where, f.label) for f in survey.findings if f.kind != "odd"] == [
        ("duplicate", "1", "no label"), ("contradiction", "2", "b")]
