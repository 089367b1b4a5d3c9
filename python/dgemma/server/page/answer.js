/* An answer: its drafts, its text, and its steps. */
"use strict";

/* Entropy in nats to opacity: what is certain is full ink, and nothing is too faint to read. */
const opacity = (entropy) => Math.max(0.3, 1 - 0.32 * Math.sqrt(Math.max(0, entropy)) - 0.1 * entropy);
const REGIONS = { "<|channel>": "thought", "<|tool_call>": "call-text", "<|tool_response>": "call-text" };
const MARKS = new Set([...Object.keys(REGIONS), "<channel|>", "<tool_call|>", "<tool_response|>", '<|"|>']);

/* One step: certain text, then the canvas token by token, and the map of the canvas. */
function drawStep(answer, step, previous) {
  const nodes = [document.createTextNode(step.before)], map = [];
  const before = previous && previous.canvas === step.canvas ? previous.tokens : null;
  let region = "";
  step.pieces.forEach((piece, i) => {
    const changed = before !== null && before[i] !== step.tokens[i], shade = opacity(step.entropies[i]).toFixed(2);
    const cell = element(null, "i", changed ? "on new" : "on");
    cell.style.opacity = shade;
    map.push(cell);
    if (MARKS.has(piece)) {
      if (piece !== '<|"|>') region = REGIONS[piece] ?? "";
      if (piece !== '<|"|>') return;
      piece = '"';
    }
    const token = element(null, "span", [region, changed ? "changed" : ""].join(" ").trim(), piece);
    token.style.opacity = shade;
    token.title = `entropy ${step.entropies[i].toFixed(3)} nats`;
    nodes.push(token);
  });
  while (map.length < canvasLength) map.push(element(null, "i"));
  answer.text.classList.add("draft");
  answer.text.replaceChildren(...nodes);
  answer.map.replaceChildren(...map);
  answer.map.hidden = false;
}

class Answer {
  constructor(at) {
    this.root = element(log, "article", "answer");
    this.root.at = at;
    this.root.setAttribute("aria-label", "Answer");
    this.text = element(this.root, "div", "text draft running");
    this.map = element(this.root, "div", "map");
    this.map.hidden = true;
    this.map.setAttribute("aria-hidden", "true");
    this.foot = element(this.root, "div", "foot");
    this.figures = element(this.foot, "span", "figures", "waiting for the model …");
    this.content = this.reasoning = "";
    this.calls = [];
    this.steps = [];
    this.frame = 0;
    this.began = performance.now();
    this.root.setAttribute("aria-busy", "true");
  }

  /* An answer of a conversation that was kept: without its steps. */
  static kept({ content, reasoning, calls, figures }, at) {
    const made = new Answer(at);
    made.delta({ content, reasoning_content: reasoning, tool_calls: calls });
    made.finish();
    made.figures.textContent = figures ?? "";
  }

  draft(draft) {
    this.steps.push({ before: this.content, ...draft });
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      drawStep(this, this.steps.at(-1), this.steps.at(-2));
      follow();
    });
    const seconds = (performance.now() - this.began) / 1000;
    const certain = draft.entropies.filter((e) => e < 0.05).length / Math.max(1, draft.entropies.length);
    this.figures.textContent = `canvas ${draft.canvas + 1} · step ${draft.step} · ${Math.round(100 * certain)} % certain · ${seconds.toFixed(1)} s`;
  }

  delta(delta) {
    if (delta.content) this.content += delta.content;
    if (delta.reasoning_content) {
      this.reasoning += delta.reasoning_content;
      if (!this.thoughts) {
        const details = element(null, "details", "thoughts");
        element(details, "summary", "", "Thought");
        this.thoughts = element(details, "div");
        this.root.prepend(details);
      }
      this.thoughts.textContent = this.reasoning;
    }
    for (const call of delta.tool_calls || []) {
      this.calls.push(call);
      const shown = element(null, "details", "call");
      element(shown, "summary", "", `Calls ${call.function.name}`);
      element(shown, "pre", "", pretty(call.function.arguments));
      shown.open = true;
      this.map.before(shown);
    }
  }

  fail(message) {
    const shown = element(null, "div", "error", message.charAt(0).toUpperCase() + message.slice(1));
    shown.setAttribute("role", "alert");
    this.map.before(shown);
  }

  showFinished() {
    this.text.classList.remove("draft", "running");
    this.text.replaceChildren();
    markdown(this.text, this.content);
    for (const code of this.text.querySelectorAll("pre")) {
      const frame = element(null, "div", "code");
      code.replaceWith(frame);
      frame.append(code);
      copyButton(frame, () => code.textContent).setAttribute("aria-label", "Copy this code");
    }
    this.map.hidden = true;
  }

  finish(timings, stopped, again) {
    cancelAnimationFrame(this.frame);
    this.root.removeAttribute("aria-busy");
    this.showFinished();
    const parts = [];
    if (timings) {
      parts.push(`seed ${timings.seed}`, `steps ${timings.steps.join(" + ") || 0}`, `${timings.completion_tokens} tokens`,
        `${(timings.timings.tokens_per_s || 0).toFixed(1)} tokens/s`, `${(timings.timings.total_s || 0).toFixed(1)} s`);
    }
    if (stopped) parts.push("stopped");
    this.figures.textContent = parts.join(" · ");
    if (this.content) copyButton(this.foot, () => this.content);
    if (again) this.again = button(this.foot, "Again", again);
    if (this.steps.length > 1) this.addSlider();
  }

  /* Goes through the steps that were kept; the right end is the finished answer. */
  addSlider() {
    const replay = element(this.foot, "div", "replay"), last = this.steps.length;
    const many = this.steps.at(-1).canvas > 0;
    const play = button(replay, "Replay", () => {
      let i = 0;
      clearInterval(this.player);
      this.player = setInterval(() => { show(i); if (i++ >= last) clearInterval(this.player); }, Math.max(60, 1500 / last));
    });
    play.setAttribute("aria-label", "Replay the steps of this answer");
    const save = button(replay, "Save", async () => {
      save.disabled = true;
      const link = element(null, "a");
      link.href = URL.createObjectURL(await animation(this.steps));
      link.download = "canvas.png";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
      save.disabled = false;
    });
    save.setAttribute("aria-label", "Save the settling canvas as an animated picture");
    const slider = element(replay, "input");
    Object.assign(slider, { type: "range", min: 0, max: last, value: last });
    slider.setAttribute("aria-label", "Step of this answer");
    const label = element(replay, "output", "", "finished");
    const show = (i) => {
      const step = this.steps[i];
      if (step) drawStep(this, step, this.steps[i - 1]);
      else this.showFinished();
      slider.value = i;
      label.textContent = step ? `${many ? `canvas ${step.canvas + 1}, ` : ""}step ${step.step}` : "finished";
      slider.setAttribute("aria-valuetext", label.textContent);
    };
    slider.addEventListener("input", () => { clearInterval(this.player); show(Number(slider.value)); });
  }
}

function pretty(json) {
  try { return JSON.stringify(JSON.parse(json), null, 2); } catch { return json; }
}
