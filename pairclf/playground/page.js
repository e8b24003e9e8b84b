"use strict";
const byId = (id) => document.getElementById(id);
const form = JSON.parse(byId("form").textContent);
const letter = (place) => String.fromCharCode(65 + place);
const MOST_ANSWERS = 26;

const empty = (count) => Array.from({ length: count }, () => "");
let row = {
  fields: Object.fromEntries(form.fields.map((name) => [name, empty(1)])),
  answers: form.sides.map(() => empty(1)),
};
let loaded = null; // the row of the file, and the probabilities of its classes

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick" || key === "oninput") made[key] = value;
    else if (value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

const button = (text, onclick, disabled = false) => element("button", { type: "button", onclick, disabled }, text);
const named = (text) => element("bdi", {}, text); // a name may run from right to left

// --- the row ---------------------------------------------------------------------------------------------------------

const texts = () => [...Object.values(row.fields), ...row.answers];
const differs = (turns, others) => loaded !== null && JSON.stringify(turns) !== JSON.stringify(others ?? null);

function change(edit) {
  edit();
  drawRow();
}

function drawText(name, turns, others, ...buttons) {
  const note = element("span", { class: "quiet" });
  const mark = () => (note.textContent = differs(turns, others) ? " changed" : "");
  const areas = turns.map((turn, place) => {
    const label = turns.length > 1 ? `${name}, turn ${place + 1}` : name;
    const area = element("textarea", { rows: 5, "aria-label": label, dir: "auto", spellcheck: "false" });
    area.value = turn ?? "";
    area.oninput = () => {
      turns[place] = area.value;
      mark();
    };
    return area;
  });
  mark();
  return element("div", { class: "text" }, element("h3", {}, named(name), note, ...buttons), ...areas);
}

function drawRow() {
  const others = loaded?.row;
  const shared = form.fields.map((name) => drawText(name, row.fields[name], others?.fields[name]));
  const answers = row.answers.map((turns, place) => {
    const name = place < form.sides.length ? `${letter(place)}: ${form.sides[place]}` : letter(place);
    const away = () => change(() => row.answers.splice(place, 1));
    return drawText(name, turns, others?.answers[place], ...(place < 2 ? [] : [" ", button("Remove", away)]));
  });
  const turns = Math.max(...texts().map((text) => text.length));
  const addTurn = () => change(() => texts().forEach((text) => text.push("")));
  const cutTurn = () => change(() => texts().forEach((text) => text.splice(Math.max(1, turns - 1))));
  const addAnswer = () => change(() => row.answers.push(empty(1)));
  byId("row").replaceChildren(
    ...shared,
    element("div", { class: "answers" }, ...answers),
    element(
      "p",
      { class: "buttons" },
      element("button", { type: "submit" }, "Score"),
      ...(form.sides.length ? [button("Add an answer", addAnswer, row.answers.length >= MOST_ANSWERS)] : []),
      ...(form.turns ? [button("Add a turn", addTurn), button("Remove the last turn", cutTurn, turns < 2)] : []),
    ),
  );
}

// --- the verdict -----------------------------------------------------------------------------------------------------

const isNumber = (cell) => typeof cell === "number" || /^[+−]?\d/.test(cell);
const shown = (cell) => (typeof cell === "number" ? cell.toFixed(4).replace("-", "−") : cell);

function table(titles, rows) {
  const line = (name, cells) =>
    cells.map((cell, place) => element(name, { class: isNumber(rows[0][place]) && "number" }, shown(cell)));
  const body = rows.map((cells) => element("tr", {}, ...line("td", cells)));
  const head = element("thead", {}, element("tr", {}, ...line("th", titles)));
  const whole = element("table", {}, head, element("tbody", {}, ...body));
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "verdict" }, whole);
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4);

function drawClasses(classes) {
  const orders = classes[0].probabilities.length > 1;
  const titles = ["class", "P", ...(loaded?.means ? ["change"] : []), ...(orders ? ["P, AB", "P, BA"] : [])];
  const rows = classes.map(({ name, probabilities: [mean, ...others] }, place) => {
    const bar = element("meter", { min: 0, max: 1, value: mean, "aria-label": `P(${name})` });
    const moved = loaded?.means ? [signed(mean - loaded.means[place])] : [];
    return [element("span", {}, named(name), bar), mean, ...moved, ...others];
  });
  const notes = orders ? ["P: the mean of both orders; AB: as above; BA: with the sides exchanged"] : [];
  if (loaded?.means) notes.push("change: of P, from the loaded row");
  return [table(titles, rows), ...notes.map((note) => element("p", { class: "quiet" }, note))];
}

function drawVerdict({ classes, ranking, score, rewards, cut, seconds }) {
  const parts = [element("h2", {}, "Verdict")];
  if (classes) parts.push(...drawClasses(classes));
  if (ranking) {
    const rows = ranking.map((answer, place) => [letter(place), answer.score, String(answer.rank)]);
    parts.push(table(["answer", score, "rank"], rows));
  } else if (rewards.length) {
    parts.push(table(["answer", "reward"], rewards.map((reward, place) => [letter(place), reward])));
  }
  const lost = cut.map(({ bundle, text, tokens }) => {
    const where = typeof text === "number" ? letter(text) : text;
    return element("li", {}, named(bundle), ` does not see ${tokens} tokens of `, named(where));
  });
  parts.push(lost.length ? element("ul", {}, ...lost) : element("p", {}, "The texts were read whole."));
  parts.push(element("p", { class: "quiet" }, `${seconds.toFixed(2)} s`));
  byId("verdict").replaceChildren(...parts);
}

// --- the server ------------------------------------------------------------------------------------------------------

async function ask(path, body) {
  // The page's own policy, no-referrer, may make of the header Origin `null`, which the server refuses.
  const request = { method: "POST", referrerPolicy: "same-origin", body: JSON.stringify(body) };
  const response = await fetch(path, request).catch(() => {
    throw new Error("The server does not answer. Start pairclf try again.");
  });
  const text = await response.text();
  if (response.ok) return JSON.parse(text);
  const json = response.headers.get("content-type") === "application/json";
  throw new Error(json ? JSON.parse(text).error : `${response.status}: ${text}`);
}

let busy = false;

async function whileBusy(what, work) {
  if (busy) return;
  busy = true;
  byId("status").textContent = what;
  byId("error").textContent = "";
  try {
    await work();
  } catch (error) {
    byId("verdict").replaceChildren();
    byId("error").textContent = error.message;
  }
  byId("status").textContent = "";
  busy = false;
}

async function score() {
  drawVerdict(await ask("verdict", row));
}

async function load(id) {
  const found = await ask("row", { id });
  row = { fields: found.fields, answers: found.answers };
  loaded = { row: structuredClone(row), means: null };
  drawRow();
  const verdict = await ask("verdict", row);
  drawVerdict(verdict);
  loaded.means = verdict.classes.map(({ probabilities }) => probabilities[0]);
  byId("id").value = found.id;
}

byId("row").addEventListener("submit", (event) => {
  event.preventDefault();
  whileBusy("Scoring …", score);
});
byId("row").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("row").requestSubmit();
});
if (form.data) {
  byId("loader").append(
    element("label", { for: "id" }, "Row of ", named(form.data)),
    element("input", { id: "id", placeholder: "id; empty: the first row", autocomplete: "off" }),
    element("button", { type: "submit" }, "Load"),
  );
  byId("loader").addEventListener("submit", (event) => {
    event.preventDefault();
    whileBusy("Loading …", () => load(byId("id").value));
  });
}
drawRow();
