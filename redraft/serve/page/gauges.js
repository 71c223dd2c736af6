// Figures of the whole server, from /metrics: speed, batch, queue, pages. Asked for only while the page is in view.

import { brief, make, percent } from "./elements.js";
import { bars, Lines, tile } from "./plots.js";
import { metrics } from "./server.js";

const BUSY = 1000; // milliseconds between two readings while a reply of this page is under way
const IDLE = 10000;

export class Gauges {
  /** pages: of the caches of all workers, which are equal; workers: how many there are. */
  constructor(element, pages, workers) {
    [this.element, this.pages, this.workers] = [element, pages, workers];
    this.batch = new Lines("Texts that run and wait", ["running", "waiting"]);
    this.tiles = make("dl", { class: "tiles three" });
    this.cache = make("div", {});
    element.append(this.tiles, this.batch.element, make("h3", {}, "Cache"), this.cache);
    this.before = null;
    this.busy = false;
    document.addEventListener("visibilitychange", () => this.wake());
    this.wake();
  }

  /** A reply begins or ends. */
  set working(value) {
    this.busy = value;
    this.wake();
  }

  wake() {
    clearTimeout(this.timer);
    if (!document.hidden) this.read();
  }

  async read() {
    clearTimeout(this.timer);
    const number = (this.reading = (this.reading ?? 0) + 1);
    try {
      const figure = await metrics();
      if (number === this.reading) this.show(figure, performance.now());
    } catch (error) {
      if (number === this.reading) this.tiles.replaceChildren(tile("Server", error.message));
    }
    if (number === this.reading && !document.hidden) this.timer = setTimeout(() => this.read(), this.busy ? BUSY : IDLE);
  }

  show(figure, now) {
    const tokens = figure("generation_tokens_total");
    const speed = this.before && now > this.before.now ? (1000 * (tokens - this.before.tokens)) / (now - this.before.now) : NaN;
    this.before = { tokens, now };
    const [running, waiting] = [figure("num_requests_running"), figure("num_requests_waiting")];
    this.batch.push(running, waiting);
    this.tiles.replaceChildren(
      tile("Tokens/s, all", brief(speed), "Of all clients, since the last reading"),
      tile("Batch", `${running}`, "Texts that run"),
      tile("Queue", `${waiting}`, "Texts that wait"),
    );
    const used = Math.round((figure("kv_cache_usage_perc") / this.workers) * this.pages);
    const [shared, kept] = [figure("kv_cache_shared_pages"), figure("kv_cache_published_pages")];
    const hits = figure("prefix_cache_hits_total") / figure("prefix_cache_queries_total");
    this.cache.replaceChildren(
      bars(
        "Pages of the cache",
        [
          ["in use", used / this.pages, count(used)],
          ["shared", shared / this.pages || 0, count(shared)],
          ["reusable", kept / this.pages || 0, count(kept)],
        ],
        "named",
      ),
      make("p", { class: "soft" }, `${count(this.pages)} pages · ${percent(hits)} of prompt tokens were cached`),
    );
  }
}

function count(number) {
  return Number.isFinite(number) ? number.toLocaleString("en") : "–";
}
