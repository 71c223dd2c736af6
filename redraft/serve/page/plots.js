// Small plots: lines over the last minute, and bars.

import { brief, draw, make } from "./elements.js";

const WIDTH = 240;
const HEIGHT = 56;
const POINTS = 60;

/** Lines over the last POINTS values. series: names; each line has the class "series0" and so on. */
export class Lines {
  constructor(title, series) {
    this.values = series.map(() => []);
    this.series = series;
    this.title = draw("title", {}, title);
    this.paths = series.map((_, i) => draw("path", { class: `series series${i}` }));
    this.top = draw("text", { x: WIDTH - 2, y: 10, "text-anchor": "end" }, "");
    this.base = draw("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 });
    const box = { class: "plot", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title };
    const drawn = draw("svg", box, this.title, this.base, ...this.paths, this.top);
    const names = make("p", { class: "series-names", "aria-hidden": "true" }, ...series.map((name) => make("span", {}, name)));
    this.drawn = drawn;
    this.element = make("figure", {}, drawn, names);
  }

  /** One value for each line; NaN: a gap. */
  push(...values) {
    values.forEach((value, i) => {
      this.values[i].push(value);
      if (this.values[i].length > POINTS) this.values[i].shift();
    });
    const most = Math.max(...this.values.flat().filter(Number.isFinite), 0);
    this.top.textContent = most ? brief(most) : "";
    this.paths.forEach((path, i) => path.setAttribute("d", line(this.values[i], most || 1)));
    const last = this.series.map((name, i) => `${name} ${brief(this.values[i].at(-1))}`).join(", ");
    this.drawn.setAttribute("aria-label", `${this.title.textContent}: ${last}`);
  }
}

function line(values, most) {
  let [path, pen] = ["", "M"];
  values.forEach((value, i) => {
    if (!Number.isFinite(value)) {
      pen = "M";
      return;
    }
    const x = WIDTH - (values.length - 1 - i) * (WIDTH / (POINTS - 1));
    const y = HEIGHT - 2 - (HEIGHT - 16) * (value / most);
    path += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  });
  return path;
}

/** A list of bars. rows: [label, share from 0 to 1, text]; kind: a class. */
export function bars(title, rows, kind = "") {
  const items = rows.map(([name, share, text]) => {
    const fill = make("span", { class: "fill" });
    fill.style.setProperty("width", `${100 * share}%`);
    return make("li", {}, make("span", {}, name), make("span", { class: "track" }, fill), make("span", { class: "number" }, text));
  });
  return make("ol", { class: `bars ${kind}`, "aria-label": title }, ...items);
}

/** A figure with its name. */
export function tile(name, value, hint = null) {
  return make("div", { class: "tile", title: hint }, make("dt", {}, name), make("dd", {}, value));
}
