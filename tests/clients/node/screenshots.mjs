// Makes the pictures of README.md from a cluster that runs: `make up WORLD_SIZE=2`, then this, with LOCKSTEP_HTTP if the
// gateway is not at its default address.

import { chromium } from "playwright-core";

const url = process.env.LOCKSTEP_HTTP ?? "http://127.0.0.1:8080";
const folder = new URL("../../../docs/images/", import.meta.url).pathname;

const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox"] });

async function open(options) {
  const page = await (await browser.newContext(options)).newPage();
  await page.goto(url);
  await page.waitForFunction(() => document.getElementById("summary").textContent);
  return page;
}

async function ask(page, question, settings) {
  for (const [name, value] of Object.entries(settings)) await page.locator(`[name=${name}]`).evaluate(fill, value);
  await page.getByLabel("Message").fill(question);
  await page.keyboard.press("Enter");
}

function fill(input, value) {
  input.value = value;
}

async function answered(page) {
  await page.getByRole("button", { name: "Send" }).waitFor();
}

// While it answers, so that the cluster has something to do.
const desktop = await open({ viewport: { width: 1280, height: 800 }, colorScheme: "light" });
await ask(desktop, "What is the capital of France? Answer in one sentence.", { temperature: 0.2, seed: 7 });
await answered(desktop);
const letter = "Write a long letter to a friend about a week in Paris, day by day.";
await ask(desktop, letter, { temperature: 0.8, seed: 1 });
await desktop.locator(".step", { hasText: "tokens/s" }).waitFor();
await desktop.locator(".sequences", { hasText: "1 running" }).waitFor();
await desktop.screenshot({ path: `${folder}page.png` });
await desktop.keyboard.press("Escape");
await answered(desktop);

const phone = await open({ viewport: { width: 390, height: 720 }, colorScheme: "dark", deviceScaleFactor: 1.5 });
await ask(phone, "What is the capital of France? Answer in one sentence.", { temperature: 0.2, seed: 7 });
await answered(phone);
await phone.getByRole("button", { name: "Prompt" }).click();
await phone.locator("#prompt-tokens li").first().waitFor();
await phone.screenshot({ path: `${folder}page-phone.png` });

await browser.close();
