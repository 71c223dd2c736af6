// Light or dark: the system's choice, or that of the button.

import { button } from "./elements.js";

const KEPT = "redraft-theme";
const NEXT = { system: "light", light: "dark", dark: "system" };
const SIGNS = { system: "◐", light: "☀", dark: "☾" };

/** The button that goes from the system's choice to light, dark and back. */
export function themeButton() {
  const made = button("", () => show(NEXT[theme()], made), { class: "icon" });
  show(theme(), made);
  return made;
}

function theme() {
  try {
    return localStorage.getItem(KEPT) ?? "system";
  } catch {
    return document.documentElement.dataset.theme ?? "system"; // storage is switched off
  }
}

function show(name, made) {
  const known = Object.hasOwn(NEXT, name) ? name : "system";
  document.documentElement.dataset.theme = known;
  made.textContent = SIGNS[known];
  made.setAttribute("aria-label", `Colours: ${known}`);
  made.title = `Colours: ${known}`;
  try {
    localStorage.setItem(KEPT, known);
  } catch {
    // it holds until the page is left
  }
}
