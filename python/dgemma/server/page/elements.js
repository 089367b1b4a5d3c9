/* What the whole page uses: its state, and making elements. */
"use strict";

const $ = (id) => document.getElementById(id);
const log = $("log"), input = $("input"), send = $("send");
const TRIES = ["Why is the sky blue?", "What is the capital of France?", "Write a haiku about rain."];
let messages = [];      // the conversation: { role, content }, of answers also what is shown beside it
let chat = newId();     // under which the conversation is kept
let running = null;     // the AbortController of the answer under way
let canvasLength = 256;

function element(parent, kind, className, text) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function button(parent, label, act, className = "quiet") {
  const made = element(parent, "button", className, label);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

function newId() { return `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`; }

/* A button that copies, and says so for a moment. */
function copyButton(parent, text) {
  const made = button(parent, "Copy", async () => {
    await navigator.clipboard?.writeText(text());
    made.textContent = "Copied";
    setTimeout(() => { made.textContent = "Copy"; }, 1200);
  });
  return made;
}

/* Stays at the end, unless the reader has scrolled away from it. */
function follow(always = false) {
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 180) log.scrollTop = log.scrollHeight;
}
