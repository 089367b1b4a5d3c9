/* Conversations, kept in this browser. */
"use strict";

const STORE = "dgemma.chats", MAX_KEPT = 100;

function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    return Array.isArray(found) ? found : [];
  } catch { return []; }
}

/* The newest first; where the browser has no more room, the oldest go. */
function keep(chats) {
  for (let n = Math.min(chats.length, MAX_KEPT); n >= 0; n--) {
    try { localStorage.setItem(STORE, JSON.stringify(chats.slice(0, n))); return; } catch { if (!n) return; }
  }
}

function keepThis(id, turns) {
  const others = kept().filter((one) => one.id !== id);
  const title = turns[0]?.content.trim().replace(/\s+/g, " ").slice(0, 80);
  keep(turns.length ? [{ id, title, system: $("system").value, messages: turns }, ...others] : others);
}

function openChat(one) {
  running?.abort();
  ({ id: chat, messages } = one);
  $("system").value = one.system ?? "";
  log.replaceChildren();
  messages.forEach((message, at) => {
    if (message.role === "user") question(message.content, at);
    else Answer.kept(message, at);
  });
  if (!messages.length) welcome();
  follow(true);
}

function newChat() {
  openChat({ id: newId(), messages: [], system: $("system").value });
  input.focus();
}

function listChats() {
  const chats = kept();
  $("list").replaceChildren();
  for (const one of chats) {
    const item = element($("list"), "li");
    const open = button(item, one.title || "…", () => { $("chats").close(); openChat(one); input.focus(); }, "open");
    open.setAttribute("aria-current", one.id === chat);
    const remove = button(item, "Delete", () => {
      keep(kept().filter((other) => other.id !== one.id));
      if (one.id === chat) newChat();
      listChats();
      ($("list").querySelector("button") ?? $("close")).focus();
    });
    remove.setAttribute("aria-label", `Delete ${one.title}`);
  }
  if (!chats.length) element($("list"), "li", "", "There are none yet.");
}
