"""From texts to tokens, and from an answer's tokens to what of it can be told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from .limits import Refused


# What a tokenizer makes of bytes that are not yet, or never, a character.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Tokens before an answer that its first ones are decoded with: at least, and at most to find the beginning of a character.
CONTEXT, FAR = 8, 64
# Tokens that may be waited for until they are characters; those of one are four at most.
PENDING = 16


def longest(model: Any, tokenizer: Any, limit: int) -> int:
    """Tokens that a prompt and its answer may have together, by the limit, the tokenizer and the model's positions."""
    sizes = [limit, tokenizer.model_max_length]
    if size := getattr(model.config, "max_position_embeddings", None):
        sizes.append(size)
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond, one long text would change the positions of all that are in its batch.
        sizes.append(rope["original_max_position_embeddings"])
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind that of the padding.
        if (
            isinstance(module, nn.Embedding)
            and "position" in name.rpartition(".")[2]
            and module.padding_idx is not None
        ):
            sizes.append(module.num_embeddings - module.padding_idx - 1)
    return min(sizes)


class Prompts:
    """Reads what is asked; blocking, and by any thread.

    Args:
        tokenizer: the model's.
        size: tokens that the model knows.
        longest: tokens of a prompt and its answer together.
        characters: of a text; one that has more is not read at all.
    """

    def __init__(self, tokenizer: Any, size: int, longest: int, characters: int) -> None:
        self.tokenizer, self.size, self.longest, self.characters = tokenizer, size, longest, characters
        # The first call puts off truncation and padding that tokenizer.json may have; others beside it would stumble.
        tokenizer("")

    def read(self, text: str | list[int], room: int) -> list[int]:
        """A prompt's tokens, with room for so many more behind them.

        Raises:
            Refused: if there is nothing in it, it is too long, or has tokens that there are not.
        """
        tokens = self._tokens(text) if isinstance(text, str) else text
        if not tokens:
            raise Refused("the prompt has no tokens.")
        if any(not 0 <= token < self.size for token in tokens):
            raise Refused(f"the prompt has tokens outside 0 to {self.size - 1}.")
        if len(tokens) + room > self.longest:
            raise Refused(
                f"{len(tokens)} tokens of the prompt and {room} of the answer are more than the {self.longest} that are "
                "allowed.",
                code="context_length_exceeded",
            )
        return tokens

    def read_chat(self, messages: list[dict[str, Any]], room: int | None) -> tuple[list[int], int]:
        """The tokens of messages, as the tokenizer's template has them, and how many there is room for behind them.

        Args:
            messages: as templates take them.
            room: tokens of the answer; None for as many as there can be.

        Raises:
            Refused: if there is no template, it does not take them, or as `read`.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise Refused("this model has no chat template; use /v1/completions.")
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # whatever a template has to say
            raise Refused(f"the chat template does not take these messages: {error}") from None
        # The template writes the special tokens itself.
        tokens = self._tokens(text, add_special_tokens=False)
        room = room or max(1, self.longest - len(tokens))
        return self.read(tokens, room), room

    def _tokens(self, text: str, **options: bool) -> list[int]:
        if len(text) > self.characters:
            raise Refused(
                f"a prompt of {len(text):,} characters is not read: it has more than the {self.longest} tokens that are "
                "allowed.",
                code="context_length_exceeded",
            )
        return list(self.tokenizer(text, **options)["input_ids"])


class Decoding:
    """The text of an answer, token by token; each costs the same, however long the answer is.

    New tokens are decoded together with some before them, and what that adds is their text: a tokenizer may drop the space
    before the first of what it decodes, and the bytes of a character may be several tokens.

    Args:
        tokenizer: the model's.
        before: what the answer continues; nothing, if it is a text of its own.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        # Cleaned up, the text before would change with what comes after it.
        self._decode: Callable[[Sequence[int]], str] = partial(
            tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        # The first `_done` of them are `_known`.
        self._tokens, self._known = self._context(before)
        self._done = len(self._tokens)

    def _context(self, before: Sequence[int]) -> tuple[list[int], str]:
        size = CONTEXT
        while True:
            tokens = list(before[-size:])
            text = self._decode(tokens)
            # Special tokens are no text, and bytes from the middle of a character would spoil those behind them.
            if (text and text[0] != UNFINISHED) or size >= min(len(before), FAR):
                return tokens, text.rstrip(UNFINISHED)
            size += 1

    def add(self, token: int) -> str:
        """What a token adds; nothing as long as it ends in the middle of a character."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        late = len(self._tokens) - self._done >= PENDING
        if text.endswith(UNFINISHED) and not late:
            return ""
        if new := self._new(text):
            self._tokens = self._tokens[self._done :]
            self._done, self._known = len(self._tokens), self._decode(self._tokens)
        elif late:
            # Special ones, that no text comes of.
            del self._tokens[self._done :]
        return new

    def end(self) -> str:
        """What there is of characters that were not finished."""
        return self._new(self._decode(self._tokens))

    def _new(self, text: str) -> str:
        # Bytes that are no character may spoil those before them, which were told.
        return text[len(self._known) :] if text.startswith(self._known) else self._decode(self._tokens[self._done :])


class Telling:
    """What of an answer can be told, while its tokens come.

    Args:
        decoding: of the answer.
        stops: texts that end it, and are no part of it.
    """

    def __init__(self, decoding: Decoding, stops: Sequence[str]) -> None:
        self.decoding, self.stops = decoding, stops
        self._kept = ""

    def tell(self, token: int | None) -> tuple[str, bool]:
        """Take in a token, or the end of the answer (None).

        Returns:
            What is new, and whether a stop ends it.
        """
        text = self._kept + (self.decoding.end() if token is None else self.decoding.add(token))
        at = min((found for stop in self.stops if (found := text.find(stop)) >= 0), default=None)
        if at is not None:
            return text[:at], True
        # What may be the beginning of a stop is kept back.
        end = len(text) if token is None else len(text) - max((_begun(text, stop) for stop in self.stops), default=0)
        self._kept = text[end:]
        return text[:end], False


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
