"""What clients send, in the words of OpenAI's API where it has them.

What would be ignored is refused; what asks for nothing (null, a penalty of 0) is taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    model_validator,
)


def _writable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no character") from None
    return text


def _one_prompt(value: Any) -> Any:
    """A list of one prompt is that prompt."""
    if isinstance(value, list) and any(isinstance(prompt, str | list) for prompt in value):
        if len(value) > 1:
            raise ValueError("one prompt a request is served; send a request for each")
        value = value[0]
    if not isinstance(value, str) and not (isinstance(value, list) and all(type(token) is int for token in value)):
        raise ValueError("a prompt is a text, or its tokens as integers")
    return value


def _off(value: bool) -> bool:
    if value:
        raise ValueError("this is not served")
    return value


Text = Annotated[str, AfterValidator(_writable)]
Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_writable)]
Off = Annotated[StrictBool, AfterValidator(_off)]
Zero = Annotated[float, Field(ge=0, le=0)]
# Options that a body may have: an error is made for each that does not exist.
OPTIONS = 100


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Null asks for nothing."""
        if isinstance(data, dict) and len(data) > OPTIONS:
            raise ValueError(f"there are no {len(data):,} options")
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Off = False


class _Generation(_Body):
    """What both kinds of completion have."""

    model: Text
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[Stop], Field(max_length=16), BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    frequency_penalty: Zero = 0.0
    presence_penalty: Zero = 0.0
    logprobs: Off = False
    user: Text | None = None


class CompletionRequest(_Generation):
    prompt: Annotated[Text | list[int], BeforeValidator(_one_prompt)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    echo: Literal[False] = False
    best_of: Literal[1] = 1


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class Message(_Body):
    role: Text
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]
    name: Text | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name is not None else {})


class ChatRequest(_Generation):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class ClassifyRequest(_Body):
    model: Text
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=256)]
