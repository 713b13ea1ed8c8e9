"""What a training step must compute, move and take, from the config alone.

Lower bounds from shapes: nothing is compiled here. `aot.py` sets the compiled program
beside them. All figures are of one device and one optimiser step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gamayun_jax.config import Config, ModelConfig
from gamayun_jax.model.attention import OUTPUT
from gamayun_jax.model.transformer import REMATS
from gamayun_jax.model.weights import flops_per_token, size_of, weights_of
from gamayun_jax.training.chips import Chip
from gamayun_jax.training.optimizer import NEWTON_SCHULZ_STEPS

COMPUTE_BYTES = 2  # bfloat16: weights gathered, activations kept
REDUCE_BYTES = {"float32": 4, "bfloat16": 2}  # of a gradient that devices sum
VALUE_BYTES = 4  # float32: a parameter, a moment, a gradient


@dataclass(frozen=True)
class Assumptions:
    """What a roofline cannot know: the shares of the data sheet's peaks reached."""

    compute: float = 0.6  # of the dense peak, by everything that is not waiting
    hbm: float = 0.8
    ici: float = 0.8
    dcn: float = 0.8


def matrices(cfg: ModelConfig) -> dict[str, int]:
    """Parameters of a layer's matrices and of the embedding and head, by name."""
    sizes = {w.name: w.size(cfg) for w in weights_of(cfg) if w.summed}
    sizes["embedding"] += sizes.pop("unembedding", 0)
    return sizes


def layer_parameters(cfg: ModelConfig) -> int:
    """Parameters in the matrices of all layers."""
    sizes = matrices(cfg)
    return cfg.num_layers * sum(n for k, n in sizes.items() if k != "embedding")


def recomputed_flops_per_token(cfg: Config) -> float:
    """FLOPs of a token beyond the model's own: what the remat policy makes again.

    The flash kernels' backward pass makes the scores again under every policy.
    """
    model, sizes = cfg.model, matrices(cfg.model)
    remat = REMATS.get(cfg.compute.remat)
    products = ("q", "k", "v", "o", "gate", "up")
    again = [name for name in products if remat and name not in remat.kept]
    scores = model.num_layers * model.num_heads * model.head_dim * cfg.data.seq_len
    flops = 2.0 * model.num_layers * sum(sizes[k] for k in again) + scores
    return flops + (2.0 * scores if remat and OUTPUT not in remat.kept else 0.0)


def kept_bytes_per_token(cfg: Config) -> float:
    """Bytes of a token's activations that wait in HBM for the backward pass."""
    model = cfg.model
    q, kv = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    sizes = {"q": q, "k": kv, "v": kv, OUTPUT: q, "gate": model.d_ff, "up": model.d_ff}
    if remat := REMATS.get(cfg.compute.remat):
        names = () if remat.offloaded else remat.kept
        kept = sum(sizes[name] for name in names)
    else:  # norms, rotations, the gated product, the residual between the two halves
        kept = 2 * (2 * q + 2 * kv) + 3 * model.d_ff + 3 * model.d_model
    return COMPUTE_BYTES * model.num_layers * (model.d_model + kept)


def rows_per_device(cfg: Config, mesh: Mapping[str, int]) -> int:
    """Examples of one microbatch on one device."""
    ways = mesh["data"] * mesh["fsdp"] * cfg.compute.microbatches
    return max(1, cfg.data.batch_size // ways)


def parameter_bytes(cfg: Config, mesh: Mapping[str, int]) -> float:
    """Parameters of one device in float32: as many as its gradients or one moment."""
    count = layer_parameters(cfg.model) + matrices(cfg.model)["embedding"]
    return VALUE_BYTES * count / (mesh["fsdp"] * mesh["tensor"])


def state_values(cfg: Config) -> float:
    """Values of the state for a parameter, in the mean: itself, Adam's two moments (of
    a layer's matrix Muon has one), its average."""
    values = 4.0 if cfg.optimizer.ema_tokens else 3.0
    if cfg.optimizer.kind == "muon":
        layers = layer_parameters(cfg.model)
        values -= layers / (layers + matrices(cfg.model)["embedding"])
    return values


def layers_of_a_device(cfg: Config, mesh: Mapping[str, int]) -> int:
    """Layers whose matrices Muon makes orthogonal on one device."""
    return math.ceil(cfg.model.num_layers / (mesh["fsdp"] * mesh["tensor"]))


def orthogonal_flops(cfg: Config, mesh: Mapping[str, int]) -> float:
    """FLOPs of Muon's products on one device: three in each iteration, two of them of
    the shorter side's square by the longer, one of its cube."""
    if cfg.optimizer.kind != "muon":
        return 0.0
    flops = 0.0
    for w in weights_of(cfg.model):
        if w.layer_matrix:
            rows = size_of(cfg.model, w.summed)
            short, long = sorted((rows, w.size(cfg.model) // rows))
            flops += 4.0 * short**2 * long + 2.0 * short**3
    return NEWTON_SCHULZ_STEPS * layers_of_a_device(cfg, mesh) * flops


def memory_estimate(cfg: Config, mesh: Mapping[str, int]) -> float:
    """Rough peak of one device in bytes, to choose what is worth compiling."""
    model = cfg.model
    B, T, t = rows_per_device(cfg, mesh), cfg.data.seq_len, mesh["tensor"]
    vocab = model.vocab_size / t
    table = vocab * model.d_model * (COMPUTE_BYTES + 4)  # gathered, and its gradient
    chunk = cfg.compute.loss_chunk or T
    logits = B * min(chunk, T) * vocab * 10
    kept = B * T * kept_bytes_per_token(cfg)
    layer = B * T * COMPUTE_BYTES * (6 * model.d_ff / t + 8 * model.d_model)
    gradients = 2 if cfg.compute.microbatches > 1 else 1  # and their sums
    values = state_values(cfg) + gradients
    return parameter_bytes(cfg, mesh) * values + table + logits + kept + layer


def least_moved_bytes(cfg: Config, mesh: Mapping[str, int]) -> dict[str, float]:
    """Bytes that a device must send along each mesh axis, at the least.

    fsdp: the weights are gathered for the forward and for the backward pass and their
    gradients scattered, in `compute.reduce_dtype`, in every microbatch (ZeRO, arXiv
    1910.02054, stage 3); the embedding is gathered once, because its uses are
    neighbours. data: the scattered gradients are summed. tensor: two sums of the
    activations in each pass of a layer (Megatron, arXiv 1909.08053), and those of
    look-up and head. Muon exchanges parts of layers for whole ones, and back.
    """
    model, m = cfg.model, cfg.compute.microbatches
    d, f, t = mesh["data"], mesh["fsdp"], mesh["tensor"]
    reduced = REDUCE_BYTES[cfg.compute.reduce_dtype]
    layers = layer_parameters(model) / t
    table = matrices(model)["embedding"] / t
    gathered = COMPUTE_BYTES * (2 * layers + table)
    fsdp = m * (gathered + reduced * (layers + table)) * (f - 1) / f
    data = m * 2 * reduced * (layers + table) / f * (d - 1) / d
    passes = 2 + (cfg.compute.remat != "none")
    activations = (
        rows_per_device(cfg, mesh) * cfg.data.seq_len * model.d_model * COMPUTE_BYTES
    )
    sums = 2 * passes * model.num_layers + 2
    tensor = m * sums * 2 * activations * (t - 1) / t
    if cfg.optimizer.kind == "muon":
        whole = layers_of_a_device(cfg, mesh) / model.num_layers
        exchanged = 2 * COMPUTE_BYTES * layer_parameters(model) * whole
        fsdp += exchanged * (f - 1) / f
        tensor += exchanged * (t - 1) / t
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def hbm_bytes(cfg: Config, mesh: Mapping[str, int]) -> float:
    """Bytes to and from HBM: a lower bound.

    The optimiser reads and writes its state and reads the gradients; each pass writes
    and reads the gathered weights; what is kept is written and read once; the logits
    are written in float32, read, their gradient written in bfloat16 and read twice.
    """
    model, m = cfg.model, cfg.compute.microbatches
    count = layer_parameters(model) + matrices(model)["embedding"]
    tokens = rows_per_device(cfg, mesh) * cfg.data.seq_len * m
    optimiser = (2 * state_values(cfg) + 1) * parameter_bytes(cfg, mesh)
    weights = m * 3 * 2 * COMPUTE_BYTES * count / mesh["tensor"]
    logits = tokens * model.vocab_size / mesh["tensor"] * (4 + 4 + 2 + 2 + 2)
    return optimiser + weights + 2 * tokens * kept_bytes_per_token(cfg) + logits


def step_seconds(
    cfg: Config,
    mesh: Mapping[str, int],
    chip: Chip,
    moved: Mapping[str, float],
    dimensions: int,
    slices: int = 1,
    assume: Assumptions = Assumptions(),
) -> dict[str, float]:
    """Seconds of one step by resource, and `step`: the longest, the rest beside it.

    Args:
      moved: bytes that a device sends along each mesh axis. Of those along `data`,
        the share that leaves the slice goes over DCN, after a sum inside the slice.
      dimensions: of the torus that a slice is; an axis has the links of as many as it
        spans, and axes take turns.
    """
    tokens = cfg.tokens_per_step / math.prod(mesh.values())
    flops = flops_per_token(cfg.model, cfg.data.seq_len)
    flops += recomputed_flops_per_token(cfg)
    dcn = 0.0
    if slices > 1:
        dcn = moved.get("data", 0.0) / (mesh["data"] / slices)
    whole = math.log(math.prod(mesh.values()) / slices)
    ici = 0.0
    for axis, amount in moved.items():
        size = mesh[axis] // (slices if axis == "data" else 1)
        if size > 1:
            spans = max(1, round(dimensions * math.log(size) / whole))
            inside = amount - (dcn if axis == "data" else 0.0)
            ici += inside / (chip.ici_bandwidth * assume.ici * spans / dimensions)
    seconds = {
        "compute": (tokens * flops + orthogonal_flops(cfg, mesh))
        / (chip.flops * assume.compute),
        "hbm": hbm_bytes(cfg, mesh) / (chip.hbm_bandwidth * assume.hbm),
        "ici": ici,
        "dcn": dcn / (chip.dcn_bandwidth * assume.dcn) if dcn else 0.0,
    }
    return {**seconds, "step": max(seconds.values())}
