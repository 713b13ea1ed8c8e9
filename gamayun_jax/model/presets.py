"""Architectures by name: functions that return a ModelConfig.

`gamayun_1p5b` is this project's own choice of shape for the 1.5B model of the
Gamayun paper (arXiv 2512.21580), whose exact shape is not public. The other three
are the published shapes of the models the paper compares with (their config.json).
"""

from gamayun_jax.config import ModelConfig, RopeScaling


def gamayun_1p5b() -> ModelConfig:
    """1.495B parameters; widths are multiples of 256, exports as Qwen3."""
    return ModelConfig(
        vocab_size=131_072,
        num_layers=26,
        d_model=2048,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        d_ff=5632,
        max_seq_len=4096,
        rope_theta=500_000.0,
        norm_eps=1e-6,
        qk_norm=True,
    )


def llama3p2_1b() -> ModelConfig:
    """Llama 3.2 1B: 1.236B parameters, grouped-query attention, tied embeddings."""
    return ModelConfig(
        vocab_size=128_256,
        num_layers=16,
        d_model=2048,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        d_ff=8192,
        max_seq_len=131_072,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
    )


def qwen2p5_1p5b() -> ModelConfig:
    """Qwen2.5 1.5B: 1.544B parameters, biases on q, k and v."""
    return ModelConfig(
        vocab_size=151_936,
        num_layers=28,
        d_model=1536,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        d_ff=8960,
        max_seq_len=32_768,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qkv_bias=True,
    )


def qwen3_1p7b() -> ModelConfig:
    """Qwen3 1.7B: 1.721B parameters, norms on q and k, no biases."""
    return ModelConfig(
        vocab_size=151_936,
        num_layers=28,
        d_model=2048,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        d_ff=6144,
        max_seq_len=40_960,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qk_norm=True,
    )


def tiny(vocab_size: int = 2048) -> ModelConfig:
    """A model of the same family that a laptop CPU trains in minutes."""
    return ModelConfig(
        vocab_size=vocab_size,
        num_layers=3,
        d_model=128,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        d_ff=384,
        max_seq_len=256,
        rope_theta=10_000.0,
        qk_norm=True,
    )
