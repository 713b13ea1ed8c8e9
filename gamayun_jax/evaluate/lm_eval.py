"""lm-evaluation-harness on our models: `gamayun lm-eval --model gamayun ...`.

`lm_eval` finds models of its own package only, so its command is run from here, with
`gamayun` registered beside them; everything else about it is as its manual says. Texts
become tokens as with its Hugging Face backend (`--model hf`), so that the results are
the same, but for two things: see `hf_parity`. Needs the extra `lm-eval`.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gamayun_jax.config import UserError, check_local
from gamayun_jax.data.hf_tokenizer import HFTokenizer
from gamayun_jax.data.model_tokenizer import open_tokenizer
from gamayun_jax.evaluate.loglikelihood import Request, Scorer
from gamayun_jax.inference.generator import Generator
from gamayun_jax.inference.sampling import Sampling
from gamayun_jax.interop.export_tokenizer import write_tokenizer
from gamayun_jax.interop.load_model import load_params
from gamayun_jax.storage import as_path
from gamayun_jax.training.run_folder import is_hf_folder

MAX_NEW = 256  # tokens to generate where the task says nothing, as in --model hf


@register_model("gamayun")
class GamayunLM(TemplateLM):
    """A model of ours, or a Hugging Face folder, as lm-evaluation-harness sees it.

    Args:
      path: run folder, checkpoint or Hugging Face folder.
      dtype: what is computed in: float32 or bfloat16.
      max_length: most tokens of context; default: the model's window.
      batch_size: prompts that are continued at a time, or "auto" (16). Scoring
        sizes its batches itself.
      batch_tokens: tokens that each device scores at a time, about.
      hf_parity: do as the harness's Hugging Face backend does where `gamayun eval`
        does otherwise: a whole text (loglikelihood_rolling) is scored with the BOS that
        the tokenizer writes, after another BOS, its control tokens read as such; and
        the context of a text's first token is the token named BOS, or else EOS, even
        where the tokenizer writes another one.

    The harness also passes device, max_batch_size and others: devices are JAX's own.
    """

    def __init__(
        self,
        path: str,
        dtype: Literal["auto", "float32", "bfloat16"] = "float32",
        max_length: int | None = None,
        batch_size: int | str = "auto",
        batch_tokens: int = 4096,
        hf_parity: bool = False,
        **_: Any,
    ):
        super().__init__()
        check_local(path, "path=")
        folder = as_path(path)
        cfg, params, meta, mesh = load_params(folder)
        compute = dataclasses.replace(cfg.compute, dtype=dtype)
        own = open_tokenizer(folder, meta.tokenizer, cfg.data.corpus)
        self.tokenizer = load_tokenizer(folder, own, cfg.model.max_seq_len)
        self._name = str(folder)
        self._own, self._parity = own, hf_parity
        self.max_length = int(max_length or cfg.model.max_seq_len)
        self.batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self.scorer = Scorer(
            cfg.model, params, mesh, compute, self.max_length, int(batch_tokens)
        )
        self._generator = lambda: Generator(cfg.model, params, mesh, own, compute)
        self._made: Generator | None = None
        self._info = {
            "model_num_parameters": sum(x.size for x in jax.tree.leaves(params)),
            "model_dtype": dtype,
            "model_sha": meta.lineage.get("run") or "",
            "step": meta.step,
        }

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside the model's name."""
        return self._info

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of the harness's cache of requests."""
        return self._name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Context of a text's first token: BOS, or what ends a text."""
        if not self._parity:
            return self._own.start_id
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as one text, by the tokenizer's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, with BOS if the tokenizer writes one."""
        return self._encode([string], add_special_tokens)[0]

    def _encode(
        self, texts: Sequence[str], special: bool | None = None
    ) -> list[list[int]]:
        bos = self.tokenizer.decode([self.prefix_token_id])
        begun = [special is None and bool(bos) and t.startswith(bos) for t in texts]
        kwargs = {} if special is None else {"add_special_tokens": special}
        ids = self.tokenizer(list(texts), **kwargs)["input_ids"] if texts else []
        for i, already in enumerate(begun):  # a chat template has written BOS
            if already:
                ids[i] = self.tokenizer.encode(texts[i], add_special_tokens=False)
        return ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Requests of the same context are scored together."""
        of_context: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for i, (args, before, after) in enumerate(requests):
            if not after:
                raise UserError(
                    f"nothing to score after {str(args)[-80:]!r}: the continuation "
                    "is empty, or its tokens are part of the context's last"
                )
            same = of_context.setdefault(tuple(before), {})
            same.setdefault(tuple(after), []).append(i)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(
            total=sum(map(len, of_context.values())),
            desc="Scoring",
            disable=disable_tqdm,
        )
        with bar:
            scores = self.scorer.score(
                [Request(before, list(c)) for before, c in of_context.items()],
                bar.update,
            )
        for score, choices in zip(scores, of_context.values(), strict=True):
            for logprob, greedy, where in zip(
                score.logprobs, score.greedy, choices.values(), strict=True
            ):
                for i in where:
                    found[i] = float(logprob), bool(greedy)
        for (args, _before, _after), result in zip(requests, found, strict=True):
            if args is not None:
                self.cache_hook.add_partial("loglikelihood", args, result)
        return found

    def loglikelihood_rolling(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in the harness's own windows."""
        texts = [r.args[0] for r in requests]
        # What is scored is the text: not what the tokenizer writes before it.
        encode = self._encode if self._parity else self._own.encode_batch
        parts: list[tuple[None, list[int], list[int]]] = []
        owner: list[int] = []
        for i, ids in enumerate(encode(texts)):
            for window in get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                before, after = make_disjoint_window(window)
                parts.append((None, before, after))
                owner.append(i)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(parts, disable_tqdm=disable_tqdm)
        for i, (logprob, _greedy) in zip(owner, scores, strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Each prompt continued up to one of its stop strings, which is left out."""
        contexts = [r.args[0] for r in requests]
        prompts = dict(enumerate(self._encode(contexts)))
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        found = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="Generating", disable=disable_tqdm)
        for group in groups.values():
            group.sort(key=lambda i: -len(prompts[i]))
            kwargs = normalize_gen_kwargs(requests[group[0]].args[1], MAX_NEW)
            until = handle_stop_sequences(
                kwargs.get("until"), eos=self.tokenizer.decode([self.eot_token_id])
            )
            count = int(kwargs["max_gen_toks"])
            room = self.max_length - count
            if room <= 0:
                raise UserError(
                    f"a task asks for {count} new tokens, the window has only "
                    f"{self.max_length}: set --gen_kwargs max_gen_toks=N"
                )
            sampling = sampling_of(kwargs)
            for at in range(0, len(group), self.batch_size):
                batch = group[at : at + self.batch_size]
                ids = [prompts[i][-room:] or [self.prefix_token_id] for i in batch]
                for i, text in zip(
                    batch, self._continue(ids, count, sampling, until), strict=True
                ):
                    found[i] = text
                    self.cache_hook.add_partial(
                        "generate_until", requests[i].args, text
                    )
                bar.update(len(batch))
        bar.close()
        return found

    def _continue(
        self,
        ids: Sequence[Sequence[int]],
        count: int,
        sampling: Sampling,
        until: Sequence[str],
    ) -> list[str]:
        self._made = self._made or self._generator()

        def finished(made: Sequence[int]) -> bool:
            text = self.tokenizer.decode(made, skip_special_tokens=True)
            return any(stop in text for stop in until if stop)

        rows = self._made.generate_ids(
            ids, count, sampling, stop_ids=self._own.stop_ids, finished=finished
        )
        texts = [self.tokenizer.decode(r, skip_special_tokens=True) for r in rows]
        return [postprocess_generated_text(t, list(until), None) for t in texts]


def sampling_of(kwargs: dict[str, Any]) -> Sampling:
    """The harness's generation arguments as ours."""
    if not kwargs.get("do_sample"):
        return Sampling()
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return Sampling(**{k: kwargs[k] for k in names if k in kwargs})


def load_tokenizer(path: Path, own: Any, window: int) -> Any:
    """The tokenizer as `transformers` opens it, which is what --model hf uses.

    Args:
      path: the model.
      own: its tokenizer as `model_tokenizer.open_tokenizer` gives it.
      window: the model's.
    """
    from transformers import AutoTokenizer, PretrainedConfig

    if is_hf_folder(path):
        return AutoTokenizer.from_pretrained(path)
    # Not beside a config.json of transformers, so it shall look for none.
    options = dict(config=PretrainedConfig())
    if isinstance(own, HFTokenizer):
        return AutoTokenizer.from_pretrained(own.folder, **options)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(own, Path(folder), window)
        return AutoTokenizer.from_pretrained(folder, **options)


def main(arguments: Sequence[str]) -> None:
    """The harness's own command line, with `--model gamayun`."""
    from lm_eval.__main__ import cli_evaluate

    former = sys.argv
    sys.argv = ["gamayun lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = former


if __name__ == "__main__":
    main(sys.argv[1:])
