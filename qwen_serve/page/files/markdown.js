// Markdown as models write it, made into elements. What is no Markdown, HTML above all, stays text.
//
// Every function takes time that grows with the text alone, whatever it says, and nesting is bounded.
import { copy, make } from "./dom.js";
import { say } from "./words.js";

const DEEPEST = 12; // lists and quotations within each other, and emphasis
const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+|$)/;

// Makes `container` show `text`. Blocks that are there from the last time stay as they are.
export function show(container, text) {
  const blocks = scan(text.split("\n"));
  blocks.forEach((block, index) => {
    const old = container.childNodes[index];
    const key = `${block.kind}:${block.lines.join("\n")}`;
    if (old?.key === key) return;
    if (old?.code && block.kind === "code" && old.language === block.language) {
      old.code.textContent = block.text; // in place, so that what is selected or scrolled stays so
      old.key = key;
      return;
    }
    const node = build(block, 0);
    node.key = key;
    if (old) old.replaceWith(node);
    else container.append(node);
  });
  while (container.childNodes.length > blocks.length) container.lastChild.remove();
}

// The blocks of lines: their kind, their lines, and what their kind needs.
function scan(lines) {
  const blocks = [];
  for (let index = 0; index < lines.length; ) {
    if (!lines[index].trim()) {
      index += 1;
      continue;
    }
    const block = blockAt(lines, index);
    block.lines = lines.slice(index, block.end);
    blocks.push(block);
    index = block.end;
  }
  return blocks;
}

function blockAt(lines, start) {
  const line = lines[start];
  if (FENCE.test(line)) return codeAt(lines, start);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = line.slice(heading[0].length).trim().replace(/(^|\s)#+$/, "");
    return { kind: "heading", level: heading[1].length, text, end: start + 1 };
  }
  if (RULE.test(line)) return { kind: "rule", end: start + 1 };
  if (QUOTE.test(line)) {
    const end = firstFrom(lines, start, (each) => !QUOTE.test(each));
    return { kind: "quote", inside: lines.slice(start, end).map((each) => each.replace(QUOTE, "")), end };
  }
  if (ITEM.test(line)) return listAt(lines, start);
  if (isTable(lines, start)) {
    const end = firstFrom(lines, start + 2, (each) => !each.includes("|"));
    return { kind: "table", rows: lines.slice(start, end), end };
  }
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !begins(lines, end)) end += 1;
  return { kind: "paragraph", text: lines.slice(start, end).join("\n").trim(), end };
}

function begins(lines, index) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((kind) => kind.test(lines[index])) || isTable(lines, index);
}

function firstFrom(lines, start, isOther) {
  let end = start;
  while (end < lines.length && !isOther(lines[end])) end += 1;
  return end;
}

function codeAt(lines, start) {
  const [opening, fence] = FENCE.exec(lines[start]);
  const language = lines[start].slice(opening.length).trim().split(/\s/, 1)[0];
  const isEnd = (each) => {
    const text = each.trim();
    return text.length >= fence.length && text === fence[0].repeat(text.length);
  };
  const end = firstFrom(lines, start + 1, isEnd);
  const indent = lines[start].length - lines[start].trimStart().length;
  const inside = lines.slice(start + 1, end).map((each) => each.slice(Math.min(indent, indentOf(each))));
  return { kind: "code", language, text: inside.join("\n"), end: Math.min(end + 1, lines.length) };
}

const indentOf = (line) => line.length - line.trimStart().length;

// A list and its items. What is indented by two or more belongs to the item above it, as models write it.
function listAt(lines, start) {
  const [, indent, first] = ITEM.exec(lines[start]);
  const type = first.slice(-1);
  const items = [];
  let index = start;
  while (index < lines.length) {
    const found = ITEM.exec(lines[index]);
    if (found && indentOf(lines[index]) < indent.length + 2) {
      if (found[2].slice(-1) !== type || RULE.test(lines[index])) break;
      const width = Math.min(found[0].length, indent.length + found[2].length + 1);
      items.push({ width, lines: [lines[index].slice(Math.min(width, found[0].length))] });
    } else if (!lines[index].trim()) {
      const next = firstFrom(lines, index, (each) => each.trim());
      if (next === lines.length) break;
      const goesOn = indentOf(lines[next]) >= indent.length + 2 || ITEM.exec(lines[next])?.[2].slice(-1) === type;
      if (!goesOn) break;
      for (; index < next; index += 1) items.at(-1).lines.push("");
      continue;
    } else if (indentOf(lines[index]) >= indent.length + 2) {
      items.at(-1).lines.push(lines[index].slice(Math.min(items.at(-1).width, indentOf(lines[index]))));
    } else if (!lines[index - 1].trim() || begins(lines, index)) {
      break;
    } else {
      items.at(-1).lines.push(lines[index]);
    }
    index += 1;
  }
  const number = /^\d/.test(first) ? parseInt(first, 10) : null;
  return { kind: "list", number, items: items.map((item) => item.lines), end: index };
}

function isTable(lines, index) {
  if (index + 1 >= lines.length || !lines[index].includes("|") || !lines[index + 1].includes("-")) return false;
  const marks = cells(lines[index + 1]);
  return marks.length === cells(lines[index]).length && marks.every((each) => /^:?-+:?$/.test(each));
}

// The cells of a row; a bar in code or behind a backslash divides nothing.
function cells(line) {
  const found = [""];
  let inCode = false;
  for (let index = 0; index < line.length; index += 1) {
    if (line[index] === "`") inCode = !inCode;
    if (line[index] === "\\" && line[index + 1] === "|") {
      found[found.length - 1] += "|";
      index += 1;
    } else if (line[index] === "|" && !inCode) found.push("");
    else found[found.length - 1] += line[index];
  }
  const trimmed = found.map((each) => each.trim());
  if (trimmed.length > 1 && trimmed[0] === "") trimmed.shift();
  if (trimmed.length > 1 && trimmed.at(-1) === "") trimmed.pop();
  return trimmed;
}

const BUILDERS = {
  heading: (block) => make(`h${Math.min(block.level + 1, 6)}`, {}, inline(block.text)),
  rule: () => make("hr"),
  paragraph: (block) => make("p", {}, inline(block.text)),
  quote: (block, depth) => make("blockquote", {}, all(block.inside, depth)),
  code: buildCode,
  table: buildTable,
  list: buildList,
};

function build(block, depth) {
  return BUILDERS[block.kind](block, depth);
}

function all(lines, depth) {
  if (depth >= DEEPEST) return [lines.join("\n")];
  return scan(lines).map((block) => build(block, depth + 1));
}

function buildCode(block) {
  const code = make("code", {}, block.text);
  const press = make("button", { type: "button", onclick: () => copy(code.textContent, press, say("copied")) });
  press.textContent = say("copy");
  const bar = make("div", { class: "codebar" }, make("span", {}, block.language), press);
  const node = make("div", { class: "code" }, bar, make("pre", { tabindex: "0" }, code));
  node.code = code;
  node.language = block.language;
  return node;
}

function buildTable(block) {
  const [head, marks, ...rows] = block.rows.map(cells);
  const align = marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : "left"));
  const row = (tag, texts) =>
    make("tr", {}, head.map((_, index) => make(tag, { class: align[index] }, inline(texts[index] ?? ""))));
  const body = make("tbody", {}, rows.map((each) => row("td", each)));
  const table = make("table", {}, make("thead", {}, row("th", head)), body);
  return make("div", { class: "table", tabindex: "0" }, table);
}

function buildList(block, depth) {
  const items = block.items.map((lines) => {
    const task = /^\[([ xX])\] /.exec(lines[0]);
    const mark = task ? (task[1] === " " ? "☐ " : "☑ ") : null;
    const inside = task ? [lines[0].slice(4), ...lines.slice(1)] : lines;
    if (depth >= DEEPEST) return make("li", {}, mark, inside.join("\n"));
    const [first, ...rest] = scan(inside);
    if (first?.kind !== "paragraph") return make("li", {}, mark, all(inside, depth));
    const others = rest.map((each) => build(each, depth + 1));
    return make("li", { class: task ? "task" : null }, mark, inline(first.text), others);
  });
  return block.number === null ? make("ul", {}, items) : make("ol", { start: block.number }, items);
}

const SPECIAL = /[\\`*_~[$!]|https?:\/\//gi;
const ESCAPED = /[\\`*_~#|>!+.{}-]/;
const LINK =
  /\[([^[\]]*(?:\[[^[\]]*\][^[\]]*)*)\]\(\s?<?([^()\s<>]*(?:\([^()\s<>]*\)[^()\s<>]*)*)>?(?:\s+"[^"]*")?\s?\)/y;
const BARE = /https?:\/\/[^\s<>"'`*|\\^{}[\]，。；：、！？（）【】《》“”‘’]+/iy;

// The texts and elements of a line. Delimiters of emphasis wait in `out` until their partner comes.
function inline(text, inLink = false) {
  const out = [];
  const openers = { "*": [], _: [], "~": [] };
  const missing = new Set(); // what was looked for and does not come any more
  let index = 0;
  const push = (item) => out.push(item);
  while (index < text.length) {
    SPECIAL.lastIndex = index;
    const found = SPECIAL.exec(text);
    if (!found || found.index > index) {
      const end = found ? found.index : text.length;
      push(text.slice(index, end));
      index = end;
      continue;
    }
    const character = text[index];
    if (character in openers) {
      index = emphasis(text, index, out, openers);
      continue;
    }
    const read = verbatim(text, index, missing) ?? (inLink ? null : link(text, index));
    push(read ? read.item : found[0]);
    index = read ? read.end : index + found[0].length;
  }
  return out.map(content);
}

// The text or element of what stands in `out`; a delimiter without partner is text.
function content(item) {
  return typeof item === "string" ? item : item.node ?? item.mark.repeat(item.count);
}

const MATH = { "\\(": "\\)", "\\[": "\\]", $$: "$$" }; // is shown as it was written

// Code, mathematics, and what stands behind a backslash.
function verbatim(text, index, missing) {
  const two = text.slice(index, index + 2);
  if (text[index] === "`") {
    const fence = /`+/y;
    fence.lastIndex = index;
    const mark = fence.exec(text)[0];
    const end = missing.has(mark) ? -1 : closingRun(text, index + mark.length, mark);
    if (end < 0) {
      missing.add(mark);
      return { item: mark, end: index + mark.length };
    }
    const inside = text.slice(index + mark.length, end).replace(/^ ([^]*) $/, "$1");
    return { item: { node: make("code", {}, inside) }, end: end + mark.length };
  }
  if (two in MATH) {
    const end = missing.has(two) ? -1 : text.indexOf(MATH[two], index + 2);
    if (end < 0) {
      missing.add(two);
      return { item: two, end: index + 2 };
    }
    return { item: { node: make("span", { class: "math" }, text.slice(index, end + 2)) }, end: end + 2 };
  }
  if (text[index] === "\\" && ESCAPED.test(text[index + 1] ?? "")) return { item: text[index + 1], end: index + 2 };
  return null;
}

function closingRun(text, from, mark) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let run = runs.exec(text); run; run = runs.exec(text)) if (run[0] === mark) return run.index;
  return -1;
}

// A link to http or https; to anything else there is none. A picture becomes a link: nothing is loaded.
function link(text, index) {
  const isPicture = text[index] === "!";
  const at = (pattern, from) => {
    pattern.lastIndex = from;
    return pattern.exec(text);
  };
  if (text[index] === "[" || (isPicture && text[index + 1] === "[")) {
    const found = at(LINK, isPicture ? index + 1 : index);
    if (!found || !isWeb(found[2])) return null;
    const label = found[1].trim() ? inline(found[1], true) : [found[2]];
    return { item: { node: anchor(found[2], label) }, end: LINK.lastIndex };
  }
  const found = at(BARE, index);
  if (!found) return null;
  let end = found[0].length;
  const punctuation = found[0].includes("(") ? ".,;:!?" : ".,;:!?)";
  while (punctuation.includes(found[0][end - 1])) end -= 1;
  const address = found[0].slice(0, end);
  return isWeb(address) ? { item: { node: anchor(address, [address]) }, end: index + address.length } : null;
}

function isWeb(address) {
  try {
    return /^https?:\/\//i.test(address) && ["http:", "https:"].includes(new URL(address).protocol);
  } catch {
    return false;
  }
}

function anchor(href, label) {
  return make("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" }, label);
}

// A run of delimiters at `index`: closes what waits for it, and waits itself if it may open. Returns where it ends.
function emphasis(text, index, out, openers) {
  const mark = text[index];
  let end = index;
  while (text[end] === mark) end += 1;
  if (mark === "~" && end - index !== 2) {
    out.push(text.slice(index, end));
    return end;
  }
  const before = text[index - 1] ?? " ";
  const after = text[end] ?? " ";
  const isWord = (character) => /[\p{L}\p{N}]/u.test(character);
  const opens = /\S/.test(after) && !(mark === "_" && isWord(before));
  const closes = /\S/.test(before) && !(mark === "_" && isWord(after));
  let count = end - index;
  while (closes && count > 0 && openers[mark].length) {
    const place = openers[mark].at(-1);
    const opener = out[place];
    const used = Math.min(2, count, opener.count);
    for (const places of Object.values(openers)) while (places.at(-1) > place) places.pop();
    const inside = out.splice(place + 1);
    const depth = 1 + inside.reduce((deepest, item) => Math.max(deepest, item.depth ?? 0), 0);
    if (depth > DEEPEST) {
      for (const item of inside) out.push(item);
      openers[mark].pop();
      break;
    }
    const nodes = inside.map(content);
    out.push({ node: make(mark === "~" ? "del" : used === 2 ? "strong" : "em", {}, nodes), depth });
    opener.count -= used;
    count -= used;
    if (!opener.count) openers[mark].pop();
  }
  if (count && opens) openers[mark].push(out.push({ mark, count }) - 1);
  else if (count) out.push(mark.repeat(count));
  return end;
}
