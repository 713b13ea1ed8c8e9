"""Text generation: prefill and decode with a static key-value cache.

Prompts of different lengths are padded on the left, so that all rows of a batch write
the same cache slot. Batch, prompt length and cache are rounded up to powers of two or
between, and the sampling parameters are arguments of the programs, so what is compiled
depends on sizes only. The cache grows when it is full: for few rows by all tokens that
may still come, AHEAD at most, so that few sizes are compiled; for many rows by fewer,
since each slot that they attend over takes time. Memory follows the text, not the
window.

Shape suffixes: B rows, T prompt tokens, S cache slots, C tokens of a chunk.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from gamayun_jax.config import ComputeConfig, ModelConfig, UserError
from gamayun_jax.data.tokenizer import TextCoder, TextStream
from gamayun_jax.inference.decode import CHUNK, Decoder
from gamayun_jax.inference.sampling import Sampling
from gamayun_jax.model import sharding

SHORTEST = 128  # tokens from which rows have lengths between powers of two
SMALLEST = 16  # shortest bucket of prompts, in tokens
# Slots that a cache grows by at most, over all rows of a device; CHUNK a row at least.
AHEAD = 128
STOPS = 8  # least room for stop ids; more of them are programs of their own


def bucket(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return 1 << (max(n, least, 1) - 1).bit_length()


def row_length(tokens: int, least: int = SHORTEST) -> int:
    """The shortest row of 16, 32, 64, 128, 192, 256, 384, 512, ... places for so many
    tokens, from `least` on."""
    power = bucket(tokens, least)
    return power * 3 // 4 if tokens <= power * 3 // 4 >= SHORTEST else power


class Generator:
    """Continues prompts with one model. Keeps a copy of the weights, laid out for it.

    Args:
      cfg: the architecture.
      params: parameters on `mesh`, of training or quantised.
      mesh: rows are divided over data and fsdp, also those of other processes, which
        then all make the same calls; heads over tensor.
      tokenizer: its vocabulary is the model's.
      compute: its dtype is used.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Any,
        mesh: Mesh,
        tokenizer: TextCoder,
        compute: ComputeConfig = ComputeConfig(),
    ):
        self.cfg, self.mesh, self.tokenizer = cfg, mesh, tokenizer
        self.message: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
        self.decoder = Decoder(cfg, params, mesh, compute)
        self._ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def encode(
        self, prompt: str, max_tokens: int, truncate: bool, literal: bool = False
    ) -> list[int]:
        """Ids of a prompt as `TextCoder.encode_prompt` gives them, no more than leave
        room for `max_tokens`.

        Raises:
          UserError: it is too long and may not be cut, or has a control token that the
            model has no row for.
        """
        first = list(self.tokenizer.prefix_ids)
        ids = self.tokenizer.encode_prompt(prompt, literal)
        ids = ids or [self.tokenizer.start_id]
        if max(ids) >= self.cfg.vocab_size:
            raise UserError(
                f"the prompt has control token {max(ids)}, but the model has only "
                f"model.vocab_size={self.cfg.vocab_size}: leave it out, or have "
                "control tokens read as text"
            )
        window = self.cfg.max_seq_len
        room = window - max_tokens
        if len(ids) <= room:
            return ids
        what = f"the prompt has {len(ids)} tokens, and {max_tokens} new ones"
        if not truncate or room <= len(first):
            raise UserError(
                f"{what} would pass model.max_seq_len={window}: shorten it or ask for "
                "fewer"
            )
        self.message(f"{what} pass the window of {window}: its beginning is cut off")
        return first + ids[len(ids) - room + len(first) :]

    def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int,
        sampling: Sampling = Sampling(),
        on_text: Callable[[int, str], None] | None = None,
        stop_ids: Sequence[int] | None = None,
        truncate: bool = False,
        literal: bool = False,
    ) -> list[str]:
        """Continue each prompt; returns the new text only, without the stop token.

        Args:
          prompts: texts, begun as the tokenizer begins them; an empty one is continued
            from BOS, or from what ends a document where there is none.
          max_tokens: most new tokens of each.
          sampling: how tokens are chosen.
          on_text: called with (prompt number, new text) as it comes, in pieces of
            about CHUNK tokens that never end within a character.
          stop_ids: ids that end a text; default: the tokenizer's.
          truncate: cut long prompts from the left, with a message, instead of
            refusing them.
          literal: control tokens that a prompt spells are text.

        Raises:
          UserError: a prompt too long, or numbers out of their range.
        """
        ids = [self.encode(p, max_tokens, truncate, literal) for p in prompts]
        made = self.generate_ids(ids, max_tokens, sampling, on_text, stop_ids)
        return [TextStream(self.tokenizer)(row, last=True) for row in made]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling = Sampling(),
        on_text: Callable[[int, str], None] | None = None,
        stop_ids: Sequence[int] | None = None,
        finished: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[list[int]]:
        """`generate` for prompts of token ids, with BOS where it belongs.

        Args:
          finished: given the new ids of a prompt from time to time; True ends it.
        """
        stop_ids = list(self.tokenizer.stop_ids if stop_ids is None else stop_ids)
        if max_tokens < 1:
            raise UserError(f"{max_tokens} new tokens: ask for at least 1")
        if not prompts:
            return []
        T = row_length(max(map(len, prompts)), SMALLEST)
        each = bucket(-(-len(prompts) // self._ways))  # rows of a device
        B, ahead = self._ways * each, max(AHEAD // each, CHUNK)
        tokens_BT, lengths_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
        for row, ids in enumerate(prompts):
            tokens_BT[row, T - len(ids) :] = ids
            lengths_B[row] = len(ids)
        lack = bucket(len(stop_ids), STOPS) - len(stop_ids)
        stops = np.array(stop_ids + [-1] * lack, np.int32)
        values, program = sampling.values(), sampling.program
        made: list[list[int]] = [[] for _ in prompts]
        streams = [TextStream(self.tokenizer) for _ in prompts]
        ended = [False] * len(prompts)

        def take(new_BC: np.ndarray, last: bool) -> None:
            for row, ids in enumerate(new_BC[: len(prompts)]):
                begin = len(made[row])
                for token in ids if not ended[row] else ():
                    ended[row] = int(token) in stop_ids
                    if ended[row]:
                        break
                    made[row].append(int(token))
                if finished and not ended[row]:
                    ended[row] = finished(made[row])
                if on_text:
                    text = streams[row](made[row][begin:], ended[row] or last)
                    if text:
                        on_text(row, text)

        with jax.set_mesh(self.mesh), nn.logical_axis_rules(sharding.RULES):
            batch_sharding = sharding.batch_sharding(self.mesh)
            placed = (
                jax.make_array_from_callback(x.shape, batch_sharding, x.__getitem__)
                for x in (tokens_BT, lengths_B)
            )
            state, first_B = self.decoder.prefill(*placed, values, stops, program)
            total, used = 1, T
            take(np.asarray(first_B)[:, None], max_tokens == 1)
            while total < max_tokens and not all(ended):
                S = state["segments"].shape[1]
                if used == S:
                    S = row_length(used + min(max_tokens - total, ahead), SMALLEST)
                    state = self.decoder.longer(state, S)
                count = min(CHUNK, max_tokens - total, S - used)
                state, new_BC, n = self.decoder.decode(
                    self.decoder.weights, state, values, stops, np.int32(count), program
                )
                total, used = total + count, used + count
                take(np.asarray(new_BC)[:, : int(n)], total == max_tokens)
        return made
