"""Tests run on the CPU with 8 simulated devices, and shapes are checked at every door."""
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
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


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """For modules whose tests compile the same few functions over and over, most of what they would spend."""
    changes = dict(jax_compilation_cache_dir=str(tmp_path_factory.mktemp("compiled")),
                   jax_persistent_cache_min_compile_time_secs=0.1)
    before = {name: getattr(jax.config, name) for name in changes}
    for settings in (changes, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is changes:
            yield
