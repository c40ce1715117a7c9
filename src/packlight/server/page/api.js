// The server's routes: JSON, streams, the API key, and errors in plain words.

const KEY = "packlight-api-key";

/** What went wrong, as one sentence for the reader. `retryAfter` is in seconds, null where nothing was said. */
export class ServerError extends Error {
  constructor(message, { status = 0, detail = "", retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.detail = detail;
    this.retryAfter = retryAfter;
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY),
  set: (key) => sessionStorage.setItem(KEY, key),
  forget: () => sessionStorage.removeItem(KEY),
};

/** The JSON of a route. Throws ServerError. */
export async function getJson(path, signal) {
  const response = await ask(path, { signal });
  return response.json();
}

/** The events of a streamed chat completion, each a parsed chunk. Throws ServerError, and AbortError once stopped. */
export async function* streamChat(body, signal) {
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError("The server could not go on.", { detail: chunk.error.message ?? "" });
    yield chunk;
  }
  throw new ServerError("The answer was cut off: the connection ended before it was complete.");
}

async function ask(path, options) {
  const headers = new Headers(options.headers);
  if (apiKey.get()) headers.set("Authorization", `Bearer ${apiKey.get()}`);
  const response = await reach(fetch(path, { ...options, headers }), options.signal);
  if (!response.ok) throw await inWords(response);
  return response;
}

/** What a browser calls a TypeError is a network that failed. */
async function reach(promise, signal) {
  try {
    return await promise;
  } catch (error) {
    if (signal?.aborted || !(error instanceof TypeError)) throw error;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
}

async function inWords(response) {
  const { status } = response;
  const detail = await ownWords(response);
  const retryAfter = seconds(response.headers.get("Retry-After"));
  return new ServerError(sentence(status, retryAfter), { status, detail, retryAfter });
}

function sentence(status, retryAfter) {
  const when = retryAfter === null ? "try again soon" : `retry in ${retryAfter} s`;
  if (status === 401) return apiKey.get() ? "The server does not know this API key." : "This server asks for an API key.";
  if (status === 429) return `The server is busy: ${when}.`;
  if (status === 503) return `The server takes no requests now: ${when}.`;
  if (status === 413) return "This conversation is larger than the server takes: begin a new chat.";
  if (status >= 500) return `The server failed (${status}).`;
  return `The server refused this request (${status}).`;
}

/** The message of an error in OpenAI's shape, or nothing. */
async function ownWords(response) {
  try {
    const { error } = await response.json();
    return typeof error?.message === "string" ? error.message : "";
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof TypeError) return "";
    throw error;
  }
}

/** Seconds of a Retry-After header, which is a number or a date. */
function seconds(header) {
  if (!header) return null;
  const number = /^\d+$/.test(header) ? Number(header) : Math.ceil((Date.parse(header) - Date.now()) / 1000);
  return Number.isFinite(number) ? Math.max(0, number) : null;
}

/** The `data` of server-sent events. Lines end as the standard allows; a character may be cut between two reads. */
async function* events(stream, signal) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reach(reader.read(), signal);
      if (done) return;
      const parts = (rest + decoder.decode(value, { stream: true })).split(/\r\n\r\n|\n\n|\r\r/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r\n|\n|\r/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.releaseLock();
  }
}
