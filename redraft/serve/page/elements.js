// Makes elements. Text enters as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. attributes: "onclick" and the like add a listener; null, undefined and false are left out. */
export function make(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** An SVG element. */
export function draw(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

/** A button with a name that is read out. */
export function button(text, onclick, attributes = {}) {
  return make("button", { type: "button", onclick, ...attributes }, text);
}

/** A token's text with visible blanks. limit: characters, then an ellipsis. */
export function visible(text, limit = Infinity) {
  const shown = text.replaceAll("\r", "␍").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
  const letters = [...shown];
  return letters.length > limit ? `${letters.slice(0, limit - 1).join("")}…` : shown || "∅";
}

/** A number with about three digits. */
export function brief(number) {
  if (!Number.isFinite(number)) return "–";
  if (number === 0) return "0";
  if (number >= 1000) return Math.round(number).toLocaleString("en");
  return number.toFixed(number >= 100 ? 0 : number >= 10 ? 1 : 2);
}

/** A share from 0 to 1 as percent. */
export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  const value = 100 * share;
  if (value > 0 && value < 0.01) return "<0.01%";
  return `${value >= 99.95 || value === 0 ? Math.round(value) : value.toFixed(value < 1 ? 2 : 1)}%`;
}

export function seconds(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${brief(milliseconds / 1000)} s`;
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
