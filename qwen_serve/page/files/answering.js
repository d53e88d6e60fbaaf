// Answers that are being given: at most one a conversation, of several conversations at once.
import * as server from "./server.js";
import { add, toMessages } from "./tree.js";

const SAVE_MS = 1000; // between two savings of an answer that grows
const running = new Map(); // id of a conversation -> what ends its answer

export const isRunning = (conversation) => running.has(conversation.id);

export function stop(conversation) {
  running.get(conversation.id)?.abort();
}

// Lets the model answer the branch up to `parent`, or go on with `message`, its child.
// tell: {begun, changed(message), save, ended}
export async function start(conversation, parent, message, model, chosen, tell) {
  const goesOn = message !== null;
  const messages = toMessages(conversation, goesOn ? message.id : parent);
  const answered = message ?? add(conversation, parent, { role: "assistant", reasoning: "" });
  answered.reasoning ??= "";
  for (const name of ["error", "code", "finish", "usage", "timings", "first"]) delete answered[name];
  const body = { model: model?.id, messages, stream: true, ...chosen };
  body.stream_options = { include_usage: true, continuous_usage_stats: true };
  if (goesOn) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  const controller = new AbortController();
  running.set(conversation.id, controller);
  tell.begun();
  const clock = new Clock(answered, tell);
  try {
    for await (const chunk of server.answer(body, controller.signal)) {
      take(answered, chunk, clock);
      clock.changed();
    }
  } catch (error) {
    if (error.name === "AbortError") answered.finish = "stopped";
    else Object.assign(answered, { error: error.message, code: error.code ?? "broken" });
  }
  delete answered.firstAt;
  running.delete(conversation.id);
  clock.end();
  tell.ended();
}

// Puts a chunk into the message.
function take(message, chunk, clock) {
  for (const name of ["usage", "timings", "seed", "warnings"]) if (chunk[name]) message[name] = chunk[name];
  const choice = chunk.choices[0];
  if (!choice) return;
  const { reasoning_content: reasoning, content, tool_calls: calls = [] } = choice.delta;
  if (reasoning || content || calls.length) clock.something(message);
  if (reasoning) message.reasoning += reasoning;
  if ((content || calls.length) && message.reasoning && message.thought === undefined) clock.thought(message);
  if (content) message.content += content;
  for (const call of calls) {
    message.calls ??= [];
    const known = (message.calls[call.index] ??= { id: call.id, name: call.function.name, arguments: "" });
    known.arguments += call.function.arguments;
  }
  if (choice.finish_reason) {
    message.finish = choice.finish_reason;
    if (message.reasoning && message.thought === undefined) clock.thought(message);
  }
}

// Times of an answer, and when it is shown and saved: once a frame, once a second.
class Clock {
  constructor(message, tell) {
    Object.assign(this, { message, tell, began: performance.now(), saved: performance.now(), frame: null });
  }

  something(message) {
    message.firstAt ??= performance.now();
    message.first ??= (message.firstAt - this.began) / 1000;
  }

  thought(message) {
    message.thought = (performance.now() - message.firstAt) / 1000;
  }

  changed() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.tell.changed(this.message);
    });
    if (performance.now() - this.saved < SAVE_MS) return;
    this.saved = performance.now();
    this.tell.save();
  }

  end() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
  }
}
