// The artifact's ledger: what was compressed, and what it cost beside the original.

import { drawn, element } from "/page/dom.js";
import { formatDifference, formatNumber, formatShare, formatSize, significant } from "/page/format.js";

const MISSING = "–";

/** What the table shows, in this order, by the name of the ledger's row. */
const QUANTITIES = [
  { name: "disk_bytes", label: "on disk", write: formatSize, means: "The weight files, headers included." },
  { name: "bits_per_weight", label: "bits/weight", write: formatNumber },
  { name: "peak_bytes", label: "peak memory", write: formatSize, means: "What the model adds to the process, at most." },
  { name: "perplexity", label: "perplexity", write: formatNumber, isCompared: true, means: "± its standard error; lower is better." },
  { name: "kl", label: "KL, nats", write: formatNumber, means: "Divergence from the original on the same tokens." },
  { name: "top1", label: "top-1", write: formatShare, hidesSpread: true, means: "How often both name the same likeliest token." },
  { name: "decode_tps", label: "decode, tok/s", write: formatNumber },
  { name: "prefill_tps", label: "prefill, tok/s", write: formatNumber },
  { name: "first_token_s", label: "first token, s", write: formatNumber },
  { name: "second_token_s", label: "second token, s", write: formatNumber },
  { name: "base_bytes", label: "base memory", write: formatSize, means: "Interpreter and torch, apart from the peak above." },
];

/** How it was made and checked: one value each. */
const CHECKS = [
  { name: "job_s", label: "time it took", write: (value) => `${formatNumber(value)} s` },
  { name: "job_peak_bytes", label: "peak memory of the job", write: formatSize },
  { name: "calibration_tokens", label: "tokens it was calibrated on", write: formatNumber },
  { name: "proof_runtime_kl", label: "KL once loaded back, nats", write: formatNumber },
  { name: "proof_transformers_kl", label: "KL in transformers, nats", write: formatNumber },
  { name: "proof_tensors", label: "tensors equal bit for bit", write: formatNumber },
  { name: "greedy_agreement", label: "same greedy tokens", write: formatShare },
];

/** Show what `/evidence` says in a node. */
export function showEvidence(node, { model, recipe, rows }) {
  const ledger = new Ledger(rows);
  if (!ledger.subjects.length && !ledger.spent().length) {
    node.replaceChildren(element("p", { class: "quiet" }, "This model was not compressed by packlight: it has no ledger."));
    return;
  }
  const parts = [summary(ledger, model, recipe), table(ledger), spentTable(ledger, recipe), blockErrors(ledger)];
  parts.push(checks(ledger), recipeText(recipe));
  node.replaceChildren(...parts.filter((part) => part !== null));
}

/** The rows by name and subject; of several for one thing the last counts. */
class Ledger {
  #rows = new Map();

  constructor(rows) {
    this.rows = rows;
    for (const row of rows) this.#rows.set(`${row.name} ${row.subject}`, row);
    const shown = rows.filter((row) => QUANTITIES.some(({ name }) => name === row.name));
    this.subjects = [...new Set(shown.map((row) => row.subject))];
  }

  get(name, subject) {
    return this.#rows.get(`${name} ${subject}`) ?? null;
  }

  /** A number, or null where there is none. */
  number(name, subject) {
    const value = this.get(name, subject)?.value;
    return typeof value === "number" ? value : null;
  }

  /** The last row of a name, whatever its subject. */
  last(name) {
    return this.rows.findLast((row) => row.name === name) ?? null;
  }

  /** What a budget was spent on: `{grid, matrices, bytes, nats}` for each grid, the largest first. */
  spent() {
    const found = new Map();
    for (const row of this.#rows.values()) {
      const [, grid, bytes] = /^([\w-]+), (\d+) bytes/.exec(row.note ?? "") ?? [];
      if (row.name !== "predicted_kl" || !row.subject.endsWith(".weight") || !grid) continue;
      const sum = found.get(grid) ?? { grid, matrices: 0, bytes: 0, nats: 0 };
      sum.matrices += 1;
      sum.bytes += Number(bytes);
      sum.nats += row.value;
      found.set(grid, sum);
    }
    return [...found.values()].sort((a, b) => b.bytes - a.bytes);
  }

  /** The error of each block's output, in the blocks' order. */
  blockErrors() {
    const rows = [...this.#rows.values()].filter(
      (row) => row.name === "relative_output_error" && typeof row.value === "number" && /\.\d+$/.test(row.subject),
    );
    return rows.sort((a, b) => blockNumber(a) - blockNumber(b));
  }
}

function blockNumber({ subject }) {
  return Number(/\d+$/.exec(subject)[0]);
}

/** One sentence of what matters: packed against original. */
function summary(ledger, model, recipe) {
  const pair = (name) => [ledger.number(name, "packed"), ledger.number(name, "original")];
  const parts = [];
  const [size, fullSize] = pair("disk_bytes");
  if (size && fullSize) parts.push(`${formatShare(size / fullSize)} of the bytes`);
  const [rate, fullRate] = pair("decode_tps");
  if (rate && fullRate) parts.push(`${significant(rate / fullRate, 3)} times the decode speed`);
  const [perplexity, fullPerplexity] = pair("perplexity");
  if (perplexity && fullPerplexity) parts.push(`perplexity ${formatDifference(perplexity, fullPerplexity)}`);
  const name = element("strong", {}, recipe?.source?.name ?? model);
  return element("p", { class: "summary" }, name, parts.length ? `, packed: ${parts.join(", ")}.` : ".");
}

function table(ledger) {
  if (!ledger.subjects.length) return null;
  const present = QUANTITIES.filter(({ name }) => ledger.subjects.some((subject) => ledger.get(name, subject)));
  const heads = ledger.subjects.map((subject) => element("th", { scope: "col" }, subject));
  const body = element("tbody", {}, ...present.flatMap((quantity) => tableRows(ledger, quantity)));
  const head = element("thead", {}, element("tr", {}, element("td", {}), ...heads));
  return scrolling(element("table", { class: "ledger" }, head, body), "Measured, beside what was planned");
}

/** The row of a quantity, and the one under it that its button opens. */
function tableRows(ledger, quantity) {
  const id = `why-${quantity.name}`;
  const button = element("button", { type: "button", class: "why", "aria-expanded": "false", "aria-controls": id });
  button.append(quantity.label);
  const cells = ledger.subjects.map((subject) => cell(ledger, quantity, subject));
  const found = ledger.subjects.map((subject) => ledger.get(quantity.name, subject)).filter((row) => row !== null);
  const all = element("td", { colspan: String(1 + ledger.subjects.length) }, explanation(quantity), ...provenances(found));
  const more = element("tr", { id, class: "provenance", hidden: true }, all);
  button.addEventListener("click", () => {
    more.hidden = !more.hidden;
    button.setAttribute("aria-expanded", String(!more.hidden));
  });
  return [element("tr", {}, element("th", { scope: "row" }, button), ...cells), more];
}

function cell(ledger, quantity, subject) {
  const row = ledger.get(quantity.name, subject);
  const made = element("td", {}, written(row, quantity));
  const small = besides(ledger, row, quantity);
  if (small) made.append(element("small", {}, small));
  return made;
}

function written(row, { write, hidesSpread }) {
  if (row === null) return MISSING;
  if ((row.value ?? null) === null) return "failed";
  if (typeof row.value !== "number") return String(row.value);
  const hasSpread = Boolean(row.spread) && !hidesSpread;
  return write(row.value) + (hasSpread ? ` ± ${significant(row.spread, 2)}` : "");
}

/** The plan's claim and how far off it was, or how far this is from the original. */
function besides(ledger, row, { name, write, isCompared }) {
  if (typeof row?.value !== "number") return "";
  if (row.predicted === row.value) return "as planned";
  if (typeof row.predicted === "number") {
    const off = formatDifference(row.value, row.predicted);
    return `plan ${write(row.predicted)}${off && `, ${off}`}`;
  }
  const original = ledger.number(name, "original");
  return isCompared && original && row.subject !== "original" ? formatDifference(row.value, original) : "";
}

function explanation({ means }) {
  return means ? element("p", { class: "means" }, means) : null;
}

/** Where numbers come from; those that come from the same place are told together. */
function provenances(rows) {
  const found = new Map();
  for (const row of rows) {
    const told = JSON.stringify(source(row));
    found.set(told, [...(found.get(told) ?? []), row]);
  }
  return [...found.values()].map((together) => {
    const lines = source(together[0]).map(([term, words]) =>
      element("div", {}, element("dt", {}, term), element("dd", {}, words)),
    );
    const names = together.map(({ subject }) => subject).join(", ");
    return element("div", { class: "source" }, element("p", { class: "of" }, names), element("dl", {}, ...lines));
  });
}

function source({ note, n, command, commit, environment }) {
  const lines = [
    ["note", note],
    ["n", typeof n === "number" ? formatNumber(n) : null],
    ["command", command],
    ["commit", commit],
    ["machine", machine(environment)],
  ];
  return lines.filter(([, words]) => words);
}

function machine(environment) {
  if (!environment) return null;
  const { cpu, threads, torch } = environment;
  const parts = [cpu, threads && `${threads} threads`, torch && `torch ${torch}`];
  return parts.filter(Boolean).join(", ");
}

/** On what the bytes were spent; where every matrix has the same grid the recipe's steps say it. */
function spentTable(ledger, recipe) {
  const spent = ledger.spent();
  if (!spent.length) return steps(recipe);
  const most = Math.max(...spent.map(({ bytes }) => bytes));
  const rows = spent.map(({ grid, matrices, bytes, nats }) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, grid),
      element("td", {}, formatNumber(matrices)),
      element("td", {}, formatSize(bytes), bar(bytes / most)),
      element("td", {}, significant(nats, 2)),
    ),
  );
  const heads = ["grid", "matrices", "in memory", "plan, nats"].map((text) => element("th", { scope: "col" }, text));
  const head = element("thead", {}, element("tr", {}, ...heads));
  const method = (recipe?.steps ?? []).map((step) => step.method).join(", then ");
  const title = element("h3", {}, "What was compressed", method ? element("span", { class: "peek" }, `by ${method}`) : null);
  const body = scrolling(element("table", { class: "spent" }, head, element("tbody", {}, ...rows)), "Matrices by grid");
  return element("div", {}, title, body);
}

function steps(recipe) {
  if (!recipe?.steps?.length) return null;
  const lines = recipe.steps.map((step) => {
    const settings = Object.entries(step).filter(([key, value]) => key !== "method" && ["string", "number"].includes(typeof value));
    return element("li", {}, [step.method, ...settings.map(([key, value]) => `${key} ${value}`)].join(" · "));
  });
  return element("div", {}, element("h3", {}, "What was done"), element("ul", { class: "steps" }, ...lines));
}

function bar(share) {
  const fill = drawn("rect", { class: "fill", x: String(100 - 100 * share), width: String(100 * share), height: "3" });
  return drawn("svg", { class: "bar-line", viewBox: "0 0 100 3", preserveAspectRatio: "none", "aria-hidden": "true" }, fill);
}

/** A bar for each block. */
function blockErrors(ledger) {
  const rows = ledger.blockErrors();
  if (rows.length < 2) return null;
  const most = rows.reduce((best, row) => (row.value > best.value ? row : best));
  const bars = rows.map(({ value }, place) => {
    const height = most.value ? (value / most.value) * 34 : 0;
    return drawn("rect", { class: "fill", x: String(place * 4), y: String(36 - height), width: "3", height: String(height) });
  });
  const words = `${rows.length} blocks; the largest error is ${significant(most.value, 2)}, of ${most.subject}`;
  const box = { viewBox: `0 0 ${rows.length * 4 - 1} 36`, preserveAspectRatio: "none", role: "img", "aria-label": words };
  const title = element("h3", {}, "Error of each block's output");
  return element("figure", { class: "blocks" }, title, drawn("svg", box, ...bars), element("figcaption", {}, words));
}

function checks(ledger) {
  const found = CHECKS.map((quantity) => ({ quantity, row: ledger.last(quantity.name) })).filter(({ row }) => row !== null);
  if (!found.length) return null;
  const lines = found.map(({ quantity, row }) => {
    const small = [besides(ledger, row, quantity), row.note].filter(Boolean).join("; ");
    const value = element("dd", {}, written(row, quantity), small ? element("small", {}, small) : null);
    return element("div", {}, element("dt", {}, quantity.label), value);
  });
  return element("details", {}, element("summary", {}, "How it was made and proved"), element("dl", { class: "checks" }, ...lines));
}

function recipeText(recipe) {
  if (!recipe) return null;
  const text = element("pre", { tabindex: "0", "aria-label": "Recipe" }, JSON.stringify(recipe, null, 1));
  return element("details", {}, element("summary", {}, "Recipe"), text);
}

/** A table that scrolls sideways by itself where it is too wide. */
function scrolling(node, label) {
  node.prepend(element("caption", { class: "unseen" }, label));
  return element("div", { class: "scroll" }, node);
}
