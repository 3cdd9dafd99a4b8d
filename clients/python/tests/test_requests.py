"""What Python values become."""

import pytest

from lockstep import Conversation, Role, Sampling, requests
from lockstep.v1.inference_service_pb2 import ChatRequest
from lockstep.v1.sampling_pb2 import OutputOptions, SamplingParams


def test_every_parameter_of_the_contract_is_a_keyword():
    names = [*SamplingParams.DESCRIPTOR.fields_by_name, *OutputOptions.DESCRIPTOR.fields_by_name]
    assert sorted(Sampling.__annotations__) == sorted(names)


def test_keywords_go_where_they_belong():
    request = requests.chat(ChatRequest, "Hi", "m", None, None, stop="x", seed=0, logprobs=2, constraint={"regex": "a"})
    assert list(request.sampling.stop) == ["x"]
    assert request.sampling.HasField("seed") and not request.sampling.HasField("n")
    assert request.sampling.constraint.regex == "a"
    assert request.output.logprobs == 2
    with pytest.raises(ValueError, match="no_such"):
        requests.chat(ChatRequest, "Hi", None, None, None, no_such=1)


def test_messages_in_every_form():
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        ("developer", "Be brief."),
        {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    made = requests.conversation(turns)
    roles = [Role.ROLE_SYSTEM, Role.ROLE_USER, Role.ROLE_ASSISTANT, Role.ROLE_TOOL]
    assert [message.role for message in made.messages] == roles
    assert made.messages[1].content[0].text == "1 + 1?"
    assert made.messages[2].tool_calls[0].arguments_json == '{"a": 1}'
    assert made.messages[3].tool_call_id == "c"
    assert requests.conversation(made) is made
    assert requests.conversation(made.messages) == made
    assert requests.conversation("Hi").messages[0].role == Role.ROLE_USER


def test_tools_keep_the_order_of_their_keys():
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    made = requests.conversation(
        "x", [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}], "required"
    )
    assert made.tools[0].parameters_json == '{"type": "object", "properties": {"z": {}, "a": {}}}'
    assert made.tools[0].strict
    named = requests.conversation("x", [], {"type": "function", "function": {"name": "f"}})
    assert named.tool_choice.name == "f"


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        (["Hi"], TypeError, "a message is a pair"),
        ([("robot", "Hi")], ValueError, "robot"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ValueError, "image_url"),
        ([{"role": "user", "text": "Hi"}], ValueError, "'text'"),
    ],
)
def test_what_is_no_message_is_named(wrong, error, said):
    with pytest.raises(error, match=said):
        requests.conversation(wrong)


def test_what_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="tool_choice"):
        requests.conversation("x", None, "sometimes")
    with pytest.raises(ValueError, match="Conversation"):
        requests.conversation(Conversation(), [])
    with pytest.raises(ValueError, match="either"):
        requests.count_tokens(None, None, None)
    with pytest.raises(TypeError, match="list"):
        requests.embed("x", None, 0, None, None)
