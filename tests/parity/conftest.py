"""Parity with timm, transformers and torch; a module here begins with `pytest.importorskip("timm")`, so it is skipped
without them.

`pip install torch torchvision timm transformers "pillow<13"` makes an environment that runs these tests: Pillow 13
refuses the posterize of 0 bits that timm's RandAugment asks for.
"""
import importlib.util

LIBRARIES = []  # a torch Library takes its operators with it when it is collected


def _register_torchvision_operators() -> None:
    """torchvision without its compiled part, beside a torch built for CPUs, looks two operators up on import."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    LIBRARIES.append(library)


if importlib.util.find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _register_torchvision_operators()
