"""Bad input as a user meets it: one line on stderr that says where, what and the way out; nothing written."""
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

import cb_vit
from cb_vit import config as config_lib
from cb_vit import experiment, overrides
from cb_vit.config import ConfigError
from cb_vit.settings import check
from cb_vit.tools import __main__ as command
from cb_vit.tools import cli, config_files
from configs import debug, digits, vit_i1k

ROOT = pathlib.Path(__file__).parents[1]
DEBUG = "--config=configs/debug.py"


def run(*args, cwd=ROOT, **env):
    clean = {name: value for name, value in os.environ.items() if name != "TFDS_DATA_DIR"}
    return subprocess.run([sys.executable, str(ROOT / "main.py"), *map(str, args)], cwd=cwd, capture_output=True,
                          text=True, timeout=120, env=clean | {"JAX_PLATFORMS": "cpu"} | env)


def refused(*args, workdir=None, **kw):
    """The one line that a refused command prints."""
    start = time.monotonic()
    result = run(*[f"--workdir={workdir}"] * (workdir is not None), *args, **kw)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert workdir is None or not workdir.is_dir()
    assert time.monotonic() - start < 20  # a few seconds, on a machine that is not loaded
    return result.stderr.removeprefix("error: ").rstrip()


# What the command line itself shows: no data, no devices, and so no more than a moment.


@pytest.mark.parametrize("args, error", [
    ([DEBUG, "--config.lr=1e-3", "--config.input.batch_size=many"],
     r"config\.input\.batch_size: expected a whole number, got 'many'$"),
    (["--config=configs/debgu.py", "--config.lr=1"],
     r"--config: neither a config of .* a file: 'configs/debgu\.py'; did you mean configs/debug\.py\? --config=list"),
    (["--config=configs/digits.py:variatn=x"],
     r"configs/digits\.py, line \d+: argument 'variatn' in :variatn=x: this file takes variant, context$"),
    (["--config.lr=1"], "--config: not given; for example --config=digits, or --config=list$"),
    ([DEBUG, "stray"], "stray: not an argument of this program; settings are written --config.key=value$"),
    ([DEBUG, "--wrokdir=x"], r"--wrokdir: unknown flag; did you mean --workdir\? --help lists them$"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_the_command_line(args, error, tmp_path):
    assert re.match(error, refused(*args, workdir=tmp_path / "run"))


@pytest.mark.parametrize("arg, error", [
    ("--config.grad_clip_nrom=1", r"config\.grad_clip_nrom: unknown; did you mean grad_clip_norm\?"),
    ("--config.inptu.batch_size=8", r"config\.inptu: unknown; did you mean input\?"),
    ("--config.zzz=1", r"config\.zzz: unknown; config takes .*seed, total_steps, "),
    ("--config.total_epochs=abc", r"config\.total_epochs: expected a number, got 'abc'$"),
    ("--config.plot=maybe", r"config\.plot: expected True or False, got 'maybe'$"),
    ("--config.schedule=3", r"config\.schedule: expected .* or a block of ScheduleConfig settings, got '3'$"),
    ("--config.lr.x=3", r"config\.lr: is 0\.001, not a block of settings"),
    ("--config.lr", r"config\.lr: no value given; write --config\.lr=VALUE, a number$"),
])
def test_an_override_that_cannot_work(arg, error):
    _, given = overrides.split(["main.py", arg])
    with pytest.raises(ConfigError) as caught:
        check(overrides.lay_over(debug.get_config(), given))
    assert re.match(error, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("given, error", [
    ("configs/debug.py:size=big", r"configs/debug\.py, line \d+: argument size=big: expected int$"),
    ("configs/common.py", r"configs/common\.py: there is no get_config\(\); a config file has"),
])
def test_a_config_that_cannot_be_loaded(given, error, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=error):
        config_files.get_config(given)


def test_a_missing_workdir():
    assert refused(DEBUG) == "--workdir: not given; for example --workdir=runs/digits"


@pytest.mark.parametrize("text, error", [
    ("def get_config():\n    return {1:\n", r"line 2: '\{' was never closed: return \{1:$"),
    ("import ml_collections\n\ndef get_config():\n    return ml_collections.ConfgDict()\n",
     r"line 4: AttributeError: module 'ml_collections' has no attribute 'ConfgDict'"),
    ("def get_config():\n    raise ValueError('no GPU,\\nno config')\n", "line 2: no GPU, no config$"),
    ("def get_config():\n    return open('/no/such/file')\n", "line 2: FileNotFoundError: .*'/no/such/file'$"),
    ("import configs.nothing\n", "line 1: ModuleNotFoundError: No module named 'configs.nothing'$"),
    ("def get_config(arg):\n    return None\n", r"TypeError: get_config\(\) missing 1 required positional argument"),
    ("def get_config():\n    pass\n", r"get_config\(\) returns None; a config file has get_config\(\), which "),
    ("def get_config():\n    return {'lr': 1}\n", r"get_config\(\) returns \{'lr': 1\}; a config file"),
])
def test_a_config_file_that_is_wrong(text, error, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config_files.get_config(str(path))
    assert re.match(rf"{path}(, |: ){error}", " ".join(str(caught.value).split()))


def test_any_setting_can_be_overridden_whether_the_file_has_it_or_not():
    _, given = overrides.split([
        "main.py", "--config.mesh=(('data', 2), ('model', -1))", "--config.lr_mults=(('head.*', 0.1),)",
        "--config.resume=x",
        "--config.random_erasing.area_max=0.2", "--config.schedule.timescale_steps=5000", "--config.optax.b2", "0.95",
        "--config.schedule.decay_type=rsqrt", "--config.model.context=cb_s", "--config.input.pp=value_range|onehot(10)",
        "--config.evals.val.pp_fn=value_range(-1, 1)|onehot(10)", "--config.evals.val.num_threads=3", "--noconfig.plot",
        "--config.sharding_strategy=(('.*', 'fsdp'),)", "--config.input.data.num_examples=64", "--config.tensorboard"])
    settings = check(overrides.lay_over(debug.get_config(), given))
    assert settings.mesh == (("data", 2), ("model", -1)) and settings.resume == "x"
    assert settings.lr_mults == (("head.*", 0.1),) and settings.random_erasing.area_max == 0.2
    assert settings.schedule.timescale.value == 5000 and settings.optax == {"b2": 0.95} and not settings.plot
    assert settings.model.context == "cb_s" and settings.input.pp.text == "value_range|onehot(10)"
    assert settings.evals["val"].pp_fn.text == "value_range(-1, 1)|onehot(10)"
    assert settings.evals["val"].num_threads == 3 and settings.input.data.num_examples == 64
    assert settings.raw["optax"] == {"b2": 0.95} and settings.raw["plot"] is False and settings.tensorboard
    json.dumps(settings.raw)


def test_help_shows_the_program_and_its_flags_and_no_more():
    for flag in ("--help", "-h"):
        result = run(flag)
        assert result.returncode == 0 and not result.stderr
        assert "\nTrain a Vision Transformer with Context Broadcasting.\n" in result.stdout
        assert all(word in result.stdout for word in ("--config NAME", "--workdir WORKDIR", "--config=digits"))
        assert result.stdout.count("\n") < 40


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_where_output_has_no_room_it_ends_in_one_line(tmp_path):
    script = tmp_path / "tool.py"
    script.write_text("""'''usage'''
import sys
from cb_vit.tools import cli
arguments, main = lambda parser: None, lambda args: print("x")
cli.run(sys.modules[__name__])
""")
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, script], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
                                env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode != 0 and result.stderr == (
        "error: what this program prints cannot be written: No space left on device; free some space there\n")


def test_the_list_of_configs_has_a_line_for_each(tmp_path, monkeypatch):
    """Those that come with cb_vit by name, those of the user by path, wherever one stands."""
    result = run("--config=list", cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) >= 3 and all(re.match(r"\w+ +\S", line) for line in lines)
    assert not any("common" in line.split()[0] for line in lines)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("'''Of my own.'''\ndef get_config(): pass\n")
    monkeypatch.chdir(tmp_path)
    assert list(config_files.overview())[-1].split(maxsplit=1) == ["configs/mine.py", "Of my own."]


def test_a_config_by_name_is_ours_and_one_by_path_whatever_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("common", "digits"):
        (tmp_path / "configs" / f"{name}.py").write_text("raise ValueError('of the user')\n")
    (tmp_path / "configs" / "mine.py").write_text(
        "import configs.debug as base\nimport configs.other as other\nget_config = lambda: other.of(base)\n")
    (tmp_path / "configs" / "other.py").write_text(
        "def of(base):\n    import configs.common\n    return base.get_config()\n")
    (tmp_path / "digits").write_text("raise ValueError('of the user')\n")
    assert config_files.get_config("digits:variant=mu/2").model.variant == "mu/2"
    for path in ("configs/digits.py", "configs/mine.py"):  # whose configs.common is that of the same folder
        with pytest.raises(ConfigError, match="of the user"):
            config_files.get_config(path)
    (tmp_path / "configs" / "common.py").unlink()
    assert config_files.get_config("configs/mine.py").model.variant == "mu/4"
    (tmp_path / "away.py").write_text(
        "import os, sys\nimport configs.debug as base\nos.chdir('/')\nsys.path.insert(0, '/x')\n"
        "get_config = base.get_config\n")
    before = list(sys.path)
    assert config_files.get_config("away.py").model.variant == "mu/4" and sys.path == before
    monkeypatch.chdir(tmp_path)
    assert sys.modules["configs.debug"] is debug and os.getcwd() not in sys.path
    with pytest.raises(ConfigError, match=r"^--config: neither .*: 'digts'; did you mean digits\? --config=list"):
        config_files.get_config("digts")


def test_the_commands(monkeypatch, capsys):
    """Each has a line in the overview, a help, and knows its own flags when one is misspelt."""
    def said(*args):
        monkeypatch.setattr(sys, "argv", ["cb-vit", *args])
        try:
            command.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    code, out, err = said()
    assert (code, err) == (0, "") and said("--help") == (code, out, err)
    listed = dict(line.split(maxsplit=1) for line in out.split("\n\n")[-1].splitlines())
    assert listed.keys() == command.COMMANDS.keys()
    for name, line in listed.items():
        code, out, err = said(name, "--help")
        assert (code, err) == (0, "") and out.startswith(f"usage: cb-vit {name} [FLAG …]") and line in out
        assert f"cb-vit {name}" in out.split("\n", 1)[1], "an example"
    assert said("--version")[1] == f"cb_vit {cb_vit.__version__}\n"
    assert said("trian") == (1, "", "error: trian: no command; did you mean train? There are "
                                    f"{', '.join(command.COMMANDS)}; --help says more\n")


# What the checks of the settings show, without starting a program for each.


def config_of(module, **changes):
    config = module.get_config()
    for name, value in changes.items():
        *parents, key = name.split("__")
        block = config
        for parent in parents:
            block = block[parent]
        with block.ignore_type():
            block[key] = value
    return config


IMAGES = "keep('image', 'labels')"


@pytest.mark.parametrize("change, error", [
    (dict(lr=-1.0), r"config\.lr: must be .*, got -1\.0$"),
    (dict(label_smoothing=2.0), r"config\.label_smoothing: is a share in \[0, 1\), got 2\.0$"),
    (dict(label_smoothing="some"), r"config\.label_smoothing: expected a number, got 'some'$"),
    (dict(seed=-1), r"config\.seed: must be in "),
    (dict(seed=None), r"config\.seed: required and not set; give seed$"),
    (dict(grad_clip_nrom=1.0), r"config\.grad_clip_nrom: unknown; did you mean grad_clip_norm\?$"),
    (dict(input__batchsize=8), r"config\.input\.batchsize: unknown; did you mean batch_size\?$"),
    (dict(model__contxt="cb"), r"config\.model\.contxt: unknown; did you mean context\?$"),
    (dict(schedule__warmup_step=3), r"config\.schedule\.warmup_step: unknown; did you mean warmup_steps\?$"),
    (dict(evals__val__log_step=3), r"config\.evals\.val\.log_step: unknown; did you mean log_steps\?$"),
    (dict(evals__val__type="clasification"), r"config\.evals\.val\.type: unknown evaluator .*mean classification"),
    (dict(evals__val__pp_fn="decod"), r"config\.evals\.val\.pp_fn: unknown preprocessing op 'decod'; did you mean de"),
    (dict(model_name="vti"), r"config\.model_name: unknown model 'vti'; did you mean vit"),
    (dict(model__variant="XXL/16"), r"config\.model\.variant: unknown ViT variant 'XXL'"),
    (dict(model__context="bc"), r"config\.model\.context: unknown value 'bc'; .*none, cb, cb_s"),
    (dict(loss="softmax"), r"config\.loss: unknown loss 'softmax'; did you mean softmax_xent\? Choices: "),
    (dict(input__pp="flip_rl|" + IMAGES), r"config\.input\.pp: unknown preprocessing op 'flip_rl'; did you mean flip"),
    (dict(input__pp="flip_lr(1"), r"config\.input\.pp: cannot read 'flip_lr\(1'"),
    (dict(num_classes=11), r"config\.num_classes: 11, but input\.pp has onehot\(10\)"),
    (dict(total_epochs=1.0), r"config\.total: total_steps and total_epochs are both set; keep one$"),
    (dict(total_steps=None), r"config\.total: required and not set; give total_steps or "),
    (dict(ckpt_steps=0), r"config\.ckpt_steps: must be more than 0"),
    (dict(grad_accum_steps=3), r"config\.grad_accum_steps: 3 does not divide input\.batch_size 32$"),
    (dict(sharding_strategy=[(".*", "fdsp('data')")]),
     r"config\.sharding_strategy\[0\]: unknown sharding rule 'fdsp'; did you mean fsdp"),
    (dict(sharding_rules=[("act_batch", "dta")]),
     r"config\.sharding_rules\[0\]: the mesh has no axis 'dta'; did you mean data\? config\.mesh has data$"),
], ids=lambda value: str(value)[:40])
def test_a_setting_that_cannot_work(change, error):
    with pytest.raises(ConfigError) as caught:
        check(config_of(debug, **change))
    assert re.match(error, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [debug, digits, vit_i1k])
def test_the_configs_of_the_house_pass_and_fix_the_size_of_what_they_crop(module):
    config = config_of(module)
    assert check(config).raw == config_lib.plain(config)
    if module is vit_i1k:
        with pytest.raises(ConfigError, match=r"^config\.model\.variant: .* does not divide the image of 224×224"):
            check(config_of(module, model__variant="S/15"))


def test_what_the_devices_rule_out():
    for change, error in (
            (dict(input__batch_size=30, input__virtual_ranks=1),
             r"config\.input\.batch_size: 30 cannot .* by 8 devices; use 24 or 32$"),
            (dict(input__batch_size=4, input__virtual_ranks=1),
             r"config\.input\.batch_size: 4 cannot be shared evenly by 8 devices; use 8$"),
            (dict(input__batch_size=24, grad_accum_steps=2),
             r"config\.input\.batch_size: 24 .* by 8 devices × grad_accum_steps 2; use 16 or 32$"),
            (dict(evals__val__batch_size=12), r"config\.evals\.val\.batch_size: 12 cannot be shared"),
            (dict(model__variant="mu/5"), r"config\.model\.variant: .* patch 5×5, .* image of 16×16;"),
            (dict(mesh=[("data", 3)]), r"config\.mesh: \[\('data', 3\)\] does not make up the 8 devices"),
            (dict(sharding_strategy=[("params/haed.*", "fsdp")]),
             r"config\.sharding_strategy\[0\]: 'params/haed\.\*' matches no parameter"),
            (dict(num_classes=5, input__pp=f"value_range(-1, 1)|onehot(5)|{IMAGES}"),
             r"config\.num_classes: makes 5 classes, the data has 10; make it so many, also in every onehot"),
            (dict(input__pp=f"value_range(-1, 1)|{IMAGES[:-1]}, 'label')"), r"config\.input\.pp: |no 'labels'")):
        with pytest.raises((ConfigError, ValueError)) as caught:
            experiment.build(check(config_of(debug, **change)))
        assert re.search(error, str(caught.value)), str(caught.value)


# The whole path, for a few.


def test_a_misspelt_key_in_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import configs.debug as base\n\ndef get_config():\n    config = base.get_config()\n"
                    "    config.grad_clip_nrom = 1.0\n    return config\n")
    assert refused(f"--config={path}", workdir=tmp_path / "run") == \
        "config.grad_clip_nrom: unknown; did you mean grad_clip_norm?"


def test_an_impossible_value(tmp_path):
    assert refused(DEBUG, "--config.label_smoothing=2", workdir=tmp_path / "run") == \
        "config.label_smoothing: is a share in [0, 1), got 2.0"


def test_a_batch_that_the_devices_cannot_share(tmp_path):
    assert refused(DEBUG, "--config.input.batch_size=30", "--config.input.virtual_ranks=1", workdir=tmp_path / "run",
                   JAX_NUM_CPU_DEVICES="8") == \
        "config.input.batch_size: 30 cannot be shared evenly by 8 devices; use 24 or 32"


def test_data_that_is_not_prepared(tmp_path):
    (tmp_path / "empty").mkdir()
    error = refused(f"--config=configs/vit_i1k.py:data_dir={tmp_path}/empty", workdir=tmp_path / "run")
    assert error.startswith("config.input.data") and f"is not prepared in {tmp_path}/empty" in error
    assert f"tfds build imagenet2012 --file_format=array_record --data_dir={tmp_path}/empty" in error


def test_evaluation_data_that_is_not_there(tmp_path):
    assert refused(DEBUG, "--config.evals.val.data.split=tset", workdir=tmp_path / "run").startswith(
        "config.evals.val.data.split: no split 'tset' in 'tset'; did you mean test?")


def test_a_file_in_place_of_the_workdir(tmp_path):
    (tmp_path / "run").write_text("")
    assert refused(DEBUG, workdir=tmp_path / "run") == \
        f"workdir: cannot write in {tmp_path}/run: {tmp_path}/run is not a writable folder"


def test_a_length_on_the_command_line_replaces_the_files(tmp_path):
    """Also from another folder, with a file of one's own."""
    path = tmp_path / "mine.py"
    path.write_text("import configs.debug as base\n\ndef get_config():\n    config = base.get_config()\n"
                    "    config.total_steps, config.total_epochs = None, 100.0\n    return config\n")
    result = run("--config=mine.py", "--workdir=run", "--config.total_steps=3", "--config.input.batch_size", "16",
                 "--noconfig.plot", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "done at step 3" in result.stdout
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [written[key] for key in ("total_steps", "total_epochs", "plot")] == [3, None, False]
    assert written["input"]["batch_size"] == 16


def test_what_others_wrote_reaches_neither_terminal_nor_log_as_it_is(capsys):
    record = logging.LogRecord("cb_vit", logging.WARNING, "", 0, "%s\n%s", ("a\x1b[2J\u202e", "b\udcff"), None)
    assert cli._Log("%(message)s").format(record) == "a\\x1b[2J\\u202e\nb\\udcff"
    cli.show("a\x1b[2J", "b\rc")
    assert capsys.readouterr().out == "a\\x1b[2J\nb\\rc\n"


def test_a_name_in_an_error_is_escaped(tmp_path):
    error = refused(f"--config={tmp_path}/\x1b]0;x\x07\u202e.py")
    assert "\x1b" not in error and "\u202e" not in error
