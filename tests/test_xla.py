"""Flags that the compiler knows, and that leave the user's own in force."""

import os
import subprocess
import sys

import jax

from gamayun_jax import xla


def test_flags_only_where_they_belong(tmp_path):
    environment = {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false"}
    xla.set_flags(environment, tmp_path / "no driver")
    assert environment == {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false"}
    xla.set_flags(environment, tmp_path)
    flags = environment["XLA_FLAGS"].split()
    assert flags[:-1] == list(xla.GPU_FLAGS)
    assert flags[-1] == "--xla_gpu_enable_pipelined_all_gather=false"


def test_the_compiler_knows_the_flags():
    """An unknown one ends the process."""
    code = "import jax; jax.numpy.ones(3).block_until_ready()"

    def run(flags):
        environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True).returncode

    assert run(xla.GPU_FLAGS) == 0
    assert run([*xla.GPU_FLAGS, "--xla_gpu_not_a_flag=true"]) != 0


def test_no_cache_on_cpus(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    xla.keep_compilations(tmp_path / "compiled")
    assert jax.config.jax_compilation_cache_dir == before


def test_a_cache_where_programs_stay_valid(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    try:
        xla.keep_compilations(tmp_path)
        assert jax.config.jax_compilation_cache_dir == before  # the user's own stays
        jax.config.update("jax_compilation_cache_dir", None)
        xla.keep_compilations(tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
