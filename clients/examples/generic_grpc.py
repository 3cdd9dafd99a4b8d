"""A streamed answer over gRPC from nothing but an address: the server describes its contract by reflection."""

import os

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

ASKED = {
    "conversation": {
        "messages": [
            {"role": "ROLE_USER", "content": [{"text": "What is the capital of France? Answer in one sentence."}]}
        ]
    },
    "sampling": {"maxNewTokens": 32},
}

with grpc.insecure_channel(os.environ.get("LOCKSTEP_GRPC", "127.0.0.1:50051")) as channel:
    contract = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    method = contract.FindServiceByName("lockstep.v1.InferenceService").FindMethodByName("StreamChat")
    call = channel.unary_stream(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    for response in call(ParseDict(ASKED, GetMessageClass(method.input_type)()), timeout=60):
        match response.WhichOneof("event"):
            case "start":
                print(f"{response.start.model}, {response.start.prompt_tokens} tokens:")
            case "chunk":
                print(response.chunk.text, end="", flush=True)
            case "finish":
                print(f"\n{response.finish.usage.completion_tokens} tokens, seed {response.finish.repro.seed}")
