// What a run's tokens say: the legend with counts, acceptance by depth, speed and what the same steps would give without drafts.

import { brief, button, make, percent, seconds } from "./elements.js";
import { MODEL, label, look } from "./origins.js";
import { bars, tile } from "./plots.js";

const DEPTHS = 10; // that are shown

/** The origins of a run's tokens as buttons: each dims all others. chosen: is called with an origin, or null. */
export function legend(run, only, chosen) {
  const counted = [...run.counts].sort(([a, first], [b, second]) => Number(b === MODEL) - Number(a === MODEL) || second - first);
  const items = counted.map(([origin, count]) => {
    const toggle = button("", () => chosen(only === origin ? null : origin), { "aria-pressed": String(only === origin), class: "key" });
    const share = percent(count / run.tokens.length);
    toggle.append(
      make("span", { class: `sample ${look(origin)}`, "aria-hidden": "true" }, "Aa"),
      make("span", {}, label(origin)),
      make("span", { class: "number" }, `${count.toLocaleString("en")} · ${share}`),
    );
    return make("li", {}, toggle);
  });
  return make("ul", { class: "legend", "aria-label": "Origins of the tokens" }, ...items);
}

/** Of the steps with a draft, the share that accepted at least so many tokens. */
export function depths(run) {
  if (!run.drafts) return make("p", { class: "soft" }, "No step had a draft.");
  const rows = run.depths.slice(0, DEPTHS).map((count, i) => [`${i + 1}`, count / run.drafts, percent(count / run.drafts)]);
  const none = `${run.drafts.toLocaleString("en")} drafts, none of them was accepted.`;
  return rows.length ? bars("Steps that accepted at least so many drafted tokens", rows) : make("p", { class: "soft" }, none);
}

/** The figures of a run. speed: tokens a second, now or over all. */
export function figures(run, speed) {
  const note = "An estimate: the speed if each of these steps had given one token. Steps without drafts are shorter; Both ways measures it";
  return make(
    "dl",
    { class: "tiles" },
    tile("Tokens/s", brief(speed)),
    tile("Plain, estimated", brief(speed / run.perStep), note),
    tile("Tokens a step", brief(run.perStep)),
    tile("Drafts accepted", run.drafted ? percent(run.accepted / run.drafted) : "–", `${run.accepted} of ${run.drafted} drafted tokens`),
  );
}

/** One line about a run that ended. */
export function summary(run) {
  const parts = [`${run.tokens.length.toLocaleString("en")} tokens`];
  if (run.steps) parts.push(`${run.steps.toLocaleString("en")} steps`, `${brief(run.perStep)} a step`);
  if (Number.isFinite(run.speed)) parts.push(`${brief(run.speed)} tokens/s`);
  if (run.ended !== null) parts.push(seconds(run.ended));
  if (run.finish && run.finish !== "stop") parts.push(run.finish === "length" ? "cut at its limit" : run.finish);
  return [...parts, ...chosen(run.request)].join(" · ");
}

/** What went wrong in a run, as paragraphs. */
export function problems(run) {
  const faults = (Array.isArray(run.metrics?.faults) ? run.metrics.faults : []).map((fault) => `Went on without drafts: ${fault}`);
  const found = faults.map((text) => make("p", { class: "soft" }, text));
  return run.error ? [make("p", { class: "error", role: "alert" }, run.error), ...found] : found;
}

/** The methods that a request chose. */
function chosen(request) {
  const { speculation: drafts, cache, temperature, seed } = request;
  const parts = [];
  if (drafts === "off") parts.push("drafts off");
  else if (drafts) parts.push(...[drafts.method, drafts.verifier].filter((name) => typeof name === "string"));
  for (const name of ["keep", "codec", "read"]) if (typeof cache?.[name] === "string") parts.push(cache[name]);
  if (request.response_format || request.structured_outputs) parts.push("grammar");
  if (temperature === 0) parts.push("greedy");
  else if (seed !== undefined) parts.push(`seed ${seed}`);
  return parts;
}
