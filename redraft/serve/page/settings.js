// The settings of the next message: how it is sampled, drafted, verified, cached and constrained.

import { make } from "./elements.js";

const GRAMMARS = {
  text: ["any text", ""],
  json: ["a JSON schema", '{"type": "object", "properties": {"name": {"type": "string"}}}'],
  regex: ["a regular expression", "[0-9]{4}-[0-9]{2}-[0-9]{2}"],
  choice: ["one of these lines", "yes\nno"],
  grammar: ["a grammar", 'root ::= "yes" | "no"'],
};

export class Settings {
  /** info: of /server_info. */
  constructor(form, info) {
    this.form = form;
    const { methods, policies } = info;
    this.model = select("model", "Model", [...info.models, ...info.adapters].map((name) => [name, name]));
    this.system = area("system", "System prompt", 3, "none");
    this.method = select("method", "Drafter", [["", `the server's: ${info.draft}`], ["off", "no drafts"], ...plain(methods.draft)]);
    this.verifier = select("verifier", "Verifier", [["", `the server's: ${info.verify}`], ...plain(methods.verify)]);
    this.budget = numeric("budget", "Drafted tokens a step", { min: 0, max: 1024, step: 1, placeholder: String(info.scheduler.draft_rows ?? "") });
    const policy = (seam, name) => select(seam, name, [["", own(policies[seam])], ["none", "none"], ...plain(methods[seam])]);
    this.keep = policy("keep", "Keep");
    this.codec = policy("codec", "Codec");
    this.read = policy("read", "Read");
    this.grammar = select("grammar", "The reply is", Object.entries(GRAMMARS).map(([name, [shown]]) => [name, shown]));
    this.pattern = area("pattern", "Schema or pattern", 4, "");
    this.order = select("order", "Both ways", [["after", "one after the other"], ["once", "at once"]]);
    this.predicted = area("predicted", "Predicted text", 3, "a text that the reply may resemble");
    this.temperature = numeric("temperature", "Temperature", { min: 0, max: 100, step: "any", value: 0.7 });
    this.top_p = numeric("top_p", "Top p", { min: 0, max: 1, step: "any", value: 0.95 });
    this.max_tokens = numeric("max_tokens", "Max tokens", { min: 1, max: 2 ** 31 - 1, step: 1, value: 400 });
    this.seed = numeric("seed", "Seed", { min: 0, step: 1, placeholder: "random" });
    const several = info.models.length + info.adapters.length > 1;
    form.append(
      group("Message", several ? this.model : null, this.system),
      group("Sampling", pair(this.temperature, this.top_p), pair(this.max_tokens, this.seed)),
      group("Drafts", this.method, this.verifier, this.budget, this.predicted, this.order),
      group("Cache", this.keep, this.codec, this.read),
      group("Grammar", this.grammar, this.pattern),
    );
    field(this.grammar).addEventListener("change", () => this.showPattern());
    form.addEventListener("submit", (event) => event.preventDefault());
    this.showPattern();
  }

  set mode(mode) {
    this.system.hidden = mode === "completion";
  }

  showPattern() {
    const [, example] = GRAMMARS[value(this.grammar)];
    this.pattern.hidden = value(this.grammar) === "text";
    field(this.pattern).placeholder = example;
  }

  /** Fields of the request, without the prompt. Throws an Error that names a field that is wrong. */
  request(chat) {
    for (const part of [this.temperature, this.top_p, this.max_tokens, this.seed, this.budget]) {
      if (!field(part).checkValidity()) throw new Error(`${part.dataset.name}: ${field(part).validationMessage}`);
    }
    const seed = value(this.seed) === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number(value(this.seed));
    const found = { model: value(this.model), seed };
    for (const name of ["temperature", "top_p", "max_tokens"]) if (value(this[name]) !== "") found[name] = Number(value(this[name]));
    const drafts = given({ method: value(this.method), verifier: value(this.verifier), budget: value(this.budget) });
    if (drafts.budget !== undefined) drafts.budget = Number(drafts.budget);
    if (drafts.method === "off") found.speculation = "off";
    else if (Object.keys(drafts).length) found.speculation = drafts;
    const cache = given({ keep: value(this.keep), codec: value(this.codec), read: value(this.read) });
    if (Object.keys(cache).length) found.cache = cache;
    if (value(this.predicted) && found.speculation !== "off") found.prediction = { type: "content", content: value(this.predicted) };
    return { ...found, ...this.constraint(chat) };
  }

  constraint(chat) {
    const [kind, text] = [value(this.grammar), value(this.pattern)];
    if (kind === "text") return {};
    if (!text.trim()) throw new Error(`Grammar: ${GRAMMARS[kind][0]} is needed`);
    if (kind === "choice") return { structured_outputs: { choice: text.split("\n").filter((line) => line !== "") } };
    if (kind !== "json") return { structured_outputs: { [kind]: text } };
    let schema;
    try {
      schema = JSON.parse(text);
    } catch (error) {
      throw new Error(`Grammar: the schema is not JSON: ${error.message}`, { cause: error });
    }
    if (!chat) return { structured_outputs: { json: schema } };
    return { response_format: { type: "json_schema", json_schema: { name: "reply", schema } } };
  }

  /** Whether a message sent both ways runs both at once. */
  get atOnce() {
    return value(this.order) === "once";
  }

  get systemPrompt() {
    return value(this.system).trim();
  }
}

function given(fields) {
  return Object.fromEntries(Object.entries(fields).filter(([, one]) => one !== ""));
}

function plain(names) {
  return names.filter((name) => name !== "none").map((name) => [name, name]);
}

function own(name) {
  return name ? `the server's: ${name}` : "the server's: none";
}

function field(part) {
  return part.querySelector("input, select, textarea");
}

function value(part) {
  return field(part).value;
}

function group(title, ...parts) {
  return make("fieldset", {}, make("legend", {}, title), ...parts);
}

function pair(...parts) {
  return make("div", { class: "pair" }, ...parts);
}

function labelled(id, name, control) {
  const made = make("div", { class: "field" }, make("label", { for: `set-${id}` }, name), control);
  made.dataset.name = name;
  return made;
}

function select(id, name, options) {
  const entries = options.map(([one, shown]) => make("option", { value: one }, shown));
  return labelled(id, name, make("select", { id: `set-${id}` }, ...entries));
}

function area(id, name, rows, placeholder) {
  return labelled(id, name, make("textarea", { id: `set-${id}`, rows, placeholder, spellcheck: "false" }));
}

function numeric(id, name, attributes) {
  return labelled(id, name, make("input", { id: `set-${id}`, type: "number", inputmode: "decimal", ...attributes }));
}
