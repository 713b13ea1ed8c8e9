"""Plans: their arithmetic by hand, their errors, and compilations for real topologies.

What compiles for a TPU is slow and needs libtpu (the extra `tpu`).
"""

import dataclasses
import importlib.util
import json
import re
import sys
import time
import typing

import jax
import pytest

from gamayun_jax import cli, config, fields
from gamayun_jax.config import ComputeConfig, MeshConfig, UserError
from gamayun_jax.model import presets, sharding
from gamayun_jax.model.weights import flops_per_token, parameter_count
from gamayun_jax.plan import aot, choices, roofline
from gamayun_jax.plan import text as plan_text
from gamayun_jax.plan.topology import TOPOLOGIES, chip_name, topology_devices
from gamayun_jax.training.chips import CHIPS, GIB

# JAX's own cache cannot read back what was compiled for absent devices.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)


@pytest.fixture
def stage1():
    return config.load_config("experiments/stage1.py")


# --- names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        (
            "v5e-256",
            "the chips are v4, v5e, v5p, v6e, tpu7x, for example v4:4x4x8, v5e:16x16",
        ),
        ("v7:4x4", "'v7:4x4' is unknown"),
        ("v5e", "write CHIP:AxB"),
        ("v5e:4x4x4", "slices of v5e have 2 sizes"),
        ("v4:4x4", "slices of v4 have 3 sizes"),
        ("v6e:0x4", "of at least 1"),
        ("h100:0", "GPUs of a host are a100:8"),
        ("h100:2x4", "'h100:2x4' is unknown"),
    ],
)
def test_unknown_topologies(topology, message):
    with pytest.raises(UserError, match=re.escape(message)) as e:
        chip_name(topology)
    assert "\n" not in str(e.value)


def test_known_topologies():
    assert [chip_name(example) for _, example in TOPOLOGIES.values()] == [
        "v4", "v5e", "v5p", "v6e", "tpu7x"
    ]  # fmt: skip
    assert set(TOPOLOGIES) <= set(CHIPS)


def test_the_command_without_or_with_a_wrong_topology(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cli.main(["plan", "experiments/stage1.py"]) == 2
    assert "--topology" in capsys.readouterr().err
    assert cli.main(["plan", "experiments/stage1.py", "--topology", "v9:2x2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gamayun: --topology 'v9:2x2' is unknown")
    assert error.count("\n") == 1
    for more in (["--search"], ["--slices", "2"]):  # they would change nothing
        words = ["plan", "experiments/stage1.py", "--table", "v5e:4x4", *more]
        assert cli.main(words) == 2
        assert "go with --topology" in capsys.readouterr().err


def test_a_table_without_the_compiler_does_not_say_that_nothing_fits(
    stage1, monkeypatch
):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(aot, "topology_devices", topology_devices.__wrapped__)
    with pytest.raises(UserError, match="needs the TPU compiler"):
        choices.table(stage1, ["v5e:4x4"])


# --- arithmetic -------------------------------------------------------------------


def test_matrices_are_all_parameters_but_norms(stage1):
    model = stage1.model
    norms = model.num_layers * (2 * model.d_model + 2 * model.head_dim) + model.d_model
    count = roofline.layer_parameters(model) + roofline.matrices(model)["embedding"]
    assert count + norms == parameter_count(model)


def test_least_traffic_by_hand(stage1):
    """FSDP over 16 of 256 chips, sums over the other 16."""
    layers, table = 1_226_833_920, 131_072 * 2048
    assert roofline.layer_parameters(stage1.model) == layers
    least = roofline.least_moved_bytes(stage1, {"data": 16, "fsdp": 16, "tensor": 1})
    gathered = 2 * (2 * layers + table)
    assert least["fsdp"] == (gathered + 4 * (layers + table)) * 15 / 16
    assert least["data"] == 2 * 4 * (layers + table) / 16 * 15 / 16
    assert least["tensor"] == 0
    compute = dataclasses.replace(stage1.compute, reduce_dtype="bfloat16")
    half = dataclasses.replace(stage1, compute=compute)
    least = roofline.least_moved_bytes(half, {"data": 16, "fsdp": 16, "tensor": 1})
    assert least["fsdp"] == (gathered + 2 * (layers + table)) * 15 / 16
    assert least["data"] == 2 * 2 * (layers + table) / 16 * 15 / 16
    alone = roofline.least_moved_bytes(stage1, {"data": 1, "fsdp": 1, "tensor": 1})
    assert set(alone.values()) == {0.0}


def test_step_time_by_hand(stage1):
    mesh = {"data": 16, "fsdp": 16, "tensor": 1}
    chip, assume = CHIPS["v5e"], roofline.Assumptions(0.5, 1.0, 1.0, 1.0)
    cfg = dataclasses.replace(stage1, compute=ComputeConfig(remat="minimal"))
    moved = {"data": 32e9, "fsdp": 9e9, "tensor": 0.0}
    model = cfg.model
    again = 2 * 26 * (2 * 2048 * 8 * 128 + 16 * 128 * 2048) + 26 * 16 * 128 * 4096
    assert roofline.recomputed_flops_per_token(cfg) == again
    flops = (flops_per_token(model, 4096) + again) * 2 * 4096
    one = roofline.step_seconds(cfg, mesh, chip, moved, 2, 1, assume)
    assert one["compute"] == pytest.approx(flops / (197e12 / 2))
    # Each axis has half of the links of a two-dimensional torus.
    assert one["ici"] == pytest.approx(41e9 / 90e9)
    assert one["dcn"] == 0
    assert one["step"] == max(one.values())
    two = roofline.step_seconds(cfg, mesh, chip, moved, 2, 2, assume)
    assert two["dcn"] == pytest.approx(32e9 / 8 / chip.dcn_bandwidth)


def test_what_muon_adds_by_hand(stage1):
    """Two of 26 layers on each of 16 devices; one moment less of the layers."""
    mesh, chip = {"data": 16, "fsdp": 16, "tensor": 1}, CHIPS["v5e"]
    optimizer = dataclasses.replace(stage1.optimizer, kind="muon")
    muon = dataclasses.replace(stage1, optimizer=optimizer)
    one = 5 * (
        2 * (6 * 2048**3)  # q, o
        + 2 * (4 * 1024**2 * 2048 + 2 * 1024**3)  # k, v
        + 3 * (4 * 2048**2 * 5632 + 2 * 2048**3)  # gate, up, down
    )
    assert roofline.orthogonal_flops(muon, mesh) == 2 * one
    assert roofline.orthogonal_flops(stage1, mesh) == 0
    layers = roofline.layer_parameters(stage1.model)
    whole = layers + 131_072 * 2048
    assert roofline.state_values(muon) == pytest.approx(3 - layers / whole)
    both = [roofline.least_moved_bytes(cfg, mesh) for cfg in (stage1, muon)]
    # There and back, in bfloat16, 32 layers where there are 26.
    exchanged = 2 * 2 * layers / 26 * 32 / 16 * 15 / 16
    assert both[1]["fsdp"] - both[0]["fsdp"] == pytest.approx(exchanged)
    seconds = [
        roofline.step_seconds(cfg, mesh, chip, moved, 2)["step"]
        for cfg, moved in zip((stage1, muon), both, strict=True)
    ]
    assert 1.04 < seconds[1] / seconds[0] < 1.06


def test_more_is_made_again_and_less_is_kept(stage1):
    """The policies in their order, from `none` to `full`."""
    flops, kept = [], []
    for remat in ("none", "minimal", "attention", "full"):
        cfg = dataclasses.replace(stage1, compute=ComputeConfig(remat=remat))
        flops.append(roofline.recomputed_flops_per_token(cfg))
        kept.append(roofline.kept_bytes_per_token(cfg))
    assert flops == sorted(flops)
    assert len(set(flops)) == 4
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 2 * 26 * 2048
    assert typing.get_args(fields.hints_of(ComputeConfig)["remat"]) == (
        "none", "minimal", "attention", "full", "offload",
    )  # fmt: skip


def test_candidates_divide_and_cross_slices_by_data(stage1):
    found = choices.candidates(aot.for_tpu(stage1), 512, 2, CHIPS["v5e"].hbm_bytes)
    assert found
    for cfg in found:
        mesh = cfg.mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == 512
        assert mesh.data % 2 == 0
        assert cfg.data.batch_size == stage1.data.batch_size
        assert cfg.data.batch_size % (mesh.data * mesh.fsdp) == 0
        assert (cfg.compute.dtype, cfg.compute.attention) == ("bfloat16", "splash")
    # Less memory, fewer candidates.
    assert len(choices.candidates(stage1, 512, 2, 4 * GIB)) < len(found)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: ... Used 19.34G of 15.75G hbm. Exceeded by 3.59G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (19.34G) exceeds available HBM (15.75G).",
    ],
)
def test_out_of_memory_says_by_how_much_and_what_helps(stage1, message):
    mesh = {"data": 16, "fsdp": 16, "tensor": 1}
    full = dataclasses.replace(stage1, compute=ComputeConfig(remat="full"))
    error = aot.out_of_memory(full, mesh, message)
    assert "needs 19.34 GiB of a chip's 15.75 GiB, 3.59 GiB too much" in str(error)
    assert "compute.microbatches=2" in str(error)
    assert "mesh.fsdp=32" in str(error)
    assert "remat" not in str(error)  # it is full already
    assert (error.used, error.limit) == (19.34 * GIB, 15.75 * GIB)
    bare = dataclasses.replace(stage1, compute=ComputeConfig(remat="minimal"))
    knobs = str(aot.out_of_memory(bare, {"data": 1, "fsdp": 512, "tensor": 1}, ""))
    assert "compute.remat=attention" in knobs
    assert "compute.loss_chunk=512" in knobs
    assert "mesh.fsdp" not in knobs


# --- what a compilation shows, with CPUs for chips ---------------------------------


COMPILED = {}
compile_for = aot.compile_for


def compiled_once(cfg, mesh):
    if cfg.compute not in COMPILED:
        COMPILED[cfg.compute] = compile_for(cfg, mesh)
    return COMPILED[cfg.compute]


@pytest.fixture
def on_cpus(wide_config, monkeypatch):
    """A config for 8 CPUs, which stand in for the chips of v5e:2x4."""
    monkeypatch.setattr(aot, "topology_devices", lambda *_: tuple(jax.devices()))
    monkeypatch.setattr(aot, "compile_for", compiled_once)
    compute = ComputeConfig("float32", attention="xla", remat="full")
    return dataclasses.replace(wide_config, compute=compute, mesh=MeshConfig(-1, 4, 1))


def test_what_cannot_be_read_is_unknown_and_the_rest_is_kept(
    on_cpus, monkeypatch, tmp_path
):
    def broken(*_):
        raise KeyError("no such computation")

    whole = aot.plan_topology(on_cpus, "v5e:2x4")
    assert whole["unknown"] == []
    assert whole["moved_bytes"] > 0
    monkeypatch.setattr(aot.hlo, "collectives", broken)
    for _ in range(2):  # compiled, and from the cache
        p = aot.plan_topology(on_cpus, "v5e:2x4", cache=tmp_path)
        assert p["memory"] == whole["memory"]
        assert p["collectives"] is p["moved_bytes"] is None
        assert p["seconds"]["step"] > 0
        assert p["unknown"] == ["the traffic (KeyError: 'no such computation')"]
        text = plan_text.format_plan(p)
        assert "unknown    the traffic (KeyError" in text
        assert "unknown; the least is" in text
        assert "average of parameters" not in text  # the config keeps none
        kept = {**p, "memory": {**p["memory"], "average": GIB}}
        assert "average of parameters 1.00" in plan_text.format_plan(kept)
        assert "| unknown |" in plan_text.format_table([p])


def test_a_loop_that_counts_once_makes_no_plan_faster(on_cpus, monkeypatch):
    monkeypatch.setattr(aot.hlo, "collectives", lambda *_: [])
    nothing = aot.plan_topology(on_cpus, "v5e:2x4")

    class WithUnknown(aot.hlo.Program):
        def __init__(self, text):
            super().__init__(text)
            self.unknown = {"layers"}

    monkeypatch.setattr(aot.hlo, "Program", WithUnknown)
    p = aot.plan_topology(on_cpus, "v5e:2x4")
    assert p["moved_bytes"] == 0.0
    assert p["seconds"]["ici"] > nothing["seconds"]["ici"] == 0.0
    assert "how often the loop layers runs" in plan_text.format_plan(p)


def test_progress_is_told_while_it_compiles(on_cpus, monkeypatch):
    lines = []
    monkeypatch.setattr(aot, "TICK_SECONDS", 0.01)

    def slowly(cfg, mesh):
        time.sleep(0.1)
        return compiled_once(cfg, mesh)

    monkeypatch.setattr(aot, "compile_for", slowly)
    aot.plan_topology(on_cpus, "v5e:2x4", log=lines.append)
    assert lines[0].startswith(
        "v5e:2x4, data 2 x fsdp 4, remat full, microbatches 1: c"
    )
    assert "still compiling after 0 s" in lines[1]


def test_two_devices_of_a_chip_are_paid_for_once(on_cpus):
    """TPU7x: 8 devices are 4 chips; the rest is as for 8 devices of its speed."""
    p = aot.plan_topology(on_cpus, "tpu7x:2x2x1", price=2.0)
    assert (p["chips"], p["devices"]) == (4, 8)
    assert p["chip_hours"] == pytest.approx(p["days"] * 24 * 4)
    assert p["cost"] == pytest.approx(2 * p["chip_hours"])
    peak = 8 * CHIPS["tpu7x"].flops
    assert p["mfu"] == pytest.approx(p["tokens_per_s"] * p["flops_per_token"] / peak)
    text = plan_text.format_plan(p)
    assert "4 chips, 8 devices" in text
    assert "GiB a device" in text


def test_gpus_are_not_compiled_and_the_plan_says_so(stage1, monkeypatch):
    monkeypatch.setattr(aot, "compile_for", None)  # not called
    cfg = dataclasses.replace(stage1, mesh=MeshConfig(-1, 8, 1))
    p = aot.plan_topology(cfg, "h100:8", slices=4)
    assert p["mesh"] == {"data": 4, "fsdp": 8, "tensor": 1}
    assert p["moved_bytes"] is None
    assert [text.partition(":")[0] for text in p["unknown"]] == ["memory", "traffic"]
    # All NVLinks serve fsdp, which stays inside of a host; data crosses hosts.
    least, chip = p["least_moved_bytes"], CHIPS["h100"]
    assert p["seconds"]["ici"] == pytest.approx(
        least["fsdp"] / 0.8 / chip.ici_bandwidth
    )
    assert p["seconds"]["dcn"] == pytest.approx(
        least["data"] / 0.8 / chip.dcn_bandwidth
    )
    text = plan_text.format_plan(p)
    assert "fits       not known" in text
    assert "unknown    traffic" in text
    assert "| unknown |" in plan_text.format_table([p])
    with pytest.raises(UserError, match="8 hosts, .* divisor of the 8 GPUs"):
        aot.plan_topology(
            dataclasses.replace(stage1, mesh=MeshConfig(4, 16, 1)), "h100:8", slices=8
        )


# --- choices ----------------------------------------------------------------------


@pytest.fixture
def times(monkeypatch):
    """Compilation replaced by a table: (remat, microbatches) -> seconds, None: refused.

    Gives the choices in the order in which they are made.
    """
    tried = []

    def use(seconds):
        def plan_topology(cfg, topology, slices=1, *_, **__):
            choice = (cfg.compute.remat, cfg.compute.microbatches)
            tried.append(choice)
            if seconds.get(choice) is None:
                raise aot.OutOfMemoryError("too much", 20 * GIB, 16 * GIB)
            mesh = dataclasses.asdict(cfg.mesh)
            step = {"compute": 0.1, "compiler": seconds[choice]}
            return {
                "topology": topology, "slices": slices, "chips": 64, "mesh": mesh,
                "hbm_bytes": 32 * GIB, "choice": choice,
                "seconds": {**step, "step": max(step.values())},
            }  # fmt: skip

        monkeypatch.setattr(aot, "plan_topology", plan_topology)
        monkeypatch.setattr(aot, "topology_devices", lambda *_: (None,) * 64)
        return tried

    return use


def test_a_table_is_never_slower_than_the_config_s_own_choice(stage1, times):
    """The roofline ranks `full` last; the compiled programs may not."""
    compute = dataclasses.replace(stage1.compute, remat="full", microbatches=1)
    cfg = dataclasses.replace(stage1, compute=compute)
    tried = times({("full", 1): 1.142, ("minimal", 2): 1.229, ("minimal", 4): 1.3})
    (best,) = choices.table(cfg, ["v6e:8x8"])
    assert tried[0] == ("full", 1)
    assert len(tried) == len(set(tried)) == 4
    assert best["choice"] == ("full", 1)
    assert best["not_compiled"] > 0


def test_nothing_more_is_compiled_once_nothing_can_be_faster(stage1, times):
    compute = dataclasses.replace(stage1.compute, remat="full", microbatches=1)
    cfg = dataclasses.replace(stage1, compute=compute)
    tried = times({("full", 1): 0.01})
    (best,) = choices.table(cfg, ["v6e:8x8"])
    assert tried == [("full", 1)]
    assert best["not_compiled"] == 0


def test_a_plan_names_a_faster_choice_and_how_it_knows(stage1, times, tmp_path):
    compute = dataclasses.replace(stage1.compute, remat="full", microbatches=1)
    cfg = dataclasses.replace(stage1, compute=compute, mesh=MeshConfig(16, 16, 1))
    made = {
        "topology": "v5e:16x16", "slices": 1, "chips": 256, "hbm_bytes": 16 * GIB,
        "mesh": dataclasses.asdict(cfg.mesh), "seconds": {"step": 0.886},
    }  # fmt: skip
    better = choices.faster(cfg, made, cache=tmp_path)
    assert better["set"] == "compute.remat=minimal"
    assert not better["compiled"]
    assert better["seconds"] == pytest.approx(0.758, abs=5e-4)
    # Compiled before, it is known; refused then, it is not named again.
    minimal = dataclasses.replace(compute, remat="minimal")
    known = aot.for_tpu(dataclasses.replace(cfg, compute=minimal))
    aot.cache_file(known, "v5e:16x16", 1, tmp_path).write_text("{}")
    times({("minimal", 1): 0.76})
    better = choices.faster(cfg, made, cache=tmp_path)
    assert better == {"set": "compute.remat=minimal", "seconds": 0.76, "compiled": True}
    times({})
    better = choices.faster(cfg, made, cache=tmp_path)
    assert better["set"] == "compute.remat=minimal compute.microbatches=2"
    # Where the compiler's own estimates bind, the roofline says nothing of others.
    made["seconds"]["step"] = 1.142
    assert choices.faster(cfg, made) is None


# --- compiled for real ------------------------------------------------------------


@pytest.fixture
def small(stage1):
    """The 1.5B model's layer at a tenth of its size: seconds to compile."""
    model = dataclasses.replace(
        presets.gamayun_1p5b(), num_layers=2, vocab_size=8192, d_model=1024, d_ff=1536
    )
    data = dataclasses.replace(stage1.data, batch_size=16, seq_len=2048)
    compute = dataclasses.replace(stage1.compute, loss_chunk=256, remat="full")
    return dataclasses.replace(
        stage1, model=model, data=data, compute=compute, mesh=MeshConfig(-1, 4, 1)
    )


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4", "tpu7x:2x2x2"])
def test_plan_of_a_small_model(small, topology, tmp_path):
    """Splash attention under the mesh, traffic near the least, figures that add up."""
    p = aot.plan_topology(small, topology, price=2.0, cache=tmp_path)
    assert p["mesh"] == {"data": 4, "fsdp": 4, "tensor": 1}
    m = p["memory"]
    assert m["parameters"] == pytest.approx(parameter_count(small.model), rel=0.01)
    assert m["optimiser"] == pytest.approx(2 * m["parameters"], rel=0.01)
    assert m["peak"] < p["hbm_bytes"]
    by_axis = {"data": 0.0, "fsdp": 0.0, "tensor": 0.0}
    for row in p["collectives"]:
        by_axis[row["axes"][0]] += row["bytes"]
    assert by_axis["tensor"] == 0
    if not topology.startswith("tpu7x"):  # which all-reduces most (docs/plan.md)
        least = p["least_moved_bytes"]
        assert by_axis["fsdp"] == pytest.approx(least["fsdp"], rel=0.2)
        assert p["moved_bytes"] < 1.2 * sum(least.values())
    assert p["tokens"] == sum(s.tokens for s in small.stages)
    assert p["cost"] == pytest.approx(2 * p["chip_hours"])
    assert p["days"] * 24 * p["chips"] == pytest.approx(p["chip_hours"])
    assert 0 < p["mfu"] < 0.6
    assert json.loads(json.dumps(p)) == p
    assert "fits       yes" in plan_text.format_plan(p)
    assert plan_text.format_table([p]).count("\n") == 2
    # The second time it is not compiled.
    broken = dataclasses.replace(small, name="other")
    assert len(list(tmp_path.iterdir())) == 1
    jax.clear_caches()
    again = aot.plan_topology(small, topology, price=2.0, cache=tmp_path)
    assert again == p
    assert broken.name != small.name


@needs_libtpu
@pytest.mark.slow
def test_attention_is_the_kernel_and_its_rows_stay(small):
    """Three Pallas calls: forward, forward again (remat), backward."""
    cfg = aot.for_tpu(small)
    mesh = sharding.make_mesh(cfg.mesh, aot.topology_devices("v5e:4x4"))
    _, compiled = aot.compile_for(cfg, mesh)
    text = compiled.as_text()
    calls = re.findall(r"%(splash_\w+?)[.\d]* = .*tpu_custom_call", text)
    assert sum("fwd" in c for c in calls) == 2
    assert sum("dkv" in c for c in calls) == 1
    # One row a device of 16, 16 heads: nothing of the batch was gathered for it.
    shapes = re.findall(r"splash_mha_fwd\S* = .*?bf16\[([\d,]+)\]", text)
    assert set(shapes) == {"16,2048,128"}
    assert not re.search(r"f32\[[\d,]*2048,2048\]", text)  # no scores


@needs_libtpu
@pytest.mark.slow
def test_a_step_that_does_not_fit(small, tmp_path):
    data = dataclasses.replace(small.data, batch_size=16 * 64)
    compute = ComputeConfig(remat="minimal")
    big = dataclasses.replace(small, data=data, compute=compute)
    big = dataclasses.replace(
        big, model=dataclasses.replace(big.model, vocab_size=65_536)
    )
    for _ in range(2):  # compiled, and from the cache
        with pytest.raises(aot.OutOfMemoryError, match="GiB too much; what helps"):
            aot.plan_topology(big, "v5e:4x4", cache=tmp_path)


@needs_libtpu
@pytest.mark.slow
def test_sizes_that_do_not_fit_a_topology(small):
    wrong = dataclasses.replace(small, mesh=MeshConfig(1, 5, -1))
    with pytest.raises(UserError, match="5 does not divide 16"):
        aot.plan_topology(wrong, "v5e:4x4")
    data = dataclasses.replace(small.data, batch_size=24)
    with pytest.raises(UserError, match="use a multiple of 16"):
        aot.plan_topology(dataclasses.replace(small, data=data), "v5e:4x4")
    with pytest.raises(UserError, match="not one that the TPU compiler knows"):
        aot.topology_devices("v5e:3x5")


@needs_libtpu
@pytest.mark.slow
def test_activations_wait_in_the_memory_of_the_host(small):
    cfg = dataclasses.replace(
        small, compute=dataclasses.replace(small.compute, remat="offload")
    )
    cfg = aot.for_tpu(cfg)
    mesh = sharding.make_mesh(cfg.mesh, aot.topology_devices("v5e:4x4"))
    found = aot.memory(*aot.compile_for(cfg, mesh))
    # One row of 2048 tokens in 2 layers: q, attention's output, gate and up.
    kept = 2 * 2048 * 2 * (16 * 128 + 16 * 128 + 2 * 1536)
    assert found["host"] >= kept
