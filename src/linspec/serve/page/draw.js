// Turns of a conversation as elements. Everything a model or a user wrote goes in as text, never as markup.

import { keep, kept } from "./chats.js";

const HUES = 6;
const names = kept("linspec.drafters", []);

/** The class of a drafter's colour; the same one at every visit. */
export function hue(name) {
  if (!names.includes(name)) {
    names.push(name);
    keep("linspec.drafters", names);
  }
  return `hue-${names.indexOf(name) % HUES}`;
}

/** An element with a class, its text and its children. */
export function make(tag, kind = "", text = "", ...children) {
  const found = document.createElement(tag);
  if (kind) found.className = kind;
  if (text) found.textContent = text;
  found.append(...children);
  return found;
}

/** The text of a part: drafted ones say by whom. */
function written(part) {
  if (!part.drafter) return document.createTextNode(part.text);
  const found = make("span", `draft ${hue(part.drafter)}`, part.text);
  found.title = `drafted by ${part.drafter}`;
  return found;
}

function turnedDown(text, drafter) {
  const found = make("del", `rejected ${hue(drafter)}`, text.replaceAll("\n", "⏎"));
  found.title = `drafted by ${drafter}, rejected`;
  found.ariaHidden = "true";
  return found;
}

/** Adds what a round brought. Rejected drafts stand where the model went another way. */
export function append(element, round) {
  const parts = round.parts ?? [{ text: round.text, drafter: "" }];
  const own = parts.findLastIndex((part) => part.drafter) + 1;
  const lost = (round.rejected ?? []).map((each) => turnedDown(each.text, round.drafter));
  element.append(...parts.slice(0, own).map(written), ...lost, ...parts.slice(own).map(written));
}

/** Rounds as they are kept: those without drafts are one text. */
export function packed(rounds) {
  const found = [];
  for (const { parts = [], text, drafter, rejected = [] } of rounds) {
    const drafted = rejected.length > 0 || parts.some((part) => part.drafter);
    const last = found.at(-1);
    if (drafted) found.push({ parts, drafter, rejected });
    else if (last && !last.parts) last.text += text;
    else found.push({ text });
  }
  return found;
}

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** Tokens, tokens per round, and the speed beside plain decoding. */
export function cost(totals, tokens) {
  const plain = totals.plain_tokens_per_s;
  const mark = totals.plain_is_lower_bound ? "≥ " : "";
  const line = `${tokens} tokens · ${totals.tokens_per_round.toFixed(2)} tokens per round · `
    + `${totals.accepted} of ${totals.drafted} drafts accepted`;
  const found = make("div", "cost", "", make("p", "small", line));
  if (!totals.tokens_per_s || !plain) return found;
  const race = make("div", "race");
  const most = Math.max(totals.tokens_per_s, plain);
  for (const [name, speed, kind, sign] of [
    ["with drafts", totals.tokens_per_s, "ours", ""], ["plain decoding", plain, "", mark],
  ]) {
    const bar = make("progress", kind);
    bar.max = most;
    bar.value = speed;
    bar.ariaLabel = name;
    race.append(make("span", "", name), bar, make("span", "", `${sign}${number.format(speed)} tokens/s`));
  }
  found.append(race);
  return found;
}

const WHO = { user: "You", assistant: "Model", wrong: "Not answered" };

/** A turn, whole; returns its element and that of its text. */
export function turn(told) {
  const text = make("div", "text");
  if (told.rounds) told.rounds.forEach((round) => append(text, round));
  else text.textContent = told.text;
  const kind = told.wrong ? "wrong" : told.role;
  const found = make("article", `turn ${kind}`, "", make("div", "who", WHO[kind]), text);
  if (told.totals) found.append(cost(told.totals, told.tokens));
  return { element: found, text };
}
