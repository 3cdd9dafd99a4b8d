// The page at `/`, in headless Chromium. The cluster has one group of two ranks, and a key.

import assert from "node:assert/strict";
import { after, before, beforeEach, afterEach, test } from "node:test";

import axe from "axe-core";
import { chromium } from "playwright-core";

const { LOCKSTEP_HTTP: url, LOCKSTEP_KEY: key } = process.env;
const [leader, follower] = process.env.LOCKSTEP_RANKS.split(",").map(Number);
const PHONE = { width: 360, height: 640 };
// Two cores run a browser and two ranks.
const PATIENCE_MS = 60_000;

let browser, page, faults;

before(async () => {
  browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox"] });
});

after(() => browser.close());

/** A page in a tab of its own, which has the key unless `withKey` is false; its clock can be advanced `withClock`. */
async function open({ withKey = true, withClock = false, ...options } = {}) {
  const context = await browser.newContext(options);
  context.setDefaultTimeout(PATIENCE_MS);
  page = await context.newPage();
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("console", (message) => message.type() === "error" && faults.push(message.text()));
  await page.addInitScript(() => {
    addEventListener("securitypolicyviolation", (event) => console.error(`violates ${event.violatedDirective}`));
  });
  await page.addInitScript({ content: axe.source });
  if (withClock) await page.clock.install();
  if (withKey) await page.addInitScript((key) => sessionStorage.setItem("key", key), key);
  await page.goto(url);
}

beforeEach(() => {
  faults = [];
});

afterEach(async () => {
  await page.context().close();
  assert.deepEqual(faults, []);
});

const answers = () => page.locator(".assistant .text");
const facts = () => page.locator(".assistant .facts");

async function ask(text) {
  await page.getByLabel("Message").fill(text);
  await page.keyboard.press("Enter");
}

/** Waits until the page says so. */
const sees = (locator, text) => locator.filter({ hasText: text }).first().waitFor();

const answered = () => page.getByRole("button", { name: "Send" }).waitFor();

async function api(path, body) {
  const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
  const response = await fetch(url + path, { method: body ? "POST" : "GET", headers, body: JSON.stringify(body) });
  return response.json();
}

/** Waits until the gateway says so of its only group. */
async function group(wanted) {
  const deadline = Date.now() + PATIENCE_MS;
  for (;;) {
    const [found] = (await api("/cluster")).groups;
    if (wanted(found)) return found;
    assert.ok(Date.now() < deadline, JSON.stringify(found));
  }
}

// First, as whoever runs this starts another follower soon after one has died.
test("a rank that dies and a leader that is silent are shown, and so is that they are back", async () => {
  await open();
  const card = page.locator(".group");
  await sees(card.locator(".state"), "ready");
  await sees(card.locator(".ranks"), /0 joined.*1 joined/s);
  process.kill(follower, "SIGSTOP");
  await sees(card.locator(".ranks"), /1 missing, heard \d+ s ago/);
  await sees(card.locator(".state"), "forming");
  process.kill(follower, "SIGKILL");
  await sees(card.locator(".ranks"), /0 joined.*1 joined/s);
  await sees(card.locator(".state"), "ready");
  await sees(card.locator(".about"), "epoch 2");
  process.kill(leader, "SIGSTOP");
  await sees(card.locator(".state"), "lost");
  process.kill(leader, "SIGCONT");
  await sees(card.locator(".state"), "ready");
  await group(({ state }) => state === "ready");
});

test("a key is asked for in the gateway's words, and works", async () => {
  await open({ withKey: false });
  await sees(page.getByRole("alert"), "an API key is needed");
  await page.getByLabel("API key").fill(key);
  await page.keyboard.press("Tab");
  await sees(page.locator("#summary"), "1 of 1 ready");
  await page.waitForFunction(() => document.getElementById("model").value === "demo");
  assert.equal(await page.locator("#notice").isVisible(), false);
  assert.ok(faults.length > 0 && faults.every((fault) => fault.includes("401")), faults.join("\n"));
  faults = [];
});

test("a conversation is led by keyboard, and answers grow", async () => {
  await open();
  await page.waitForFunction(() => document.activeElement?.id === "input");
  await page.getByLabel("Max tokens").fill("40");
  await page.getByLabel("Temperature").fill("0");
  await page.getByLabel("Message").focus();
  await page.keyboard.type("Name");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("some colours.");
  await page.evaluate(() => {
    window.lengths = new Set();
    const log = document.getElementById("messages");
    new MutationObserver(() => window.lengths.add(log.querySelector(".assistant .text")?.textContent.length)).observe(
      log,
      { subtree: true, characterData: true },
    );
  });
  await page.keyboard.press("Enter");
  await answered();
  assert.ok((await page.evaluate(() => window.lengths.size)) > 10);
  assert.equal(await page.locator(".user .text").textContent(), "Name\nsome colours.");
  await sees(facts(), /^\d+ prompt tokens.* · \d+ generated · [\d.]+ tokens\/s · first after \d+ ms/);
  const messages = [{ role: "user", content: "Name\nsome colours." }];
  const same = await api("/v1/chat/completions", { messages, max_tokens: 40, temperature: 0 });
  assert.equal(await answers().textContent(), same.choices[0].message.content);

  await ask("And one more?");
  await answered();
  assert.equal(await answers().count(), 2);
  const last = page.locator(".assistant").last().getByRole("button", { name: "Regenerate" });
  await last.focus();
  await page.keyboard.press("Enter");
  await answered();
  assert.equal(await answers().count(), 2);
  await page.locator(".user").last().getByRole("button", { name: "Edit" }).click();
  assert.equal(await page.getByLabel("Message").inputValue(), "And one more?");
  assert.equal(await page.locator(".message").count(), 2);
  await page.getByRole("button", { name: "Clear" }).click();
  assert.equal(await page.locator(".message").count(), 0);
});

test("the cluster shows a generation, and Escape ends it everywhere", async () => {
  await open();
  // The model may say little; what goes on is the same.
  await page.route("**/v1/chat/completions", (route) => {
    return route.continue({ postData: { ...route.request().postDataJSON(), ignore_eos: true } });
  });
  await ask("Tell me a story about a river.");
  await sees(page.locator(".sequences"), "1 running");
  await sees(page.locator(".step"), /ms, \d+ tokens\/s/);
  await sees(answers(), /\w/);
  await page.keyboard.press("Escape");
  await sees(facts(), "stopped");
  await answered();
  await group(({ report }) => report.running_sequences === 0);
  await sees(page.locator(".sequences"), "0 running");
  assert.equal(await page.evaluate(() => document.activeElement.id), "input");
});

test("what was changed is sent, and nothing else", async () => {
  await open();
  await page.waitForFunction(() => document.querySelector("[name=temperature]").placeholder === "1");
  const bodies = [];
  await page.route("**/v1/chat/completions", (route) => {
    bodies.push(route.request().postDataJSON());
    return route.continue();
  });
  const always = { model: "demo", stream: true, stream_options: { include_usage: true } };
  await page.getByLabel("Max tokens").fill("3");
  await ask("Hello");
  await answered();
  const messages = [{ role: "user", content: "Hello" }];
  assert.deepEqual(bodies.pop(), { ...always, messages, max_tokens: 3 });
  await page.getByRole("button", { name: "Clear" }).click();
  await page.getByLabel("System prompt").fill("Be brief.");
  const values = { Temperature: "0.5", "Top p": "0.9", "Top k": "40", "Min p": "0.05", "Repetition penalty": "1.1" };
  for (const [label, value] of Object.entries({ ...values, Seed: "7" })) await page.getByLabel(label).fill(value);
  await page.getByLabel("Stop strings").fill("END\nSTOP");
  await ask("Hello");
  await answered();
  assert.deepEqual(bodies.pop(), {
    ...always,
    messages: [{ role: "system", content: "Be brief." }, ...messages],
    temperature: 0.5,
    max_tokens: 3,
    top_p: 0.9,
    top_k: 40,
    min_p: 0.05,
    repetition_penalty: 1.1,
    seed: 7,
    stop: ["END", "STOP"],
  });
  await page.getByRole("button", { name: "Reset" }).click();
  assert.equal(await page.getByLabel("Top p").inputValue(), "");
});

test("what is wrong is said in the gateway's words", async () => {
  await open();
  await page.getByLabel("Temperature").fill("hot");
  await ask("Hello");
  await sees(page.locator(".assistant .error"), "temperature");
  await page.getByLabel("Temperature").fill("1000");
  await page.getByRole("button", { name: "Regenerate" }).click();
  await sees(page.locator(".assistant .error"), /temperature: 1000 is not in/);
  assert.equal(faults.length, 2, "Chromium notes answers of 400");
  faults = [];
});

test("the prompt and its tokens are those of the API", async () => {
  await open();
  await page.getByLabel("Message").fill("What is  <b>1+1</b>?\nTell me. 🦀");
  await page.getByRole("button", { name: "Prompt" }).click();
  const chips = page.locator("#prompt-tokens li");
  await chips.first().waitFor();
  const messages = [{ role: "user", content: "What is  <b>1+1</b>?\nTell me. 🦀" }];
  const { tokens, token_strs: texts } = await api("/tokenize", { messages, return_token_strs: true });
  assert.deepEqual((await chips.locator("small").allTextContents()).map(Number), tokens);
  const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "↵");
  assert.deepEqual(await chips.locator("span").allTextContents(), texts.map(visible));
  const { prompt } = await api("/detokenize", { tokens });
  assert.equal(await page.locator("#prompt-text").textContent(), prompt);
  assert.ok(prompt.includes("<b>1+1</b>?\nTell me. 🦀"));
  await page.keyboard.press("Escape");
  assert.equal(await page.locator("#prompt").isVisible(), false);
});

test("hostile text is text", async () => {
  await open();
  const hostile = `<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"><a href="javascript:1">x</a>`;
  const piece = (text) => `data: ${JSON.stringify({ choices: [{ delta: { content: text } }] })}\n\n`;
  await page.route("**/v1/chat/completions", (route) => {
    const body = [...hostile].map(piece).join("") + `data: {"error": {"message": ${JSON.stringify(hostile)}}}\n\n`;
    return route.fulfill({ body, contentType: "text/event-stream" });
  });
  await ask(hostile);
  await sees(page.locator(".assistant .error"), "hacked");
  for (const said of [page.locator(".user .text"), answers(), page.locator(".assistant .error")]) {
    assert.equal(await said.textContent(), hostile);
    assert.equal(await said.locator("*").count(), 0);
  }
  await page.getByRole("button", { name: "Prompt" }).click();
  await sees(page.locator("#prompt-text"), "hacked");
  assert.equal(await page.locator("#prompt script, #prompt img").count(), 0);
  assert.equal(await page.evaluate(() => window.hacked), undefined);
});

test("an answer that is cut says so", async () => {
  await open();
  const body = `data: ${JSON.stringify({ choices: [{ delta: { content: "Half a" } }] })}\n\n`;
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ body, contentType: "text/event-stream" }));
  await ask("Hello");
  await sees(page.locator(".assistant .error"), "The answer was cut off.");
  assert.equal(await answers().textContent(), "Half a");
});

test("nobody is asked while nobody looks", async () => {
  await open({ withClock: true });
  await sees(page.locator("#summary"), "1 of 1 ready");
  let asked = 0;
  await page.route("**/cluster", (route) => {
    asked += 1;
    return route.continue();
  });
  const look = (hidden) =>
    page.evaluate((hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }, hidden);
  await look(true);
  await page.clock.runFor(10_000);
  assert.ok(asked <= 1, `asked ${asked} times, and once at most it was on its way`);
  const lookedAt = page.waitForRequest("**/cluster");
  await look(false);
  await lookedAt;
});

for (const colorScheme of ["light", "dark"]) {
  test(`a phone shows everything, and nothing keeps anybody out (${colorScheme})`, async () => {
    await open({ viewport: PHONE, colorScheme });
    await ask("Hello, who are you? ".repeat(20) + "x".repeat(200));
    await sees(answers(), /\w/);
    await page.keyboard.press("Escape");
    await answered();
    const check = async (what) => {
      const [width, room] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
      assert.ok(width <= room, `${what}: ${width} > ${room}`);
      const { violations } = await page.evaluate(() => axe.run());
      assert.deepEqual(violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)]), [], what);
    };
    await check("chat");
    for (const view of ["Settings", "Cluster"]) {
      await page.getByRole("link", { name: view }).click();
      await page.getByRole("heading", { name: view }).waitFor();
      await check(view);
    }
    await page.getByRole("link", { name: "Chat" }).click();
    await page.getByRole("button", { name: "Prompt" }).click();
    await page.locator("#prompt-tokens li").first().waitFor();
    await check("prompt");
    await page.keyboard.press("Escape");
    await page.setViewportSize({ width: 1280, height: 800 });
    await check("desktop");
  });
}
