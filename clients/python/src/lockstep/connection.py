"""What both clients do alike with their connection."""

from __future__ import annotations

from lockstep.v1.generation_pb2 import Chunk, Finish, Start
from lockstep.v1.inference_service_pb2 import StreamChatResponse, StreamGenerateResponse

Event = Start | Chunk | Finish

# The largest message that is read: 256 embeddings of 16,384 values, or a long answer with all log-probabilities.
MAX_MESSAGE_BYTES = 64 << 20

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Takes all addresses behind a name in turn, and goes around one that is gone.
    ("grpc.lb_policy_name", "round_robin"),
    # A peer that vanished would else leave a call without a deadline waiting for ever.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

CUT_OFF = "the stream ended without its Finish: it was cut off"


def metadata(api_key: str | None) -> list[tuple[str, str]]:
    """What goes with every call."""
    return [] if api_key is None else [("authorization", f"Bearer {api_key}")]


def event_of(response: StreamChatResponse | StreamGenerateResponse) -> Event | None:
    """What a response carries; None for what a newer server may send."""
    kind = response.WhichOneof("event")
    return None if kind is None else getattr(response, kind)


def text_of(event: Event) -> str:
    """The text that an event adds to the first choice."""
    return event.text if isinstance(event, Chunk) and event.choice == 0 else ""
