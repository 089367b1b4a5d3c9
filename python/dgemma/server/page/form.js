/* The form, and how the page begins. */
"use strict";

function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function welcome() {
  log.replaceChildren($("hello").content.cloneNode(true));
  for (const text of TRIES) button(log.querySelector(".tries"), text, () => ask(text), "");
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) { running.abort(); return; }
  const text = input.value.trim();
  if (!text) return;
  input.value = "";
  fit();
  ask(text);
});
input.addEventListener("input", fit);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("chats").open) running.abort();
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey;
  if (event.key === "/" && !typing) { event.preventDefault(); input.focus(); }
});
$("more").addEventListener("click", () => {
  const shown = $("options").hidden;
  $("options").hidden = !shown;
  $("more").setAttribute("aria-expanded", shown);
});
$("form").addEventListener("invalid", () => {
  $("options").hidden = false;
  $("more").setAttribute("aria-expanded", true);
}, true);
$("clear").addEventListener("click", newChat);
$("kept").addEventListener("click", () => { listChats(); $("chats").showModal(); });
$("close").addEventListener("click", () => $("chats").close());
// Who comes back, or loads the page again, finds the conversation as it was.
const latest = kept()[0];
if (latest && sessionStorage.getItem("dgemma.seen")) openChat(latest);
else welcome();
sessionStorage.setItem("dgemma.seen", "1");
fetch("props").then((r) => r.json()).then((p) => {
  canvasLength = p.info.canvas_length;
  $("model").textContent = `${p.model} · ${p.info.backend_name} · context ${p.n_ctx.toLocaleString("en")}`;
  $("steps").placeholder = `at most ${p.sampling.max_denoising_steps}`;
}).catch(() => {});
