// The messages: sends them, shows replies as they come, and sends one both ways, with drafts and without.

import { button, make, seconds } from "./elements.js";
import { problems, summary } from "./figures.js";
import { Run } from "./run.js";
import { streamed } from "./server.js";
import { TextView } from "./text.js";

const DRAFTED = "With drafts";
const PLAIN = "Without drafts";

/** page: {card, settings, said, watch, working, follow}; see main.js. */
export class Conversation {
  constructor(element, page) {
    [this.element, this.page] = [element, page];
    this.turns = []; // {role, content, runs, element}
    this.views = new Map(); // run -> TextView
    this.mode = "chat";
    this.stopper = null;
  }

  get busy() {
    return this.stopper !== null;
  }

  /** Sends a message, or a prompt to continue. Throws an Error if a setting is wrong. */
  async send(text, both = false) {
    if (this.busy) return;
    const request = this.request();
    if (this.mode === "completion") this.clear();
    this.add({ role: "user", content: text, runs: [] });
    await this.reply(request, both);
  }

  /** Answers the last message again. */
  async retry(both = false) {
    if (this.busy || !this.turns.some((turn) => turn.role === "user")) return;
    const request = this.request();
    if (this.turns.at(-1).role === "assistant") this.remove();
    await this.reply(request, both);
  }

  /** Takes the last message and its reply away. Returns the message. */
  takeBack() {
    if (this.busy) return "";
    while (this.turns.length && this.turns.at(-1).role !== "user") this.remove();
    return this.turns.length ? this.remove().content : "";
  }

  stop() {
    this.stopper?.abort();
  }

  clear() {
    while (this.turns.length) this.remove();
    this.page.card.hide();
  }

  /** Shows turns that were read from a file. */
  load(mode, turns) {
    this.stop();
    this.clear();
    this.mode = mode;
    for (const turn of turns) {
      this.add(turn);
      for (const run of turn.runs) this.finish(run);
      if (turn.runs.length === 2) this.compare(turn);
      if (turn.runs.length) this.page.watch(turn.runs[0]);
    }
  }

  toJSON() {
    return this.turns.map(({ role, content, runs }) => ({ role, content, runs }));
  }

  // ---- requests

  request() {
    return this.page.settings.request(this.mode === "chat");
  }

  body(request) {
    const common = { ...request, stream: true, stream_options: { include_usage: true }, provenance: true };
    if (this.mode === "completion") return { ...common, prompt: this.turns.findLast((turn) => turn.role === "user").content };
    const system = this.page.settings.systemPrompt;
    const failed = (turn) => turn?.role === "assistant" && turn.runs[0].text === "";
    const said = this.turns.filter((turn, i) => !failed(turn) && !failed(this.turns[i + 1])); // a message without a reply is left out too
    return { ...common, messages: [...(system ? [{ role: "system", content: system }] : []), ...said.map((turn) => this.message(turn))] };
  }

  message({ role, content, runs }) {
    return { role, content: role === "assistant" ? runs[0].text : content };
  }

  async reply(request, both) {
    const turn = { role: "assistant", content: "", runs: [new Run(request, both ? DRAFTED : "")] };
    if (both) {
      const { prediction, ...rest } = request;
      if (request.speculation === "off") delete turn.runs[0].request.speculation;
      turn.runs = [turn.runs[0], new Run({ ...rest, speculation: "off" }, PLAIN)];
      for (const run of turn.runs) run.request = { ...run.request, cache_salt: salt() }; // neither finds the other's prompt
    }
    const bodies = turn.runs.map((run) => this.body(run.request));
    this.add(turn);
    this.stopper = new AbortController();
    this.page.working(true);
    if (this.page.settings.atOnce) await Promise.all(turn.runs.map((run, i) => this.produce(run, bodies[i])));
    else for (const [i, run] of turn.runs.entries()) if (!this.stopper.signal.aborted) await this.produce(run, bodies[i]);
    this.stopper = null;
    this.page.working(false);
    if (!this.turns.includes(turn)) return; // it was taken away meanwhile
    if (both) this.compare(turn);
    this.page.watch(turn.runs[0]);
    this.page.said(turn.runs.map((run) => run.error ?? `${run.name || "Reply"} finished: ${summary(run)}`).join(". "));
  }

  async produce(run, body) {
    const view = this.views.get(run);
    const path = this.mode === "chat" ? "v1/chat/completions" : "v1/completions";
    const begun = performance.now();
    view.element.setAttribute("aria-busy", "true");
    this.page.watch(run, begun);
    try {
      for await (const chunk of streamed(path, body, this.stopper.signal)) {
        run.metrics = chunk.metrics ?? run.metrics;
        const choice = chunk.choices[0];
        if (!choice) continue;
        const { provenance = [], trees = [], finish_reason } = choice;
        const text = choice.delta?.content ?? choice.text ?? "";
        run.add({ at: performance.now() - begun, text, finish_reason, provenance, trees });
        view.update(this.page.follow);
      }
      run.end(performance.now() - begun);
    } catch (error) {
      run.end(performance.now() - begun, error.name === "AbortError" ? "stopped" : "error");
      if (error.name !== "AbortError") run.error = error.message;
    }
    view.element.removeAttribute("aria-busy");
    this.finish(run);
  }

  // ---- what is shown

  add(turn) {
    turn.element = turn.role === "assistant" ? this.replied(turn) : this.asked(turn);
    this.turns.push(turn);
    this.element.append(turn.element);
    this.offer();
    this.page.follow();
  }

  remove() {
    const turn = this.turns.pop();
    turn.element.remove();
    for (const run of turn.runs) this.views.delete(run);
    this.offer();
    return turn;
  }

  /** Only the last message and the last turn have buttons. */
  offer() {
    const last = [this.turns.findLast((turn) => turn.role === "user"), this.turns.at(-1)];
    for (const turn of this.turns) {
      const actions = turn.element.querySelector(".turn-actions");
      if (actions) actions.hidden = !last.includes(turn);
    }
  }

  asked(turn) {
    const edit = button("Edit", () => this.page.edit(), { title: "Change this message and send it again" });
    return make(
      "article",
      { class: `turn ${turn.role}` },
      make("h2", {}, this.mode === "completion" ? "prompt" : turn.role === "user" ? "you" : turn.role),
      make("div", { class: "said" }, turn.content),
      turn.role === "user" ? make("div", { class: "turn-actions" }, edit) : null,
    );
  }

  replied(turn) {
    const columns = make("div", { class: turn.runs.length > 1 ? "columns" : "column" });
    for (const run of turn.runs) {
      const view = new TextView(run, this.page.card, this.page.said);
      view.element.addEventListener("focus", () => this.page.watch(run));
      view.element.addEventListener("pointerdown", () => this.page.watch(run));
      this.views.set(run, view);
      const head = run.name ? make("h3", {}, run.name) : null;
      const notes = make("div", { class: "notes" }, make("p", { class: "summary" }));
      columns.append(make("div", { class: "reply" }, head, view.element, notes));
    }
    const actions = make(
      "div",
      { class: "turn-actions" },
      navigator.clipboard ? button("Copy", () => this.copy(turn.runs[0].text)) : null, // there is none without https, but on this machine
      button("Retry", () => this.page.attempt(() => this.retry())),
      button("Both ways", () => this.page.attempt(() => this.retry(true)), { title: "The same message with drafts and without" }),
    );
    return make("article", { class: "turn assistant" }, make("h2", {}, "model"), columns, make("p", { class: "verdict", hidden: true }), actions);
  }

  async copy(text) {
    await navigator.clipboard.writeText(text);
    this.page.said("Copied");
  }

  finish(run) {
    const view = this.views.get(run);
    if (!view) return;
    view.update(this.page.follow);
    const notes = view.element.parentElement.querySelector(".notes");
    notes.querySelector(".summary").textContent = run.tokens.length ? summary(run) : "";
    notes.append(...problems(run));
  }

  /** Says whether the two texts are equal, and which was faster. */
  compare({ runs: [drafted, plain], element }) {
    const verdict = element.querySelector(".verdict");
    verdict.hidden = false;
    if ([drafted, plain].some((run) => run.ended === null || !["stop", "length"].includes(run.finish))) {
      verdict.textContent = "One of the two did not finish.";
      return;
    }
    const length = Math.max(drafted.tokens.length, plain.tokens.length);
    let same = 0;
    while (same < length && drafted.tokens[same]?.token_id === plain.tokens[same]?.token_id) same += 1;
    const equal = same === length && drafted.text === plain.text;
    const times = `${seconds(drafted.ended)} with drafts, ${seconds(plain.ended)} without`;
    verdict.replaceChildren(
      make("strong", { class: equal ? "equal" : "unequal" }, equal ? "The texts are equal" : `The texts differ from token ${same + 1} on`),
      ` · ${times} · `,
      make("strong", {}, `${(plain.ended / drafted.ended).toFixed(2)}× as fast`),
    );
    if (!equal) for (const run of [drafted, plain]) this.views.get(run).mark(same);
  }
}

function salt() {
  return crypto.getRandomValues(new Uint32Array(4)).join("-");
}
