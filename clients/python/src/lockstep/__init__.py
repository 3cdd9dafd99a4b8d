"""Client of Lockstep, which serves language models over gRPC.

    with lockstep.Client("127.0.0.1:50051") as client:
        print(lockstep.text(client.chat("What is the capital of France?", max_new_tokens=32)))
        for piece in client.stream_chat([("system", "Be brief."), ("user", "And of Italy?")]):
            print(piece, end="", flush=True)

`AsyncClient` is the same for asyncio. What goes out and comes back are the messages of `proto/lockstep/v1`, all of which
`lockstep.v1` has; those that programs name most are here, too.
"""

from lockstep.aio import AsyncClient, AsyncStream
from lockstep.client import Client, Stream
from lockstep.connection import Event
from lockstep.errors import Error
from lockstep.requests import Sampling
from lockstep.v1.constraint_pb2 import ChoiceList, Constraint
from lockstep.v1.conversation_pb2 import Conversation, Document, Message, Role, Tool, ToolCall, ToolChoice
from lockstep.v1.embedding_pb2 import Pooling
from lockstep.v1.generation_pb2 import Chunk, Finish, FinishReason, Start
from lockstep.v1.inference_service_pb2 import ChatResponse, GenerateResponse
from lockstep.v1.prompt_pb2 import RawPrompt

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChoiceList",
    "Chunk",
    "Client",
    "Constraint",
    "Conversation",
    "Document",
    "Error",
    "Event",
    "Finish",
    "FinishReason",
    "Message",
    "Pooling",
    "RawPrompt",
    "Role",
    "Sampling",
    "Start",
    "Stream",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "text",
]


def text(response: ChatResponse | GenerateResponse) -> str:
    """The text of an answer, of its first choice if there are several."""
    if isinstance(response, GenerateResponse):
        return response.choices[0].text
    return "".join(part.text for part in response.choices[0].message.content)
