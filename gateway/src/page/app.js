// The chat. It is also an example of the API: all that it does goes through /v1/chat/completions, /v1/models, /tokenize
// and /detokenize. Whatever a model or a server says becomes a text node, never markup.

import { watchCluster } from "./cluster.js";

const $ = (id) => document.getElementById(id);

/** Tokens that are shown of a prompt. */
const MAX_TOKENS_SHOWN = 5000;

/** An answer that is no 2xx, in the gateway's own words. */
class Refused extends Error {}

/** Calls the gateway: GET without a body. */
async function call(path, body, signal) {
  const headers = { "content-type": "application/json" };
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  const method = body ? "POST" : "GET";
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  if (response.ok) return response;
  const text = await response.text();
  throw new Refused(messageOf(text) ?? `${response.status} ${response.statusText}`);
}

async function ask(path, body, signal) {
  return (await call(path, body, signal)).json();
}

/** What an error says, if it is one of OpenAI's shape. */
function messageOf(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return undefined;
  }
}

/** Words for people: the gateway's if it has answered. */
function describe(error) {
  return error instanceof Refused ? error.message : `The gateway does not answer (${error.message}).`;
}

function show(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

// --- Settings ---

/** A number as it was typed. What is none, or would lose digits, goes as text: the gateway says what is wrong with it. */
function number(text) {
  const value = Number(text);
  return !Number.isFinite(value) || (Number.isInteger(value) && !Number.isSafeInteger(value)) ? text : value;
}

/** The parameters that were changed. */
function sampling() {
  const changed = {};
  for (const { name, value } of $("sampling").querySelectorAll("input")) {
    if (value.trim()) changed[name] = number(value.trim());
  }
  const stop = $("stop-strings").value.split("\n").filter((line) => line);
  if (stop.length) changed.stop = stop;
  return changed;
}

let models = [];

async function loadModels() {
  try {
    models = (await ask("/v1/models")).data;
    const chosen = $("model").value;
    $("model").replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === chosen)));
    show($("notice"), models.length ? "" : "No model is served yet.");
  } catch (error) {
    show($("notice"), describe(error));
  }
  showDefaults();
}

function showDefaults() {
  const defaults = models.find(({ id }) => id === $("model").value)?.sampling_defaults ?? {};
  for (const input of $("sampling").querySelectorAll("input")) {
    const unset = { seed: "random", max_tokens: "what fits" }[input.name] ?? "";
    input.placeholder = defaults[input.name] ?? unset;
  }
}

// --- The conversation ---

/** What was said: `role`, `content`, and the `article` that shows it. */
const turns = [];

/** Ends the answer that is being generated, if one is. */
let generating;

function addTurn(role, who, content) {
  const article = $("message").content.cloneNode(true).firstElementChild;
  article.classList.add(role);
  article.querySelector(".who").textContent = who;
  const text = article.querySelector(".text");
  text.append(content);
  const turn = { role, content, article, text: text.firstChild };
  turns.push(turn);
  $("messages").append(article);
  showActions();
  return turn;
}

function removeTurns(from) {
  for (const turn of turns.splice(from)) turn.article.remove();
  showActions();
}

/** The last question can be edited, the last answer made anew. */
function showActions() {
  const question = turns.findLastIndex(({ role }) => role === "user");
  turns.forEach(({ role, article }, index) => {
    const button = article.querySelector(".action");
    const isAnswer = role === "assistant";
    button.textContent = isAnswer ? "Regenerate" : "Edit";
    button.hidden = Boolean(generating) || (isAnswer ? index !== turns.length - 1 : index !== question);
    button.onclick = isAnswer ? regenerate : edit;
  });
}

function regenerate() {
  removeTurns(turns.length - 1);
  $("input").focus();
  answer();
}

function edit() {
  const question = turns.findLastIndex(({ role }) => role === "user");
  $("input").value = turns[question].content;
  removeTurns(question);
  $("input").focus();
}

/** The conversation as the API has it. An answer of which nothing came is none. */
function messages() {
  const system = $("system").value.trim();
  const said = turns.map(({ role, content }) => ({ role, content })).filter(({ content }) => content);
  return system ? [{ role: "system", content: system }, ...said] : said;
}

/** Objects of a stream of server-sent events. One that ends without `[DONE]` was cut. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused("The answer was cut off.");
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice("data:".length).trim();
      if (data === "[DONE]") return;
      const message = messageOf(data);
      if (message) throw new Refused(message);
      yield JSON.parse(data);
    }
  }
}

async function answer() {
  const model = $("model").value;
  const body = { model, messages: messages(), ...sampling(), stream: true, stream_options: { include_usage: true } };
  generating = new AbortController();
  showGenerating();
  const turn = addTurn("assistant", model, "");
  const facts = turn.article.querySelector(".facts");
  facts.textContent = "…";
  const times = { sent: performance.now() };
  const seen = {};
  try {
    const response = await call("/v1/chat/completions", body, generating.signal);
    for await (const event of events(response)) take(event, turn, times, seen);
  } catch (error) {
    if (error.name === "AbortError") seen.reason = "stopped";
    else show(turn.article.querySelector(".error"), describe(error));
  }
  facts.textContent = factsOf(times, seen);
  generating = undefined;
  showGenerating();
}

/** Takes one event of an answer in. */
function take(event, turn, times, seen) {
  const piece = event.choices[0];
  const text = piece?.delta.content;
  if (text) {
    times.first ??= performance.now();
    times.last = performance.now();
    const atEnd = isAtEnd();
    turn.content += text;
    turn.text.appendData(text);
    if (atEnd) scrollToEnd();
  }
  seen.reason = piece?.finish_reason ?? seen.reason;
  seen.usage = event.usage ?? seen.usage;
}

/** How an answer went, in one line. */
function factsOf({ sent, first, last }, { reason, usage }) {
  const facts = [];
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    facts.push(`${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} cached)` : ""}`);
    facts.push(`${usage.completion_tokens} generated`);
    if (last > first) facts.push(`${((usage.completion_tokens - 1) / (last - first) * 1000).toFixed(1)} tokens/s`);
  }
  if (first) facts.push(`first after ${Math.round(first - sent)} ms`);
  if (reason === "length") facts.push("cut at its greatest length");
  if (reason === "stopped") facts.push("stopped");
  return facts.join(" · ");
}

function showGenerating() {
  $("send").hidden = Boolean(generating);
  $("stop").hidden = !generating;
  // Readers of screens hear an answer once it is whole.
  $("messages").setAttribute("aria-busy", String(Boolean(generating)));
  showActions();
  scrollToEnd();
}

function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = $("messages");
  return scrollHeight - scrollTop - clientHeight < 40;
}

function scrollToEnd() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function send(event) {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || generating) return;
  $("input").value = "";
  addTurn("user", "You", text);
  answer();
}

function stop() {
  if (!generating) return;
  generating.abort();
  $("input").focus();
}

// --- The prompt ---

/** The conversation up to the question that is being written, or else the last one that was asked. */
function prompt() {
  const text = $("input").value.trim();
  const said = messages();
  if (text) return [...said, { role: "user", content: text }];
  return said.slice(0, said.findLastIndex(({ role }) => role === "user") + 1);
}

async function showPrompt() {
  $("prompt").showModal();
  $("prompt-body").hidden = true;
  const model = $("model").value;
  try {
    const messages = prompt();
    if (!messages.length) throw new Refused("Write a message first: it has no prompt yet.");
    const { tokens, token_strs: texts } = await ask("/tokenize", { model, messages, return_token_strs: true });
    const { prompt: rendered } = await ask("/detokenize", { model, tokens });
    $("prompt-text").textContent = rendered;
    const more = tokens.length > MAX_TOKENS_SHOWN ? `, the first ${MAX_TOKENS_SHOWN} of them here` : "";
    $("prompt-count").textContent = `${tokens.length} tokens${more}`;
    $("prompt-tokens").replaceChildren(...tokens.slice(0, MAX_TOKENS_SHOWN).map((id, index) => chip(id, texts[index])));
    $("prompt-body").hidden = false;
    show($("prompt-error"), "");
  } catch (error) {
    show($("prompt-error"), describe(error));
  }
}

function chip(id, text) {
  const [item, shown, number] = ["li", "span", "small"].map((tag) => document.createElement(tag));
  shown.textContent = text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→");
  number.textContent = id;
  item.append(shown, " ", number);
  return item;
}

// --- Wiring ---

function showView() {
  const view = location.hash.slice(1);
  if (!["chat", "settings", "cluster"].includes(view)) return;
  document.body.dataset.view = view;
  markView();
}

function markView() {
  for (const link of document.querySelectorAll("nav a")) {
    const isCurrent = link.hash === `#${document.body.dataset.view}`;
    isCurrent ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
}

$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  loadModels();
});
$("model").addEventListener("change", showDefaults);
$("composer").addEventListener("submit", send);
$("input").addEventListener("keydown", (event) => {
  // Enter also ends the composition of a character, which is no message yet.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("prompt").open) stop();
});
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", () => {
  stop();
  removeTurns(0);
  $("input").focus();
});
$("show-prompt").addEventListener("click", showPrompt);
$("close-prompt").addEventListener("click", () => $("prompt").close());
addEventListener("hashchange", showView);
markView();
showView();
await loadModels();
$("input").focus();
await watchCluster(ask, describe, (nReady) => {
  // The page may have been opened before there was a model.
  if (nReady && !models.length) loadModels();
});
