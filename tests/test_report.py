"""The page on some runs: it holds everything itself, asks for nothing, and shows what others wrote as text alone."""
import base64
import html.parser
import io
import re

import numpy as np
import pytest
from helpers import refusal, run_records, write_run
from PIL import Image

from cb_vit.analysis import page
from cb_vit.analysis.report import write_page
from cb_vit.analysis.report_files import read_table
from cb_vit.tools import cli, report

EVIL = "<script>alert('x')</script>&\x1b[2J"
VOID = {"meta", "img", "br"}


def config(context, seed, **evals):
    val = {"type": "classification"}
    return {"seed": seed, "lr": 0.1, "model": {"context": context}, "evals": {"val": val, **evals}, "note": EVIL}


def png(size=(40, 30), colour=200):
    file = io.BytesIO()
    Image.new("RGB", size, (colour, 90, 30)).save(file, "PNG")
    return file.getvalue()


def add_evidence(run, shift):
    """What evaluators leave: as much as there is of it."""
    for name in ("density", "calibration", "mistakes", "attention", "robust"):
        (run / name).mkdir()
    rows = ["block,head,queries,keys,measure,mean,std,q05,q25,q50,q75,q95"]
    for block in range(4):
        rows.append(f"{block},all,patches,patches,attention_distance,{3 + block},.1,.1,.2,.3,.4,.5")
        rows.append(f"{block},all,all,patches,entropy_normalised,0.1234,.1,.1,.2,.3,.4,.5")
        for head in ("all", 0, 1):
            for measure in ("entropy_normalised", "distance_from_uniform"):
                rows.append(f"{block},{head},all,all,{measure},{0.5 + shift + block / 10},.1,.1,.2,.3,.4,.5")
    (run / "density/density.csv").write_text("\n".join(rows) + "\n")
    rows = ["bins,low,high,examples,confidence,accuracy"]
    for bins in ("width", "mass"):
        rows += [f"{bins},{b / 10},{(b + 1) / 10},{b * 7},{b / 10 + 0.05},{min(1, b / 10 + shift)}"
                 for b in range(1, 10)]
        rows.append(f"{bins},0.0,0.1,0,,")
    (run / "calibration/reliability.csv").write_text("\n".join(rows) + "\n")
    (run / "mistakes/confusion.png").write_bytes(png((60, 60)))
    (run / "mistakes/per_class.csv").write_text(
        f"class,examples,correct,accuracy,most confused with,times\ncat,9,8,0.8889,{EVIL},1\ndog,0,0,,,0\n")
    for name in ("index.png", "a.png", "b/c.png"):
        path = run / "attention" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png((50, 40)))
    robust = {"corruptions": {"error": 0.4, "mce": 0.9, **{f"severity_{s}/error": s / 10 + shift for s in range(1, 6)},
                              **{f"{name}/error": 0.3 + shift for name in ("gaussian_noise", "fog")}},
              "attack": {"clean/prec@1": 0.7, **{f"fgsm/eps_{eps}/{metric}": 0.5 - shift for eps in (1, 4)
                                                  for metric in ("prec@1", "loss")}},
              "occlusion": {f"{way}/{ratio}/prec@1": 1 - ratio - shift for way in ("random", "salient")
                            for ratio in (0.1, 0.5)}}
    lines = [f"{kind},{kind},{kind}/{name},{value}" for kind, found in robust.items() for name, value in found.items()]
    (run / "robust/metrics.csv").write_text("\n".join(["evaluator,type,metric,value", *lines]) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two arms of two seeds, one of which has everything that a report shows."""
    home = tmp_path_factory.mktemp("runs")
    found = []
    for number, context in enumerate(("none", "cb")):
        for seed in (0, 1):
            folder = home / f"{context}{seed}"
            scores = {"ece/ece": 0.1, "ece/nll": 0.5}
            write_run(folder, config(context, seed, ece={"type": "calibration"}),
                      run_records(0.5 + number / 10 + seed / 50, **scores), classes=("cat", EVIL), devices="8 × cpu",
                      versions={"jax": "0.10.2", "cb_vit": EVIL})
            found.append(folder)
        add_evidence(folder, number / 10)
    return found


class Reader(html.parser.HTMLParser):
    """What is on a page: every tag with its attributes, the words, and that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data if self.open[-1:] != ["style"] else ""

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def draw(*args):
    report.main(cli.parse(report, list(map(str, args))))


@pytest.fixture(scope="module")
def full(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    draw(*runs, f"--out={out}", "--metric=val/prec@1", "--baseline=context=none")
    return out.read_text()


def test_the_page_holds_all_it_shows_and_asks_for_nothing(full):
    found = Reader(full)
    assert not found.open
    policy = next(tag for tag in found.of("meta") if tag.get("http-equiv") == "Content-Security-Policy")["content"]
    assert policy.startswith("default-src 'none'") and "script" not in policy and "unsafe-eval" not in policy
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "h1", "p", "nav", "ol", "li", "a", "main",
               "section", "h2", "figure", "img", "figcaption", "div", "table", "caption", "thead", "tbody", "tr", "th",
               "td", "ul", "pre"}
    assert {tag for tag, _ in found.tags} <= allowed
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") or name in ("style", "srcset") for name in attributes), (tag, attributes)
        for name in ("href", "src", "action", "data"):
            if name in attributes:
                assert attributes[name].startswith("#" if tag == "a" else "data:image/png;base64,")
    assert not re.search(r"url\(|@import", full)
    names = [attributes["id"] for attributes in found.of("section")]
    assert [link["href"][1:] for link in found.of("a")] == names and len(set(names)) == 9
    for image in found.of("img"):
        assert image["alt"]
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        assert picture.size == (int(image["width"]), int(image["height"]))


def test_the_page_shows_what_is_there_in_pictures_and_in_numbers(full):
    found = Reader(full)
    alts = [image["alt"] for image in found.of("img")]
    for what in ("val/prec@1 of each arm", "curves of training_loss", "measures of attention", "attention on a.png",
                 "attention on b/c.png", "corruptions: error by severity, error by corruption", "attack: fgsm: top-1",
                 "occlusion: random: top-1", "accuracy over confidence, bins of equal width", "confusion matrix"):
        assert sum(alt.startswith(what) for alt in alts) in (1, 2), what
    for words in ("named on the command line", "context=cb − context=none", "+0.1000", "entropy / ln N, by block",
                  "severity", "gaussian_noise", "attention distance, pixels, by block", "6.0000", "attack/clean/prec@1",
                  "ece/nll", "the classes it finds hardest", "0.10.2", "8 × cpu",
                  "config.model.context", "none, cb"):
        assert words in found.words, words
    assert "What is missing" not in found.words and "0.1234" not in found.words
    assert full.index("id=\"comparison\"") < full.index("id=\"runs\"")


def test_words_of_others_are_text(full):
    found = Reader(full)
    assert "<script" not in full and "\x1b" not in full
    assert found.words.count(EVIL.partition("\x1b")[0]) >= 3  # a setting, a version, a class


def test_what_is_not_there_is_said(tmp_path, capsys):
    write_run(tmp_path / "run", config("cb", 0), run_records(0.5)[:1])
    draw(tmp_path / "run")
    words = Reader((tmp_path / "run/report.html").read_text()).words
    for what in ("run is not finished: at step 10 of 20", "density of attention: no density.csv", "no pictures in RUN/",
                 "robustness: no metrics of an evaluator 'attack'", "calibration: no reliability.csv", "mistakes: no",
                 "versions: not recorded by run"):
        assert what in words, what
    assert capsys.readouterr().out.startswith(f"wrote  {tmp_path}/run/report.html: 0.")


def test_what_cannot_be_read_is_left_out_and_said(tmp_path):
    run = write_run(tmp_path / "run", config("cb", 0), run_records(0.5))
    add_evidence(run, 0)
    (run / "density/density.csv").write_text("block,mean\n0,1\n")
    (run / "calibration/reliability.csv").write_text("bins,low,high,examples,confidence,accuracy\nwidth,0,1,2,x,3\n")
    (run / "mistakes/confusion.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (run / "robust/metrics.csv").write_bytes(b"\xff\xfe\x00")
    words = Reader(write_page([run])).words
    for what in ("density.csv is left out: it is no density.csv (line 1: its", "reliability.csv cannot be",
                 "confusion.png is left out: it is no PNG", "metrics.csv is left out: it 'utf-8' codec"):
        assert what in words, what


def test_only_a_report_of_ours_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_page", lambda folders, **choices: page.page("x", "y", []))
    run = write_run(tmp_path / "run", config("cb", 0), run_records(0.5))
    (run / "report.html").write_text("<p>mine</p>")
    error = f"--out: {run}/report.html is already there; choose another name, or give --overwrite"
    assert refusal(report, run) == error
    draw(run, "--overwrite")
    draw(run)
    assert page.GENERATOR in (run / "report.html").read_text()
    assert refusal(report, run, f"--out={run}/report.html") == error


@pytest.mark.parametrize("args, error", [
    (["RUN", "RUN2"], "--out: not given, and there are several folders; for example --out=report.html"),
    (["RUN", "--out=x.pdf"], "--out: x.pdf: expected a name that ends in .html"),
    (["nothing"], "RUN: nothing is no folder; give that of a run or of a sweep"),
    (["RUN", "RUN/.", "--out=x.html"], "RUN: RUN/. and RUN are the same run; give it once"),
    (["RUN", "RUN2", "--out=x.html", "--metric=val/x"], "--metric: no evaluator has measured 'val/x' at")])
def test_a_page_that_cannot_be(runs, args, error):
    fill = lambda text: text.replace("RUN2", str(runs[1])).replace("RUN", str(runs[0]))  # noqa: E731
    assert refusal(report, *map(fill, args)).startswith(error[:4] + fill(error[4:]))


@pytest.mark.parametrize("text, error", [("", "has the columns '(none)', not a,b"), ("a\n1\n", "has the columns 'a'"),
                                         ("a,b\n1\n", "zip")])
def test_a_table_of_other_columns_is_none(text, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        read_table(text, ("a", "b"))


def test_a_picture_that_is_too_large_or_none_is_refused(monkeypatch):
    np.testing.assert_equal(page.picture(png((3, 2)), "x").count('width="3" height="2"'), 1)
    with pytest.raises(ValueError, match="it is no PNG"):
        page.picture(b"GIF89a", "x")
    monkeypatch.setattr(page, "LARGEST", 10)
    with pytest.raises(ValueError, match="larger than"):
        page.picture(png(), "x")
