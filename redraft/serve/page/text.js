// The text of a run as coloured tokens. Tokens are appended once a frame, and one listener serves all of them.

import { spoken } from "./card.js";
import { make, visible } from "./elements.js";
import { look } from "./origins.js";

const BATCH = 400; // tokens that a frame appends at most
const BLOCK = 48; // tokens after which a line end begins a new block: the browser skips blocks that are not in view

export class TextView {
  /** said: is called with a text to read out. */
  constructor(run, card, said = () => {}) {
    [this.run, this.card, this.said] = [run, card, said];
    this.element = make("div", {
      class: "text",
      tabindex: 0,
      role: "textbox",
      "aria-readonly": "true",
      "aria-multiline": "true",
      "aria-label": `${run.name || "Reply"}: arrow keys go from token to token, up and down from step to step`,
    });
    this.drawn = 0;
    this.current = -1;
    this.only = null;
    this.size = 0; // tokens of the last block
    this.block = null;
    this.element.addEventListener("pointerover", (event) => this.over(event));
    this.element.addEventListener("pointerout", () => this.card.leave());
    this.element.addEventListener("click", (event) => this.over(event, true));
    this.element.addEventListener("keydown", (event) => this.key(event));
    this.element.addEventListener("blur", () => this.card.pinned || this.card.leave());
  }

  /** Draws what is new with the next frame. then: is called after each frame that drew something. */
  update(then = () => {}) {
    if (this.waiting || this.drawn >= this.run.settled) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.append(Math.min(this.run.settled, this.drawn + BATCH));
      then();
      this.update(then);
    });
  }

  append(until) {
    let part = document.createDocumentFragment();
    for (; this.drawn < until; this.drawn += 1) {
      const { shown } = this.run.tokens[this.drawn];
      this.size += 1;
      const end = this.size > BLOCK ? shown.lastIndexOf("\n") + 1 : 0;
      if (end === 0) {
        part.append(...this.spans(this.drawn, shown));
        continue;
      }
      part.append(...this.spans(this.drawn, shown.slice(0, end)));
      this.blockFor(part);
      this.block = null;
      part = document.createDocumentFragment();
      if (end < shown.length) part.append(...this.spans(this.drawn, shown.slice(end), " rest"));
    }
    if (part.hasChildNodes()) this.blockFor(part);
  }

  /** Appends to the last block, or to a new one. */
  blockFor(part) {
    if (this.block === null) {
      this.block = make("div", { class: "lines" });
      this.element.append(this.block);
      this.size = 0;
    }
    this.block.append(part);
  }

  /** The element of a token, or of the rest of one that a block's end has cut; none if its character is the next token's. */
  spans(index, shown, rest = "") {
    const token = this.run.tokens[index];
    const silent = shown === "";
    if (silent && token.own === "") return [];
    const made = document.createElement("span");
    const dim = this.only !== null && this.only !== token.origin ? " dim" : "";
    const kind = silent ? " silent" : /^[\r\n]/.test(shown) ? " end" : "";
    made.className = `token ${look(token.origin)}${kind}${rest}${dim}`;
    made.dataset.index = index;
    made.textContent = silent ? visible(token.token, 24) : shown;
    return [made];
  }

  /** Only tokens of this origin stay bright; null: all. */
  highlight(origin) {
    this.only = origin;
    for (const made of this.element.querySelectorAll(".token")) {
      made.classList.toggle("dim", origin !== null && this.run.tokens[made.dataset.index].origin !== origin);
    }
  }

  /** Marks the tokens from this index on, where another text differs. */
  mark(from) {
    for (const made of this.element.querySelectorAll(".token")) made.classList.toggle("differs", Number(made.dataset.index) >= from);
  }

  over(event, pinned = false) {
    const made = event.target.closest?.(".token");
    if (!made) return;
    if (pinned) this.current = Number(made.dataset.index);
    this.card.show(this.run, Number(made.dataset.index), made, pinned);
  }

  key(event) {
    if (event.key === "Enter" && this.card.at !== null) {
      this.card.pin();
      return;
    }
    const to = this.target(event.key);
    if (to === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.current = Math.max(0, Math.min(this.drawn - 1, to));
    const made = this.nearest(event.key === "ArrowLeft" ? -1 : 1);
    if (!made) return;
    made.scrollIntoView({ block: "nearest" });
    this.card.hide();
    this.card.show(this.run, this.current, made);
    this.said(spoken(this.run, this.current));
  }

  target(key) {
    const [begin, end] = this.run.span(this.run.tokens[Math.max(0, this.current)]?.step);
    const before = begin > 0 ? this.run.span(this.run.tokens[begin - 1].step)[0] : 0;
    const places = { ArrowRight: this.current + 1, ArrowLeft: this.current - 1, ArrowDown: end, ArrowUp: before, Home: 0, End: this.drawn - 1 };
    return places[key] ?? null;
  }

  /** The element of the current token, or of the next one in this direction that has one. */
  nearest(direction) {
    for (let i = this.current; i >= 0 && i < this.drawn; i += direction) {
      const made = this.element.querySelector(`[data-index="${i}"]`);
      if (made) {
        this.current = i;
        return made;
      }
    }
    return null;
  }
}
