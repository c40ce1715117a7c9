// The conversation: turns of a question and its answer, streamed, stopped and made again.

import { getJson, streamChat } from "/page/api.js";
import { byId, element } from "/page/dom.js";
import { significant } from "/page/format.js";
import { render } from "/page/text.js";

const SHORTEST_MS = 50; // pieces that came together tell nothing about speed

/** A conversation in `#log`. `fail(error)` and `clearError()` show and hide what went wrong. */
export class Chat {
  #turns = [];
  #model = null;
  #abort = null; // of the answer that is being written

  constructor({ sampling, system, fail, clearError }) {
    Object.assign(this, { sampling, system, fail, clearError });
  }

  get isAnswering() {
    return this.#abort !== null;
  }

  /** Whether the last question has no whole answer because something failed. */
  get canRetry() {
    return this.#turns.at(-1)?.hasFailed ?? false;
  }

  /** The served model's id; asked once. Throws ServerError. */
  async model() {
    this.#model ??= (await getJson("/v1/models")).data[0].id;
    return this.#model;
  }

  async send(question, settings) {
    const turn = { question, answer: "", hasFailed: false, ...turnElements(question) };
    this.#turns.at(-1)?.again.remove();
    this.#turns.push(turn);
    byId("empty").hidden = true;
    byId("log").append(turn.node);
    turn.again.addEventListener("click", () => this.retry(true));
    toBottom();
    await this.#answer(turn, settings);
  }

  /** The last question again, where its answer failed or where `isWanted`; what was answered is replaced. */
  async retry(isWanted = false) {
    if (this.isAnswering || !this.#turns.length || !(isWanted || this.canRetry)) return;
    const settings = this.sampling();
    if (settings === null) return;
    byId("message").focus();
    await this.#answer(this.#turns.at(-1), settings);
  }

  stop() {
    this.#abort?.abort();
  }

  clear() {
    this.stop();
    this.#abort = null;
    for (const { node } of this.#turns) node.remove();
    this.#turns = [];
    byId("empty").hidden = false;
    announce("New chat.");
  }

  async #answer(turn, settings) {
    const abort = (this.#abort = new AbortController());
    this.clearError();
    begin(turn);
    const seen = { start: performance.now(), first: null, last: null, finish: null, usage: null };
    let ended = "";
    try {
      const body = { model: await this.model(), messages: this.#messages(turn), ...settings };
      for await (const chunk of streamChat(body, abort.signal)) take(chunk, turn, seen);
      ended = report(seen);
    } catch (error) {
      if (abort.signal.aborted) {
        ended = "stopped";
      } else {
        turn.hasFailed = true;
        ended = turn.answer ? "not complete" : "not answered";
      }
      if (turn.hasFailed && turn === this.#turns.at(-1)) this.fail(error);
    } finally {
      if (this.#abort === abort) this.#abort = null;
      end(turn, ended, this.isAnswering);
    }
  }

  /** Questions without an answer are left out, as templates want the roles to take turns. */
  #messages(last) {
    const earlier = this.#turns.filter((turn) => turn !== last && turn.answer);
    const said = earlier.flatMap(({ question, answer }) => [
      { role: "user", content: question },
      { role: "assistant", content: answer },
    ]);
    const system = this.system();
    const first = system ? [{ role: "system", content: system }] : [];
    return [...first, ...said, { role: "user", content: last.question }];
  }
}

function turnElements(question) {
  const answerNode = element("div", { class: "answer", "aria-label": "Answer", role: "group" });
  const meta = element("span", { class: "meta" });
  const again = element("button", { type: "button", class: "again", hidden: true }, "Regenerate");
  const node = element(
    "article",
    { class: "turn" },
    element("div", { class: "question", "aria-label": "Question", role: "group" }, question),
    answerNode,
    element("footer", {}, meta, again),
  );
  return { node, answerNode, meta, again, frame: null };
}

function begin(turn) {
  turn.answer = "";
  turn.hasFailed = false;
  turn.answerNode.replaceChildren();
  turn.meta.textContent = "";
  turn.again.hidden = true;
  turn.node.setAttribute("aria-busy", "true"); // the live region reads the answer once it is whole
  byId("send").hidden = true;
  byId("stop").hidden = false;
  announce("The model is answering.");
}

function take(chunk, turn, seen) {
  seen.usage = chunk.usage ?? seen.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  seen.finish = choice.finish_reason ?? seen.finish;
  if (!choice.delta?.content) return;
  seen.last = performance.now();
  seen.first ??= seen.last;
  turn.answer += choice.delta.content;
  turn.frame ??= requestAnimationFrame(() => show(turn));
}

function show(turn) {
  cancelAnimationFrame(turn.frame);
  turn.frame = null;
  const log = byId("log");
  const isAtBottom = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  render(turn.answerNode, turn.answer);
  if (isAtBottom) toBottom();
}

function end(turn, ended, isAnotherRunning) {
  show(turn);
  turn.node.removeAttribute("aria-busy");
  turn.meta.textContent = ended;
  turn.again.hidden = turn.hasFailed; // the notice offers to try again
  toBottom();
  if (isAnotherRunning) return; // a new chat began meanwhile
  byId("send").hidden = false;
  byId("stop").hidden = true;
  announce(turn.hasFailed ? "" : ended === "stopped" ? "Stopped." : "The answer is complete.");
}

/** 128 tokens, 40.7 tokens/s, first after 0.31 s. Measured here, so the way through the network is in it. */
function report({ start, first, last, finish, usage }) {
  const tokens = usage?.completion_tokens ?? 0;
  const parts = [];
  if (tokens) parts.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  if (tokens > 1 && last - first > SHORTEST_MS) parts.push(`${significant(((tokens - 1) * 1000) / (last - first), 3)} tokens/s`);
  if (first !== null) parts.push(`first after ${significant((first - start) / 1000, 2)} s`);
  if (finish === "length") parts.push("ended at its length limit");
  if (first === null) parts.push("the answer is empty");
  return parts.join(" · ");
}

function toBottom() {
  const log = byId("log");
  log.scrollTop = log.scrollHeight;
}

function announce(words) {
  byId("said").textContent = words;
}
