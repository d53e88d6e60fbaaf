// The settings: one table of fields, each saved as it is changed. What is empty is the server's.
import { button, find, make } from "./dom.js";
import { keepSettings, settings } from "./store.js";
import { say } from "./words.js";

// name -> least, most, step, and the words that stand for the server's default where it has no number
const NUMBERS = {
  temperature: [0, 100, "any"],
  top_p: [0, 1, "any"],
  top_k: [-1, 1000000, 1],
  min_p: [0, 1, "any"],
  repetition_penalty: [0.01, 100, "any"],
  presence_penalty: [-2, 2, "any", "0"],
  max_tokens: [1, 10000000, 1, "rest"],
  thinking_token_budget: [0, 10000000, 1, "unbounded"],
  seed: [0, 9007199254740991, 1, "drawn"],
};

// Fields of a request that the settings choose.
export function chosen(model) {
  const found = { ...settings.values };
  const knows = model?.meta?.chat_template;
  if (knows?.thinking && !settings.think) found.reasoning_effort = "none";
  const tools = readTools();
  if (tools?.length && knows?.tools !== false) found.tools = tools;
  return found;
}

function readTools() {
  if (!settings.tools.trim()) return [];
  try {
    const tools = JSON.parse(settings.tools);
    return Array.isArray(tools) ? tools : null;
  } catch {
    return null;
  }
}

export function showTheme() {
  document.documentElement.dataset.theme = settings.theme;
}

// Fills the dialog; `changed` is called with the name of what has changed.
export function fill(model, changed) {
  const save = (name) => {
    keepSettings();
    changed(name);
  };
  const sampling = Object.keys(NUMBERS).map((name) => numberField(name, model, save));
  const reset = button(say("defaults"), () => {
    settings.values = {};
    save("values");
    fill(model, changed);
  });
  find("fields").replaceChildren(
    make("fieldset", { class: "grid" }, make("legend", {}, say("sampling")), sampling, reset),
    textField("system", say("newSystem"), "", save),
    ...(model?.meta?.chat_template?.tools === false ? [] : [toolsField(save)]),
    keyField(save),
    themeField(save),
    make("p", { class: "help" }, `${say("keys")} — ${say("keyList")}`),
  );
}

function numberField(name, model, save) {
  const [min, max, step, other] = NUMBERS[name];
  const ofServer = model?.meta?.default_sampling_params?.[name];
  const text = ofServer ?? (other === "0" ? other : other && say(other)) ?? "";
  const placeholder = say("ofServer", text);
  const field = make("input", { type: "number", min, max, step, placeholder, id: `set-${name}` });
  field.value = settings.values[name] ?? "";
  field.addEventListener("input", () => {
    if (!field.checkValidity()) return;
    if (field.value === "") delete settings.values[name];
    else settings.values[name] = Number(field.value);
    save(name);
  });
  return make("label", {}, say(name === "seed" ? "seedField" : name), field);
}

function textField(name, label, help, save) {
  const field = make("textarea", { rows: "3", id: `set-${name}`, spellcheck: "false" });
  field.value = settings[name];
  field.addEventListener("input", () => {
    settings[name] = field.value;
    save(name);
  });
  return make("label", {}, label, field, help && make("span", { class: "help" }, help));
}

function toolsField(save) {
  const wrong = make("span", { class: "help error", role: "alert", hidden: true });
  const check = () => {
    wrong.hidden = readTools() !== null;
    wrong.textContent = say("toolsWrong", settings.tools.trim().slice(0, 40));
  };
  const field = textField("tools", say("tools"), say("toolsHelp"), (name) => {
    check();
    save(name);
  });
  check();
  field.append(wrong);
  return field;
}

function keyField(save) {
  const field = make("input", { type: "password", id: "set-key", autocomplete: "off" });
  field.value = settings.key;
  field.addEventListener("change", () => {
    settings.key = field.value.trim();
    save("key");
  });
  return make("label", {}, say("apiKey"), field, make("span", { class: "help" }, say("apiKeyHelp")));
}

function themeField(save) {
  const options = ["auto", "light", "dark"].map((each) => make("option", { value: each }, say(each)));
  const field = make("select", { id: "set-theme" }, options);
  field.value = settings.theme;
  field.addEventListener("change", () => {
    settings.theme = field.value;
    showTheme();
    save("theme");
  });
  return make("label", {}, say("theme"), field);
}
