"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

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
    CountTokensResponse,
    GenerateRequest,
    GenerateResponse,
    RenderChatRequest,
    RenderChatResponse,
    StreamChatRequest,
    StreamGenerateRequest,
)
from lockstep.v1.inference_service_pb2_grpc import InferenceServiceStub
from lockstep.v1.model_service_pb2 import ListModelsRequest, ListModelsResponse, Model
from lockstep.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from lockstep.requests import Sampling


class AsyncClient:
    """`Client` for asyncio: the same calls, to be awaited. It belongs to the event loop that runs when it is made."""

    def __init__(
        self,
        target: str,
        api_key: str | None = None,
        timeout: float | None = None,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        tries: int = 3,
    ) -> None:
        """Takes what `Client` takes."""
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, connection.OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, connection.OPTIONS)
        self._inference = InferenceServiceStub(self._channel)
        self._models = ModelServiceStub(self._channel)
        self._metadata = connection.metadata(api_key)
        self._timeout = timeout
        self._tries = tries
        self._budget = Budget()

    async def chat(
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
        response: ChatResponse = await self._call(self._inference.Chat, request, timeout)
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
    ) -> AsyncStream:
        """Answers a conversation as it is generated."""
        request = requests.chat(StreamChatRequest, messages, model, tools, tool_choice, **sampling)
        return self._stream(self._inference.StreamChat, request, timeout)

    async def generate(
        self, prompt: Prompt, model: str | None = None, *, timeout: float | None = None, **sampling: Unpack[Sampling]
    ) -> GenerateResponse:
        """Continues a raw prompt; `lockstep.text` has the text of what comes back."""
        request = requests.generate(GenerateRequest, prompt, model, **sampling)
        response: GenerateResponse = await self._call(self._inference.Generate, request, timeout)
        return response

    def stream_generate(
        self, prompt: Prompt, model: str | None = None, *, timeout: float | None = None, **sampling: Unpack[Sampling]
    ) -> AsyncStream:
        """Continues a raw prompt as it is generated."""
        request = requests.generate(StreamGenerateRequest, prompt, model, **sampling)
        return self._stream(self._inference.StreamGenerate, request, timeout)

    async def embed(
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
        response: EmbedResponse = await self._call(self._inference.Embed, request, timeout)
        return response

    async def count_tokens(
        self,
        *,
        messages: Messages | None = None,
        prompt: Prompt | None = None,
        model: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Counts the tokens that a conversation or a raw prompt has: one of the two."""
        request = requests.count_tokens(messages, prompt, model)
        response: CountTokensResponse = await self._call(self._inference.CountTokens, request, timeout)
        return response.token_count

    async def render_chat(
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
        response: RenderChatResponse = await self._call(self._inference.RenderChat, request, timeout)
        return response

    async def list_models(self, *, timeout: float | None = None) -> list[Model]:
        """All models that are served, by name."""
        response: ListModelsResponse = await self._call(self._models.ListModels, ListModelsRequest(), timeout)
        return list(response.models)

    async def close(self) -> None:
        """Cancels what runs and closes the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self._budget, self._tries, self._timeout if timeout is None else timeout)

    async def _call(self, method: Callable[..., Any], request: object, timeout: float | None) -> Any:
        attempts = self._attempts(timeout)
        while True:
            try:
                return await method(request, timeout=attempts.remaining(), metadata=self._metadata)
            except grpc.RpcError as failure:
                error = from_rpc(failure)
                pause = attempts.pause_after(error)
                if pause is None:
                    raise error from failure
            await asyncio.sleep(pause)

    def _stream(self, method: Callable[..., Any], request: object, timeout: float | None) -> AsyncStream:
        attempts = self._attempts(timeout)
        return AsyncStream(lambda: method(request, timeout=attempts.remaining(), metadata=self._metadata), attempts)


class AsyncStream(AsyncIterator[str]):
    """`Stream` for asyncio. A loop that is left early leaves the call running until `close`, or until it is dropped."""

    finish: Finish | None = None
    """How it ended, what it counts and how to have it again, once the iteration is over."""

    def __init__(self, start: Callable[[], Any], attempts: Attempts) -> None:
        self._start = start
        self._attempts = attempts
        self._call = start()
        self._has_begun = False
        self._is_closed = False

    async def events(self) -> AsyncIterator[Event]:
        """All of it, in place of the text alone: one Start, then Chunks, then one Finish."""
        while (event := await self._receive()) is not None:
            yield event

    def close(self) -> None:
        """Cancels the call, if it still runs."""
        self._is_closed = True
        self._call.cancel()

    async def __anext__(self) -> str:
        while (event := await self._receive()) is not None:
            if text := connection.text_of(event):
                return text
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _receive(self) -> Event | None:
        while not self._is_closed and self.finish is None:
            try:
                response = await self._call.read()
            except asyncio.CancelledError:
                # A call that `close` has cancelled says so to its reader in the words of a cancelled task.
                if self._is_closed:
                    return None
                raise
            except grpc.RpcError as failure:
                await self._recover(from_rpc(failure), failure)
                continue
            if response is grpc.aio.EOF:
                raise Error(connection.CUT_OFF, grpc.StatusCode.UNAVAILABLE)
            self._has_begun = True
            event = connection.event_of(response)
            if isinstance(event, Finish):
                self.finish = event
            if event is not None:
                return event
        return None

    async def _recover(self, error: Error, failure: grpc.RpcError) -> None:
        """Starts a stream that has not begun anew; raises the error where there is nothing to be done."""
        if self._is_closed:
            return
        pause = None if self._has_begun else self._attempts.pause_after(error)
        if pause is None:
            raise error from failure
        await asyncio.sleep(pause)
        if not self._is_closed:
            self._call = self._start()
