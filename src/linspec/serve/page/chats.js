// Chats as this browser keeps them: {id, title, turns: [{role, text, parts, totals, wrong}]}, the newest first.

const PLACE = "linspec.chats";
const MOST = 100;

function read(place, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(place)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keeps `value`; false where the browser has no room or keeps nothing. */
export function keep(place, value) {
  try {
    localStorage.setItem(place, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const kept = read;

/** All chats and the one that is open. */
export class Chats {
  constructor() {
    const found = read(PLACE, []);
    this.all = Array.isArray(found) ? found.filter((each) => Array.isArray(each?.turns)) : [];
    this.begin();
  }

  begin() {
    this.open = { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", turns: [] };
  }

  choose(id) {
    this.open = this.all.find((each) => each.id === id) ?? this.open;
  }

  /** Keep what the open chat has become; old chats give way where there is no room. */
  save() {
    const first = this.open.turns.find((each) => each.role === "user");
    this.open.title = (first?.text ?? "").slice(0, 60);
    this.all = [this.open, ...this.all.filter((each) => each !== this.open)].slice(0, MOST);
    while (!keep(PLACE, this.all) && this.all.length > 1) this.all.pop();
  }

  drop(id) {
    this.all = this.all.filter((each) => each.id !== id);
    keep(PLACE, this.all);
    if (this.open.id === id) this.begin();
  }

  forget() {
    this.all = [];
    keep(PLACE, this.all);
    this.begin();
  }
}
