"""From texts to tokens, and from an answer's tokens to what of it can be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .limits import Refused


# What a tokenizer makes of bytes that are not yet, or never, a character.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Prompts:
    """Reads what is asked.

    Args:
        tokenizer: the model's.
        size: tokens that the model knows.
        longest: tokens of a prompt and its answer together.
    """

    def __init__(self, tokenizer: Any, size: int, longest: int) -> None:
        self.tokenizer, self.size, self.longest = tokenizer, size, longest

    def read(self, text: str | list[int], room: int) -> list[int]:
        """A prompt's tokens, with room for so many more behind them.

        Raises:
            Refused: if there is nothing in it, it is too long, or has tokens that there are not.
        """
        tokens = list(self.tokenizer(text)["input_ids"]) if isinstance(text, str) else text
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
        tokens = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        room = room or max(1, self.longest - len(tokens))
        return self.read(tokens, room), room


class Telling:
    """What of an answer can be told, while its tokens come.

    Args:
        tokenizer: the model's.
        stops: texts that end the answer, and are no part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens: list[int] = []
        self._told = ""

    def tell(self, token: int | None) -> tuple[str, bool]:
        """Take in a token, or the end of the answer (None).

        Returns:
            What is new, and whether a stop ends it.
        """
        if token is not None:
            self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        at = min((found for stop in self.stops if (found := text.find(stop)) >= 0), default=None)
        if at is not None:
            text = text[:at]
        elif token is not None:
            # What may be the beginning of a stop, or of a character, is kept back.
            text = text[: _safe(text, self.stops)]
        new = text[len(self._told) :]
        if new or at is not None or token is None:
            self._told = text
        return new, at is not None


def _safe(text: str, stops: Sequence[str]) -> int:
    """How much of a text can be told, when more is to come."""
    end = len(text.rstrip(UNFINISHED)) if text.endswith(UNFINISHED) else len(text)
    for stop in stops:
        for size in range(min(len(stop) - 1, end), 0, -1):
            if text[:end].endswith(stop[:size]):
                end -= size
                break
    return end
