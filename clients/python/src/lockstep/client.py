"""The client for code that waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import grpc

from lockstep import connection, requests
from lockstep.connection import Event
from lockstep.errors import Error, from_rpc
from lockstep.requests import Messages, Prompt, ToolChoiceLike, Tools
from lockstep.retries import Attempts, Budget
from lockstep.v1.embedding_pb2 import EmbedResponse, Pooling
from lockstep.v1.generation_pb2 import Finish
from lockstep.v1.inference_service_pb2 import (
    ChatRequest,
    ChatResponse,
    GenerateRequest,
    GenerateResponse,
    RenderChatRequest,
    RenderChatResponse,
    StreamChatRequest,
    StreamGenerateRequest,
)
from lockstep.v1.inference_service_pb2_grpc import InferenceServiceStub
from lockstep.v1.model_service_pb2 import ListModelsRequest, Model
from lockstep.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from lockstep.requests import Sampling


class Client:
    """Calls a gateway. Threads may share one; it holds one connection, which `close` or the end of `with` closes.

    Calls return the messages of the contract, whose fields `proto/lockstep/v1` documents. They raise `Error`.
    """

    def __init__(
        self,
        target: str,
        api_key: str | None = None,
        timeout: float | None = None,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        tries: int = 3,
    ) -> None:
        """Connects with the first call.

        Args:
            target: `HOST:PORT`, or `dns:///NAME:PORT` for all addresses behind a name.
            api_key: Shown to the gateway, if it asks for one.
            timeout: The deadline of calls that bring none of their own. A generation that is under way then ends with
                what it has. Unit: seconds. Default: none.
            credentials: Makes the connection TLS, such as `grpc.ssl_channel_credentials()`.
            tries: How often a call may be sent, the first time included. It is sent again only where the server has
                refused it for now and says when to come back, within the deadline, and never once a stream has begun.
        """
        if credentials is None:
            self._channel = grpc.insecure_channel(target, connection.OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, credentials, connection.OPTIONS)
        self._inference = InferenceServiceStub(self._channel)
        self._models = ModelServiceStub(self._channel)
        self._metadata = connection.metadata(api_key)
        self._timeout = timeout
        self._tries = tries
        self._budget = Budget()

    def chat(
        self,
        messages: Messages,
        model: str | None = None,
        tools: Tools | None = None,
        tool_choice: ToolChoiceLike | None = None,
        *,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> ChatResponse:
        """Answers a conversation; `lockstep.text` has the text of what comes back."""
        request = requests.chat(ChatRequest, messages, model, tools, tool_choice, **sampling)
        response: ChatResponse = self._call(self._inference.Chat, request, timeout)
        return response

    def stream_chat(
        self,
        messages: Messages,
        model: str | None = None,
        tools: Tools | None = None,
        tool_choice: ToolChoiceLike | None = None,
        *,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Answers a conversation as it is generated."""
        request = requests.chat(StreamChatRequest, messages, model, tools, tool_choice, **sampling)
        return self._stream(self._inference.StreamChat, request, timeout)

    def generate(
        self, prompt: Prompt, model: str | None = None, *, timeout: float | None = None, **sampling: Unpack[Sampling]
    ) -> GenerateResponse:
        """Continues a raw prompt; `lockstep.text` has the text of what comes back."""
        request = requests.generate(GenerateRequest, prompt, model, **sampling)
        response: GenerateResponse = self._call(self._inference.Generate, request, timeout)
        return response

    def stream_generate(
        self, prompt: Prompt, model: str | None = None, *, timeout: float | None = None, **sampling: Unpack[Sampling]
    ) -> Stream:
        """Continues a raw prompt as it is generated."""
        request = requests.generate(StreamGenerateRequest, prompt, model, **sampling)
        return self._stream(self._inference.StreamGenerate, request, timeout)

    def embed(
        self,
        inputs: Iterable[Prompt],
        model: str | None = None,
        *,
        pooling: Pooling = Pooling.POOLING_UNSPECIFIED,
        normalize: bool | None = None,
        dimensions: int | None = None,
        timeout: float | None = None,
    ) -> EmbedResponse:
        """Turns prompts into vectors."""
        request = requests.embed(inputs, model, pooling, normalize, dimensions)
        response: EmbedResponse = self._call(self._inference.Embed, request, timeout)
        return response

    def count_tokens(
        self,
        *,
        messages: Messages | None = None,
        prompt: Prompt | None = None,
        model: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Counts the tokens that a conversation or a raw prompt has: one of the two."""
        request = requests.count_tokens(messages, prompt, model)
        count: int = self._call(self._inference.CountTokens, request, timeout).token_count
        return count

    def render_chat(
        self,
        messages: Messages,
        model: str | None = None,
        tools: Tools | None = None,
        tool_choice: ToolChoiceLike | None = None,
        *,
        timeout: float | None = None,
    ) -> RenderChatResponse:
        """Shows the prompt that a conversation becomes."""
        asked = requests.conversation(messages, tools, tool_choice)
        request = RenderChatRequest(model=model or "", conversation=asked)
        response: RenderChatResponse = self._call(self._inference.RenderChat, request, timeout)
        return response

    def list_models(self, *, timeout: float | None = None) -> list[Model]:
        """All models that are served, by name."""
        return list(self._call(self._models.ListModels, ListModelsRequest(), timeout).models)

    def close(self) -> None:
        """Cancels what runs and closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self._budget, self._tries, self._timeout if timeout is None else timeout)

    def _call(self, method: Callable[..., Any], request: object, timeout: float | None) -> Any:
        attempts = self._attempts(timeout)
        while True:
            try:
                return method(request, timeout=attempts.remaining(), metadata=self._metadata)
            except grpc.RpcError as failure:
                error = from_rpc(failure)
                pause = attempts.pause_after(error)
                if pause is None:
                    raise error from failure
            time.sleep(pause)

    def _stream(self, method: Callable[..., Any], request: object, timeout: float | None) -> Stream:
        attempts = self._attempts(timeout)
        return Stream(lambda: method(request, timeout=attempts.remaining(), metadata=self._metadata), attempts)


class Stream(Iterator[str]):
    """An answer on its way: an iterator of the pieces of its text, the first choice's if there are several.

    `close`, the end of `with`, and dropping it cancel the call, which frees its place in the engine at once.
    """

    finish: Finish | None = None
    """How it ended, what it counts and how to have it again, once the iteration is over."""

    def __init__(self, start: Callable[[], Any], attempts: Attempts) -> None:
        self._start = start
        self._attempts = attempts
        self._call = start()
        self._has_begun = False
        self._is_closed = False

    def events(self) -> Iterator[Event]:
        """All of it, in place of the text alone: one Start, then Chunks, then one Finish."""
        while (event := self._receive()) is not None:
            yield event

    def close(self) -> None:
        """Cancels the call, if it still runs."""
        self._is_closed = True
        self._call.cancel()

    def __next__(self) -> str:
        while (event := self._receive()) is not None:
            if text := connection.text_of(event):
                return text
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> Event | None:
        while not self._is_closed and self.finish is None:
            try:
                event = connection.event_of(next(self._call))
            except StopIteration:
                raise Error(connection.CUT_OFF, grpc.StatusCode.UNAVAILABLE) from None
            except grpc.RpcError as failure:
                self._recover(from_rpc(failure), failure)
                continue
            self._has_begun = True
            if isinstance(event, Finish):
                self.finish = event
            if event is not None:
                return event
        return None

    def _recover(self, error: Error, failure: grpc.RpcError) -> None:
        """Starts a stream that has not begun anew; raises the error where there is nothing to be done."""
        if self._is_closed:
            return
        pause = None if self._has_begun else self._attempts.pause_after(error)
        if pause is None:
            raise error from failure
        time.sleep(pause)
        if not self._is_closed:
            self._call = self._start()
