// The card of a token: where it comes from, how likely it was, what else was likely, and the tree of its step.

import { make, percent, visible } from "./elements.js";
import { label, look } from "./origins.js";
import { treeOf } from "./tree.js";

const GAP = 8; // pixels around the card
const LINGER = 180; // milliseconds until a card that was left goes away
const LARGEST = 96; // nodes of a tree that are drawn

/** One for the page. It is shown beside a token, and stays if it is pinned. */
export class Card {
  constructor() {
    this.element = make("aside", { class: "card", id: "card", role: "region", "aria-label": "Origin of the token", tabindex: -1, hidden: true });
    this.element.addEventListener("pointerenter", () => clearTimeout(this.leaving));
    this.element.addEventListener("pointerleave", () => this.leave());
    document.body.append(this.element);
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
    document.addEventListener("pointerdown", (event) => {
      if (this.pinned && !this.element.contains(event.target) && !event.target.closest(".token")) this.hide();
    });
    document.addEventListener("scroll", (event) => this.follow(event), true);
    this.pinned = false;
    this.at = null;
  }

  /** anchor: the token's element. */
  show(run, index, anchor, pinned = false) {
    clearTimeout(this.leaving);
    if (this.pinned && !pinned) return;
    this.pinned = pinned;
    if (this.at !== anchor) {
      this.at?.classList.remove("at");
      anchor.classList.add("at");
      this.at = anchor;
      this.element.replaceChildren(...contents(run, index));
    }
    this.element.classList.toggle("pinned", pinned);
    this.element.hidden = false;
    this.place(anchor);
    const marked = this.element.querySelector(".marked rect");
    if (marked) marked.closest(".wood").scrollLeft = marked.getAttribute("x") - this.element.clientWidth / 2;
  }

  /** Keeps the card that is shown, and goes into it. */
  pin() {
    this.pinned = true;
    this.element.classList.add("pinned");
    this.element.focus();
  }

  leave() {
    clearTimeout(this.leaving);
    if (!this.pinned) this.leaving = setTimeout(() => this.hide(), LINGER);
  }

  hide() {
    clearTimeout(this.leaving);
    if (this.element.contains(document.activeElement)) this.at?.closest(".text").focus();
    this.at?.classList.remove("at");
    this.at = null;
    this.pinned = false;
    this.element.hidden = true;
  }

  /** Stays at its token while the page scrolls, until that is out of view. */
  follow(event) {
    if (this.at === null || this.element.contains(event.target)) return;
    const { top, bottom } = this.at.getBoundingClientRect();
    if (bottom < 0 || top > innerHeight) this.hide();
    else this.place(this.at);
  }

  /** Below the token or above it, where there is more room, and never on it. */
  place(anchor) {
    const boxes = [...anchor.getClientRects()].filter((box) => box.width > 0);
    const [first, last] = boxes.length ? [boxes[0], boxes.at(-1)] : [anchor.getBoundingClientRect(), anchor.getBoundingClientRect()];
    const { style } = this.element;
    style.removeProperty("max-height");
    const { offsetWidth: width, offsetHeight: height } = this.element;
    const [above, below] = [first.top - 2 * GAP, innerHeight - last.bottom - 2 * GAP];
    const under = height <= below || below >= above;
    const tall = Math.min(height, under ? below : above);
    const near = under ? last : first;
    style.setProperty("max-height", `${tall}px`);
    style.setProperty("left", `${Math.max(GAP, Math.min(near.left, innerWidth - width - GAP))}px`);
    style.setProperty("top", `${under ? last.bottom + GAP : first.top - GAP - tall}px`);
  }
}

/** What is read out for a token. */
export function spoken(run, index) {
  const token = run.tokens[index];
  return `${spelled(token)}, from ${label(token.origin)}, probability ${percent(token.probability)}, rank ${token.rank}, step ${token.step}`;
}

/** A token's text, or its bytes if it is a part of a character. */
function spelled(token, limit) {
  const hexadecimal = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");
  return token.bytes ? `bytes ${token.bytes.map(hexadecimal).join(" ")}` : visible(token.token, limit);
}

function contents(run, index) {
  const token = run.tokens[index];
  const head = make(
    "header",
    {},
    make("code", { class: `sample ${look(token.origin)}` }, spelled(token, 40)),
    make("span", { class: "origin" }, label(token.origin)),
    make("span", { class: "number" }, `#${index + 1}`),
  );
  const chance = make(
    "p",
    { class: "chance" },
    make("strong", {}, percent(token.probability)),
    make("span", {}, token.rank === 1 ? "the likeliest token" : `rank ${token.rank.toLocaleString("en")}`),
  );
  const likely = [{ ...token, chosen: true }, ...token.alternatives].sort((a, b) => b.probability - a.probability);
  return [head, chance, make("ol", { class: "likely", "aria-label": "The likeliest tokens" }, ...likely.map(bar)), ...step(run, token, index)];
}

function bar(one) {
  const filled = make("span", { class: "fill" });
  filled.style.setProperty("width", `${Math.max(0.5, 100 * one.probability)}%`);
  return make(
    "li",
    { class: one.chosen ? "chosen" : null },
    make("code", {}, spelled(one, 14)),
    make("span", { class: "track" }, filled),
    make("span", { class: "number" }, percent(one.probability)),
  );
}

function step(run, token, index) {
  const nodes = run.trees.get(token.step) ?? [];
  const [begin] = run.span(token.step);
  const kept = nodes.filter((node) => node.accepted).length;
  const title = nodes.length ? `Step ${token.step}: ${nodes.length} drafted, ${kept} accepted` : `Step ${token.step}: nothing was drafted`;
  const found = [make("h3", {}, title)];
  if (nodes.length > LARGEST) found.push(make("p", { class: "soft" }, "The tree is too large to draw."));
  else if (nodes.length) {
    const shown = treeOf(nodes, run.drawn(token.step), index - begin);
    found.push(make("div", { class: "wood", tabindex: 0, role: "group", "aria-label": "Tree of the step" }, shown));
  }
  return found;
}
