"""docs/weights.md with PyTorch and timm at hand, so that the snippets that need them run too."""
import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")
from test_weights_docs import files, pytestmark, test_a_snippet  # noqa: E402, F401
