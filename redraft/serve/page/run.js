// One generated text: its pieces as they came, its tokens with their origin, the tree of each step, and its times.

import { MODEL } from "./origins.js";

const NEAR = 32; // characters within which a token's text is looked for after a difference
const WINDOW = 1000; // milliseconds over which the current speed is taken

/** Times are milliseconds since the request was sent. */
export class Run {
  constructor(request = {}, name = "") {
    this.request = request;
    this.name = name;
    this.pieces = []; // {at, text, finish_reason, provenance, trees}
    this.tokens = []; // entries of provenance; own: the characters that end in a token, shown: its part of the text
    this.settled = 0; // leading tokens whose `shown` is known
    this.trees = new Map(); // step -> nodes
    this.ends = new Map(); // step -> index after its last token
    this.counts = new Map(); // origin -> tokens
    this.depths = []; // [i]: drafted steps that accepted more than i tokens
    this.drafts = 0; // steps with a draft
    this.drafted = 0;
    this.accepted = 0;
    this.text = "";
    this.metrics = null; // the server's own
    this.error = null;
    this.finish = null;
    this.ended = null;
    this.loose = ""; // text whose tokens are not known yet
    [this.encoder, this.decoder] = [new TextEncoder(), new TextDecoder("utf-8", { ignoreBOM: true })];
  }

  add(piece) {
    this.pieces.push(piece);
    this.text += piece.text;
    this.loose += piece.text;
    for (const origin of piece.provenance) {
      const raw = origin.bytes ? new Uint8Array(origin.bytes) : this.encoder.encode(origin.token);
      this.tokens.push({ ...origin, own: this.decoder.decode(raw, { stream: true }), shown: "" });
      this.counts.set(origin.origin, (this.counts.get(origin.origin) ?? 0) + 1);
      this.ends.set(origin.step, this.tokens.length);
    }
    for (const tree of piece.trees) this.count(tree);
    this.finish = piece.finish_reason ?? this.finish;
    this.settle(this.finish !== null);
  }

  count({ step, nodes }) {
    this.trees.set(step, nodes);
    if (!nodes.length) return;
    const kept = nodes.filter((node) => node.accepted).length;
    this.drafts += 1;
    this.drafted += nodes.length;
    this.accepted += kept;
    for (let depth = 0; depth < kept; depth += 1) this.depths[depth] = (this.depths[depth] ?? 0) + 1;
  }

  end(at, finish = null) {
    this.ended = at;
    this.finish = finish ?? this.finish ?? "stopped";
    this.settle(true);
  }

  // ---- which part of the text is which token's

  /** A character of several tokens counts as its last token's. Texts of tokens that the server leaves out stay empty. */
  settle(ended) {
    while (this.settled < this.tokens.length && this.settleNext(ended)) this.settled += 1;
    if (ended && this.tokens.length) {
      this.tokens[this.tokens.length - 1].shown += this.loose;
      this.loose = "";
    }
  }

  settleNext(ended) {
    const token = this.tokens[this.settled];
    const { own } = token;
    if (own.startsWith(this.loose) && !this.loose.startsWith(own)) {
      if (ended) this.give(token, this.loose.length);
      return ended;
    }
    if (this.loose.startsWith(own)) this.give(token, own.length);
    else if (own.trimStart() && this.loose.startsWith(own.trimStart())) this.give(token, own.trimStart().length);
    else {
      const at = this.loose.slice(0, NEAR + own.length).indexOf(own);
      if (at > 0) this.give(token, at + own.length);
    }
    return true;
  }

  give(token, length) {
    token.shown += this.loose.slice(0, length);
    this.loose = this.loose.slice(length);
  }

  // ---- figures

  get steps() {
    return this.ends.size;
  }

  get perStep() {
    return this.steps ? this.tokens.length / this.steps : NaN;
  }

  get first() {
    return this.pieces.find((piece) => piece.provenance.length)?.at ?? NaN;
  }

  get last() {
    return this.pieces.findLast((piece) => piece.provenance.length)?.at ?? NaN;
  }

  /** Tokens a second after those of the first piece. */
  get speed() {
    const begin = this.pieces.find((piece) => piece.provenance.length)?.provenance.length ?? 0;
    return this.last > this.first ? (1000 * (this.tokens.length - begin)) / (this.last - this.first) : NaN;
  }

  /** Tokens a second in the second before `now`. */
  speedAt(now) {
    const since = Math.max(now - WINDOW, this.first);
    let count = 0;
    for (let i = this.pieces.length - 1; i >= 0 && this.pieces[i].at > since; i -= 1) count += this.pieces[i].provenance.length;
    return now - since > 50 ? (1000 * count) / (now - since) : NaN;
  }

  /** The entries of one step: [from, to) in `tokens`. */
  span(step) {
    const end = this.ends.get(step) ?? 0;
    let begin = end;
    while (begin > 0 && this.tokens[begin - 1].step === step) begin -= 1;
    return [begin, end];
  }

  /** The token that the model drew after the accepted drafts of a step, if the text did not end before. */
  drawn(step) {
    const [begin, end] = this.span(step);
    return end > begin && this.tokens[end - 1].origin === MODEL ? this.tokens[end - 1] : null;
  }

  toJSON() {
    const { name, request, pieces, metrics, error, finish, ended } = this;
    return { name, request, pieces, metrics, error, finish, ended };
  }
}
