// A recorded run, in a file of its own: nothing is asked of a server.

import { Card } from "./card.js";
import { make } from "./elements.js";
import { depths, figures, legend, problems, summary } from "./figures.js";
import { read } from "./file.js";
import { TextView } from "./text.js";
import { themeButton } from "./theme.js";

function show() {
  const main = document.querySelector("main");
  document.querySelector(".actions").append(themeButton());
  let saved;
  try {
    saved = read(document.getElementById("run").textContent);
  } catch (error) {
    main.append(make("p", { class: "error", role: "alert" }, error.message));
    return;
  }
  document.getElementById("about").textContent = Object.values(saved.server).filter((value) => typeof value === "string").join(" · ");
  const card = new Card();
  const live = document.getElementById("said");
  for (const turn of saved.turns) {
    if (turn.role === "assistant") main.append(...turn.runs.map((one) => reply(one, card, (text) => (live.textContent = text))));
    else {
      const name = saved.mode === "completion" ? "prompt" : turn.role === "user" ? "you" : turn.role;
      main.append(make("article", { class: `turn ${turn.role}` }, make("h2", {}, name), make("div", { class: "said" }, turn.content)));
    }
  }
}

function reply(run, card, said) {
  const view = new TextView(run, card, said);
  view.update();
  const side = make("aside", { class: "figures", "aria-label": "Figures of the reply" });
  const shown = make("article", { class: "turn assistant recorded" }, make("div", { class: "reply" }, make("h2", {}, run.name || "model")));
  shown.firstChild.append(view.element, make("div", { class: "notes" }, make("p", { class: "summary" }, summary(run)), ...problems(run)));
  const fill = (only) => {
    view.highlight(only);
    side.replaceChildren(
      figures(run, run.speed),
      make("h3", {}, "Origins"),
      legend(run, only, fill),
      make("h3", {}, "Accepted by depth"),
      depths(run),
    );
  };
  fill(null);
  shown.append(side);
  return shown;
}

show();
