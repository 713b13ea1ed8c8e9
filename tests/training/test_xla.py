"""Flags that the compiler knows, and that leave the user's own in force."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gamayun_jax.training import xla

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_enable_xla_caches",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def settings():
    """JAX's, of its cache: as before after the test."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_flags_only_where_they_belong(tmp_path):
    environment = {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false"}
    xla.set_flags(environment, tmp_path / "no driver")
    assert environment == {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false"}
    xla.set_flags(environment, tmp_path)
    flags = environment["XLA_FLAGS"].split()
    assert flags[:-1] == list(xla.GPU_FLAGS)
    assert flags[-1] == "--xla_gpu_enable_pipelined_all_gather=false"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == xla.GPU_MEMORY
    own = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}
    xla.set_flags(own, tmp_path)
    assert own["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".5"


def test_the_compiler_knows_the_flags():
    """An unknown one ends the process."""
    code = "import jax; jax.numpy.ones(3).block_until_ready()"

    def run(flags):
        environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True).returncode

    assert run(xla.GPU_FLAGS) == 0
    assert run([*xla.GPU_FLAGS, "--xla_gpu_not_a_flag=true"]) != 0


def test_a_tpu_is_looked_for_where_there_may_be_one(tmp_path, monkeypatch):
    """A Google network card is none; what the user wants is done; without libtpu,
    and with a GPU at hand, JAX looks for itself."""
    monkeypatch.setattr(xla.importlib.util, "find_spec", lambda name: name)
    card, chip, driver = (tmp_path / n for n in ("card/0", "chip/0", "driver"))
    for device, number in ((card, "0x0042"), (chip, "0x0063")):
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x1ae0\n")
        (device / "device").write_text(f"{number}\n")
    driver.touch()

    def platforms(pci, drivers=(), environment=()):
        environment = dict(environment)
        xla.skip_absent_tpu(environment, pci, drivers)
        return environment.get("JAX_PLATFORMS")

    assert platforms(tmp_path / "no PCI") == "cpu"
    assert platforms(card.parent) == "cpu"
    assert platforms(chip.parent) is None
    assert platforms(card.parent, [driver]) is None
    assert platforms(card.parent, (), {"JAX_PLATFORMS": "tpu"}) == "tpu"
    monkeypatch.setattr(xla.importlib.util, "find_spec", lambda name: None)
    assert platforms(card.parent) is None


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)
def test_libtpu_is_silent_on_a_cpu_machine(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    code = (
        "import sys\nfrom gamayun_jax import cli\ntry:\n    cli.main(['--version'])\n"
        "except SystemExit:\n    import jax\n    jax.devices()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_each_kind_of_cpu_has_a_cache_of_its_own(tmp_path, monkeypatch, settings):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(xla, "instructions", lambda: "")  # not known: none is kept
    xla.keep_compilations(tmp_path)
    assert not jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(xla, "instructions", lambda: "cpu-1")
    xla.keep_compilations(tmp_path)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cpu-1")


def test_small_programs_are_kept_unless_the_user_says_otherwise(
    tmp_path, monkeypatch, settings
):
    for told, kept in ((True, 7.0), (False, 0.0)):
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
        if not told:
            monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
        xla.keep_compilations(tmp_path)
        assert jax.config.jax_persistent_cache_min_compile_time_secs == kept


def test_a_key_of_all_processes_is_of_one_program(tmp_path, monkeypatch, settings):
    """Another program, other devices or another JAX find none."""
    from jax._src import cache_key

    former = cache_key._hash_accelerator_config
    monkeypatch.setattr(cache_key, "_hash_accelerator_config", former)
    xla.same_keys()
    assert cache_key._hash_accelerator_config is not former
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()

    def kept():
        return {path.name for path in tmp_path.glob("*-cache")}

    def is_new(factor=2, device=0):
        """Whether a program is compiled, and so kept, that was not there."""
        before = kept()
        here = jax.device_put(1.0, jax.devices()[device])
        jax.jit(lambda x: x * factor)(here)
        return kept() != before

    try:
        assert is_new()
        assert not is_new()
        assert is_new(factor=3)
        assert is_new(device=1)
        with monkeypatch.context() as other:
            other.setattr(cache_key, "jaxlib_version_str", "0.0.1")
            assert is_new()
        assert not is_new()
    finally:
        compilation_cache.reset_cache()


@pytest.mark.parametrize("left", [0, 300])
def test_a_kept_program_that_was_cut_is_compiled_anew(tmp_path, settings, left):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    try:
        assert jax.jit(lambda x: x * 2)(21.0) == 42
        for path in tmp_path.glob("*-cache"):
            os.truncate(path, left)
        with pytest.warns(UserWarning, match="Error reading persistent compilation"):
            assert jax.jit(lambda x: x * 2)(21.0) == 42
    finally:
        compilation_cache.reset_cache()


def test_another_jax_keeps_its_own_keys(monkeypatch):
    """One that hashes devices in another way, or elsewhere."""
    from jax._src import cache_key

    def other(hash_obj, devices, backend):
        pass

    monkeypatch.setattr(cache_key, "_hash_accelerator_config", other)
    xla.same_keys()
    assert cache_key._hash_accelerator_config is other
    monkeypatch.delattr(cache_key, "_hash_accelerator_config")
    xla.same_keys()
    assert not hasattr(cache_key, "_hash_accelerator_config")


def test_kinds_of_cpus(tmp_path):
    def of(text):
        (tmp_path / "cpuinfo").write_text(text)
        return xla.instructions(tmp_path / "cpuinfo")

    one = "model\t: 85\nflags\t: sse avx2\ncpu MHz\t: 2000.0\n"
    assert of(one) == of(one + one.replace("2000", "2100")).strip()  # a second core
    assert of(one) != of(one.replace("avx2", "avx512f"))
    assert of("Features\t: asimd sve\n") not in ("", of(one))
    assert of("nothing\n") == xla.instructions(tmp_path / "none") == ""


def test_a_cache_where_programs_stay_valid(tmp_path, monkeypatch, settings):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    xla.keep_compilations(tmp_path)
    assert jax.config.jax_compilation_cache_dir == before  # the user's own stays
    jax.config.update("jax_compilation_cache_dir", None)
    xla.keep_compilations(tmp_path)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
