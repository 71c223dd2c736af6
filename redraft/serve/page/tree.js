// The draft tree of a step as a drawing: depth from left to right, the accepted path marked, then the token that the model drew.

import { draw, visible } from "./elements.js";
import { MODEL, label, look } from "./origins.js";

const WIDE = 92; // of a column
const HIGH = 30; // of a row
const BOX = [78, 22]; // of a node
const LETTERS = 9; // of a token that a node shows

/** nodes: {token, parent, origin, accepted}; drawn: the model's own token after the path, or null; marked: its token is shown boldly. */
export function treeOf(nodes, drawn, marked) {
  const all = nodes.map((node) => ({ ...node, inside: [], depth: 0, row: 0 }));
  const root = { inside: [], depth: -1, row: 0 };
  if (drawn !== null) {
    const parent = all.findLastIndex((node) => node.accepted);
    all.push({ token: drawn.token, parent, origin: MODEL, accepted: true, inside: [], depth: 0, row: 0, own: true });
  }
  for (const node of all) (node.parent < 0 ? root : all[node.parent]).inside.push(node);
  const rows = placed(root, 0);
  const deepest = Math.max(...all.map((node) => node.depth));
  const [width, height] = [28 + WIDE * (deepest + 1), HIGH * rows + 4];
  const summary = `${nodes.length} drafted, ${nodes.filter((node) => node.accepted).length} accepted`;
  const made = draw("svg", { class: "tree", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": summary });
  made.append(...all.map((node) => edge(node.parent < 0 ? root : all[node.parent], node)));
  made.append(draw("circle", { class: "root", cx: 8, cy: y(root), r: 4 }, draw("title", {}, "the text so far")));
  made.append(...all.map((node) => box(node, node.depth === marked)));
  return made;
}

/** Gives each node a depth and a row, accepted children first. Returns the row after the last one. */
function placed(node, row) {
  node.row = row;
  if (!node.inside.length) return row + 1;
  node.inside.sort((a, b) => Number(b.accepted) - Number(a.accepted));
  let next = row;
  for (const child of node.inside) {
    child.depth = node.depth + 1;
    next = placed(child, next);
  }
  return next;
}

function edge(from, to) {
  const [x1, y1] = [from.depth < 0 ? 12 : x(from) + BOX[0], y(from)];
  const [x2, y2] = [x(to), y(to)];
  const bend = (x1 + x2) / 2;
  return draw("path", { class: to.accepted ? "edge kept" : "edge", d: `M${x1} ${y1}C${bend} ${y1} ${bend} ${y2} ${x2} ${y2}` });
}

function box(node, marked) {
  const classes = ["node", look(node.origin), node.accepted ? "kept" : "", marked && node.accepted ? "marked" : ""];
  const state = node.own ? "drawn by the model" : node.accepted ? "accepted" : "dropped";
  return draw(
    "g",
    { class: classes.filter(Boolean).join(" ") },
    draw("title", {}, `${visible(node.token)}: ${label(node.origin)}, ${state}`),
    draw("rect", { x: x(node), y: y(node) - BOX[1] / 2, width: BOX[0], height: BOX[1], rx: 5 }),
    draw("text", { x: x(node) + BOX[0] / 2, y: y(node) + 4, "text-anchor": "middle" }, visible(node.token, LETTERS)),
  );
}

function x(node) {
  return 24 + WIDE * node.depth;
}

function y(node) {
  return 2 + HIGH * node.row + HIGH / 2;
}
