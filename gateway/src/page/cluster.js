// The live picture of the cluster: /cluster, each second, while somebody can see it.

const $ = (id) => document.getElementById(id);

const INTERVAL_MS = 1000;
const TIMEOUT_MS = 5000;
/** Points of a curve: a minute. */
const N_POINTS = 60;

const integer = new Intl.NumberFormat("en");

const WORDS = {
  ready: "ready",
  forming: "forming",
  draining: "draining",
  lost: "lost",
  unknown: "not seen yet",
  joined: "joined",
  waiting: "waiting",
  missing: "missing",
};

const BREAKERS = {
  open: "Left alone for a while: requests failed here.",
  half_open: "Requests failed here; one tries whether it works again.",
};

/** By address: the card of a group, the curve of its steps, and what it had generated when. */
const cards = new Map();

/** Draws what `ask` answers, for ever, and tells `seen` how many groups are ready. */
export async function watchCluster(ask, describe, seen) {
  for (;;) {
    await visible();
    try {
      seen(draw(await ask("/cluster", undefined, AbortSignal.timeout(TIMEOUT_MS))));
      report("");
    } catch (error) {
      report(describe(error));
    }
    await new Promise((resolve) => setTimeout(resolve, INTERVAL_MS));
  }
}

/** Resolves once the page can be seen. */
function visible() {
  return new Promise((resolve) => {
    if (!document.hidden) return resolve();
    document.addEventListener("visibilitychange", resolve, { once: true });
  });
}

function report(error) {
  $("cluster-error").textContent = error;
  $("cluster-error").hidden = !error;
  $("groups").classList.toggle("stale", Boolean(error));
  if (error) $("summary").textContent = "";
}

/** Gives the number of groups that are ready. */
function draw({ version, groups }) {
  $("version").textContent = version;
  const ready = groups.filter(({ state }) => state === "ready");
  const running = ready.reduce((sum, { report }) => sum + report.running_sequences, 0);
  $("summary").textContent = `${ready.length} of ${groups.length} ready · ${running} running`;
  groups.forEach(drawGroup);
  return ready.length;
}

function drawGroup(group) {
  if (!cards.has(group.address)) {
    const element = $("group").content.cloneNode(true).firstElementChild;
    cards.set(group.address, { element, points: [], generated: undefined, at: undefined });
    $("groups").append(element);
  }
  const card = cards.get(group.address);
  const set = (name, text) => (card.element.querySelector(`.${name}`).textContent = text);
  const { report } = group;
  card.element.dataset.state = group.state;
  set("address", group.address);
  set("state", WORDS[group.state]);
  set("breaker", BREAKERS[group.breaker] ?? "");
  card.element.querySelector(".breaker").hidden = group.breaker === "closed";
  card.element.classList.toggle("bare", !report);
  if (!report) return;
  set("model", report.model);
  const digest = report.model_digest.slice(0, 12);
  set("about", `${report.device} · epoch ${report.epoch} · version ${report.engine_version} · digest ${digest}`);
  drawRanks(card.element.querySelector(".ranks"), report.ranks, group.state);
  set("sequences", `${report.running_sequences} running, ${report.waiting_sequences} waiting`);
  drawLoad(card.element, set, group);
  drawCache(card.element, set, report.kv_blocks);
  drawSteps(card, set, group);
}

function drawRanks(list, ranks, groupState) {
  const cells = ranks.map(({ rank, state, silent_s: silent }) => {
    const cell = document.createElement("li");
    // Of a lost group nobody knows how its ranks are.
    const now = groupState === "lost" ? "lost" : state;
    cell.dataset.state = now;
    const heard = now === "missing" && silent !== null ? `, heard ${silent} s ago` : "";
    const number = document.createElement("b");
    number.textContent = rank;
    cell.append(number, ` ${WORDS[now]}${heard}`);
    return cell;
  });
  list.replaceChildren(...cells);
}

/** What is to be done, beside what the cache can hold: at the end of the bar sequences may have to wait. */
function drawLoad(element, set, { report, own_tokens: own }) {
  const { outstanding_tokens: outstanding, kv_blocks: blocks } = report;
  const room = blocks.total * blocks.size;
  set("load", `${plural(outstanding, "token")} at most`);
  set("own", `${integer.format(own)} given by this gateway`);
  drawBar(element.querySelector(".load-bar"), [Math.min(outstanding, room), Math.max(room - outstanding, 0)]);
}

function drawCache(element, set, { total, free, cached, size }) {
  const used = total - free - cached;
  set("kv", `${percent(used, total)} used`);
  set("blocks", `${integer.format(used)} used, ${integer.format(cached)} cached, ${integer.format(free)} free of ` +
    `${integer.format(total)} blocks of ${size} tokens`);
  drawBar(element.querySelector(".kv-bar"), [used, cached, free]);
}

function drawBar(bar, parts) {
  parts.forEach((part, index) => (bar.children[index].style.flexGrow = part));
}

function drawSteps(card, set, { state, report }) {
  const now = performance.now();
  const tokens = report.generated_tokens - (card.generated ?? report.generated_tokens);
  // A leader that began anew counts from 0.
  const rate = Math.max(tokens, 0) / ((now - (card.at ?? now)) / 1000 || 1);
  const isBusy = state !== "lost" && tokens > 0;
  const step = report.decode_step_ms;
  [card.generated, card.at] = [report.generated_tokens, now];
  card.points = [...card.points, isBusy ? step ?? 0 : 0].slice(-N_POINTS);
  const mean = step === null ? "none yet" : `${step.toFixed(1)} ms`;
  set("step", isBusy ? `${mean}, ${rate.toFixed(0)} tokens/s` : `${mean}, idle`);
  const top = Math.max(...card.points, 1e-9);
  const first = N_POINTS - card.points.length;
  const points = card.points.map((point, index) => `${first + index},${(19 - (point / top) * 18).toFixed(1)}`);
  card.element.querySelector("polyline").setAttribute("points", points.join(" "));
}

function percent(part, whole) {
  return whole ? `${((100 * part) / whole).toFixed(part && part < whole / 10 ? 1 : 0)} %` : "0 %";
}

function plural(count, noun) {
  return `${integer.format(count)} ${noun}${count === 1 ? "" : "s"}`;
}
