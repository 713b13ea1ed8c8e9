"""Commands on trained models: scores, comparisons, text, other formats."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any, Literal

from gamayun_jax.commands import Folder, Repeated, RunFolder, note
from gamayun_jax.config import Count, UserError, Whole
from gamayun_jax.data import files
from gamayun_jax.fields import DrawSeed, Finite, Mass, Part, Share


def evaluate(
    model: Path,
    *,
    tasks: list[str] | None = None,
    limit: Count = 0,
    corpus: Path | None = None,
    languages: list[str] | None = None,
    batch_size: Count | None = None,
    window: Count | None = None,
    out: Folder | None = None,
) -> None:
    """Evaluate a model by language, on held-out text or on tasks.

    Without --tasks: loss and bits per byte on the held-out sets of its corpus. Writes
    OUT/eval.json, OUT/items/ and OUT/index.html. Control tokens that a scored text
    spells are text.

    Examples:
      gamayun eval runs/demo
      gamayun eval runs/demo --tasks all --limit 50 --languages ru tr --out out

    Args:
      tasks (TASK): embedded tasks by name, `all` of them, or YAML files (see
        docs/tasks.md).
      batch_size (N): rows per step, of held-out sets (default: as in training).
      window (TOKENS): most that the model sees of a text (default: its own window; for
        held-out sets of a run, data.seq_len, as in training).
    """
    from gamayun_jax.api import models

    scored = models.evaluate(
        model,
        tasks=tasks or (),
        limit=limit,
        corpus=corpus,
        languages=languages,
        batch_size=batch_size,
        window=window,
    )
    print(scored)
    if out:
        page = scored.write(out)
        folder = "items/ and " if scored.items else ""
        print(f"{out}/eval.json, {folder}{page.name} are written")


def align(
    model: Path,
    *,
    out: Folder | None = None,
    corpus: Path | None = None,
    languages: list[str] | None = None,
    eval_: Path | None = None,
) -> None:
    """Measure how languages align inside a model.

    Translation retrieval by layer, information parity and consistency of answers, on
    parallel held-out sets. Writes OUT/alignment.json and a picture per set.

    Example:
      gamayun align runs/demo --eval out --out align

    Args:
      eval_: folder that `gamayun eval --out` wrote: consistency of its answers.
    """
    from gamayun_jax.evaluate import alignment
    from gamayun_jax.report import alignment as alignment_report

    result = alignment.align(model, out, corpus, languages, eval_)
    if out:
        alignment_report.write_figures(result, out)
    print(alignment_report.alignment_text(result))


def compare(
    models: list[Path],
    *,
    out: Folder,
    tasks: list[str] | None = None,
    limit: Count = 0,
    languages: list[str] | None = None,
) -> None:
    """Compare models by language and task, with paired confidence intervals.

    Reads models, or folders that `gamayun eval --out` wrote; writes OUT/index.html,
    OUT/compare.json and the results of the models.

    Example:
      gamayun compare runs/a runs/b Qwen3-1.7B --limit 100 --out compared

    Args:
      models (MODEL): run folder, checkpoint, Hugging Face folder or result folder; the
        others are compared with the first.
      tasks (TASK): embedded tasks by name, or YAML files (default: all embedded ones).
    """
    from gamayun_jax.api import models as api

    options: dict[str, Any] = dict(tasks=tasks or (), limit=limit, languages=languages)
    print(api.compare(*models, **options, out=out, log=note))
    print(f"\n{out / 'index.html'}")


def generate(
    model: Path,
    *,
    prompt: Repeated = (),
    interactive: bool = False,
    literal: bool = False,
    max_tokens: Count = 128,
    temperature: Share = 0.8,
    top_k: Whole = 0,
    top_p: Mass = 1.0,
    min_p: Part = 0.0,
    repetition_penalty: Finite = 1.0,
    seed: DrawSeed = 0,
) -> None:
    """Continue a text, printed as it is made.

    Reads the model, and the tokenizer beside it or of its corpus. Control tokens that
    the prompt of an imported model spells (<|im_start|>) are read as such, as in
    transformers.

    Examples:
      gamayun generate runs/demo --prompt "To open a file,"
      gamayun generate runs/demo --interactive --top-p 0.95
      gamayun generate runs/demo --prompt "To open a file," --temperature 0

    Args:
      prompt (TEXT): text to continue; may be repeated.
      interactive: continue each line of the input.
      literal: read control tokens in a prompt as text.
      max_tokens (N): most tokens to add.
      temperature: 0 always takes the most likely token.
      top_k (K): draw from the K most likely tokens only; 0: from all.
      top_p (P): draw from the fewest tokens that reach this probability.
      min_p (P): least probability, as a share of the most likely token's.
      repetition_penalty: above 1, tokens that were seen become less likely.
      seed: seed of the draws.
    """
    from gamayun_jax.api.models import load_model

    if not prompt and not interactive:
        raise UserError("nothing to continue: give --prompt TEXT or --interactive")
    if temperature:
        note(f"drawn at --temperature {temperature:g} with --seed {seed}")
    loaded = load_model(model)
    tokenizer = loaded.tokenizer
    write = functools.partial(
        loaded.generate,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        literal=literal,
    )

    def check(text: str) -> None:
        plain = tokenizer.encode_prompt(text, literal=True)
        if not literal and tokenizer.encode_prompt(text) != plain:
            note("control tokens in the prompt are read as such; --literal: as text")

    def show(text: str) -> None:
        check(text)
        # With what comes first, since the prompt may be refused.
        shown, put = iter([text]), functools.partial(print, end="", flush=True)
        write([text], on_text=lambda _, new: put(next(shown, "") + new))
        print(next(shown, ""), flush=True)

    if len(prompt) == 1:
        show(prompt[0])
    elif prompt:
        for text in prompt:
            check(text)
        for text, new in zip(prompt, write(list(prompt)), strict=True):
            print(f"{text}{new}\n")
    if interactive:
        note("a line is continued; an empty one ends")
        for line in itertools.takewhile(str.strip, sys.stdin):
            show(line.rstrip("\n"))


def lm_eval(*arguments: str) -> None:
    """Run lm-evaluation-harness on our models: all arguments are the harness's own.

    Needs the extra `lm-eval`: pip install -e '.[lm-eval]' in a checkout of the project.

    Example:
      gamayun lm-eval --model gamayun --model_args path=runs/demo --tasks arc_easy

    Args:
      arguments: arguments of lm-evaluation-harness.
    """
    try:
        from gamayun_jax.evaluate import lm_eval as harness
    except ImportError as e:
        if {"-h", "--help"} & {*arguments}:  # ours, where the harness's is not
            print(inspect.getdoc(lm_eval))
            return
        raise UserError(
            f"lm-evaluation-harness is not whole here ({e}): in a checkout of the "
            "project, pip install -e '.[lm-eval]'"
        ) from e
    harness.main(list(arguments))


def quantize(
    model: Path,
    out: RunFolder,
    *,
    bits: Literal[8, 4] = 8,
    corpus: Path | None = None,
    no_eval: bool = False,
) -> None:
    """Write a checkpoint with int8 or int4 weights, for small machines.

    int4 weights are rounded by what they do to text of the model's corpus, or of the
    embedded one where that is not there or the model's tokenizer is another.

    Prints bits per byte by language before and after. `gamayun eval` and `generate`
    read the folder.

    Example:
      gamayun quantize runs/demo out-int4 --bits 4

    Args:
      model: run folder or checkpoint.
      bits: bits per weight.
      no_eval: only write the folder.
    """
    import jax

    from gamayun_jax.data.corpus import open_corpus
    from gamayun_jax.data.model_tokenizer import open_tokenizer
    from gamayun_jax.evaluate import results, stored_model
    from gamayun_jax.inference import quantize, rounding
    from gamayun_jax.interop import load_model
    from gamayun_jax.model.weights import parameter_count
    from gamayun_jax.report import scores
    from gamayun_jax.training.model_folder import save_model

    files.check_new(out)
    cfg, params, meta, mesh = load_model.load_params(model, quantised=True)
    if not (corpus or cfg.data.corpus or no_eval):
        raise UserError(
            f"{model} was not trained on a corpus here: give --corpus, a corpus "
            "folder with held-out sets, or --no-eval"
        )
    if not no_eval:  # refused before the folder is written
        open_corpus(corpus or cfg.data.corpus)
    tokenizer = open_tokenizer(model, meta.tokenizer, corpus or cfg.data.corpus)
    if bits == 4 and not meta.bits:
        # Refuses axes that have no groups before anything takes its time.
        jax.eval_shape(functools.partial(quantize.quantize, bits=bits), params)
        rows, whose = rounding.text_rows(tokenizer, corpus or cfg.data.corpus)
        print(f"rounding by {rows.size:,} tokens of {whose}", flush=True)
        small = rounding.quantize_by_text(cfg, params, rows, mesh)
        meta = dataclasses.replace(meta, layout=quantize.LAYOUT)
    else:
        small = jax.jit(quantize.quantize, static_argnums=1)(params, bits)
    save_model(small, dataclasses.replace(meta, bits=bits), tokenizer, out)
    old, new = (quantize.size_bytes(tree) for tree in (params, small))
    per_weight = 8 * new / parameter_count(cfg.model)
    print(
        f"{out}: {new:,} bytes of weights, {per_weight:.2f} bits each; before {old:,}",
        flush=True,
    )
    del params, small
    evals = []
    for folder, label in () if no_eval else ((model, "before"), (out, f"int{bits}")):
        result, sets = stored_model.evaluate_heldout(folder, corpus)
        evals.append({**result, "label": label})
        for name, items in sets.items():
            results.write_items(out / "items" / label, name, items)
    quantize.write_record(out, meta, bits, (old, new), evals)
    if evals:
        print(scores.language_text(evals, cfg.languages))


def average(
    run: Path,
    out: RunFolder,
    *,
    last: Count | None = None,
    window: Count | None = None,
    ema: bool = False,
    weights: Literal["uniform", "linear", "1-sqrt"] = "uniform",
    until: Count | None = None,
) -> None:
    """Write an average of a run's weights as one checkpoint.

    Of its last checkpoints, or the one that it kept (optimizer.ema_tokens). At a
    constant learning rate it takes the place of a decay. All commands read the folder,
    and `train --init-from` begins from it, with new moments.

    Examples:
      gamayun average runs/demo out --last 4
      gamayun average runs/demo out --window 20000000000 --weights 1-sqrt
      gamayun average runs/demo out --ema

    Args:
      run: run folder, or one checkpoint: the newest to be taken.
      last (N): average the last N checkpoints.
      window (TOKENS): average those within so many tokens of the newest.
      ema: take the moving average that the run kept while it trained.
      weights: the same for all; growing with the step; or those that stand for a
        1-sqrt decay over the window.
      until (STEP): take no checkpoint after this step.
    """
    from gamayun_jax.data.model_tokenizer import open_tokenizer
    from gamayun_jax.training.average import average_meta, average_of
    from gamayun_jax.training.model_folder import save_model

    if ema + (last is not None) + (window is not None) != 1:
        raise UserError(
            "give either --last N, --window TOKENS or --ema: what to average"
        )
    if ema and weights != "uniform":
        raise UserError(
            f"--weights {weights} is of checkpoints: leave it out with --ema"
        )
    files.check_new(out)
    meta = average_meta(run, last, window, weights, until, ema)
    tokenizer = open_tokenizer(run, meta.tokenizer, meta.config.data.corpus)
    save_model(average_of(run, meta), meta, tokenizer, out)
    averaged = meta.averaged or {}
    if ema:
        print(f"{out}: the moving average of the run at step {meta.step:,}")
        return
    print(f"{out}: the average of {len(averaged['steps'])} checkpoints")
    for step, weight in zip(averaged["steps"], averaged["weights"], strict=True):
        print(f"  step {step:,}: {weight:.4f}")


def import_hf(folder: Path, out: RunFolder) -> None:
    """Read a Hugging Face folder; write a run folder with one checkpoint.

    LLaMA, Qwen2 or Qwen3: config.json, safetensors and tokenizer.

    Example:
      gamayun import-hf Qwen3-1.7B runs/qwen3

    Args:
      folder: folder to read.
      out: run folder to write.
    """
    from gamayun_jax.interop import huggingface

    done = huggingface.import_hf(folder, out)
    print(f"{out}: {done['parameters']:,} parameters", *done["notes"], sep="\n")


def export_hf(
    model: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint as a folder that transformers loads.

    Writes config, safetensors, tokenizer and model card.

    Example:
      gamayun export-hf runs/demo out --dtype bfloat16

    Args:
      model: run folder or checkpoint.
      dtype: type of the weights.
      tokenizer: tokenizer to write (default: the run's own).
    """
    from gamayun_jax.interop import huggingface

    done = huggingface.export_hf(model, out, dtype=dtype, tokenizer=tokenizer)
    print(f"{out}: {done['parameters']:,} parameters", *done["notes"], sep="\n")
