"""README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gamayun_jax import __version__
from gamayun_jax.config import Config
from gamayun_jax.interop.hf_config import ARCHITECTURES
from gamayun_jax.model.weights import parameter_count
from gamayun_jax.training.run_meta import RunMeta


def model_card(
    cfg: Config,
    meta: RunMeta,
    data: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> str:
    """README.md of an exported model: what it is, where from, how well it does."""
    m, lineage = cfg.model, meta.lineage
    languages = [k for k in cfg.languages if k != "und"]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if languages:
        lines += ["language:", *(f"- {k}" for k in languages)]
    lines += [
        "---",
        "",
        f"# {cfg.name}",
        "",
        f"A decoder of {parameter_count(m):,} parameters, exported by gamayun_jax "
        f"{__version__} as `{ARCHITECTURES[data['model_type']]}` in "
        f"{data['torch_dtype']}: {m.num_layers} layers, width {m.d_model}, "
        f"{m.num_heads} query and {m.num_kv_heads} key-value heads of {m.head_dim}, "
        f"SwiGLU {m.d_ff}, vocabulary {m.vocab_size:,}, context {m.max_seq_len:,}.",
        "",
        "## Training",
        "",
    ]
    if imported := lineage.get("imported"):
        lines += [
            f"Not trained here: imported from `{imported['folder']}` "
            f"({imported['model_type']}).",
        ]
    else:
        lines += [
            f"Trained on {meta.tokens:,} tokens ({meta.step:,} steps).",
            f"Languages: {', '.join(languages)}." if languages else "",
            "",
            "| stage | from token | to token |",
            "|---|---:|---:|",
            *(
                f"| {s['name']} | {s['start_tokens']:,} | {s['end_tokens']:,} |"
                for s in lineage.get("stages", ())
            ),
        ]
        sources = lineage.get("corpus", {}).get("sources", {})
        lines += [
            "",
            "The corpus:",
            "",
            "| source | documents | tokens |",
            "|---|---:|---:|",
        ]
        lines += [
            f"| {name} | {s['documents']:,} | {s['tokens']:,} |"
            for name, s in sources.items()
        ]
    if lineage.get("init_from"):
        origin = lineage["init_from"]
        lines += ["", f"Began from `{origin.get('checkpoint')}`."]
    lines += ["", "`lineage.json` has the whole record.", ""]
    for name, result in ((evaluation or {}).get("sets") or {}).items():
        lines += [
            f"## Held-out set {name}",
            "",
            "| language | bits per byte | ± | token accuracy |",
            "|---|---:|---:|---:|",
        ]
        rows = dict(result["languages"])
        rows |= {k: result[k] for k in ("macro", "micro") if k in result}
        lines += [
            f"| {k} | {r['bits_per_byte']:.4f} | "
            f"{'–' if (se := r['bits_per_byte_se']) is None else format(se, '.4f')} | "
            f"{r['accuracy']:.1%} |"
            for k, r in rows.items()
        ]
        lines.append("")
    lines += [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".")',
        "```",
        "",
    ]
    if not imported:  # with our tokenizer
        lines += [
            "With llama.cpp (its converter takes every SentencePiece model of this "
            "architecture to begin texts with a space, which this one does not; the "
            "second command writes that into the file):",
            "",
            "```sh",
            "python convert_hf_to_gguf.py . --outtype f32 --outfile model-f32.gguf",
            "llama-quantize --override-kv tokenizer.ggml.add_space_prefix=bool:false "
            "model-f32.gguf model.gguf Q8_0",
            'llama-cli -m model.gguf -no-cnv -p "..."',
            "```",
            "",
        ]
    return "\n".join(lines)
