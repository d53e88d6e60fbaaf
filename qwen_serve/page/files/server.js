// The server: what model it has, and answers as they come. Addresses are relative, for a server behind a proxy.
import { settings } from "./store.js";

export class ServerError extends Error {
  // code: of the server's table of errors, or "unreachable" or "broken"
  constructor(code, message, retryAfter = null) {
    super(message);
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (settings.key) headers.authorization = `Bearer ${settings.key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("unreachable", error.message);
  }
  if (response.ok) return response;
  const told = (await response.json().catch(() => null))?.error;
  const after = Number(response.headers.get("retry-after")) || null;
  throw new ServerError(told?.code ?? "unreachable", told?.message ?? `HTTP ${response.status}`, after);
}

// The first model: its id, max_model_len, and meta with sampling defaults and what its chat template knows.
export async function model() {
  return (await (await ask("v1/models")).json()).data[0];
}

// The chunks of an answer, until it is complete. Raises a ServerError, or an AbortError if `signal` ends it.
export async function* answer(body, signal) {
  const headers = { "content-type": "application/json" };
  const response = await ask("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServerError("broken", error.message);
    });
    if (done) throw new ServerError("broken", "");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue; // a comment that keeps the connection, or an empty line
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new ServerError(chunk.error.code, chunk.error.message);
      yield chunk;
    }
  }
}
