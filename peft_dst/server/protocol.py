"""What clients send, in the words of OpenAI's API where it has them. Unknown fields are refused: nothing is ignored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Generation(_Body):
    """What both kinds of completion have."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int | None = None
    stop: str | list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    n: Literal[1] = 1
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionRequest(_Generation):
    prompt: str | list[int]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    echo: Literal[False] = False
    best_of: Literal[1] = 1


class Message(_Body):
    role: str
    content: str
    name: str | None = None


class ChatRequest(_Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class ClassifyRequest(_Body):
    model: str
    input: str | Annotated[list[str], Field(min_length=1, max_length=256)]
