// How the origin of a token looks: one of eight hues and three underlines, the same in every session.

export const MODEL = "model";
const HUES = 8;
const LINES = 3;
const LABELS = { model: "the model", aggressive: "predicted text" };
const KNOWN = {
  suffix: [0, 0], ngram: [1, 1], "token-recycling": [2, 0], copyspec: [6, 1], "draft-model": [3, 0], aggressive: [4, 1], grammar: [5, 0],
  "self-skip": [7, 0], aded: [1, 0], dyspec: [3, 1], "rsd-c": [0, 1], "rsd-s": [6, 0], spectr: [2, 1], "optimal-multi-draft": [4, 0],
  vocabtrim: [5, 1], omnidraft: [7, 1], online: [2, 2],
};

/** The name of an origin for readers. */
export function label(origin) {
  return Object.hasOwn(LABELS, origin) ? LABELS[origin] : origin;
}

/** Its classes: none for the model. A name that is not known gets a hue and a dotted line from its letters. */
export function look(origin) {
  if (origin === MODEL) return "";
  const [hue, line] = Object.hasOwn(KNOWN, origin) ? KNOWN[origin] : [hash(origin) % HUES, LINES - 1];
  return `drafted hue${hue} line${line}`;
}

function hash(text) {
  let value = 2166136261; // FNV-1a
  for (const letter of text) value = Math.imul(value ^ letter.codePointAt(0), 16777619);
  return value >>> 0;
}
