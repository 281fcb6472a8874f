"""The flags `--suite`, `--data_dir` and `--pp` of `cb-vit eval`: a named set of evaluators, for any model.

A suite is a config file that sets `evals` alone, and `num_classes` where it is for models of so many classes. What its
blocks leave out is the model's own: `pp_fn` its preprocessing, `data` that of the run's evaluator `val`, or its first.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from cb_vit import io
from cb_vit.config import ConfigError, duration_keys, plain
from cb_vit.overrides import lay_over
from cb_vit.prediction import preprocessing
from cb_vit.registry import parse_calls
from cb_vit.tools import cli, config_files
from cb_vit.weights import Weights

BASE = "debug"  # the config that a suite lies over where there is no run: of it, only mesh and loading count
VAL = "val"
Config = Mapping[str, Any]


def add_arguments(parser: cli.Parser) -> None:
    """Take the flags of this module."""
    parser.add_argument("--suite", metavar="NAME[:ARGUMENTS]", help=(
        "In place of --config: a set of evaluators, robustness (ImageNet's test sets, in --data_dir) or stress (damage "
        "to the data of a run), or a file of your own."))
    parser.add_argument("--data_dir", help="Folder of the data of a suite.")
    parser.add_argument("--pp", help="Preprocessing of the images of a suite, where it is not to be the model's own.")


def read_suite(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the suite of the command line sets; None: there is none.

    Raises:
        ConfigError: there is no such suite, or it is none, or other flags do not go with it.
    """
    if args.suite is None:
        for flag in ("data_dir", "pp"):
            if getattr(args, flag) is not None:
                raise ConfigError(f"--{flag}", "is of a suite; give --suite, or set it in the config")
        return None
    if args.config is not None:
        raise ConfigError("--suite", "takes the place of --config; give one of them")
    given = args.suite
    if args.data_dir is not None:
        _check_data_dir(args.data_dir)
        given += f"{',' if ':' in given else ':'}data_dir={args.data_dir}"
    suite = plain(config_files.get_config(given, "--suite"))
    if others := suite.keys() - cli.SUITE_KEYS:
        raise ConfigError("--suite", f"{given.partition(':')[0]} is an experiment, as it sets {min(others)}: give it "
                                     f"as --config. Suites: {', '.join(config_files.suites())}")
    if not suite.get("evals"):
        raise ConfigError("--suite", f"{given.partition(':')[0]} has no evaluator")
    return suite


def _check_data_dir(data_dir: str) -> None:
    if "," in data_dir:
        raise ConfigError("--data_dir", f"{data_dir}: a comma ends an argument of a suite; give a link to the folder")
    io.check_address(data_dir, "--data_dir")
    if io.is_local(data_dir) and not os.path.isdir(os.path.expanduser(data_dir)):
        raise ConfigError("--data_dir", f"{data_dir} is no folder; give the one that holds the data sets")


def check_classes(suite: Config, num_classes: int, model: str) -> None:
    """Refuse a model that the suite cannot score.

    Args:
        suite: what the suite sets.
        num_classes: width of the model's head; 0: it has none.
        model: what the model is called.

    Raises:
        ConfigError: at "--suite".
    """
    wanted = suite.get("num_classes")
    if wanted and num_classes != wanted:
        has = f"has {num_classes:,}" if num_classes else "has no head"
        raise ConfigError("--suite", f"is for models of {wanted:,} classes, and {model} {has}; "
                                     "--suite=stress measures a run on its own data")


def settle(suite: Config, args: argparse.Namespace, run: Config | None, weights: Weights | None) -> dict[str, Any]:
    """A whole config whose evaluators are those of a suite.

    Args:
        suite: what the suite sets.
        args: arguments of the command, whose overrides are laid over it.
        run: the config of the run that is measured; None: it is none.
        weights: the model that is measured, if it was given as weights.

    Raises:
        ConfigError: a block leaves out what is not known of the model.
    """
    base = dict(plain(config_files.get_config(BASE)) if run is None else run)
    own = _own_block(run)
    # A metric of the run's evaluators need not be one of the suite's.
    config = lay_over({**base, "evals": suite["evals"], "keep_best": None}, args.overrides)
    for name, block in config["evals"].items():
        if not isinstance(block, dict):
            continue  # for the schema to refuse
        takes_own = block.get("data") is None
        if takes_own:
            block["data"] = _own_data(own, name)
        if block.get("pp_fn") is None:
            block["pp_fn"] = _pp(args.pp, own, weights, name, decode=not takes_own)
        if all(block.get(key) is None for key in duration_keys("log")):
            block["log_percent"] = 1.0
    return config


def _own_block(run: Config | None) -> Config:
    evals = (run or {}).get("evals") or {}
    return evals.get(VAL) or next(iter(evals.values()), {})


def _own_data(own: Config, name: str) -> Any:
    if own.get("data") is None:
        raise ConfigError(f"config.evals.{name}.data", "is left to the run that is measured, and there is none that "
                                                       "says its data: give --workdir or --weights=RUN")
    return own["data"]


def _pp(given: str | None, own: Config, weights: Weights | None, name: str, decode: bool) -> str:
    """Preprocessing of a block: what is given, the run's own, or what the weights say."""
    labels = "onehot|keep('image', 'labels')"
    if given is not None:
        return f"{given}|{labels}" if "onehot" not in given else given
    if text := own.get("pp_fn"):
        return text if not decode or parse_calls(text, "pp")[0].name == "decode" else f"decode|{text}"
    if weights is None:
        raise ConfigError(f"config.evals.{name}.pp_fn", "is left to the run, which has no evaluator; give --pp")
    return f"{preprocessing(weights).text}|{labels}"
