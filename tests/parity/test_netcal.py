"""Calibration errors against netcal, which `pip install netcal` brings (with torch)."""
import numpy as np
import pytest

from cb_vit.evaluators.calibration import calibration_error, fit_temperature, mass_bins, width_bins

pytest.importorskip("netcal")
from netcal.metrics import ECE  # noqa: E402
from netcal.scaling import TemperatureScaling  # noqa: E402
from scipy.special import softmax  # noqa: E402


def random(n, classes=10):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    return labels, (2 * rng.normal(size=(n, classes)) + 3 * np.eye(classes)[labels]).astype(np.float32)


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("equal_width, bins_of", [(True, width_bins), (False, mass_bins)])
def test_expected_calibration_error(bins, equal_width, bins_of):
    labels, logits = random(3000)
    p = softmax(logits.astype(np.float64), axis=1)
    found = calibration_error(bins_of(p.max(1), p.argmax(1) == labels, bins))
    assert found == pytest.approx(ECE(bins, equal_intervals=equal_width).measure(p, labels), rel=1e-9)


def test_temperature():
    labels, logits = random(3000)
    scaling = TemperatureScaling()
    scaling.fit(softmax(logits.astype(np.float64), axis=1), labels)
    found = fit_temperature(logits, logits[np.arange(3000), labels])
    assert 1 / found == pytest.approx(scaling.temperature[0], rel=1e-2)  # netcal's optimiser stops early
