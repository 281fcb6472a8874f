"""Tests run on the CPU with 8 simulated devices, and shapes are checked at every door."""
import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes by in compiling. Workers and the programs that tests start share what was compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# The models of tests are small, and most of the time goes by in compiling them: a third of it without optimisation.
# A version that does not know a flag would end the process, so that others go without.
if jax.__version_info__[:2] == (0, 10):
    os.environ["XLA_FLAGS"] = " ".join([
        "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1", os.environ.get("XLA_FLAGS", "")])
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("cb_vit", "typecheck.checked")
