"""Every config file: it loads, is checked to the last key, and its step can be made, small; some train."""
import re
from pathlib import Path

import pytest

from cb_vit import experiment
from cb_vit import optax as cb_optax
from cb_vit.config import ConfigError
from cb_vit.settings import check
from cb_vit.tools import config_files
from cb_vit.train import train_and_evaluate
from cb_vit.workdir import flatten
from configs import (
    cifar10,
    debug,
    deit3_i1k,
    deit_i1k,
    digits,
    fashion_mnist,
    finetune,
    folder,
    imagenette,
    vit_i1k,
)

ROOT = Path(__file__).resolve().parents[1]
INIT = "init=/runs/some"
CONFIGS = {  # arguments with which each file is small, and the classes of its data
    "cifar10": (cifar10, "variant=mu/8", 10),
    "debug": (debug, "", 10),
    "deit3_i1k": (deit3_i1k, "variant=mu/16,size=32", 1000),
    "deit_i1k": (deit_i1k, "variant=mu/16,size=32", 1000),
    "digits": (digits, "variant=mu/4", 10),
    "fashion_mnist": (fashion_mnist, "variant=mu/7", 10),
    "finetune": (finetune, f"{INIT},variant=mu/16,size=32", 1000),
    "folder": (folder, "root=/photos,variant=mu/16,size=32", 10),
    "imagenette": (imagenette, "variant=mu/16,size=32", 10),
    "vit_i1k": (vit_i1k, "variant=mu/16,size=32", 1000)}
SIZES = {"cifar10": 32, "fashion_mnist": 28, "digits": 8}


def test_no_file_is_forgotten():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
    assert files == {*CONFIGS, *config_files.suites()}
    listed = dict(line.split(maxsplit=1) for line in config_files.overview())
    assert listed.keys() == files and all(len(line) > 10 for line in listed.values())


def small(name):
    """The config on fake images of its own size, two epochs of one batch; nothing else is changed."""
    module, arguments, classes = CONFIGS[name]
    config = module.get_config(arguments)
    config.input.batch_size = 256  # the least that repeated augmentation makes an epoch of
    fake = dict(name="fake", num_examples=256, image_size=SIZES.get(name, 40), num_classes=classes, encoded=True)
    if name != "debug":
        config.input.data = dict(fake, split="train")
        for evaluator in config.evals.values():
            evaluator.data = dict(fake, split="test", num_examples=40)
    config.total_epochs = None
    config.total_steps = 2
    for block in (config, config.schedule, *config.evals.values()):
        for key in block:
            if re.fullmatch(r"(warmup|cooldown|log|log_training|ckpt|keep_ckpt)_(steps|epochs|percent)", key):
                with block.ignore_type():
                    block[key] = None
    config.schedule.warmup_steps = 1
    for evaluator in config.evals.values():
        evaluator.log_steps = 2
    config.model.dtype_mm = "float32"  # bfloat16 is emulated here
    config.plot = False
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_and_the_evaluators_of_a_config_can_be_made(name):
    run = experiment.build(check(small(name)))
    with run.active_mesh():
        run.jit_train_step().lower(*run.step_shapes())
    assert "val" in run.open_evaluators()


@pytest.mark.parametrize("name", ["debug", "finetune"])  # all of the recipe; and two configs in a row
def test_a_config_trains_and_evaluates(name, tmp_path):
    config = small(name)
    if name == "finetune":  # from a run of the config it is meant to follow
        first = small("deit_i1k")
        train_and_evaluate(first, tmp_path / "first")
        config.model_init = str(tmp_path / "first")
    metrics = train_and_evaluate(config, tmp_path / "run")
    assert metrics["step"] == 2 and 0 < metrics["training_loss"] < 20
    assert 0 < metrics["val/loss"] < 20
    assert ("ema/val/loss" in metrics) == ("ema" in config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_has_a_reader(name):
    config = CONFIGS[name][0].get_config({"finetune": INIT, "folder": "root=/photos"}.get(name, ""))
    check(config)
    config.unlock()
    for block in ("", "input", "input.data", "model", "mixup", "schedule", "evals.val", "evals.val.data"):
        target = config
        for part in filter(None, block.split(".")):
            target = target[part]
        with target.unlocked():
            target["nobody_reads_this"] = 1
        with pytest.raises(ConfigError, match="nobody_reads_this: unknown"):
            check(config)
        with target.unlocked():
            del target["nobody_reads_this"]
    check(config)


def test_deit_is_deit():
    """Number by number, from the table of its hyper-parameters (reference: arXiv 2012.12877, Table 9, and its code)."""
    settings = check(deit_i1k.get_config("variant=S/16"))
    cfg, model = settings, settings.model
    assert cb_optax.peak_lr(cfg, 1024) == pytest.approx(1e-3)
    given = flatten(settings.raw)
    for key, value in {
            "input.batch_size": 1024, "input.repeats": 3, "input.virtual_ranks": 4, "total_epochs": 300,
            "label_smoothing": 0.1, "weight_decay": 0.05, "loss": "softmax_xent", "optax_name": "scale_by_adam",
            "mixup.mixup_alpha": 0.8, "mixup.cutmix_alpha": 1.0, "mixup.prob": 1.0, "mixup.switch_prob": 0.5,
            "random_erasing.prob": 0.25, "random_erasing.mode": "pixel", "ema.decay": 0.99996,
            "schedule.decay_type": "deit", "schedule.warmup_epochs": 5, "schedule.warmup_lr": 1e-6,
            "schedule.min_lr": 1e-5}.items():
        assert given[key] == value, key
    assert cfg.recipe.mixup_group == 256 and cfg.grad_clip_norm is None and not cfg.optax.keys() - {"b1", "b2", "eps"}
    assert (model.drop_path, model.drop_path_schedule, model.dropout, model.gelu) == (0.1, "linear", 0.0, "erf")
    assert (model.init, model.pool_type, model.posemb, model.head_zeroinit) == ("deit", "tok", "learn", False)
    assert "inception_crop(224)|flip_lr|randaug('rand-m9-mstd0.5-inc1')|vgg_value_range" in cfg.input.pp.text
    assert "resize_small(256)|central_crop(224)" in cfg.evals["val"].pp_fn.text


@pytest.mark.parametrize("module, most", [(deit_i1k, 4), (deit3_i1k, 8), (vit_i1k, 4), (finetune, 4)])
@pytest.mark.parametrize("batch_size", [36, 64])
def test_other_classes_and_batches_are_two_arguments(module, most, batch_size):
    given = f"{f'{INIT},' * (module is finetune)}variant=S/16,root=/pets,classes=37,batch_size={batch_size}"
    settings = check(module.get_config(given))
    assert settings.num_classes == settings.input.pp.num_classes == 37
    assert all("onehot(37)" in config.pp_fn.text for config in settings.evals.values())
    ranks = settings.input.virtual_ranks
    assert settings.input.batch_size == batch_size and ranks <= most and batch_size % (2 * ranks) == 0


def test_deit_with_a_teacher_is_distilled():
    config = deit_i1k.get_config("teacher=/runs/teacher")
    settings = check(config)
    assert settings.model.distilled and settings.distillation.type == "hard"
    assert settings.distillation.alpha == 0.5


@pytest.mark.parametrize(("variant", "size", "lr", "rate"), [
    ("S/16", 224, 4e-3, 0.05), ("B/16", 192, 3e-3, 0.2), ("L/16", 192, 3e-3, 0.45), ("H/14", 154, 3e-3, 0.6)])
def test_deit3_is_deit3(variant, size, lr, rate):
    settings = check(deit3_i1k.get_config(f"variant={variant}"))
    cfg, model = settings, settings.model
    assert f"inception_crop({size})|flip_lr|three_augment|color_jitter(0.3, 0.3, 0.3)" in cfg.input.pp.text
    assert f"resize_small({size})|central_crop({size})" in cfg.evals["val"].pp_fn.text
    assert (cb_optax.peak_lr(cfg, 2048), cfg.weight_decay, cfg.grad_clip_norm) == (lr, 0.05, 1.0)
    assert (cfg.optax_name, cfg.loss, cfg.label_smoothing, cfg.input.batch_size) == ("scale_by_lamb", "bce", 0.0, 2048)
    assert (model.drop_path, model.drop_path_schedule, model.layer_scale) == (rate, "constant", 1e-4)
    assert cfg.random_erasing is None and cfg.recipe.mixup_group == 256


def test_a_folder_is_fine_tuned_as_its_weights_are_and_trained_from_scratch_as_deit_is():
    scratch, tuned = (check(folder.get_config(f"root=/photos{more}")) for more in ("", f",{INIT}"))
    assert (scratch.model.variant, scratch.model.context, scratch.input.pp.image_size) == ("Ti/16", "cb", (160, 160))
    assert scratch.mixup and scratch.random_erasing and scratch.model_init is None
    assert tuned.raw["model"].keys() <= {"variant", "context", "drop_path", "init", "dtype_mm", "head_zeroinit"}
    assert tuned.raw["model"]["variant"] is None and tuned.model_init == "/runs/some" and tuned.layer_decay == 0.75
    assert not tuned.mixup and not tuned.random_erasing and tuned.input.pp.image_size == (224, 224)
    for settings in (scratch, tuned):
        blocks = [settings.input, settings.evals["val"]]
        assert {block.data.holdout for block in blocks} == {0.1} and settings.num_classes is None
        assert all("decode(exif=True)" in pp.text for pp in (settings.input.pp, settings.evals["val"].pp_fn))
    given = check(folder.get_config(f"root=/photos,{INIT},variant=mu/16,context=none,size=32,epochs=3,batch_size=32"))
    assert (given.model.width, given.model.context, given.total.value) == (32, "none", 3)
    assert cb_optax.peak_lr(given, 32) == cb_optax.peak_lr(tuned, 64) / 2
    with pytest.raises(ValueError, match="argument root is not set"):
        folder.get_config(INIT)


def test_finetuning_needs_something_to_begin_with():
    with pytest.raises(ValueError, match="argument init is not set"):
        finetune.get_config()
