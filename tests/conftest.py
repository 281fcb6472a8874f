"""Tests run on the CPU with 8 simulated devices, and shapes are checked at every door."""
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("cb_vit", "typecheck.checked")
