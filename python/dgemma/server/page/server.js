/* Asking the server, and what it sends back. */
"use strict";

/* Server-sent events of a response: pairs of name and data. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server ended the connection in the middle of the answer.");
    buffer += value;
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const block = buffer.slice(0, end);
      buffer = buffer.slice(end + 2);
      let name = "", data = "";
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        else if (line.startsWith("data: ")) data += line.slice(6);
      }
      if (data === "[DONE]") return;
      if (data) yield [name, data];
    }
  }
}

function request() {
  const system = $("system").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []),
      ...messages.map(({ role, content }) => ({ role, content }))],
    stream: true, drafts: true, stream_options: { include_usage: true },
  };
  const numbers = { seed: "seed", steps: "max_denoising_steps", temperature: "temperature", tokens: "max_tokens" };
  for (const [id, name] of Object.entries(numbers)) if ($(id).value.trim()) body[name] = Number($(id).value);
  if ($("think").checked) body.chat_template_kwargs = { enable_thinking: true };
  return body;
}

async function refusal(response) {
  const text = await response.text();
  try { return JSON.parse(text).error.message; } catch { return `The server answered ${response.status}.`; }
}

/* What was asked, which can be asked in other words. */
function question(text, at) {
  const root = element(log, "div", "user");
  root.at = at;
  element(root, "div", "said", text);
  const edit = button(root, "Edit", () => { if (!running) editQuestion(root, text, at); });
  edit.setAttribute("aria-label", "Edit this message and send it again");
  return root;
}

function editQuestion(root, text, at) {
  const box = element(null, "div", "box"), field = element(box, "textarea"), row = element(box, "div", "row");
  field.value = text;
  field.rows = Math.min(12, text.split("\n").length + 1);
  field.setAttribute("aria-label", "Message");
  element(row, "span", "gap");
  const back = () => { root.replaceWith(question(text, at)); };
  const resend = () => {
    if (!field.value.trim() || running) return;
    takeBack(root);
    ask(field.value.trim(), at);
  };
  button(row, "Cancel", back, "");
  button(row, "Send", resend, "main");
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); back(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); resend(); }
  });
  root.replaceChildren(box);
  field.focus();
}

function takeBack(asked) {
  asked.answered?.remove();
  asked.remove();
}

/* Asks; `at` is the place of the question: what stood there and behind it is taken back. */
async function ask(text, at = messages.length) {
  log.querySelector(".hello")?.remove();
  for (const shown of [...log.children]) if (shown.at >= at) shown.remove();
  log.querySelectorAll(".answer").forEach((earlier) => earlier.answer?.again?.remove());
  const asked = question(text, at);
  const conversation = messages, id = chat;  // "New chat" begins another one while this answer still ends
  conversation.length = at;
  conversation.push({ role: "user", content: text });
  const body = request(), answer = new Answer(at + 1);
  answer.root.answer = answer;
  running = new AbortController();
  send.textContent = "Stop";
  send.classList.add("stop");
  $("status").textContent = "The answer is being made.";
  follow(true);
  const [timings, stopped, failed] = await receive(answer, body);
  asked.answered = answer.root;
  answer.finish(timings, stopped, () => { takeBack(asked); ask(text, at); });
  // A question without an answer would only confuse the next turn: it stays to be seen, that is all.
  const { content, reasoning, calls } = answer, figures = answer.figures.textContent;
  if (content || calls.length) conversation.push({ role: "assistant", content, reasoning, calls, figures });
  else { conversation.pop(); asked.at = answer.root.at = -1; }
  if (conversation.length > at) keepThis(id, conversation);
  running = null;
  send.textContent = "Send";
  send.classList.remove("stop");
  $("status").textContent = failed ? "" : stopped ? "Stopped." : `The answer: ${content}`;
  follow();
}

/* Shows an answer as it comes; its figures, and whether it was stopped or failed. */
async function receive(answer, body) {
  let timings = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const [name, data] of events(response)) {
      const value = JSON.parse(data);
      if (value.error) throw new Error(value.error.message);
      if (name === "draft") answer.draft(value);
      else if (value.choices.length) answer.delta(value.choices[0].delta);
      if (value.timings) timings = value.timings;
    }
  } catch (problem) {
    if (problem.name === "AbortError") return [timings, true, false];
    answer.fail(problem instanceof TypeError ? "The server cannot be reached." : problem.message);
    return [timings, false, true];
  }
  return [timings, false, false];
}
