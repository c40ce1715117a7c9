// The page at /: what is on it, joined.

import { apiKey, getJson, ServerError } from "/page/api.js";
import { Chat } from "/page/chat.js";
import { byId } from "/page/dom.js";
import { showEvidence } from "/page/evidence.js";
import { startLive } from "/page/live.js";
import { sampling, startSampling } from "/page/sampling.js";

const SYSTEM = "packlight-system";

const chat = new Chat({ sampling, system: () => byId("system").value.trim(), fail: showError, clearError });

startSampling();
startSystem();
startComposer();
startKey();
startPanel();
startLive();
load();
if (!matchMedia("(pointer: coarse)").matches) byId("message").focus(); // on a phone it would raise the keyboard

/** What is asked once, and again with a new key. */
async function load() {
  byId("forget-key").hidden = !apiKey.get();
  try {
    byId("model").textContent = await chat.model();
    showEvidence(byId("evidence"), await getJson("/evidence"));
  } catch (error) {
    showError(error);
  }
}

function startComposer() {
  const message = byId("message");
  const send = async () => {
    const question = message.value.trim();
    if (!question || chat.isAnswering) return;
    const settings = sampling();
    if (settings === null) return openPanel(true);
    message.value = "";
    grow(message);
    await chat.send(question, settings);
  };
  message.addEventListener("input", () => grow(message));
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
    message.focus();
  });
  byId("stop").addEventListener("click", () => {
    chat.stop();
    message.focus();
  });
  byId("new-chat").addEventListener("click", () => {
    clearError();
    chat.clear();
    openPanel(false);
    message.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    if (chat.isAnswering) chat.stop();
    else openPanel(false);
  });
}

/** As high as its text, up to what the style sheet allows. */
function grow(area) {
  area.style.height = "";
  if (area.value) area.style.height = `${area.scrollHeight + 2}px`; // with its border
}

function startSystem() {
  const area = byId("system");
  const changed = () => {
    sessionStorage.setItem(SYSTEM, area.value);
    byId("system-peek").textContent = area.value.trim() || "none";
  };
  area.value = sessionStorage.getItem(SYSTEM) ?? "";
  area.addEventListener("input", changed);
  changed();
}

function startKey() {
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    apiKey.set(byId("key").value.trim());
    byId("key").value = "";
    clearError();
    await load();
    if (byId("key-form").hidden) await chat.retry();
  });
  byId("forget-key").addEventListener("click", () => {
    apiKey.forget();
    byId("forget-key").hidden = true;
  });
}

/** On a narrow page the panel takes the place of the conversation. */
function startPanel() {
  byId("panel-toggle").addEventListener("click", () => openPanel(!document.body.classList.contains("panel-open")));
}

function openPanel(isOpen) {
  document.body.classList.toggle("panel-open", isOpen);
  byId("panel-toggle").setAttribute("aria-expanded", String(isOpen));
  byId("panel-toggle").textContent = isOpen ? "Chat" : "Details";
}

let countdown = null;

/** Say what went wrong, and offer what can be done about it: a key, or the same question again. */
function showError(error) {
  clearError();
  const notice = byId("notice");
  const isOurs = error instanceof ServerError;
  if (!isOurs) console.error(error);
  notice.append(textElement("p", isOurs ? error.message : `This page failed: ${error.message}`));
  if (error.detail) notice.append(textElement("p", error.detail, "quiet"));
  notice.hidden = false;
  if (error.status === 401) {
    byId("key-form").hidden = false;
    byId("key").focus();
  } else if (chat.canRetry) {
    notice.append(retryButton(error.retryAfter ?? 0));
  }
}

function clearError() {
  clearInterval(countdown);
  byId("notice").replaceChildren();
  byId("notice").hidden = true;
  byId("key-form").hidden = true;
}

function retryButton(seconds) {
  const button = textElement("button", "Try again");
  button.type = "button";
  button.addEventListener("click", () => {
    clearError();
    byId("message").focus();
    chat.retry();
  });
  let left = seconds;
  const tick = () => {
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left-- <= 0) clearInterval(countdown);
  };
  countdown = setInterval(tick, 1000);
  tick();
  return button;
}

function textElement(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}
