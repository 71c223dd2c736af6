// The page: puts its parts together.

import { Card } from "./card.js";
import { Conversation } from "./conversation.js";
import { button, make } from "./elements.js";
import { depths, figures, legend } from "./figures.js";
import { read, written } from "./file.js";
import { Gauges } from "./gauges.js";
import { Lines } from "./plots.js";
import { json, keys } from "./server.js";
import { Settings } from "./settings.js";
import { themeButton } from "./theme.js";

const EVERY = 250; // milliseconds between two drawings of the figures
const LARGEST = 256 << 20; // bytes of a file that is read
const EXAMPLES = {
  chat: ["Write a Python class for a stack.", "Count from one to fifty in words.", "Explain speculative decoding to a child."],
  completion: ["def fibonacci(n):\n", "class Stack:\n    def __init__(self):\n", "import os\nimport "],
};

const $ = (id) => document.getElementById(id);

class Page {
  constructor(info) {
    this.info = info;
    this.card = new Card();
    this.settings = new Settings($("settings-form"), info);
    this.conversation = new Conversation($("turns"), this);
    this.speed = new Lines("Tokens a second", ["tokens/s", "plain, estimated"]);
    this.gauges = new Gauges($("gauges"), info.cache.pages, info.workers.length);
    this.only = null;
    this.run = null;
    this.begun = null; // when the request of `run` was sent, while it is under way
    this.bottom = true;
    $("about").textContent = [info.models[0], info.backend, info.dtype, info.guarantee].join(" · ");
    $("speed").append(this.speed.element);
    this.listen();
    this.mode = "chat";
    this.figures();
  }

  listen() {
    new IntersectionObserver(([entry]) => (this.bottom = entry.isIntersecting), { root: $("scroll"), rootMargin: "0px 0px 80px" }).observe($("end"));
    for (const choice of document.querySelectorAll("[name=mode]")) choice.addEventListener("change", () => (this.mode = choice.value));
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit(event.submitter?.id === "both");
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.submit(event.ctrlKey || event.metaKey);
    });
    $("stop").addEventListener("click", () => this.conversation.stop());
    $("new").addEventListener("click", () => this.restart());
    $("save").addEventListener("click", () => this.save());
    $("open").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => this.open());
    $("actions").append(themeButton());
    for (const toggle of document.querySelectorAll("[data-toggles]")) drawer(toggle, $(toggle.dataset.toggles));
  }

  set mode(mode) {
    this.conversation.stop();
    this.conversation.clear();
    this.conversation.mode = this.settings.mode = mode;
    document.querySelector(`[name=mode][value=${mode}]`).checked = true;
    $("prompt").placeholder = mode === "chat" ? "Write a message" : "Write a text to continue";
    $("examples").replaceChildren(...EXAMPLES[mode].map((text) => make("li", {}, button(text.trim(), () => this.example(text)))));
    this.empty();
  }

  example(text) {
    $("prompt").value = text;
    $("prompt").focus();
  }

  async submit(both) {
    const text = this.conversation.mode === "chat" ? $("prompt").value.trim() : $("prompt").value;
    if (!text || this.conversation.busy) return;
    this.bottom = true;
    await this.attempt(() => this.conversation.send(text, both), () => {
      if (this.conversation.mode === "chat") $("prompt").value = "";
    });
  }

  /** Runs what may refuse the settings. begun: is called if it did not. */
  async attempt(work, begun = () => {}) {
    this.problem("");
    try {
      const done = work();
      if (this.conversation.busy) begun();
      await done;
    } catch (error) {
      this.problem(error.message);
    }
  }

  problem(text) {
    $("problem").textContent = text;
    $("problem").hidden = text === "";
  }

  edit() {
    $("prompt").value = this.conversation.takeBack();
    $("prompt").focus();
    this.empty();
  }

  restart() {
    this.conversation.stop();
    this.conversation.clear();
    this.empty();
    $("prompt").focus();
  }

  empty() {
    $("welcome").hidden = this.conversation.turns.length > 0;
  }

  // ---- what the conversation tells

  said(text) {
    $("said").textContent = text;
  }

  working(yes) {
    for (const id of ["send", "both"]) $(id).hidden = yes;
    $("stop").hidden = !yes;
    this.gauges.working = yes;
    if (yes) this.empty();
    else this.begun = null;
    this.figures();
  }

  /** Shows the figures of a run. begun: performance.now() when it was sent, if it is under way. */
  watch = (run, begun = null) => {
    if (this.begun !== null && begun === null) return;
    [this.run, this.begun] = [run, begun];
    this.figures();
  };

  follow = () => {
    if (this.bottom) $("end").scrollIntoView({ block: "end" });
  };

  figures() {
    clearTimeout(this.timer);
    const run = this.run;
    const now = performance.now();
    if (run === null || !run.tokens.length) {
      $("run").replaceChildren(make("p", { class: "soft" }, "Figures of a reply appear here."));
    } else {
      const speed = this.begun !== null && run.ended === null ? run.speedAt(now - this.begun) : run.speed;
      if (this.begun !== null && run.ended === null) this.speed.push(speed, speed / run.perStep);
      const focused = [...$("run").querySelectorAll("button")].indexOf(document.activeElement);
      const choose = (origin) => this.highlight(origin);
      const drawn = [make("h3", {}, "Origins"), legend(run, this.only, choose), make("h3", {}, "Accepted by depth"), depths(run)];
      $("run").replaceChildren(figures(run, speed), ...drawn);
      if (focused >= 0) $("run").querySelectorAll("button")[focused]?.focus();
    }
    if (this.begun !== null) this.timer = setTimeout(() => this.figures(), EVERY);
  }

  highlight(origin) {
    this.only = origin;
    for (const view of this.conversation.views.values()) view.highlight(origin);
    this.figures();
  }

  // ---- files

  save() {
    const text = written(this.info, this.conversation.mode, this.conversation.toJSON());
    const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    make("a", { href: address, download: "redraft-run.json" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }

  async open() {
    const [file] = $("file").files;
    $("file").value = "";
    if (!file) return;
    this.problem("");
    try {
      if (file.size > LARGEST) throw new Error("the file is larger than 256 MiB");
      const { mode, turns } = read(await file.text());
      this.mode = mode;
      this.conversation.load(mode, turns);
      this.empty();
      this.said("The run was loaded");
    } catch (error) {
      this.problem(`${file.name}: ${error.message}`);
    }
  }
}

/** A button that shows and hides a side of the page. */
function drawer(toggle, side) {
  const shown = () => getComputedStyle(side).display !== "none";
  const set = (open) => {
    side.dataset.open = open;
    toggle.setAttribute("aria-expanded", String(open));
    if (open) side.focus({ preventScroll: true });
  };
  toggle.setAttribute("aria-expanded", String(shown()));
  toggle.addEventListener("click", () => set(!shown()));
  side.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !matchMedia("(max-width: 1180px)").matches) return;
    set(false);
    toggle.focus();
  });
  matchMedia("(max-width: 1180px)").addEventListener("change", () => {
    delete side.dataset.open;
    toggle.setAttribute("aria-expanded", String(shown()));
  });
}

keys.ask = (wrong) =>
  new Promise((resolve) => {
    const dialog = $("key");
    $("key-wrong").hidden = !wrong;
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      dialog.close($("key-text").value);
    };
    dialog.onclose = () => {
      $("key-text").value = "";
      resolve(dialog.returnValue || null);
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
$("key-cancel").addEventListener("click", () => $("key").close(""));

try {
  new Page(await json("server_info"));
  $("prompt").disabled = false;
  $("prompt").focus();
} catch (error) {
  $("problem").textContent = error.message;
  $("problem").hidden = false;
}
