// How the next token is chosen: the fields, their ranges, and what is sent. An empty field is left to the server.

import { byId, element } from "/page/dom.js";

const STORED = "packlight-sampling";

const FIELDS = [
  { name: "temperature", short: "T", value: 0.7, min: 0, max: 2, step: 0.1, hint: "0 takes the likeliest token" },
  { name: "max_tokens", short: "max", value: "", min: 1, step: 1, hint: "empty: what fits" },
  { name: "top_p", short: "top-p", value: 0.95, min: 0.01, max: 1, step: 0.01, hint: "1 keeps all" },
  { name: "top_k", short: "top-k", value: 0, min: 0, step: 1, hint: "0 keeps all" },
  { name: "min_p", short: "min-p", value: 0, min: 0, max: 1, step: 0.01, hint: "0 keeps all" },
  { name: "repetition_penalty", short: "rep", value: 1, min: 0.01, step: 0.05, hint: "1 changes nothing" },
  { name: "seed", short: "seed", value: "", min: 0, step: 1, hint: "empty: random" },
];

/** Build the fields, with what this tab last had in them. */
export function startSampling() {
  const stored = JSON.parse(sessionStorage.getItem(STORED) ?? "{}");
  for (const field of FIELDS) byId("controls").append(row(field, stored[field.name] ?? field.value));
  byId("controls").addEventListener("input", changed);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("reset").addEventListener("click", () => {
    for (const field of FIELDS) input(field).value = field.value;
    changed();
  });
  changed();
}

/** The fields of a request, or null where one is out of its range, which is then shown and focused. */
export function sampling() {
  const wrong = FIELDS.find((field) => !isValid(field));
  if (wrong) {
    byId("sampling").open = true;
    input(wrong).focus();
    return null;
  }
  const filled = FIELDS.filter((field) => input(field).value.trim() !== "");
  return Object.fromEntries(filled.map((field) => [field.name, Number(input(field).value)]));
}

function row({ name, min, max, step, hint }, value) {
  const id = `set-${name}`;
  const range = { min, max: max ?? null, step };
  return element(
    "div",
    { class: "control" },
    element("label", { for: id }, name),
    element("input", { id, name, type: "number", value, inputmode: "decimal", "aria-describedby": `${id}-hint`, ...range }),
    element("small", { id: `${id}-hint` }, hint),
  );
}

function changed() {
  for (const field of FIELDS) {
    const isFine = isValid(field);
    input(field).setAttribute("aria-invalid", String(!isFine));
    byId(`set-${field.name}-hint`).textContent = isFine ? field.hint : allowed(field);
  }
  const now = Object.fromEntries(FIELDS.map((field) => [field.name, input(field).value]));
  sessionStorage.setItem(STORED, JSON.stringify(now));
  byId("sampling-peek").textContent = FIELDS.filter(isShown)
    .map((field) => `${field.short} ${now[field.name]}`)
    .join(" · ");
}

/** The line beside the title names the temperature, and whatever differs from its default. */
function isShown(field) {
  const { value } = input(field);
  return value !== "" && (field.name === "temperature" || value !== String(field.value));
}

/** `step` says how far an arrow key goes; only whole numbers must be on it. */
function isValid(field) {
  const { validity } = input(field);
  const isOff = field.step === 1 && validity.stepMismatch;
  return !(validity.badInput || validity.rangeUnderflow || validity.rangeOverflow || isOff);
}

function allowed({ min, max, step }) {
  const kind = step === 1 ? "a whole number" : "a number";
  return max === undefined ? `${kind}, ${min} or more` : `${kind} from ${min} to ${max}`;
}

function input(field) {
  return byId(`set-${field.name}`);
}
