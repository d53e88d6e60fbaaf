// How one message looks: its text, thinking, calls of tools, what went wrong, figures, and what can be done with it.
import { button, copy, make } from "./dom.js";
import { show } from "./markdown.js";
import { knows, say } from "./words.js";

const LABELS = { user: "you", assistant: "model" };
const CUT = ["length", "stopped", undefined]; // how an answer ends that can be continued

export class MessageView {
  // acts: what the buttons call; place: {index, count, isLast, isRunning} of the message among its branches
  constructor(message, place, acts) {
    Object.assign(this, { message, place, acts });
    this.body = make("div", { class: "body" });
    this.summary = make("summary", {}, "");
    this.thoughts = make("div", { class: "markdown" });
    this.thinking = make("details", { class: "thinking", hidden: true }, this.summary, this.thoughts);
    this.calls = make("div", { class: "calls" });
    this.error = make("div", { class: "error", role: "alert", hidden: true });
    this.figures = make("div", { class: "figures" });
    this.buttons = make("div", { class: "buttons" });
    const label = message.role === "tool" ? say("result", message.name ?? "") : say(LABELS[message.role]);
    const parts = message.role === "assistant" ? [this.thinking, this.body, this.calls, this.error, this.figures] : [];
    const foot = make("footer", {}, parts.pop(), this.buttons);
    this.element = make("article", { class: `message ${message.role}` }, make("h2", {}, label), parts, foot);
    if (!parts.length) foot.before(this.body);
    this.isRaw = false;
    this.update(place.isRunning);
    this.thoughtsAreOpen = false;
    this.thinking.addEventListener("toggle", () => this.thinking.open && this.showThoughts());
  }

  update(isRunning) {
    const { message } = this;
    this.element.classList.toggle("running", isRunning);
    if (message.role === "assistant" && !this.isRaw) {
      this.body.className = "body markdown";
      show(this.body, message.content);
    } else {
      this.body.className = "body plain";
      this.body.textContent = this.isRaw && message.reasoning
        ? `<think>\n${message.reasoning}\n</think>\n\n${message.content}`
        : message.content;
    }
    this.showThinking(isRunning);
    this.showCalls(isRunning);
    this.showError();
    this.showFigures(isRunning);
    this.buttons.replaceChildren(...(isRunning ? [] : this.actions()));
  }

  showThinking(isRunning) {
    const { reasoning, content, thought, calls } = this.message;
    this.thinking.hidden = !reasoning || this.isRaw;
    const goesOn = isRunning && !content && !calls?.length;
    const label = thought === undefined ? say("thoughts") : say("thought", thought.toFixed(1));
    this.summary.textContent = goesOn ? say("thinking") : label;
    if (this.thinking.open) this.showThoughts();
  }

  showThoughts() {
    show(this.thoughts, this.message.reasoning ?? "");
  }

  showCalls(isRunning) {
    const { calls = [] } = this.message;
    const shown = calls.map((call) => {
      const name = make("summary", {}, say("call", call.name));
      return make("details", { class: "call", open: true }, name, make("pre", {}, pretty(call.arguments)));
    });
    if (calls.length && this.place.isLast && !isRunning) shown.push(this.resultForm(calls));
    this.calls.replaceChildren(...shown);
  }

  // A field for what each tool answers: this page runs none.
  resultForm(calls) {
    const fields = calls.map((call) =>
      make("textarea", { rows: "2", placeholder: say("resultHere"), "aria-label": say("result", call.name) }),
    );
    const send = (event) => {
      event.preventDefault();
      this.acts.answerCalls(this.message, fields.map((field) => field.value));
    };
    const press = make("button", { class: "main" }, say("sendResults"));
    return make("form", { class: "results", onsubmit: send }, fields, press);
  }

  showError() {
    const { error, code, content } = this.message;
    this.error.hidden = error === undefined;
    if (error === undefined) return;
    const advice = [`error_${code}`, code].find(knows);
    const lines = [error, advice && say(advice)].filter(Boolean).map((text) => make("p", {}, text));
    const buttons = [];
    if (code === "invalid_api_key") buttons.push(button(say("settings"), this.acts.openSettings));
    if (!content) buttons.push(button(say("retry"), () => this.acts.retry(this.message)));
    this.error.replaceChildren(...lines, ...buttons);
  }

  showFigures(isRunning) {
    const { usage, first, finish, role } = this.message;
    if (role !== "assistant") return;
    if (isRunning && !usage) {
      this.figures.textContent = first === undefined ? say("waiting") : "";
      return;
    }
    const speed = this.speed(isRunning);
    const parts = [
      usage && say("tokens", usage.completion_tokens),
      speed && say("speed", speed.toFixed(1)),
      first !== undefined && say("first", first.toFixed(2)),
      !isRunning && finish === "length" && say("cut"),
      !isRunning && (finish === "stopped" || finish === undefined) && say("stopped"),
    ];
    const line = parts.filter(Boolean).join(" · ");
    if (isRunning) this.figures.textContent = line;
    else this.figures.replaceChildren(make("details", {}, make("summary", {}, line), ...this.moreFigures()));
  }

  speed(isRunning) {
    const { usage, timings, firstAt } = this.message;
    if (!isRunning) return timings?.predicted_per_second;
    const seconds = (performance.now() - firstAt) / 1000;
    return usage.completion_tokens > 1 && seconds > 0.2 ? (usage.completion_tokens - 1) / seconds : null;
  }

  moreFigures() {
    const { usage, seed, warnings = [] } = this.message;
    const cached = usage?.prompt_tokens_details?.cached_tokens ?? 0;
    const lines = [
      usage && say("prompt", usage.prompt_tokens, cached),
      Number.isFinite(seed) && say("seed", seed),
      ...warnings,
    ];
    return lines.filter(Boolean).map((text) => make("p", {}, String(text)));
  }

  actions() {
    const { message, acts, place } = this;
    const found = [];
    if (place.count > 1) {
      const turn = (text, name, step, isOff) =>
        button(text, () => acts.turn(message, step), { "aria-label": say(name), title: say(name), disabled: isOff });
      found.push(turn("‹", "previous", -1, place.index === 0), `${place.index + 1}/${place.count}`);
      found.push(turn("›", "next", 1, place.index === place.count - 1));
    }
    const press = button(say("copy"), () => copy(message.content, press, say("copied")));
    if (message.content) found.push(press);
    if (message.role === "user") found.push(button(say("edit"), () => this.edit()));
    if (message.role === "assistant") {
      if (message.content) {
        const raw = button(say("raw"), () => this.turnRaw(), { "aria-pressed": String(this.isRaw) });
        found.push(raw);
      }
      if (this.canGoOn()) found.push(button(say("goOn"), () => acts.goOn(message)));
      found.push(button(say("again"), () => acts.again(message)));
    }
    found.push(button(say("remove"), () => acts.remove(message)));
    return found;
  }

  canGoOn() {
    const { content, calls, finish, error } = this.message;
    const isCut = CUT.includes(finish) || error !== undefined;
    return this.place.isLast && isCut && Boolean(content) && !calls?.length;
  }

  turnRaw() {
    this.isRaw = !this.isRaw;
    this.body.replaceChildren();
    this.update(false);
  }

  // Lets a question be written anew; the old one stays as a branch of its own.
  edit() {
    const field = make("textarea", { "aria-label": say("edit"), rows: "3" });
    field.value = this.message.content;
    const end = () => this.turnBack();
    const send = (event) => {
      event?.preventDefault();
      if (field.value.trim()) this.acts.edit(this.message, field.value);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") end();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
      event.stopPropagation();
    });
    const press = make("button", { class: "main" }, say("save"));
    const row = make("div", { class: "row" }, button(say("cancel"), end), press);
    this.body.replaceChildren(make("form", { class: "editor", onsubmit: send }, field, row));
    this.buttons.replaceChildren();
    field.focus();
  }

  turnBack() {
    this.body.replaceChildren();
    this.update(false);
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not complete yet, or no JSON: as the model wrote it
  }
}
