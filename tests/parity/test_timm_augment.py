"""Mixup, cutmix and erasing against timm's: equal for equal draws, and of equal distribution for their own."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

pytest.importorskip("timm")
torch = pytest.importorskip("torch")
from timm.data import mixup as timm_mixup  # noqa: E402
from timm.data import random_erasing as timm_erasing  # noqa: E402

from cb_vit import augment  # noqa: E402
from cb_vit.augment import ErasingConfig, MixupConfig  # noqa: E402
from cb_vit.losses import smooth_labels  # noqa: E402

LEVEL = 1e-4  # of tests of distributions; see tests/test_augment.py
ROWS, HEIGHT, WIDTH, CLASSES = 8, 12, 17, 5
rng = np.random.default_rng(0)


def to_torch(images):
    return torch.tensor(np.moveaxis(np.asarray(images), -1, 1))


def to_numpy(images):
    return np.moveaxis(images.numpy(), 1, -1)


def spread(values, mode):
    """Values as timm draws them, one for each group, pair or row, for the rows of one group."""
    return {"batch": lambda: np.repeat(values, ROWS, 0), "pair": lambda: np.concatenate([values, values[::-1]]),
            "elem": lambda: values}[mode]()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_and_targets_for_equal_draws(monkeypatch, kind, mode):
    units = {"batch": 1, "pair": ROWS // 2, "elem": ROWS}[mode]
    images, classes = rng.normal(size=(ROWS, HEIGHT, WIDTH, 3)).astype(np.float32), rng.integers(CLASSES, size=ROWS)
    lam = rng.uniform(size=units).astype(np.float32)
    centre = np.stack([rng.integers(HEIGHT, size=units), rng.integers(WIDTH, size=units)], axis=1)
    draws = iter(centre.ravel())
    monkeypatch.setattr(timm_mixup.np.random, "beta", lambda *args, size=None: lam if size else lam[0])
    monkeypatch.setattr(timm_mixup.np.random, "randint", lambda *args, size=None: next(draws))
    theirs = timm_mixup.Mixup(**{"mixup_alpha": 0.0, f"{kind}_alpha": 1.0}, mode=mode, label_smoothing=0.1,
                              num_classes=CLASSES)(to_torch(images), torch.tensor(classes))

    lam, centre = (jnp.asarray(spread(x, mode), x.dtype.name.replace("64", "32")) for x in (lam, centre))
    whole = jnp.broadcast_to(jnp.array([0, HEIGHT, 0, WIDTH]), (ROWS, 4))
    cut = kind == "cutmix"
    ours = augment.apply_mix(
        jnp.asarray(images), smooth_labels(jax.nn.one_hot(classes, CLASSES), 0.1), lam * (not cut),
        augment.cutmix_box(lam, centre, HEIGHT, WIDTH) if cut else whole, ROWS)
    np.testing.assert_allclose(ours[0], to_numpy(theirs[0]), rtol=0 if cut else 1e-6, atol=0 if cut else 1e-6)
    np.testing.assert_allclose(ours[1], theirs[1].numpy(), atol=1e-6)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_lambda_has_timms_distribution(mode):
    settings = dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.8, switch_prob=0.4, mode=mode)
    rows = 4000
    np.random.seed(0)
    mixer = timm_mixup.Mixup(**settings, label_smoothing=0.0, num_classes=2)
    classes = torch.tensor([0, 1])
    theirs = [mixer(torch.zeros(2, 1, HEIGHT, WIDTH), classes)[1][0, 0].item() for _ in range(rows)]
    labels = jnp.tile(jnp.eye(2), (rows, 1))
    _, targets = augment.mix(jax.random.key(0), jnp.zeros((2 * rows, HEIGHT, WIDTH, 1)), labels,
                             jnp.ones(2 * rows, bool), MixupConfig(**settings), 2)
    ours = np.asarray(targets[::2, 0])
    # λ of cutmix has HEIGHT · WIDTH + 1 values, each rounded in its own way.
    assert stats.ks_2samp(np.round(ours, 5), np.round(theirs, 5)).pvalue > LEVEL


class Draws:
    """Stands in for `random`: gives timm the numbers of one image that ours has drawn, in timm's order."""

    def __init__(self, draws, count):
        self.image, self.boxes = draws[0, augment.TRIES + 1], iter(draws)
        self.whole = iter([self.image[1]] if count > 1 else [])

    def random(self):
        return self.image[0]

    def randint(self, low, high):
        return low + int(next(self.whole, None) * (high - low + 1))

    def uniform(self, low, high):
        return low + (high - low) * next(self.parts)

    def range(self, stop):
        """timm's loops: over the boxes of an image, and over ten tries for each."""
        if stop != augment.TRIES:
            return range(stop)
        box = next(self.boxes)
        self.parts, self.whole = iter(box[:augment.TRIES].ravel()), iter(box[augment.TRIES])
        return range(stop)


@pytest.mark.parametrize("count, area_max, ratio_min", [(1, 1 / 3, 0.3), (3, 1 / 3, 0.3), (1, 0.9, 0.1)],
                         ids=["deit", "up to three", "few fit"])
def test_erased_images_for_equal_draws(monkeypatch, count, area_max, ratio_min):
    rows = 300
    cfg = ErasingConfig(prob=0.7, mode="const", count=count, area_max=area_max, ratio_min=ratio_min)
    images = rng.normal(size=(rows, HEIGHT, WIDTH, 3)).astype(np.float32)
    theirs = to_torch(images)
    eraser = timm_erasing.RandomErasing(probability=0.7, max_area=area_max, min_aspect=ratio_min, mode="const",
                                        max_count=count, device="cpu")
    key = jax.random.key(1)
    for image, draws in zip(theirs, np.float64(jax.random.uniform(key, (rows, count, augment.TRIES + 2, 2))),
                            strict=True):
        stand_in = Draws(draws, count)
        monkeypatch.setattr(timm_erasing, "random", stand_in)
        monkeypatch.setattr(timm_erasing, "range", stand_in.range, raising=False)
        eraser(image)
    boxes = augment.erase_boxes(key, rows, HEIGHT, WIDTH, cfg)
    ours = augment.apply_erase(jnp.asarray(images), boxes, jnp.zeros((rows, 1, 1, 1, 1)))
    np.testing.assert_array_equal(ours, to_numpy(theirs))
    assert 0.5 < (ours != images).any((1, 2, 3)).mean() < 0.9


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erased_area_and_what_fills_it_have_timms_distribution(mode):
    size = 32
    torch.manual_seed(0)
    timm_erasing.random.seed(0)
    eraser = timm_erasing.RandomErasing(probability=1.0, mode=mode, device="cpu")
    theirs = to_numpy(eraser(torch.full((2000, 3, size, size), torch.nan)))
    ours = np.asarray(augment.erase(jax.random.key(2), jnp.full((2000, size, size, 3), jnp.nan),
                                    ErasingConfig(prob=1.0, mode=mode)))
    erased = [~np.isnan(images).any(-1) for images in (ours, theirs)]
    assert stats.ks_2samp(*(e.mean((1, 2)) for e in erased)).pvalue > LEVEL
    first = [np.ravel([i[e][0] for i, e in zip(images, where, strict=True)])
             for images, where in zip((ours, theirs), erased, strict=True)]
    assert stats.ks_2samp(*first).pvalue > LEVEL
