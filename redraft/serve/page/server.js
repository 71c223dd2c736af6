// The server's public interface: JSON, figures and streams. All addresses are relative to this file, so a proxy may add a path.

const ROOT = new URL("../", import.meta.url);
const KEPT = "redraft-key"; // in sessionStorage, and nowhere else

/** An answer that is an error, or no answer. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Asks whoever is at the page for a key; resolves to null if there will be none. Set by the page. */
export const keys = { ask: async () => null };

export async function json(path) {
  return (await asked(path)).json();
}

/** The figures of /metrics: a function from the end of a name to the sum of its values, NaN without any. */
export async function metrics() {
  const entries = [];
  for (const line of (await (await asked("metrics")).text()).split("\n")) {
    const [, name, value] = /^([^#\s{]+)(?:\{[^}]*\})? (\S+)/.exec(line) ?? [];
    if (name) entries.push([name, Number(value)]);
  }
  return (end) => {
    const found = entries.filter(([name]) => name.endsWith(end));
    return found.length ? found.reduce((sum, [, value]) => sum + value, 0) : NaN;
  };
}

/** The chunks of a streamed reply. Throws Failure, also for an error inside the stream. */
export async function* streamed(path, body, signal) {
  const answer = await asked(path, { method: "POST", body: JSON.stringify(body), signal, headers: { "Content-Type": "application/json" } });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Failure("the stream ended early");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a comment
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Failure(chunk.error.message);
      yield chunk;
    }
  }
}

async function asked(path, options = {}) {
  for (let wrong = false; ; wrong = true) {
    const key = sessionStorage.getItem(KEPT);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let answer;
    try {
      answer = await fetch(new URL(path, ROOT), { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("the server does not answer");
    }
    if (answer.ok) return answer;
    if (answer.status !== 401) throw new Failure(await message(answer), answer.status);
    const given = await keys.ask(wrong || key !== null);
    if (given === null) throw new Failure("this server needs a key", 401);
    sessionStorage.setItem(KEPT, given);
  }
}

async function message(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `status ${answer.status}`;
  }
}
