"use strict";
// The rows of a report: filter, search, walk by keys, copy an id, tick rows and download their ids.
(() => {
  const all = [...document.querySelectorAll(".row")];
  const form = document.getElementById("filter");
  if (!form) return;
  const ids = JSON.parse(document.getElementById("ids").textContent);
  const count = document.getElementById("count");
  const search = form.elements.search;
  const texts = new Map(); // of a row, in lower case, made when it is first searched
  let current = null;

  const idOf = (row) => ids[Number(row.dataset.row)];
  const textOf = (row) => {
    if (!texts.has(row)) texts.set(row, `${idOf(row)}\n${row.textContent}`.toLowerCase());
    return texts.get(row);
  };
  const boxOf = (row) => row.querySelector("input[type=checkbox]");
  const visible = () => all.filter((row) => !row.hidden);

  function show() {
    const words = search.value.toLowerCase();
    for (const row of all) {
      const fits = ["kinds", "labels", "source"].every((name) => {
        const wanted = form.elements[name]?.value;
        return !wanted || row.dataset[name].split(" ").includes(wanted);
      });
      const ticked = !form.elements.ticked.checked || boxOf(row).checked;
      row.hidden = !(fits && ticked && (!words || textOf(row).includes(words)));
    }
    say();
  }

  function say() {
    const ticked = all.filter((row) => boxOf(row).checked).length;
    count.textContent = `${visible().length} of ${all.length} rows, ${ticked} ticked`;
  }

  function go(step) {
    const rows = visible();
    if (!rows.length) return;
    const place = rows.indexOf(current);
    current = rows[place < 0 ? 0 : Math.min(Math.max(place + step, 0), rows.length - 1)];
    current.focus({ preventScroll: true });
    current.scrollIntoView({ block: "start" });
  }

  async function copy(row) {
    const id = idOf(row);
    try {
      await navigator.clipboard.writeText(id);
    } catch {
      const box = document.createElement("textarea"); // pages of a file may have no clipboard
      box.value = id;
      document.body.append(box);
      box.select();
      document.execCommand("copy");
      box.remove();
    }
    count.textContent = `copied ${id}`;
  }

  // A cell of CSV: quoted where it holds a quote, a comma or a line break.
  const cell = (id) => (/[",\r\n]/.test(id) ? `"${id.replaceAll('"', '""')}"` : id);

  function download(name, lines) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/plain" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const tickedIds = () => all.filter((row) => boxOf(row).checked).map(idOf);
  const actions = {
    text: () => download("ids.txt", tickedIds()),
    csv: () => download("ids.csv", ["id", ...tickedIds().map(cell)]),
    tick: () => {
      for (const row of visible()) boxOf(row).checked = true;
      say();
    },
    untick: () => {
      for (const row of all) boxOf(row).checked = false;
      show();
    },
  };

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", show);
  form.addEventListener("click", (event) => actions[event.target.dataset?.action]?.());
  document.addEventListener("change", (event) => {
    if (event.target.closest(".row")) say();
  });
  document.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) current = row;
    if (row && event.target.closest("button")) copy(row);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input:not([type=checkbox]), select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const keys = {
      j: () => go(1),
      k: () => go(-1),
      x: () => {
        if (current) boxOf(current).click();
      },
      c: () => {
        if (current) copy(current);
      },
      "/": () => search.focus(),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  show(); // a browser may keep what was filtered when the page is read again
})();
