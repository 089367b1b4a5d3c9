/* Markdown, as nodes: text never becomes markup. */
"use strict";

const INLINE = /(`+)([^]*?[^`])\1(?!`)|\*\*([^\s*](?:[^]*?[^\s*])?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*|~~([^~]+)~~|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>"')\]]*[^\s<>"')\].,;:!?])/;

function inline(parent, text) {
  for (;;) {
    const found = INLINE.exec(text);
    parent.append(found ? text.slice(0, found.index) : text);
    if (!found) return;
    const [whole, , code, bold, italic, struck, label, address, bare] = found;
    if (code !== undefined) element(parent, "code", "", code.trim() || code);
    else if (address || bare) {
      const link = element(parent, "a", "", label ? undefined : bare);
      if (label) inline(link, label);
      link.href = address || bare;
      link.target = "_blank";
      link.rel = "noopener noreferrer";
    } else inline(element(parent, bold ? "strong" : italic ? "em" : "s"), bold ?? italic ?? struck);
    text = text.slice(found.index + whole.length);
  }
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
const isBlock = (line, next) => /^\s*(```|~~~|#{1,6}\s|>|([-*_])(\s*\2){2,}\s*$)/.test(line) || ITEM.test(line)
  || (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(next ?? "") && next.includes("|"));

function markdown(parent, text) {
  const lines = text.split("\n");
  let i = 0;
  const run = (test) => { const from = i; while (i < lines.length && test(lines[i])) i++; return lines.slice(from, i); };
  while (i < lines.length) {
    const line = lines[i];
    let found;
    if (!line.trim()) i++;
    else if ((found = /^\s*(```+|~~~+)\s*([\w+-]*)/.exec(line))) {
      i++;
      const code = run((l) => !l.trim().startsWith(found[1]));
      i++;
      element(element(parent, "pre"), "code", "", code.join("\n"));
    } else if ((found = /^\s*(#{1,6})\s+(.*?)\s*#*\s*$/.exec(line))) {
      i++;
      inline(element(parent, `h${Math.min(4, found[1].length)}`), found[2]);
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) { i++; element(parent, "hr"); }
    else if (/^\s*>/.test(line)) {
      markdown(element(parent, "blockquote"), run((l) => /^\s*>/.test(l)).map((l) => l.replace(/^\s*> ?/, "")).join("\n"));
    } else if (ITEM.test(line)) list(parent, run((l) => ITEM.test(l) || /^\s+\S/.test(l)));
    else if (isBlock(line, lines[i + 1])) table(parent, run((l) => l.includes("|")));
    else {
      const words = [lines[i++]];
      while (i < lines.length && lines[i].trim() && !isBlock(lines[i], lines[i + 1])) words.push(lines[i++]);
      inline(element(parent, "p"), words.join("\n"));
    }
  }
}

function list(parent, lines) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const made = element(parent, /\d/.test(mark) ? "ol" : "ul");
  if (/\d/.test(mark) && parseInt(mark) !== 1) made.start = parseInt(mark);
  for (let i = 0; i < lines.length;) {
    const item = element(made, "li");
    inline(item, (ITEM.exec(lines[i]) ?? [, , , lines[i].trim()])[3]);
    const inner = [];
    for (i++; i < lines.length && !(ITEM.test(lines[i]) && ITEM.exec(lines[i])[1].length <= indent.length); i++) inner.push(lines[i]);
    if (!inner.length) continue;
    const cut = inner.findIndex((l) => ITEM.test(l)), own = cut < 0 ? inner : inner.slice(0, cut);
    if (own.length) inline(item, ` ${own.map((l) => l.trim()).join(" ")}`);
    if (cut >= 0) list(item, inner.slice(cut));
  }
}

function table(parent, lines) {
  const made = element(parent, "table");
  const add = (section, kind, line) => {
    const row = element(section, "tr");
    for (const cell of cells(line)) inline(element(row, kind), cell);
  };
  add(element(made, "thead"), "th", lines[0]);
  const body = element(made, "tbody");
  for (const line of lines.slice(2)) add(body, "td", line);
}
