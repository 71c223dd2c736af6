// A conversation as a file: written whole, and read with a check of every value. Nothing in it is ever run.

import { Run } from "./run.js";

export const FORMAT = "redraft-run";
const ROLES = ["system", "user", "assistant"];

export function written(server, mode, turns) {
  return JSON.stringify({ format: FORMAT, version: 1, made: new Date().toISOString(), server, mode, turns });
}

/** {server, mode, turns}. Throws an Error that names what is wrong. */
export function read(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("the file is not JSON");
  }
  if (data?.format !== FORMAT || data.version !== 1) throw new Error(`the file is not a run of Redraft: format must be ${FORMAT}, version 1`);
  const mode = data.mode === "completion" ? "completion" : "chat";
  return { server: object(data.server, "server"), mode, turns: list(data.turns, "turns").map(turn) };
}

function turn(given, i) {
  const place = `turns[${i}]`;
  const role = string(given?.role, `${place}.role`);
  if (!ROLES.includes(role)) throw new Error(`${place}.role = ${role.slice(0, 20)}: ${ROLES.join(", ")} are allowed`);
  const runs = role === "assistant" ? list(given.runs, `${place}.runs`).map((one, j) => run(one, `${place}.runs[${j}]`)) : [];
  return { role, content: string(given.content ?? "", `${place}.content`), runs };
}

function run(given, place) {
  const made = new Run(object(given?.request ?? {}, `${place}.request`), string(given?.name ?? "", `${place}.name`));
  list(given?.pieces, `${place}.pieces`).forEach((one, i) => made.add(piece(one, `${place}.pieces[${i}]`)));
  made.metrics = given.metrics ? object(given.metrics, `${place}.metrics`) : null;
  made.error = given.error ? string(given.error, `${place}.error`) : null;
  made.end(number(given.ended ?? made.last, `${place}.ended`), given.finish ? string(given.finish, `${place}.finish`) : null);
  return made;
}

function piece(given, place) {
  return {
    at: number(given?.at, `${place}.at`),
    text: string(given.text, `${place}.text`),
    finish_reason: given.finish_reason ? string(given.finish_reason, `${place}.finish_reason`) : null,
    provenance: list(given.provenance, `${place}.provenance`).map((one, i) => origin(one, `${place}.provenance[${i}]`)),
    trees: list(given.trees, `${place}.trees`).map((one, i) => tree(one, `${place}.trees[${i}]`)),
  };
}

function origin(given, place) {
  const bytes = given?.bytes ? { bytes: list(given.bytes, `${place}.bytes`).map((one, i) => number(one, `${place}.bytes[${i}]`)) } : {};
  return {
    ...named(given, place),
    ...bytes,
    step: number(given.step, `${place}.step`),
    origin: string(given.origin, `${place}.origin`),
    probability: number(given.probability, `${place}.probability`),
    rank: number(given.rank, `${place}.rank`),
    alternatives: list(given.alternatives, `${place}.alternatives`).map((one, i) => {
      const inner = `${place}.alternatives[${i}]`;
      return { ...named(one, inner), probability: number(one.probability, `${inner}.probability`) };
    }),
  };
}

function tree(given, place) {
  const nodes = list(given?.nodes, `${place}.nodes`).map((one, i) => {
    const inner = `${place}.nodes[${i}]`;
    const parent = number(one?.parent, `${inner}.parent`);
    if (!Number.isInteger(parent) || parent < -1 || parent >= i) throw new Error(`${inner}.parent = ${parent}: must be an earlier node or -1`);
    return { ...named(one, inner), parent, origin: string(one.origin, `${inner}.origin`), accepted: one.accepted === true };
  });
  return { step: number(given.step, `${place}.step`), nodes };
}

function named(given, place) {
  return { token: string(given?.token, `${place}.token`), token_id: number(given.token_id, `${place}.token_id`) };
}

function string(value, place) {
  if (typeof value !== "string") throw new Error(`${place}: a text is needed`);
  return value;
}

function number(value, place) {
  if (typeof value !== "number" || !Number.isFinite(value)) throw new Error(`${place}: a number is needed`);
  return value;
}

function list(value, place) {
  if (!Array.isArray(value)) throw new Error(`${place}: a list is needed`);
  return value;
}

function object(value, place) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Error(`${place}: an object is needed`);
  return value;
}
