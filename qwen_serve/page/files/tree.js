// A conversation: messages that each know their parent, so that an edited question or another answer is a branch.
//
// {id, title, created, updated, system, draft, current, messages: {id: message}}, where `current` is the last message
// of the branch that is shown. A message is {id, parent, role, content, at} and, of an answer, reasoning, calls
// [{id, name, arguments}], finish, error and its code, usage, timings, seed, warnings, and the seconds `thought` and
// `first`; of a tool's result, call (the id) and name.
import { newId } from "./dom.js";

export function newConversation(system = "") {
  const now = Date.now();
  return { id: newId("c"), title: "", created: now, updated: now, system, draft: "", current: null, messages: {} };
}

export function add(conversation, parent, message) {
  const added = { id: newId("m"), parent, content: "", at: Date.now(), ...message };
  conversation.messages[added.id] = added;
  conversation.current = added.id;
  return added;
}

// The messages of the branch that is shown, the first one first.
export function branch(conversation, last = conversation.current) {
  const found = [];
  for (let message = conversation.messages[last]; message; message = conversation.messages[message.parent]) {
    found.push(message);
  }
  return found.reverse();
}

export function children(conversation, parent) {
  return Object.values(conversation.messages).filter((message) => message.parent === parent);
}

// The end of the newest branch that goes through a message.
export function newestLeaf(conversation, id) {
  for (let next = id; next; next = children(conversation, id).at(-1)?.id) id = next;
  return id;
}

// Takes a message away with all that follows it; another branch is shown then, or what stood before.
export function remove(conversation, id) {
  const { parent } = conversation.messages[id];
  const doomed = [id];
  while (doomed.length) {
    const each = doomed.pop();
    doomed.push(...children(conversation, each).map((child) => child.id));
    delete conversation.messages[each];
  }
  const other = children(conversation, parent).at(-1);
  conversation.current = other ? newestLeaf(conversation, other.id) : parent;
}

// What the server is sent: the branch up to a message, in OpenAI's form.
export function toMessages(conversation, last) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  return [...system, ...branch(conversation, last).map(toMessage).filter(Boolean)];
}

function toMessage(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.call, content: message.content };
  if (message.role === "user") return { role: "user", content: message.content };
  const calls = (message.calls ?? []).map(({ id, name, arguments: text }) => ({
    id,
    type: "function",
    function: { name, arguments: text },
  }));
  if (!message.content && !calls.length && !message.reasoning) return null; // an answer that has failed
  const found = { role: "assistant", content: message.content };
  if (message.reasoning) found.reasoning_content = message.reasoning;
  return calls.length ? { ...found, tool_calls: calls } : found;
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = Object.values(conversation.messages).find((message) => message.role === "user");
  return (first?.content ?? conversation.draft ?? "").trim().replace(/\s+/g, " ").slice(0, 60);
}

export function holds(conversation, words) {
  const wanted = words.toLowerCase();
  return [titleOf(conversation), ...Object.values(conversation.messages).map((message) => message.content)].some(
    (text) => text.toLowerCase().includes(wanted),
  );
}

export function toMarkdown(conversation, names) {
  const parts = [`# ${titleOf(conversation)}`];
  if (conversation.system) parts.push(`> ${conversation.system.replaceAll("\n", "\n> ")}`);
  for (const message of branch(conversation)) {
    parts.push(`## ${names[message.role]}`);
    if (message.content) parts.push(message.content);
    for (const call of message.calls ?? []) parts.push(`\`\`\`\n${call.name}(${call.arguments})\n\`\`\``);
  }
  return `${parts.join("\n\n")}\n`;
}

export const FORMAT = "qwen-serve-chats-1";

// The conversations in an exported file. Raises an error if it is none: nothing of it is taken over then.
export function fromExport(text) {
  const { format, conversations } = JSON.parse(text);
  if (format !== FORMAT || !Array.isArray(conversations)) throw new Error("format");
  return conversations.map((given) => {
    const conversation = { ...newConversation(textOf(given.system)), title: textOf(given.title) };
    conversation.created = Number(given.created) || conversation.created;
    conversation.updated = Number(given.updated) || conversation.updated;
    const names = new Map();
    for (const message of Object.values(given.messages)) names.set(message.id, newId("m"));
    for (const message of Object.values(given.messages)) {
      if (!["user", "assistant", "tool"].includes(message.role)) throw new Error("role");
      const known = message.parent !== null && conversation.messages[names.get(message.parent)];
      if (message.parent !== null && !known) throw new Error("parent");
      const id = names.get(message.id);
      conversation.messages[id] = { ...readMessage(message), id, parent: known ? known.id : null };
    }
    conversation.current = names.get(given.current) ?? Object.keys(conversation.messages).at(-1) ?? null;
    return conversation;
  });
}

function readMessage(given) {
  const message = { role: given.role, content: textOf(given.content), at: Number(given.at) || Date.now() };
  for (const name of ["reasoning", "finish", "error", "code", "call", "name"]) {
    if (given[name] !== undefined && given[name] !== null) message[name] = textOf(given[name]);
  }
  for (const name of ["thought", "first", "seed"]) if (Number.isFinite(given[name])) message[name] = given[name];
  if (Array.isArray(given.calls)) {
    message.calls = given.calls.map((call) => ({
      id: textOf(call.id),
      name: textOf(call.name),
      arguments: textOf(call.arguments),
    }));
  }
  return message;
}

function textOf(value) {
  if (typeof value !== "string") throw new Error("text");
  return value;
}
