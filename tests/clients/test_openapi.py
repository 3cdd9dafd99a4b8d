"""Schemathesis makes up requests from `/openapi.json`, right and wrong ones, and checks every answer against it."""

import math
import os
import re
import struct

import schemathesis

CONFIG = schemathesis.Config.from_dict(
    {
        "seed": 1,
        "headers": {"Authorization": f"Bearer {os.environ['LOCKSTEP_KEY']}"},
        "generation": {"max-examples": 30, "no-shrink": True, "database": "none"},
        "request-timeout": 30,
    }
)

# What holds for this cluster's model and under its operator's policy (`policy.toml`), which the document is not about.
TOKEN_ID = {"maximum": 49_151}
LENGTH = {"maximum": 16}
FIELDS = {
    "model": {"enum": ["demo", "", None]},
    "max_tokens": LENGTH,
    "max_output_tokens": LENGTH,
    "max_new_tokens": LENGTH,
    "min_tokens": LENGTH,
    "n": {"maximum": 2},
    "top_k": {"maximum": 49_152},
    "logit_bias": {"patternProperties": {"^[1-9][0-9]{0,3}$": {"type": "number", "minimum": -100, "maximum": 100}}},
    "dimensions": {"maximum": 576},
    # These must agree with others, and hide what else is wrong where they do not.
    "max_completion_tokens": {"enum": [None]},
    "best_of": {"enum": [None]},
}

# What a valid request may be refused for all the same, since no schema can say it, and what each message has in it.
BEYOND_SCHEMAS = {
    "a text may have no tokens": "the text has no tokens",
    "a number may contradict another": "is over max_new_tokens",
    "tools have names": "no tool has this name|another tool has this name",
    "a text may not be JSON": "arguments: not a JSON object",
    "a constraint may allow nothing": "Unsatisfiable schema|allows no text (but the empty one|that goes on from here)",
    "the rules that are left out below": "cannot be true together with add_generation_prompt|allows no calls of tools",
    "there may be more of all this": "^and [0-9]+ more$",
}

# The smallest number of 32 bits that has all of them.
SMALLEST = 2.0**-126


def narrow(value):
    if isinstance(value, list):
        for item in value:
            narrow(item)
    elif isinstance(value, dict):
        for name, limits in FIELDS.items():
            # Rules name fields, too; where one is declared, it is described.
            if "description" in (field := value.get("properties", {}).get(name, {})):
                field.update(limits)
        if value.get("items", {}).get("format") == "uint32":
            value["items"].update(TOKEN_ID)
        for item in value.values():
            narrow(item)


@schemathesis.hook
def before_load_schema(context, raw_schema):
    schemas = raw_schema["components"]["schemas"]
    narrow([schemas[name] for name in schemas if name.endswith("Request") or name == "GenerateParameters"])
    # Schemathesis does not combine more than four rules of a schema.
    schemas["ChatRequest"]["allOf"] = schemas["ChatRequest"]["allOf"][:4]


def as_read(value):
    """A value as the gateway reads it. Integers are written without a point, which is all the same to JSON Schema. Other
    numbers are read in 32 bits: rounded away from 0 they stay on their side of every limit, and small ones are not 0."""
    if isinstance(value, dict):
        return {name: as_read(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_read(item) for item in value]
    if not isinstance(value, float) or not abs(value) < 2**63:
        return value
    if value.is_integer():
        return int(value)
    single = struct.unpack("f", struct.pack("f", value))[0]
    if abs(single) < abs(value):
        single = struct.unpack("f", struct.pack("I", struct.unpack("I", struct.pack("f", single))[0] + 1))[0]
    return math.copysign(max(abs(single), SMALLEST), value)


@schemathesis.hook
def before_call(context, case, kwargs):
    case.body = as_read(case.body)


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """Whether a failure counts."""
    if type(failure).__name__ != "RejectedPositiveData" or response.status_code not in (400, 422):
        return True
    error = response.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    beyond = re.compile("|".join(BEYOND_SCHEMAS.values()))
    return not all(beyond.search(violation) for violation in message.split("; "))


schema = schemathesis.openapi.from_url(f"{os.environ['LOCKSTEP_HTTP']}/openapi.json", config=CONFIG)


@schema.parametrize()
def test_answers_are_as_described(case):
    case.call_and_validate()
