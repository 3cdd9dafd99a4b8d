// The `openai` SDK for Node: streaming helpers, structured parse, tool runner.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.env.LOCKSTEP_HTTP}/v1`, apiKey: "none", maxRetries: 0 });
const model = process.env.LOCKSTEP_MODEL;
const ask = (content) => [{ role: "user", content }];

test("a stream says what the whole answer says", async () => {
  const wanted = { model, messages: ask("Name a colour."), max_completion_tokens: 12, temperature: 0 };
  const whole = await client.chat.completions.create(wanted);
  const runner = client.chat.completions.stream(wanted);
  let text = "";
  runner.on("content", (delta) => (text += delta));
  assert.equal(await runner.finalContent(), whole.choices[0].message.content);
  assert.equal(text, whole.choices[0].message.content);
});

test("a stream that is left ends", async () => {
  const wanted = { model, messages: ask("Count to a thousand."), max_completion_tokens: 2000, stream: true };
  const stream = await client.chat.completions.create(wanted);
  for await (const _ of stream) break;
  assert.ok(stream.controller.signal.aborted);
});

test("an answer is parsed into a type", async () => {
  const Capital = z.object({ city: z.string(), inEurope: z.boolean() });
  const answer = await client.chat.completions.parse({
    model,
    messages: ask("What is the capital of France?"),
    response_format: zodResponseFormat(Capital, "capital"),
    temperature: 0,
    max_completion_tokens: 200,
  });
  assert.equal(typeof answer.choices[0].message.parsed.city, "string");
  assert.equal(typeof answer.choices[0].message.parsed.inEurope, "boolean");
});

test("the tool runner calls functions", async () => {
  const called = [];
  const tool = zodFunction({
    name: "get_weather",
    description: "The weather in a city.",
    parameters: z.object({ city: z.enum(["Rome", "Oslo"]) }),
    function: ({ city }) => {
      called.push(city);
      return { degrees: 31 };
    },
  });
  const runner = client.chat.completions.runTools({
    model,
    messages: ask("Is it hot in Rome?"),
    tools: [tool],
    tool_choice: { type: "function", function: { name: "get_weather" } },
    temperature: 0,
  });
  await runner.done();
  assert.equal(called.length, 1);
  assert.ok(["Rome", "Oslo"].includes(called[0]));
});

test("responses are streamed", async () => {
  const wanted = { model, input: "Name a colour.", max_output_tokens: 12, temperature: 0 };
  const whole = await client.responses.create(wanted);
  let text = "";
  const stream = client.responses.stream(wanted).on("response.output_text.delta", (event) => (text += event.delta));
  const final = await stream.finalResponse();
  assert.equal(final.output_text, whole.output_text);
  assert.equal(text, whole.output_text);
});

test("what is wrong is named", async () => {
  const wrong = client.chat.completions.create({ model, messages: ask("x"), top_p: 2 });
  await assert.rejects(wrong, (error) => error.status === 400 && error.param === "top_p");
});
