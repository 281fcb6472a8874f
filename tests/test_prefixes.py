"""What stands in front of names: what all share is taken off and told, and `prefix` settles the rest."""
import numpy as np
import pytest
from helpers import H, flax_shapes, hf_shapes, random, timm_shapes

from cb_vit.weights import open_weights
from cb_vit.weights.containers import FormatError, Tensor, write_npz, write_safetensors
from cb_vit.weights.dialects.conversion import convert
from cb_vit.weights.dialects.prefixes import candidates, take_off

TIMM, HF, BARE, FLAX = timm_shapes(), hf_shapes(), hf_shapes("", head=False), flax_shapes(pos_embedding=(1, 9, 32))
PREFIXES = ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.", "timm_model.", "student.backbone.",
            "_orig_mod.module.model.encoder.", "module.module."]


def understand(arrays, **kw):
    heads = {} if "embedding/kernel" in "".join(arrays) else {"num_heads": H}
    tensors = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    return convert(tensors, path="file", **heads, **kw)


def assert_same(found, expected):
    assert found.params.keys() == expected.params.keys()
    for name, tensor in found.params.items():
        np.testing.assert_array_equal(tensor.read(), expected.params[name].read(), err_msg=name)


@pytest.fixture(scope="module", params=[TIMM, HF, BARE, FLAX], ids=["timm", "huggingface", "bare", "big_vision"])
def file(request):
    """Arrays of a file, and what they mean."""
    arrays = random(request.param)
    return arrays, understand(arrays)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_all_names_share_is_taken_off_and_told(file, prefix):
    arrays, expected = file
    prefix = prefix.replace(".", "/") if "embedding/kernel" in arrays else prefix
    found = understand({prefix + name: array for name, array in arrays.items()})
    assert_same(found, expected)
    told = [note for note in found.notes if "taken off" in note]
    assert told and all(part in "".join(told) for part in prefix.rstrip("./").replace("/", ".").split("."))
    assert not any("taken off" in note for note in expected.notes)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@pytest.mark.parametrize("prefix", ["module.", "model/", "model.backbone."])
def test_in_files_of_every_kind(tmp_path, kind, prefix):
    path = tmp_path / f"x.{kind}"
    {"safetensors": write_safetensors, "npz": write_npz}[kind](path, random({prefix + n: s for n, s in TIMM.items()}))
    assert any(repr(prefix) in note for note in open_weights(path, "path", num_heads=H).notes)


def test_wrappers_of_single_blocks():
    arrays = random(TIMM)
    wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod.").replace("attn.", "attn._checkpoint_wrapped_module."): a
               for name, a in arrays.items()}
    found = understand(wrapped)
    assert_same(found, understand(arrays))
    assert any("'_checkpoint_wrapped_module.', '_orig_mod.' in names" in note for note in found.notes)
    with pytest.raises(FormatError, match="'blocks.0.norm1.bias' is in it twice"):
        understand(wrapped | {"blocks.0.norm1.bias": arrays["blocks.0.norm1.bias"]})


def test_a_prefix_of_some_names_stays_until_it_is_given():
    arrays = random(TIMM)
    lightning = {f"model.{name}": a for name, a in arrays.items()} | {"loss.weight": np.ones(3, "f4"), "x": np.ones(1)}
    with pytest.raises(FormatError, match="^file: no ViT of .*; a ViT is in 'model': choose with prefix$"):
        understand(lightning)
    for prefix in ("model", "model."):
        found = understand(lightning, prefix=prefix)
        assert_same(found, understand(arrays))
        assert any(f"2 of the file's {len(lightning)} arrays are not under {prefix!r}" in note for note in found.notes)
    with pytest.raises(FormatError, match="^file: has no part 'modle'; its parts: 'loss', 'model'$"):
        understand(lightning, prefix="modle")


def test_a_model_that_was_wrapped_twice_over():
    """Teacher and student in one file, each with its head beside it: what is under the prefix may share one again."""
    names = [f"module.{who}.backbone.{name}" for who in ("student", "teacher") for name in TIMM]
    arrays = random(dict(zip(names, [*TIMM.values()] * 2, strict=True)) | {"module.student.head.mlp.0.weight": (3, 3)})
    with pytest.raises(FormatError, match="a ViT is in 'module.student.backbone', 'module.teacher.backbone': choose"):
        understand(arrays)
    found = understand(arrays, prefix="module.teacher")
    assert any("'backbone.' in front of all names" in note for note in found.notes)
    np.testing.assert_array_equal(found.params["cls"].read(), understand(
        {name: arrays[f"module.teacher.backbone.{name}"] for name in TIMM}).params["cls"].read())
    with pytest.raises(FormatError, match="a ViT is in 'module.student.backbone', 'module.teacher.backbone': choose"):
        understand(arrays, prefix="module")
    with pytest.raises(FormatError, match="its parts: 'module.student', 'module.teacher'$"):
        understand(arrays, prefix="student")


def test_another_family_that_holds_a_vit():
    """The image tower of a SigLIP in open_clip's names is timm's ViT."""
    arrays = random({f"visual.trunk.{n}": s for n, s in TIMM.items()} | {"text.token_embedding.weight": (3, 3)})
    with pytest.raises(FormatError, match="seems to be a CLIP.*, which is not supported; a ViT is in 'visual.trunk'"):
        understand(arrays)
    assert understand(arrays, prefix="visual.trunk").format == "timm"


def test_names_that_share_all_they_have():
    tensors = {name: Tensor((1,), np.dtype("f4"), lambda: np.ones(1, "f4")) for name in (".", "a." * 1000, "")}
    for names in (["."], ["a." * 1000], ["." * 1000, "." * 999], [""], [], list(tensors)):
        some = {name: tensors.get(name, tensors[""]) for name in names}
        assert take_off(some, None, lambda names: False, "file") == (some, [])
        assert candidates(names, lambda names: False) == []
    assert candidates(["a.b.c", "a.b.d", "x/c", "c"], lambda names: names == ["c"]) == ["a.b", "x"]
