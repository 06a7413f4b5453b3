// The page: a conversation with a model of this server, and what its drafts and its load look like.

import { charts } from "./charts.js";
import { Chats, keep, kept } from "./chats.js";
import { append, cost, hue, make, packed, turn } from "./draw.js";
import { Refused, answer, live, models } from "./talk.js";

const at = (id) => document.getElementById(id);
const chats = new Chats();
const form = at("settings");
const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"];
const THEMES = { auto: "as the system has them", light: "light", dark: "dark" };
const system = matchMedia("(prefers-color-scheme: dark)");
const SECONDS = 120;
const newest = {};
let running = null;

// ---- settings

function settings() {
  const found = Object.fromEntries(new FormData(form));
  const asked = {};
  for (const name of NUMBERS) if (found[name] !== "") asked[name] = Number(found[name]);
  const stop = found.stop.split("\n").filter(Boolean);
  if (stop.length) asked.stop = stop;
  return { asked, system: found.system, key: found.key };
}

function keepSettings() {
  const { key, ...others } = Object.fromEntries(new FormData(form));
  keep("linspec.settings", others);
  sessionStorage.setItem("linspec.key", key);
}

function fillSettings() {
  const found = { ...kept("linspec.settings", {}), key: sessionStorage.getItem("linspec.key") ?? "" };
  for (const [name, value] of Object.entries(found)) if (form.elements[name]) form.elements[name].value = value;
  for (const name of ["colours", "rejected"]) {
    at(name).checked = kept(`linspec.${name}`, name === "colours");
    at(name).addEventListener("change", () => { keep(`linspec.${name}`, at(name).checked); showMarks(); });
  }
}

function showMarks() {
  at("log").classList.toggle("coloured", at("colours").checked);
  at("log").classList.toggle("with-rejected", at("rejected").checked);
}

function showTheme(name) {
  const dark = name === "dark" || (name === "auto" && system.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  at("theme").querySelector("span").textContent = name[0].toUpperCase() + name.slice(1);
  at("theme").ariaLabel = `Colours: ${THEMES[name]}`;
}

function nextTheme() {
  const all = Object.keys(THEMES);
  const name = all[(all.indexOf(kept("linspec.theme", "auto")) + 1) % all.length];
  keep("linspec.theme", name);
  showTheme(name);
}

// ---- what is on the page

function showList() {
  at("list").replaceChildren(...chats.all.map((each) => {
    const open = make("button", "open", each.title || "…");
    open.type = "button";
    if (each === chats.open) open.ariaCurrent = "true";
    open.addEventListener("click", () => { stop(); chats.choose(each.id); show(); closeDrawers(); });
    const drop = make("button", "drop", "×");
    drop.type = "button";
    drop.ariaLabel = `Forget the chat “${each.title}”`;
    drop.addEventListener("click", () => { if (each === chats.open) stop(); chats.drop(each.id); show(); });
    return make("li", "", "", open, drop);
  }));
}

function showLegend() {
  const counts = new Map();
  for (const { rounds = [] } of chats.open.turns) {
    for (const { parts = [], text = "" } of rounds) {
      if (text) counts.set("", (counts.get("") ?? 0) + text.length);
      for (const part of parts) counts.set(part.drafter, (counts.get(part.drafter) ?? 0) + part.text.length);
    }
  }
  const all = [...counts.values()].reduce((sum, each) => sum + each, 0);
  const rows = [...counts].sort().map(([name, count]) => make(
    "li", "", "", make("span", name ? `draft ${hue(name)}` : "", name || "the model itself"),
    make("span", "", `${Math.round((100 * count) / all)}% of the text`),
  ));
  at("legend").replaceChildren(...(rows.length ? rows : [make("li", "small", "Nothing has been written yet.")]));
}

function show() {
  const turns = chats.open.turns;
  const welcome = chatting() ? "Ask the model something." : "This model continues texts: give it the beginning of one.";
  at("log").replaceChildren(...(turns.length ? turns.map((each) => turn(each).element) : [make("p", "welcome", welcome)]));
  if (turns.length && !running) at("log").lastElementChild.append(actions());
  at("ask").placeholder = chatting() ? "Ask something" : "Begin a text";
  showList();
  showLegend();
  at("log").scrollTop = at("log").scrollHeight;
}

function actions() {
  const again = make("button", "quiet", "Try again");
  again.type = "button";
  again.addEventListener("click", () => { chats.open.turns = upToQuestion(); void ask(); });
  const copy = make("button", "quiet", "Copy");
  copy.type = "button";
  copy.addEventListener("click", () => navigator.clipboard?.writeText(chats.open.turns.at(-1).text).then(() => tell("Copied")));
  return make("div", "doing", "", again, copy);
}

function upToQuestion() {
  const turns = chats.open.turns;
  return turns.slice(0, turns.findLastIndex((each) => each.role === "user") + 1);
}

/** For those who hear the page. */
function tell(text) {
  at("told").textContent = text;
}

// ---- asking

function chatting() {
  return newest.models?.[at("model").value]?.chat ?? true;
}

function request() {
  const { asked, system: told } = settings();
  const body = { model: at("model").value, ...asked };
  const said = chats.open.turns.filter((each) => !each.wrong);
  if (!chatting()) return ["v1/completions", { ...body, prompt: said.map((each) => each.text).join("") }];
  const messages = said.map((each) => ({ role: each.role, content: each.text }));
  if (told) messages.unshift({ role: "system", content: told });
  return ["v1/chat/completions", { ...body, messages }];
}

async function ask() {
  stop();
  const chat = chats.open;
  const mine = new AbortController();
  running = mine;
  busy(true);
  show();
  const told = { role: "assistant", text: "", rounds: [] };
  const drawn = turn(told);
  drawn.text.classList.add("waits");
  at("log").append(drawn.element);
  tell("The model is answering");
  try {
    await read(told, drawn, mine.signal);
  } catch (error) {
    if (error.name !== "AbortError") chat.turns.push({ role: "assistant", text: reason(error), wrong: true });
  }
  told.rounds = packed(told.rounds);
  if (told.text) chat.turns.splice(chat.turns.at(-1)?.wrong ? -1 : chat.turns.length, 0, told);
  if (running !== mine) return;
  running = null;
  busy(false);
  tell(chat.turns.at(-1).wrong ? chat.turns.at(-1).text : told.text || "Stopped");
  chats.save();
  show();
}

async function read(told, drawn, signal) {
  const [path, body] = request();
  for await (const { text, linspec, usage } of answer(path, body, settings().key, signal)) {
    const below = at("log").scrollHeight - at("log").scrollTop - at("log").clientHeight < 60;
    if (text || linspec?.rejected?.length) {
      const round = { text, ...linspec };
      told.text += text;
      told.rounds.push(round);
      append(drawn.text, round);
    }
    if (linspec?.totals) told.totals = linspec.totals;
    if (usage) told.tokens = usage.completion_tokens;
    if (below) at("log").scrollTop = at("log").scrollHeight;
  }
  if (told.totals) drawn.element.append(cost(told.totals, told.tokens ?? 0));
}

function reason(error) {
  if (!(error instanceof Refused)) return "The server cannot be reached, or went away in the middle of the answer.";
  if (error.status === 401) return "This server wants a key: enter it under Settings.";
  return error.message;
}

function stop() {
  running?.abort();
  running = null;
  busy(false);
}

function busy(now) {
  at("send").hidden = now;
  at("stop").hidden = !now;
}

function send() {
  const text = at("ask").value;
  if (!text.trim() || running) return;
  chats.open.turns.push({ role: "user", text });
  at("ask").value = "";
  grow();
  chats.save();
  void ask();
}

function grow() {
  at("ask").style.height = "auto";
  at("ask").style.height = `${at("ask").scrollHeight + 2}px`;
}

function begin() {
  stop();
  chats.begin();
  show();
  closeDrawers();
  at("ask").focus();
}

// ---- the server

async function fillModels() {
  const found = await models(settings().key);
  const chosen = kept("linspec.model", "");
  at("model").replaceChildren(...found.map((name) => new Option(name, name, false, name === chosen)));
}

/** Figures with the seconds that came before; a connection begins with all of them. */
function joined(before, models) {
  const all = Object.entries(models).map(([name, model]) => {
    const seconds = [...(before?.[name]?.seconds ?? []), ...model.seconds].slice(-SECONDS);
    return [name, { ...model, seconds }];
  });
  return Object.fromEntries(all);
}

/** Follow the live figures for as long as the page is open. */
async function follow(draw) {
  for (let first = true; ; first = false) {
    if (!first) await new Promise((resolve) => setTimeout(resolve, 3000));
    try {
      if (!at("model").options.length) await fillModels();
      for await (const figures of live(settings().key)) {
        const before = chatting();
        newest.models = joined(newest.models, figures.models);
        at("reach").textContent = "";
        if (newest.models[at("model").value]) draw(newest.models[at("model").value]);
        if (before !== chatting() && !running) show();
      }
    } catch (error) {
      at("reach").textContent = error.status === 401 ? "a key is needed" : "not connected";
    }
  }
}

// ---- drawers of narrow windows

function drawer(button, place) {
  at(button).addEventListener("click", () => {
    const open = !at(place).classList.contains("open");
    closeDrawers();
    at(place).classList.toggle("open", open);
    at(button).ariaExpanded = String(open);
    if (open) at(place).querySelector("button, input")?.focus();
  });
}

function closeDrawers() {
  for (const [button, place] of [["show-chats", "chats"], ["show-panel", "panel"]]) {
    if (at(place).classList.contains("open") && at(place).contains(document.activeElement)) at(button).focus();
    at(place).classList.remove("open");
    at(button).ariaExpanded = "false";
  }
}

// ---- keys and buttons

at("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("ask").addEventListener("input", grow);
at("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", begin);
at("forget").addEventListener("click", () => { stop(); chats.forget(); show(); });
at("theme").addEventListener("click", nextTheme);
at("model").addEventListener("change", () => { keep("linspec.model", at("model").value); show(); });
form.addEventListener("input", keepSettings);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(keepSettings));
system.addEventListener("change", () => showTheme(kept("linspec.theme", "auto")));
document.addEventListener("click", (event) => {
  if (event.target.closest("main")) closeDrawers();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { running?.abort(); closeDrawers(); }
  if (event.altKey && event.code === "KeyN") { event.preventDefault(); begin(); }
});
drawer("show-chats", "chats");
drawer("show-panel", "panel");

showTheme(kept("linspec.theme", "auto"));
fillSettings();
showMarks();
show();
void follow(charts(at("charts")));
