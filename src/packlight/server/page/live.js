// The engine now: /stats once a second while the page is looked at.

import { getJson, ServerError } from "/page/api.js";
import { byId, drawn } from "/page/dom.js";
import { formatNumber, formatShare, grouped } from "/page/format.js";

const PERIOD_MS = 1000;
const KEPT = 60; // samples, a minute

/** Poll until the page is closed; a hidden page asks nothing. */
export function startLive() {
  const rates = [];
  let round = 0; // a later round ends the earlier one, also while that waits for an answer
  const poll = async (mine) => {
    while (mine === round) {
      await look(rates);
      await new Promise((resume) => setTimeout(resume, PERIOD_MS));
    }
  };
  const turn = () => {
    round += 1;
    if (!document.hidden) poll(round);
  };
  document.addEventListener("visibilitychange", turn);
  turn();
}

async function look(rates) {
  try {
    const stats = await getJson("/stats", AbortSignal.timeout(5 * PERIOD_MS));
    rates.push(stats.tokens_per_second);
    if (rates.length > KEPT) rates.shift();
    show(stats, rates);
    say(stats.running + stats.waiting ? "at work" : "idle", true);
  } catch (error) {
    if (!(error instanceof ServerError || error instanceof DOMException)) throw error; // DOMException: it took too long
    say(error.status === 401 ? "asks for an API key" : "no answer", false);
  }
}

function say(words, isFresh) {
  byId("live-state").textContent = words;
  byId("live").classList.toggle("stale", !isFresh);
}

function show(stats, rates) {
  byId("rate").textContent = stats.tokens_per_second.toFixed(1);
  byId("running").textContent = stats.running;
  byId("waiting").textContent = stats.waiting;
  showCache(stats.kv_tokens, stats.kv_capacity_tokens);
  byId("totals").textContent = totals(stats);
  drawSpark(byId("spark"), rates);
}

function showCache(used, capacity) {
  const share = capacity ? used / capacity : 0;
  byId("kv").textContent = capacity ? `${grouped(used)} of ${grouped(capacity)} tokens, ${formatShare(share)}` : "–";
  byId("kv-bar").toggleAttribute("hidden", !capacity);
  byId("kv-bar").querySelector(".fill").setAttribute("width", String(100 * Math.min(1, share)));
}

function totals({ generated_tokens, prompt_tokens, reused_tokens, preemptions }) {
  const parts = [`${grouped(generated_tokens)} tokens written`, `${grouped(prompt_tokens)} read`];
  if (reused_tokens) parts.push(`${grouped(reused_tokens)} of them reused`);
  if (preemptions) parts.push(`${grouped(preemptions)} put back`);
  return parts.join(", ");
}

/** A line with its area, newest at the right; the scale begins at zero. */
function drawSpark(svg, values) {
  const { width, height } = svg.viewBox.baseVal;
  const top = Math.max(1, ...values);
  const points = values.map((value, place) => {
    const x = width - ((values.length - 1 - place) * width) / (KEPT - 1);
    return `${x.toFixed(1)},${(height - 1 - (value / top) * (height - 4)).toFixed(1)}`;
  });
  const first = points[0].split(",")[0];
  svg.replaceChildren(
    drawn("polygon", { class: "area", points: `${first},${height} ${points.join(" ")} ${width},${height}` }),
    drawn("polyline", { class: "line", points: points.join(" ") }),
  );
  svg.setAttribute("aria-label", `Tokens per second in the last minute, at most ${formatNumber(Math.max(...values))}`);
}
