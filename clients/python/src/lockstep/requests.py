"""Messages of the contract, made from what is convenient to write in Python."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar

from lockstep.v1.constraint_pb2 import Constraint
from lockstep.v1.conversation_pb2 import (
    ContentPart,
    Conversation,
    Message,
    Role,
    Tool,
    ToolCall,
    ToolChoice,
    ToolChoiceMode,
)
from lockstep.v1.embedding_pb2 import EmbedRequest, Pooling
from lockstep.v1.inference_service_pb2 import (
    ChatRequest,
    CountTokensRequest,
    GenerateRequest,
    StreamChatRequest,
    StreamGenerateRequest,
)
from lockstep.v1.prompt_pb2 import RawPrompt, TokenIds
from lockstep.v1.sampling_pb2 import OutputOptions, SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Unpack

Messages: TypeAlias = "str | Iterable[tuple[str, str] | Mapping[str, Any] | Message] | Conversation"
"""What a user says, or a conversation: pairs of role and text, OpenAI's dicts, or the contract's own messages."""
Tools: TypeAlias = "Iterable[Mapping[str, Any] | Tool]"
"""Tools as OpenAI has them, or as the contract does."""
ToolChoiceLike: TypeAlias = "str | Mapping[str, Any] | ToolChoice"
"""`auto`, `none`, `required`, OpenAI's dict that names a function, or the contract's own message."""
Prompt: TypeAlias = "str | Sequence[int] | RawPrompt"
"""Text, token ids, or the contract's own message."""


class Sampling(TypedDict, total=False):
    """The fields of `SamplingParams` and `OutputOptions`; `sampling.proto` has their units, ranges and defaults."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    seed: int | None
    n: int | None
    constraint: Constraint | Mapping[str, Any] | None
    return_full_text: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool | None


ChatLike = TypeVar("ChatLike", ChatRequest, StreamChatRequest)
GenerateLike = TypeVar("GenerateLike", GenerateRequest, StreamGenerateRequest)


def chat(
    kind: type[ChatLike],
    messages: Messages,
    model: str | None,
    tools: Tools | None,
    tool_choice: ToolChoiceLike | None,
    **sampling: Unpack[Sampling],
) -> ChatLike:
    """Asks for an answer to a conversation."""
    params, output = _sampling(sampling)
    asked = conversation(messages, tools, tool_choice)
    return kind(model=model or "", conversation=asked, sampling=params, output=output)


def generate(kind: type[GenerateLike], prompt: Prompt, model: str | None, **sampling: Unpack[Sampling]) -> GenerateLike:
    """Asks for the continuation of a prompt."""
    params, output = _sampling(sampling)
    return kind(model=model or "", prompt=raw_prompt(prompt), sampling=params, output=output)


def conversation(
    messages: Messages, tools: Tools | None = None, tool_choice: ToolChoiceLike | None = None
) -> Conversation:
    """What the chat template sees."""
    if isinstance(messages, Conversation):
        if tools is not None or tool_choice is not None:
            raise ValueError("a Conversation has its tools and tool_choice itself")
        return messages
    turns = [("user", messages)] if isinstance(messages, str) else messages
    return Conversation(
        messages=[_message(turn) for turn in turns],
        tools=[_tool(tool) for tool in tools or ()],
        tool_choice=None if tool_choice is None else _tool_choice(tool_choice),
    )


def raw_prompt(prompt: Prompt) -> RawPrompt:
    """A prompt that no template touches."""
    if isinstance(prompt, RawPrompt):
        return prompt
    return RawPrompt(text=prompt) if isinstance(prompt, str) else RawPrompt(token_ids=TokenIds(ids=prompt))


def embed(
    inputs: Iterable[Prompt], model: str | None, pooling: Pooling, normalize: bool | None, dimensions: int | None
) -> EmbedRequest:
    """Asks for the embeddings of prompts."""
    if isinstance(inputs, str):
        raise TypeError("inputs are a list of prompts, not one")
    return EmbedRequest(
        model=model or "",
        inputs=[raw_prompt(prompt) for prompt in inputs],
        pooling=pooling,
        normalize=normalize,  # type: ignore[arg-type]  # None is unset, which the stubs do not say
        dimensions=dimensions,
    )


def count_tokens(messages: Messages | None, prompt: Prompt | None, model: str | None) -> CountTokensRequest:
    """Asks how many tokens a prompt has."""
    if (messages is None) == (prompt is None):
        raise ValueError("either messages or a prompt is to be counted")
    if messages is not None:
        return CountTokensRequest(model=model or "", conversation=conversation(messages))
    assert prompt is not None
    return CountTokensRequest(model=model or "", prompt=raw_prompt(prompt))


def _sampling(given: Sampling) -> tuple[SamplingParams, OutputOptions]:
    """Sorts keywords into the messages that they belong to; one that no message has is a ValueError that names it."""
    stop = given.get("stop")
    named = {**given, "stop": [stop] if isinstance(stop, str) else stop}
    output = {name: named.pop(name) for name in OutputOptions.DESCRIPTOR.fields_by_name if name in named}
    return SamplingParams(**named), OutputOptions(**output)  # type: ignore[arg-type]


def _message(turn: tuple[str, str] | Mapping[str, Any] | Message) -> Message:
    if isinstance(turn, Message):
        return turn
    if isinstance(turn, str):
        raise TypeError(f"a message is a pair such as ('user', {turn!r}), a dict or a Message, not a string")
    fields: dict[str, Any] = dict(turn) if isinstance(turn, Mapping) else {"role": turn[0], "content": turn[1]}
    message = Message(
        role=_role(fields.pop("role", None)),
        content=_content(fields.pop("content", None)),
        tool_calls=[_tool_call(call) for call in fields.pop("tool_calls", None) or ()],
        tool_call_id=fields.pop("tool_call_id", None),
        name=fields.pop("name", None),
    )
    # OpenAI's answers come with fields that are empty.
    if unknown := [name for name, value in fields.items() if value]:
        raise ValueError(f"a message cannot have {', '.join(map(repr, unknown))}")
    return message


def _role(name: object) -> Role:
    names = {
        "system": Role.ROLE_SYSTEM,
        "user": Role.ROLE_USER,
        "assistant": Role.ROLE_ASSISTANT,
        "tool": Role.ROLE_TOOL,
    }
    role = names.get("system" if name == "developer" else str(name))
    if role is None:
        raise ValueError(f"a role is one of {', '.join(names)}, not {name!r}")
    return role


def _content(content: object) -> list[ContentPart]:
    if content is None:
        return []
    if isinstance(content, str):
        return [ContentPart(text=content)]
    if not isinstance(content, Iterable):
        raise TypeError(f"content is a text or parts of type 'text', not {content!r}")
    parts = list(content)
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise ValueError(f"content is a text or parts of type 'text', not {part!r}")
    return [ContentPart(text=part["text"]) for part in parts]


def _tool_call(call: Mapping[str, Any] | ToolCall) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call["function"]
    return ToolCall(id=call.get("id"), name=function["name"], arguments_json=function.get("arguments"))


def _tool(tool: Mapping[str, Any] | Tool) -> Tool:
    if isinstance(tool, Tool):
        return tool
    function = tool["function"]
    parameters = function.get("parameters")
    return Tool(
        name=function["name"],
        description=function.get("description"),
        parameters_json=None if parameters is None else json.dumps(parameters),
        strict=function.get("strict"),
    )


def _tool_choice(choice: ToolChoiceLike) -> ToolChoice:
    if isinstance(choice, ToolChoice):
        return choice
    if isinstance(choice, Mapping):
        return ToolChoice(mode=ToolChoiceMode.TOOL_CHOICE_MODE_NAMED, name=choice["function"]["name"])
    modes = {
        "auto": ToolChoiceMode.TOOL_CHOICE_MODE_AUTO,
        "none": ToolChoiceMode.TOOL_CHOICE_MODE_NONE,
        "required": ToolChoiceMode.TOOL_CHOICE_MODE_REQUIRED,
    }
    if choice not in modes:
        raise ValueError(f"tool_choice is one of {', '.join(modes)} or names a function, not {choice!r}")
    return ToolChoice(mode=modes[choice])
