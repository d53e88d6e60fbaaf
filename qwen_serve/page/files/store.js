// What this browser keeps: conversations in IndexedDB, settings in localStorage. Other tabs are told of changes.
const SETTINGS = "qwen-serve:settings";
const channel = "BroadcastChannel" in window ? new BroadcastChannel("qwen-serve") : null;
let database = null;

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// Every conversation that is kept. Raises an error where the browser keeps nothing.
export async function open() {
  const request = indexedDB.open("qwen-serve", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
  database = await done(request);
  return done(objects("readonly").getAll());
}

function objects(mode) {
  return database.transaction("conversations", mode).objectStore("conversations");
}

export async function keep(conversation) {
  if (!database) return;
  await done(objects("readwrite").put(conversation));
  channel?.postMessage(conversation.id);
}

export async function forget(id) {
  if (!database) return;
  await done(objects("readwrite").delete(id));
  channel?.postMessage(id);
}

// Calls `changed` with an id and the conversation, or undefined, when another tab has changed it.
export function watch(changed) {
  if (!channel) return;
  channel.onmessage = async ({ data }) => {
    if (database) changed(data, await done(objects("readonly").get(data)));
  };
}

const DEFAULTS = { values: {}, think: true, tools: "", key: "", theme: "auto", system: "" };

export const settings = readSettings();

function readSettings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(SETTINGS) ?? "{}") };
  } catch {
    return { ...DEFAULTS };
  }
}

export function keepSettings() {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // a browser that keeps nothing; the page has said so
  }
}
