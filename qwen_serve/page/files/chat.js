// The page: what is shown, and what happens when something is pressed. Answers themselves come from answering.js.
import { isRunning, start, stop } from "./answering.js";
import { button, download, find, make } from "./dom.js";
import { MessageView } from "./message.js";
import * as server from "./server.js";
import { chosen, fill, showTheme } from "./settings.js";
import { forget, keep, keepSettings, open, settings, watch } from "./store.js";
import * as tree from "./tree.js";
import { language, say } from "./words.js";

const FULL = 0.9; // of the context, from where on a person is told
const AGAIN_MS = 2000; // until a server that did not answer is asked again

const DRAFT_MS = 500; // after the last key, until a draft is kept

const page = { conversations: new Map(), removed: new Set(), shown: null, views: new Map(), model: null, sticks: true };

// What the buttons of messages do.
const acts = {
  edit: (message, text) => {
    if (isRunning(page.shown)) return;
    tree.add(page.shown, message.parent, { role: "user", content: text });
    answer(page.shown.current);
  },
  again: (message) => !isRunning(page.shown) && answer(message.parent),
  retry: (message) => {
    if (isRunning(page.shown)) return;
    tree.remove(page.shown, message.id);
    answer(message.parent);
  },
  goOn: (message) => !isRunning(page.shown) && answer(message.parent, message),
  remove: (message) => {
    if (isRunning(page.shown) || !confirm(say("removeMessage"))) return;
    tree.remove(page.shown, message.id);
    save(page.shown);
    draw();
  },
  turn: (message, step) => {
    const all = tree.children(page.shown, message.parent);
    const other = all[all.indexOf(message) + step];
    page.shown.current = tree.newestLeaf(page.shown, other.id);
    save(page.shown);
    draw();
  },
  answerCalls: (message, texts) => {
    if (isRunning(page.shown)) return;
    let parent = message.id;
    message.calls.forEach((call, index) => {
      const result = { role: "tool", content: texts[index], call: call.id, name: call.name };
      parent = tree.add(page.shown, parent, result).id;
    });
    answer(parent);
  },
  openSettings: () => openSettings(),
};

// Asks for what follows the message `parent`, or for more of `message`.
function answer(parent, message = null) {
  page.sticks = true;
  const conversation = page.shown;
  start(conversation, parent, message, page.model, chosen(page.model), {
    begun: () => {
      save(conversation);
      if (conversation === page.shown) draw();
    },
    changed: (answered) => {
      if (conversation !== page.shown) return;
      page.views.get(answered.id)?.update(true);
      showContext();
      stick();
    },
    save: () => save(conversation),
    ended: () => {
      save(conversation);
      if (conversation !== page.shown) return;
      page.views.get(conversation.current)?.update(false);
      drawFrame();
    },
  });
}

async function save(conversation) {
  conversation.updated = Date.now();
  await store(conversation);
}

async function store(conversation) {
  if (page.removed.has(conversation.id)) return; // while it was being answered
  if (!conversation.current && !conversation.draft) return;
  page.conversations.set(conversation.id, conversation);
  drawList();
  try {
    await keep(conversation);
  } catch (error) {
    notice(say("notKept", error.message));
  }
}

function notice(text, ...buttons) {
  find("notice").hidden = !text;
  find("notice").replaceChildren(text, ...buttons);
}

// What is shown

function draw() {
  const conversation = page.shown;
  const messages = tree.branch(conversation);
  page.views = new Map(messages.map((message) => [message.id, viewOf(conversation, message)]));
  const welcome = make("div", { class: "welcome" }, make("p", {}, say("welcome")), make("p", {}, say("local")));
  const shown = messages.length ? messages.map((message) => page.views.get(message.id).element) : [welcome];
  find("messages").replaceChildren(systemField(conversation), ...shown);
  drawFrame();
}

// What stands around the messages.
function drawFrame() {
  const conversation = page.shown;
  find("messages").setAttribute("aria-busy", String(isRunning(conversation)));
  const title = tree.titleOf(conversation) || say("newChat");
  find("title").textContent = title;
  document.title = `${title} · ${page.model?.id ?? "qwen-serve"}`;
  find("more").hidden = !conversation.current;
  find("stop").hidden = !isRunning(conversation);
  find("send").hidden = isRunning(conversation);
  showContext();
  drawList();
  stick();
}

function viewOf(conversation, message) {
  const all = tree.children(conversation, message.parent);
  const isLast = message.id === conversation.current;
  const isAnswered = isLast && isRunning(conversation);
  const place = { index: all.indexOf(message), count: all.length, isLast, isRunning: isAnswered };
  return new MessageView(message, place, acts);
}

function systemField(conversation) {
  const attributes = { rows: "3", placeholder: say("systemHere"), "aria-label": say("system"), id: "system" };
  const field = make("textarea", attributes);
  field.value = conversation.system;
  field.addEventListener("input", () => (conversation.system = field.value));
  field.addEventListener("change", () => save(conversation));
  const begins = conversation.system ? `: ${conversation.system.slice(0, 80)}` : "";
  return make("details", { class: "system" }, make("summary", {}, say("system") + begins), field);
}

function showContext() {
  const most = page.model?.max_model_len;
  const used = tree.branch(page.shown).findLast((message) => message.usage)?.usage.total_tokens ?? 0;
  find("context").hidden = !most || !used;
  if (!most || !used) return;
  find("meter").value = used / most;
  find("context").classList.toggle("full", used / most >= FULL);
  find("used").textContent = `${used.toLocaleString()} / ${most.toLocaleString()}`;
  find("context").title = say(used / most >= FULL ? "contextFull" : "context", used, most);
}

function drawList() {
  const words = find("search").value.trim();
  const all = [...page.conversations.values()].sort((one, other) => other.updated - one.updated);
  const found = all.filter((each) => !words || tree.holds(each, words));
  const items = found.map((each) => {
    const entry = button(tree.titleOf(each) || say("newChat"), () => choose(each));
    if (each === page.shown) entry.setAttribute("aria-current", "true");
    if (isRunning(each)) entry.classList.add("running");
    return make("li", {}, entry);
  });
  find("list").replaceChildren(...items);
}

function stick() {
  const scroll = find("scroll");
  if (page.sticks) scroll.scrollTop = scroll.scrollHeight;
  find("down").hidden = page.sticks;
}

function fitDraft() {
  const draft = find("draft");
  draft.style.height = "auto";
  draft.style.height = `${draft.scrollHeight + 2}px`;
}

// What is done

function choose(conversation) {
  page.shown = conversation;
  page.sticks = true;
  find("draft").value = conversation.draft ?? "";
  document.body.classList.remove("side-open");
  draw();
  fitDraft();
  if (matchMedia("(hover: hover)").matches) find("draft").focus(); // on a phone the keyboard would come up
}

const begin = () => choose(tree.newConversation(settings.system));

function send(event) {
  event?.preventDefault();
  const text = find("draft").value;
  if (!text.trim() || isRunning(page.shown)) return;
  find("draft").value = page.shown.draft = "";
  fitDraft();
  tree.add(page.shown, page.shown.current, { role: "user", content: text });
  answer(page.shown.current);
}

async function removeShown() {
  if (!confirm(say("removeChat", tree.titleOf(page.shown)))) return;
  stop(page.shown);
  const { id } = page.shown;
  page.removed.add(id);
  page.conversations.delete(id);
  begin();
  await forget(id);
}

function rename() {
  const name = prompt(say("newName"), tree.titleOf(page.shown));
  if (name === null) return;
  page.shown.title = name.trim().slice(0, 200);
  save(page.shown);
  draw();
}

function exported(conversations) {
  return JSON.stringify({ format: tree.FORMAT, conversations }, null, 1);
}

function saveAs(kind) {
  const name = tree.titleOf(page.shown).replace(/[^\p{L}\p{N} _-]/gu, "").trim().slice(0, 60) || "chat";
  if (kind === "json") return download(`${name}.json`, exported([page.shown]), "application/json");
  const names = { user: say("you"), assistant: say("model"), tool: say("result", "") };
  return download(`${name}.md`, tree.toMarkdown(page.shown, names), "text/markdown");
}

async function importFiles(files) {
  for (const file of files) {
    try {
      const found = tree.fromExport(await file.text());
      for (const each of found) {
        page.conversations.set(each.id, each);
        await keep(each);
      }
      notice(say("imported", found.length));
      if (found.length) choose(found[0]);
    } catch {
      notice(say("notImported", file.name));
    }
  }
}

function openSettings() {
  fill(page.model, (name) => {
    if (name === "key") connect();
    if (name !== "system" || page.shown.current) return;
    page.shown.system = settings.system;
    draw();
  });
  find("settings").showModal();
}

// Asks the server for its model until it answers.
async function connect() {
  try {
    page.model = await server.model();
  } catch (error) {
    const isOurs = error.code === "invalid_api_key";
    if (isOurs) notice(say("error_invalid_api_key"), button(say("settings"), openSettings));
    else {
      notice(say("unreachable"));
      setTimeout(connect, AGAIN_MS);
    }
    return;
  }
  const isLoading = page.model.max_model_len === undefined;
  if (isLoading) setTimeout(connect, AGAIN_MS);
  const cannot = !isLoading && page.model.meta.chat_template === null;
  notice(isLoading ? say("loading") : cannot ? say("noTemplate") : "");
  find("model").textContent = page.model.id;
  find("think-label").hidden = !page.model.meta?.chat_template?.thinking;
  find("think").checked = settings.think;
  showContext();
}

// The keys of the whole page.
function press(event) {
  if (event.isComposing || find("settings").open) return;
  const isControl = event.ctrlKey || event.metaKey;
  if (event.key === "Escape") {
    stop(page.shown);
    document.body.classList.remove("side-open");
  } else if (isControl && event.key === "k") {
    document.body.classList.add("side-open");
    find("search").select();
  } else if (isControl && event.shiftKey && event.key.toLowerCase() === "o") begin();
  else return;
  event.preventDefault();
}

function pressInDraft(event) {
  if (event.isComposing) return; // Enter ends a word of an input method
  if (event.key === "Enter" && !event.shiftKey) send(event);
  if (event.key === "ArrowUp" && !event.target.value && !isRunning(page.shown)) {
    const last = tree.branch(page.shown).findLast((message) => message.role === "user");
    if (last) page.views.get(last.id).edit();
    event.preventDefault();
  }
}

function listen() {
  const clicks = {
    new: begin,
    menu: () => document.body.classList.toggle("side-open"),
    stop: () => stop(page.shown),
    rename,
    remove: removeShown,
    "as-markdown": () => saveAs("markdown"),
    "as-json": () => saveAs("json"),
    export: () => download("chats.json", exported([...page.conversations.values()]), "application/json"),
    import: () => find("file").click(),
    "open-settings": openSettings,
    down: () => {
      page.sticks = true;
      stick();
    },
  };
  for (const [id, act] of Object.entries(clicks)) find(id).addEventListener("click", act);
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#more summary")) find("more").open = false;
  });
  find("composer").addEventListener("submit", send);
  find("draft").addEventListener("keydown", pressInDraft);
  let keeping = null;
  find("draft").addEventListener("input", () => {
    page.shown.draft = find("draft").value;
    fitDraft();
    clearTimeout(keeping);
    keeping = setTimeout(store, DRAFT_MS, page.shown);
  });
  find("search").addEventListener("input", drawList);
  find("file").addEventListener("change", async (event) => {
    await importFiles(event.target.files);
    event.target.value = "";
  });
  find("think").addEventListener("change", (event) => {
    settings.think = event.target.checked;
    keepSettings();
  });
  find("scroll").addEventListener("scroll", ({ target }) => {
    page.sticks = target.scrollHeight - target.scrollTop - target.clientHeight < 40;
    find("down").hidden = page.sticks;
  });
  new ResizeObserver(stick).observe(find("scroll")); // a phone's keyboard comes up
  document.querySelector("main").addEventListener("click", (event) => {
    if (event.target.id !== "menu") document.body.classList.remove("side-open");
  });
  document.addEventListener("keydown", press);
  watch((id, conversation) => {
    if (conversation) page.conversations.set(id, conversation);
    else page.conversations.delete(id);
    if (page.shown.id === id && conversation && !isRunning(page.shown)) choose(conversation);
    else drawList();
  });
}

function sayWords() {
  document.documentElement.lang = language;
  for (const node of document.querySelectorAll("[data-say]")) node.textContent = say(node.dataset.say);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = say(node.dataset.placeholder);
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", say(node.dataset.label));
    node.title = say(node.dataset.label);
  }
}

sayWords();
showTheme();
page.shown = tree.newConversation(settings.system);
listen();
draw();
connect();
try {
  for (const each of await open()) page.conversations.set(each.id, each);
} catch (error) {
  notice(say("notKept", error.message));
}
const latest = [...page.conversations.values()].sort((one, other) => other.updated - one.updated)[0];
if (latest && !page.shown.current) choose(latest);
else drawList();
