"""What is written is what is read back: across restarts, strict parsers, TensorBoard and pictures."""
import contextlib
import io
import json
import math
import shutil
import struct
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from PIL import Image

from cb_vit.config import ConfigError, parse
from cb_vit.io import CannotWrite
from cb_vit.monitor import metric_writer, tensorboard
from cb_vit.monitor.metric_writer import LoggingConfig, MetricWriter, Pace
from cb_vit.monitor.wandb_run import WandbConfig, check_login

PLAIN = LoggingConfig(plot=False)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def writer(workdir, cfg=PLAIN, resume_step=None, **kw):
    return MetricWriter(workdir, cfg, resume_step=resume_step, run_config={"seed": 0}, **kw)


def records(workdir):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")
    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    with writer(tmp_path) as w:
        w.write(3, {"training_loss": 0.5, "lr": 1e-3})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "training_loss": 0.5, "lr": 0.001}\n'
    w.close()
    with pytest.raises(ValueError, match="closed"):
        w.write(4, {"lr": 1e-3})


def test_float32_comes_back_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.float32([0, -0.0, 1e-45, 3.4028235e38, 1 / 3])])
    values = values[np.isfinite(values)]
    with writer(tmp_path) as w:
        for step, value in enumerate(values):
            w.write(step, {"x": value})
    read = np.array([r["x"] for r in records(tmp_path)], np.float32)
    np.testing.assert_array_equal(read.view(np.uint32), values.view(np.uint32))
    with writer(tmp_path, resume_step=len(values)) as w:
        np.testing.assert_array_equal(w.history()["x"][1].astype(np.float32).view(np.uint32), values.view(np.uint32))


def test_what_is_not_finite_is_null_and_reads_back_as_nan(tmp_path):
    with writer(tmp_path) as w:
        w.write(1, {"a": math.nan, "b": np.float32("inf"), "c": -math.inf, "d": 7})
    assert records(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 7}]
    with writer(tmp_path, resume_step=1) as w:
        assert w.recorded(1) == {"a", "b", "c", "d"}
        assert np.isnan(w.history()["b"][1]).all()


def test_a_resume_goes_on_where_the_checkpoint_stands(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "lr": 0.1}\noops\n{"step": 2, "val/loss": 1.25e0}\n'
    path.write_text(good + '{"step": 3, "lr": 0.3}\n{"step": 4, "l')
    with writer(tmp_path, resume_step=2) as w:
        assert path.read_text() == good  # kept lines are kept letter by letter
        assert w.recorded(2) == {"val/loss"} and w.recorded(3) == set()
        w.write(3, {"lr": 0.25})
        assert w.recorded(3) == {"lr"}
    assert path.read_text() == good + '{"step": 3, "lr": 0.25}\n'


def test_every_place_to_tear_the_file_leaves_whole_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1, "lr": 0.125}\n{"step": 2, "lr": 0.5}\n'
    for length in range(len(text) + 1):
        path.write_text(text[:length])
        with writer(tmp_path, resume_step=9) as w:
            w.write(10, {"lr": 1.0})
        whole = [r for r in ({"step": 1, "lr": 0.125}, {"step": 2, "lr": 0.5})
                 if text[:length].count("}") >= r["step"]]  # only the newline is missing
        assert records(tmp_path) == [*whole, {"step": 10, "lr": 1.0}]


def test_an_interrupted_run_writes_the_same_file_as_a_whole_one(tmp_path):
    def train(workdir, steps, resume_step):
        with writer(workdir, resume_step=resume_step) as w:
            for step in steps:
                w.write(step, {"training_loss": np.float32(1 / step)})

    train(tmp_path / "whole", range(1, 21), None)
    train(tmp_path / "parts", range(1, 14), None)
    train(tmp_path / "parts", range(11, 21), 10)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()


def test_a_fresh_start_begins_a_file_of_its_own(tmp_path):
    with writer(tmp_path) as w:
        w.write(0, {"val/loss": 3.0})
    with writer(tmp_path) as w:
        assert w.recorded(0) == set()
    assert records(tmp_path) == [] and (tmp_path / "metrics.1.jsonl").read_text() == '{"step": 0, "val/loss": 3.0}\n'


def test_history_is_in_the_order_of_steps_and_the_last_record_counts(tmp_path):
    with writer(tmp_path) as w:
        w.write(2, {"val/loss": 2.0})
        w.write(1, {"val/loss": 1.0, "lr": 0.1})
        w.write(2, {"val/loss": 2.5})
        steps, values = w.history()["val/loss"]
    assert steps.tolist() == [1, 2] and values.tolist() == [1.0, 2.5]


def test_other_processes_write_nothing(tmp_path):
    cfg = LoggingConfig(tensorboard=True, plot=True)
    with writer(tmp_path / "run", cfg, primary=False) as w:
        w.write(1, {"lr": 0.1})
        assert not w.plot() and w.history() == {} and w.recorded(1) == set()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scalars", [{"step": 1.0}, {"x": "high"}, {"x": np.zeros(2)}, {"x": None}])
def test_what_is_no_scalar_is_refused_by_name(tmp_path, scalars):
    with writer(tmp_path) as w, pytest.raises(ValueError, match=next(iter(scalars))):
        w.write(1, scalars)


class Bucket:
    """Stands in for a path of an object store: objects are written whole, and every write is counted."""

    def __init__(self, objects, name):
        self.objects, self.path, self.name = objects, name, name.rpartition("/")[2]
        self.writes = objects.setdefault("writes", [])

    def __truediv__(self, other):
        return Bucket(self.objects, f"{self.path}/{other}")

    def __fspath__(self):
        return self.path

    def mkdir(self, **kw):
        pass

    def exists(self):
        return self.path in self.objects

    def read_bytes(self):
        if not self.exists():
            raise FileNotFoundError(self.path)
        return self.objects[self.path]

    def write_bytes(self, data):
        self.objects[self.path] = data
        self.writes.append(self.path)


def test_a_bucket_gets_the_whole_file_now_and_then_and_at_the_end(monkeypatch):
    objects, clock = {}, Clock()
    monkeypatch.setattr(metric_writer.io, "as_path", lambda p: p if isinstance(p, Bucket) else Bucket(objects, p))
    path = "gs://b/run/metrics.jsonl"
    with writer("gs://b/run", clock=clock) as w:
        for step in range(100):  # 1 s each
            w.write(step, {"lr": step})
            clock.now += 1
        assert 9 <= len(objects["writes"]) <= 11
        w.flush()
        assert objects[path].count(b"\n") == 100
        w.write(100, {"lr": 0.5})
    assert objects[path].count(b"\n") == 101
    with writer("gs://b/run", resume_step=49, clock=clock) as w:
        w.write(50, {"lr": 1})
    assert [json.loads(line)["step"] for line in objects[path].splitlines()] == list(range(51))


def events(folder):
    """Summaries and session starts of all event files: TFRecord framing is length, crc, payload, crc."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    values, starts = [], []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12:at + 12 + length])
            at += 12 + length + 4
            values += [(event.step, value) for value in event.summary.value]
            starts += [event.step] if event.session_log.status == SessionLog.START else []
    return values, starts


def test_tensorboard_events_read_back_under_their_tags(tmp_path):
    cfg = LoggingConfig(tensorboard=True, plot=False)
    with writer(tmp_path, cfg) as w:
        w.write(1, {"val/prec@1": 0.5, "img/sec": 3})
    with writer(tmp_path, cfg, resume_step=1) as w:
        w.write(2, {"training_loss": math.nan})
    values, starts = events(tmp_path / "tensorboard")
    scalars = [(step, value.tag, value.simple_value) for step, value in values]
    assert scalars[:2] == [(1, "val/prec@1", 0.5), (1, "speed/img/sec", 3.0)]
    assert scalars[2][:2] == (2, "train/training_loss") and math.isnan(scalars[2][2])
    assert starts == [0, 2]  # what TensorBoard hides of the earlier files
    assert records(tmp_path)[0] == {"step": 1, "val/prec@1": 0.5, "img/sec": 3}


@pytest.mark.parametrize("group, names", [
    ("train/", ["training_loss", "lr", "lr/head", "l2_grads", "l2_params", "epoch", "examples_seen"]),
    ("speed/", ["img/sec", "img/sec/core", "data_wait", "mfu", "uptime", "core_hours"]),
    ("memory/", ["hbm_gib", "hbm_peak_gib", "host_peak_gib"]),
    ("", ["val/prec@1", "ema/val/loss", "z/secs/evaluate", "prec@1", "loss"])])
def test_tensorboard_has_a_group_for_every_metric(group, names):
    assert [tensorboard.tag(name) for name in names] == [group + name for name in names]


def test_a_picture_goes_to_tensorboard_as_it_is(tmp_path, monkeypatch):
    content = io.BytesIO()
    Image.new("RGB", (7, 5)).save(content, "png")
    wandb = FakeWandb()
    wandb.Image = lambda picture: picture.size
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with writer(tmp_path / "off") as w:
        w.image("looks", content.getvalue(), 3)
    with writer(tmp_path / "wandb", LoggingConfig(wandb=WandbConfig("p"), plot=False)) as w:
        w.image("looks", content.getvalue(), 3)
    assert wandb.logs == [(3, {"looks": (7, 5)})]
    with writer(tmp_path / "on", LoggingConfig(tensorboard=True, plot=False)) as w:
        w.image("looks", content.getvalue(), 3)
    [(step, value)], _ = events(tmp_path / "on/tensorboard")
    assert (step, value.tag, value.image.width, value.image.height) == (3, "looks", 7, 5)
    assert value.image.encoded_image_string == content.getvalue()
    assert [path.name for path in (tmp_path / "off").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("act", ["remove", "move", "replace", "remove the file"])
def test_a_folder_that_has_gone_is_told_and_not_made_anew(tmp_path, act):
    """Also where TensorBoard and the picture are asked for."""
    folder = tmp_path / "run"
    with pytest.raises(CannotWrite, match=rf"^{folder}/metrics.jsonl cannot be written: No such file or directory; "):
        with writer(folder, LoggingConfig(tensorboard=True)) as w:
            w.write(1, {"lr": 1})
            if act == "remove":
                shutil.rmtree(folder)
            elif act == "remove the file":
                (folder / "metrics.jsonl").unlink()
            else:
                folder.rename(tmp_path / "elsewhere")
            if act == "replace":
                folder.mkdir()
            w.write(2, {"lr": 1})
    assert not (folder / "metrics.jsonl").exists() and not (folder / "training_curves.png").exists()


@pytest.mark.parametrize("where, what", [(metric_writer, "_append"), (tensorboard, "write_scalars")])
def test_a_disk_that_fills_is_told_once(tmp_path, monkeypatch, caplog, where, what):
    monkeypatch.setattr(where, what, fill)
    with pytest.raises(CannotWrite, match=r"cannot be written: No space left on device; free some space there$"):
        with writer(tmp_path, LoggingConfig(tensorboard=True)) as w:
            monkeypatch.setattr(metric_writer.io, "write_atomic", fill)  # of the picture, at the end
            w.write(1, {"lr": 1})
    assert not caplog.text


def test_a_picture_is_not_worth_a_run(tmp_path, monkeypatch, caplog):
    with writer(tmp_path, LoggingConfig()) as w:
        monkeypatch.setattr(metric_writer.io, "write_atomic", fill)
        w.write(1, {"lr": 1})
        assert w.plot()
        w._drawing.result()
        assert not w.plot()
        w.write(2, {"lr": 1})
    [line] = caplog.messages
    assert line == (f"{tmp_path}/training_curves.png cannot be written: No space left on device; free some space "
                    "there; no more curves are drawn")
    assert len(records(tmp_path)) == 2


def fill(*args):
    raise OSError(28, "No space left on device")


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()
        self.inits, self.logs, self.exits = [], [], []

    def init(self, **kw):
        self.inits.append(kw)
        return types.SimpleNamespace(log=lambda scalars, step: self.logs.append((step, scalars)),
                                     finish=lambda exit_code: self.exits.append(exit_code))


def test_wandb_run_goes_on_under_its_id(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = LoggingConfig(wandb=WandbConfig("digits", name="cb"), plot=False)
    with writer(tmp_path, cfg) as w:
        w.write(1, {"lr": 0.5})
    with pytest.raises(RuntimeError), writer(tmp_path, cfg, resume_step=1):
        raise RuntimeError
    with writer(tmp_path, cfg):
        pass
    first, resumed, fresh = (kw["id"] for kw in wandb.inits)
    assert first == resumed != fresh and (tmp_path / "wandb_run.txt").read_text().strip() == fresh
    assert wandb.inits[0]["project"] == "digits" and wandb.inits[0]["resume"] == "allow"
    assert wandb.inits[0]["config"] == {"seed": 0}
    assert wandb.logs == [(1, {"lr": 0.5})] and wandb.exits == [0, 1, 0]
    for content in (b"", b"two words", b"\xff"):
        (tmp_path / "wandb_run.txt").write_bytes(content)
        with pytest.raises(ConfigError, match=f"^workdir: {tmp_path}/wandb_run.txt holds no name .*; move it away$"):
            writer(tmp_path, cfg, resume_step=1)
        assert (tmp_path / "wandb_run.txt").read_bytes() == content


def test_what_wandb_says_of_login_and_network_is_one_line(tmp_path, monkeypatch, caplog):
    def fail(*args, **kw):
        raise Exception("No API key configured.\nUse `wandb login`")

    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    online, offline = (LoggingConfig(wandb=WandbConfig("p", mode=mode), plot=False) for mode in ("online", "offline"))
    for login, refused in ((fail, r"No API key configured\."), (lambda **kw: False, "no API key is known"),
                           (lambda **kw: True, None)):
        wandb.login = login
        check_login(offline.wandb)
        check_login(PLAIN.wandb)
        expected = refused and pytest.raises(ConfigError, match=rf"^config\.wandb: {refused}; run `wandb login`, or")
        with expected or contextlib.nullcontext():
            check_login(online.wandb)
    with writer(tmp_path, online) as w:
        w._wandb.log = fail
        w.write(1, {"lr": 1})
        w.write(2, {"lr": 1})
    assert caplog.messages == ["Weights & Biases fails (No API key configured.); the run goes on without it"]
    wandb.init = fail
    with pytest.raises(ConfigError, match=r"^config\.wandb: No API key configured\.; run"):
        writer(tmp_path, online)


@pytest.mark.parametrize("module, cfg, field", [
    ("tensorboardX", LoggingConfig(tensorboard=True, plot=False), "tensorboard"),
    ("wandb", LoggingConfig(wandb=WandbConfig("p"), plot=False), "wandb"),
    ("matplotlib", LoggingConfig(), "plot")])
@pytest.mark.parametrize("primary", [True, False])
def test_a_missing_package_is_told_at_the_start(tmp_path, monkeypatch, module, cfg, field, primary):
    find = metric_writer.importlib.util.find_spec
    monkeypatch.setattr(metric_writer.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(ConfigError, match=rf"config\.{field}: {module} is not installed; pip install"):
        writer(tmp_path / "run", cfg, primary=primary)
    assert not (tmp_path / "run").exists()


def test_config_block():
    cfg = parse(LoggingConfig, {"tensorboard": True, "wandb": {"project": "p", "tags": ["a"]}}, "config")
    assert cfg == LoggingConfig(tensorboard=True, wandb=WandbConfig("p", tags=("a",)), plot=True)
    with pytest.raises(ConfigError, match="did you mean project"):
        parse(LoggingConfig, {"wandb": {"projct": "p"}}, "config")


def test_pace_keeps_to_its_share_and_its_interval():
    clock = Clock()
    pace, worked = Pace(10, 0.05, clock), 0.0
    for cost in (0.1, 2.0, 2.0, 0.1):
        while not pace.due():
            clock.now += 0.25

        def work(cost=cost):
            clock.now += cost

        pace.run(work)
        worked += cost
        begun = clock.now
        clock.now += max(10, 19 * cost) - 0.01
        assert not pace.due()
        clock.now = begun + max(10, 19 * cost)
        assert pace.due()
        assert worked <= 0.0501 * clock.now


class Drawing:
    """Stands in for `draw_curves`: a drawing takes until the test lets it, and shows how many records there were."""

    def __init__(self, monkeypatch):
        self.threads, self.let = [], threading.Event()
        monkeypatch.setattr(metric_writer, "draw_curves", self)

    def __call__(self, history, title):
        self.threads.append(threading.current_thread())
        assert self.let.wait(20)
        return str(len(history.get("lr", [()])[0])).encode()


def test_curves_are_drawn_beside_the_training_at_their_pace(tmp_path, monkeypatch):
    clock, drawing, png = Clock(), Drawing(monkeypatch), tmp_path / "training_curves.png"
    with writer(tmp_path, LoggingConfig(), clock=clock) as w:
        assert w.plot()  # and is back although it is not drawn
        w.write(1, {"lr": 0.1})
        clock.now += 100
        assert not w.plot()  # one at a time
        drawing.let.set()
        w._drawing.result()
        assert png.read_bytes() == b"0"  # what was recorded when it began
        assert not w.plot()
        clock.now += 1900  # it has taken 100 s, which are to be 5 % of the time
        assert w.plot()
        w._drawing.result()
        assert png.read_bytes() == b"1"
        w.write(2, {"lr": 0.1})
    assert png.read_bytes() == b"2" and len(drawing.threads) == 3  # closing draws the end
    assert threading.main_thread() not in drawing.threads and not any(thread.is_alive() for thread in drawing.threads)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "training_curves.png"]


def test_closing_waits_for_a_drawing_under_way(tmp_path, monkeypatch):
    drawing = Drawing(monkeypatch)
    with writer(tmp_path, LoggingConfig()) as w:
        w.write(1, {"lr": 0.1})
        w.plot()
        w.write(2, {"lr": 0.1})
        threading.Timer(0.2, drawing.let.set).start()
    assert (tmp_path / "training_curves.png").read_bytes() == b"2"
    assert not any(thread.is_alive() for thread in drawing.threads)


def test_a_picture_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def fail(*args, **kw):
        raise RuntimeError("no fonts")
    monkeypatch.setattr(metric_writer, "draw_curves", fail)
    with writer(tmp_path, LoggingConfig()) as w:
        assert w.plot()
        w._drawing.result()
        assert not w.plot()
        w.write(1, {"lr": 0.1})
    assert caplog.text.count("could not be drawn") == 1 and len(records(tmp_path)) == 1


def test_importing_is_light():
    code = ("import sys, cb_vit.monitor.metric_writer, cb_vit.monitor.timing; "
            "print({'matplotlib', 'tensorboardX', 'wandb', 'tensorflow', 'torch'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
