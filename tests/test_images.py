"""What cards say of images: every way to prepare them is done, or left open with a word on it."""
import pytest

from cb_vit.pp import builder
from cb_vit.pp.normalisation import HALF
from cb_vit.weights.dialects.images import evaluation, for_size, normalisation, preprocessor

RANGE = "vgg_value_range((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))"
TIMM = dict(mean=[0.5] * 3, std=[0.5] * 3, input_size=[3, 32, 32], crop_pct=0.9, interpolation="bilinear")
VIT = dict(image_processor_type="ViTImageProcessor")


@pytest.mark.parametrize("card, steps", [
    (dict(pretrained_cfg=TIMM), "resize_small(35, 'bilinear')|central_crop((32, 32))"),
    (dict(pretrained_cfg=TIMM | dict(crop_mode="squash")), "resize((35, 35), 'bilinear')|central_crop((32, 32))"),
    (dict(pretrained_cfg=TIMM | dict(crop_mode="squash", input_size=[3, 32, 64], crop_pct=1.0)),
     "resize((32, 64), 'bilinear')|central_crop((32, 64))"),
    (dict(pretrained_cfg=dict(mean=0.5, std=0.5)), "resize_small(18, 'bicubic')|central_crop((16, 16))"),
    (dict(architecture="x", **TIMM), "resize_small(35, 'bilinear')|central_crop((32, 32))"),
    (VIT, "resize((224, 224), 'bilinear')"), (VIT | dict(size=32, resample=1), "resize((32, 32), 'lanczos')"),
    (dict(feature_extractor_type="ViTFeatureExtractor"), "resize((224, 224), 'bilinear')"),
    (dict(image_processor_type="ViTImageProcessorFast", size=[32, 48]), "resize((32, 48), 'bilinear')"),
    (dict(image_processor_type="DeiTImageProcessor"), "resize((256, 256), 'bicubic')|central_crop((224, 224))"),
    (dict(model_type="deit", image_mean=0.5, image_std=0.5), "resize((256, 256), 'bicubic')|central_crop((224, 224))"),
    (dict(image_processor_type="BitImageProcessor", size=40), "resize_small(40, 'bicubic')|central_crop((224, 224))"),
    (dict(image_processor_type="BitImageProcessor", size=40, default_to_square=True, do_center_crop=False),
     "resize((40, 40), 'bicubic')"),
    (VIT | dict(size=40, default_to_square=False), "resize_small(40, 'bilinear')"),
    (dict(image_processor_type="SiglipImageProcessor"), "resize((224, 224), 'bicubic')"),
    (dict(model_type="siglip", image_mean=[0.5] * 3), "resize((224, 224), 'bicubic')"),
    (VIT | dict(do_resize=False), ""), (VIT | dict(size=dict(shortest_edge=40), do_center_crop=True, crop_size=32),
                                        "resize_small(40, 'bilinear')|central_crop((32, 32))")], ids=str)
def test_it_is_done(card, steps):
    pp, note = evaluation(card, HALF, (4, 4), (4, 4))
    assert (pp, note) == ("|".join(["decode", *filter(None, [steps]), RANGE]), None)


@pytest.mark.parametrize("card, reason", [
    (dict(pretrained_cfg=TIMM | dict(crop_mode="border")), "crop_mode='border'"),
    (dict(pretrained_cfg=TIMM | dict(input_size=[3, 32, 64])), "to images that are no square"),
    (dict(pretrained_cfg=TIMM | dict(interpolation="random")), "unknown resampling method 'random'"),
    (dict(pretrained_cfg=TIMM | dict(crop_pct="much")), "unsupported operand"),
    (VIT | dict(do_pad=True), "do_pad=True"), (VIT | dict(size=dict(longest_edge=32)), "size={'longest_edge': 32}"),
    (VIT | dict(resample=9), "out of range"), (VIT | dict(do_center_crop=True), "crop_size"),
    (VIT | dict(size=32, do_center_crop=True, crop_size=40), "is smaller than the crop"),
    (dict(image_processor_type="CLIPImageProcessor", image_mean=0.5, image_std=0.5), "CLIPImageProcessor"),
    (dict(image_processor_type="ConvNextImageProcessor", size=224, crop_pct=0.9), "ConvNextImageProcessor")], ids=str)
def test_what_cannot_be_done_is_left_open_and_said(card, reason):
    pp, note = evaluation(card, HALF, (4, 4), (4, 4))
    assert pp is None and note.startswith("how its card prepares images cannot be done here (") and reason in note


def test_without_a_card_it_is_a_guess_that_is_said():
    pp, note = evaluation({}, HALF, (4, 4), (4, 4))
    assert pp == f"decode|resize_small(18, 'bicubic')|central_crop((16, 16))|{RANGE}" and "taken to be" in note
    assert evaluation({}, None, (4, 4), (4, 4)) == evaluation({}, HALF, None, (4, 4)) == (None, None)


@pytest.mark.parametrize("pp, size, expected", [
    ("decode|resize_small(256, 'bilinear')|central_crop((224, 224))|value_range(-1, 1)", (518, 518),
     "decode|resize_small(592, method='bilinear')|central_crop(518)|value_range(-1, 1)"),
    ("decode|resize_small(smaller_size=256)|central_crop(size=224)", (112, 112),
     "decode|resize_small(128)|central_crop(112)"),
    ("decode(1)|resize((32, 64), antialias=False, method='bilinear')|value_range", (16, 32),
     "decode(1)|resize((16, 32), method='bilinear', antialias=False)|value_range"),
    ("decode|resize(32)|central_crop(28)|value_range", (28, 28), None),
    ("decode|resize_small(32)|central_crop(28)|value_range", (28, 56),
     "decode|resize_small(32)|central_crop(28)|resize((28, 56))|value_range"),
    ("decode|value_range", (8, 8), "decode|resize((8, 8))|value_range"), ("", (8, 8), "resize((8, 8))"),
    ("decode|resize(33)|central_crop(32)", (31, 31), "decode|resize(32)|central_crop(31)")], ids=str)
def test_a_preprocessing_for_images_of_another_size(pp, size, expected):
    assert for_size(pp, size) == (pp if expected is None else expected)
    assert builder.build(for_size(pp, size), "pp").image_size == size


@pytest.mark.parametrize("card, expected", [
    ({}, None), (dict(architectures=["ViTModel"], model_type="vit"), None), (VIT, (0.5, 0.5)),
    (dict(image_processor_type="CLIPImageProcessor"), None), (VIT | dict(do_normalize=False), (0.0, 1.0)),
    (VIT | dict(image_mean=[0.1, 0.2, 0.3]), ([0.1, 0.2, 0.3], 0.5)), (VIT | dict(rescale_factor="x"), (None, None)),
    (VIT | dict(do_rescale=False, image_mean=[51.0], image_std=[255]), ([0.2], [1.0])),
    (VIT | dict(rescale_factor=2 / 255, image_mean=1, image_std=1), (0.5, 0.5)),
    (dict(pretrained_cfg=dict(mean=[0.1])), ([0.1], None))], ids=str)
def test_how_pixels_are_normalised(card, expected):
    assert normalisation(card) == expected


@pytest.mark.parametrize("pp", [
    "decode|resize_small(40, 'bilinear')|central_crop(32)", "decode|resize(32, 'lanczos')", "decode",
    "decode|resize((40, 50), 'area')|central_crop((32, 40))"])
def test_a_card_says_what_is_done(pp):
    card, unsaid = preprocessor(f"{pp}|value_range(-1, 1)", HALF)
    again, note = evaluation(card, HALF, None, (4, 4))
    assert not unsaid and note is None and normalisation(card) == ([0.5] * 3, [0.5] * 3)
    before, after = ([type(op) for _, op in builder.build(text, "pp").host_ops] for text in (pp, again))
    assert before == after and preprocessor(again, HALF) == (card, [])


def test_what_a_card_has_no_words_for_is_told():
    _, unsaid = preprocessor("decode|flip_lr|resize(32, antialias=False)|central_crop(16)|resize(8)", HALF)
    assert unsaid == ["flip_lr", "resize(32, antialias=False)", "resize(8)"]
