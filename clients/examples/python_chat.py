"""A conversation over gRPC, with the package `lockstep-client`."""

import os

import lockstep

with lockstep.Client(os.environ.get("LOCKSTEP_GRPC", "127.0.0.1:50051"), timeout=60) as client:
    conversation = [("system", "Answer in one sentence.")]
    for question in ["What is the capital of France?", "What is it famous for?"]:
        conversation.append(("user", question))
        answer = ""
        print(f"> {question}")
        for piece in client.stream_chat(conversation, max_new_tokens=48, seed=7):
            answer += piece
            print(piece, end="", flush=True)
        print()
        conversation.append(("assistant", answer))

    try:
        client.chat("Hello", top_p=2)
    except lockstep.Error as error:
        print(error.reason, error.violations)
