// Live charts as inline SVG: one point a second.

import { make } from "./draw.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const HEIGHT = 46;

function bytes(count) {
  const units = ["B", "kB", "MB", "GB"];
  const at = count ? Math.min(3, Math.floor(Math.log10(count) / 3)) : 0;
  return `${(count / 1000 ** at).toFixed(at ? 1 : 0)} ${units[at]}`;
}

const perRound = (second) => (second.rounds ? second.tokens / second.rounds : 0);
const round = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0));

// title, value of a second, a second line, how a value is written, the least top of the scale
const CHARTS = [
  { title: "Running", of: (s) => s.running, say: (v, m) => `${v} of ${m.slots} slots`, top: (m) => m.slots },
  { title: "Waiting", of: (s) => s.waiting, say: (v, m) => `${v}, room for ${m.queue_limit}`, top: () => 4 },
  { title: "Busy", of: (s) => s.busy, say: (v) => `${Math.round(100 * v)}% of the time`, top: () => 1 },
  { title: "Tokens per second", of: (s) => s.tokens, say: (v) => round(v), top: () => 10 },
  { title: "Tokens per round", of: perRound, say: (v) => (v ? v.toFixed(2) : "–"), top: () => 2, held: true },
  { title: "State memory", of: (s) => s.state_bytes, say: (v) => bytes(v), top: () => 1e6 },
  { title: "Process memory", of: (s) => s.process_bytes, say: (v) => bytes(v), top: () => 1e6, held: true },
];

function shape(name, kind) {
  const found = document.createElementNS(SVG, name);
  found.setAttribute("class", kind);
  return found;
}

/** One chart. */
class Chart {
  constructor(spec) {
    this.spec = spec;
    this.said = make("output");
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.area = shape("path", "area");
    this.line = shape("path", "line");
    this.svg.append(this.area, this.line);
    const caption = make("figcaption", "", "", make("span", "", spec.title), this.said);
    this.element = make("figure", "", "", caption, this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.tell(this.values?.at(-1) ?? 0));
  }

  show(model) {
    this.model = model;
    this.values = model.seconds.map(this.spec.of);
    // a second without steps says nothing about these: the last one stands
    if (this.spec.held) this.values.forEach((v, i) => { if (!v && i) this.values[i] = this.values[i - 1]; });
    const top = Math.max(this.spec.top(model), ...this.values);
    const step = WIDTH / Math.max(1, this.values.length - 1);
    const points = this.values.map((v, i) => `${(i * step).toFixed(1)},${(HEIGHT - 1 - (v / top) * (HEIGHT - 3)).toFixed(1)}`);
    this.line.setAttribute("d", `M${points.join("L")}`);
    this.area.setAttribute("d", `M0,${HEIGHT}L${points.join("L")}L${WIDTH},${HEIGHT}Z`);
    const said = (value) => this.spec.say(value, model);
    const last = this.values.at(-1) ?? 0;
    this.svg.setAttribute("aria-label", `${this.spec.title}: now ${said(last)}, at most ${said(Math.max(0, ...this.values))}`);
    this.tell(last);
  }

  tell(value, when = "") {
    if (this.model) this.said.textContent = this.spec.say(value, this.model) + when;
  }

  point(event) {
    if (!this.values?.length) return;
    const box = this.svg.getBoundingClientRect();
    const at = Math.min(this.values.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * this.values.length)));
    this.tell(this.values[at], `, ${this.values.length - at} s ago`);
  }
}

/** All charts, in `place`; returns what shows a model's figures. */
export function charts(place) {
  const all = CHARTS.map((spec) => new Chart(spec));
  place.append(...all.map((each) => each.element));
  return (model) => all.forEach((each) => each.show(model));
}
