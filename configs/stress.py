"""Suite: what damage to the images of a run's own data does to its accuracy; corruptions, attacks, missing patches.

    cb-vit eval --suite=stress --workdir=runs/digits --output=runs/digits/stress
    cb-vit eval --suite=stress:examples=500 --workdir=runs/flowers --output=runs/flowers/stress

The data and its preprocessing are those of the run's evaluator `val`. What each metric means: docs/robustness.md.
"""
from ml_collections import ConfigDict

import configs.common as c


def get_config(arg=None):
    """Arguments: batch_size (0: the run's), examples of each evaluator but the first two (0: all), drawn by lot."""
    arg = c.parse_arg(arg, batch_size=0, examples=0)
    loading = dict(batch_size=arg.batch_size or None)
    some = dict(loading, examples=arg.examples or None)
    config = ConfigDict()
    config.evals = dict(
        val=c.classification(**loading),
        calibration=dict(type="calibration", **loading),
        corruptions=dict(type="corruptions", **some),
        attack=dict(type="attack", eps=(1.0, 2.0, 4.0, 8.0), **some),
        occlusion=dict(type="occlusion", ways=("random", "salient", "non_salient"), **some))
    return config
