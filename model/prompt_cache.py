"""A prompt's rows in the cache, kept from turn to turn: of the next prompt only what is new is computed.

Two sequences of one cache take turns. The stem of a prompt, which later prompts begin with, is appended to one of them
and stays as it is; the rest of the prompt and the answer go to a copy, in the other. The next stem continues the answer
or, where the encoding renders the last answer otherwise than it was said (its reasoning is left out), the last stem.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from tokenizers import Tokenizer
from torch import Tensor

from dsv4_hal.model.generate import CHUNK, Sampling, decode, prefill
from dsv4_hal.model.tokenizer import spelled, tokenize
from dsv4_hal.model.transformer import Model


@dataclass
class Held:
    """What a sequence of the cache stands for: the text of its tokens, and the last of them that are not stored yet."""

    text: str = ""
    unread: list[int] = field(default_factory=list)


class PromptCache:
    """`read` a prompt, then `answer` it, again and again.

    context  tokens that a prompt and its answer may have together
    reused   tokens of the last prompt that were in the cache; computed: those that were not
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, context: int) -> None:
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self.cache = model.new_cache(2, context, max_chunk=CHUNK)
        self.held = [Held(), Held()]
        self.live = 1  # the sequence that holds the last prompt whole, and its answer
        self.logits: Tensor | None = None  # [1, V] after the last prompt
        self.reused = self.computed = 0

    def read(self, stem: str, rest: str) -> None:
        """Make the cache hold the prompt `stem + rest`, ready to be answered.

        The two are read apart, so no token may cross the seam. ValueError, and nothing changes, if the prompt leaves no
        room for an answer.
        """
        fits = [len(h.text) if stem.startswith(h.text) else 0 for h in self.held]
        number = fits.index(max(fits)) if max(fits) else 1 - self.live
        held = self.held[number] if fits[number] else Held()
        stored = self.cache.lengths[number] if held.text else 0
        new = held.unread + tokenize(self.tokenizer, stem[len(held.text) :])
        last = tokenize(self.tokenizer, rest)
        if stored + len(new) + len(last) >= self.context:
            total = stored + len(new) + len(last)
            raise ValueError(
                f"the conversation has {total} tokens, and the context holds {self.context}: clear it, or enlarge that"
            )
        self.logits, self.reused, self.computed = None, stored, len(new) + len(last)
        self.live = 1 - number
        self._forget(self.live)
        if not held.text:
            self._forget(number)
        if new:
            self._append(number, new, stem)
        self.cache.fork(number, self.live)
        self.logits = self._append(self.live, last, stem + rest)

    def answer(self, max_new_tokens: int, sampling: Sampling) -> Generator[tuple[int | None, str]]:
        """(token, text that it completes) of the answer to the prompt read last; at most what the context holds.

        The caller stops at the token it takes for the end; the tokens given out are then part of what is held. Where
        the answer is broken off by an exception, it is computed again if it is needed.
        """
        if self.logits is None:
            raise ValueError("no prompt was read")
        logits, self.logits = self.logits, None
        number, text = self.live, self.held[self.live].text
        unread: list[int] = []
        room = min(max_new_tokens, self.context - self.cache.lengths[number])
        tokens = decode(self.model, self.cache, logits, room, sampling, number)
        try:
            for token, piece in spelled(self.tokenizer, tokens):
                text, unread = text + piece, unread if token is None else [token]
                yield token, piece
        except GeneratorExit:  # the caller has what it wanted
            pass
        except BaseException:
            self._forget(number)
            raise
        self.held[number] = Held(text, unread)

    def clear(self) -> None:
        """Forget everything."""
        for number in range(2):
            self._forget(number)

    def _append(self, number: int, tokens: list[int], text: str) -> Tensor:
        try:
            logits = prefill(self.model, self.cache, tokens, number)
        except BaseException:  # an interrupt, too, leaves the sequence in the middle of a step
            self._forget(number)
            raise
        self.held[number] = Held(text)
        return logits

    def _forget(self, number: int) -> None:
        self.held[number] = Held()
        self.cache.truncate(0, number)
