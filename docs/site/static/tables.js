// Sorts a table of class "results" by a click on a column's title, and filters its rows by the menus above it.
"use strict";

function value(row, column) {
  const cell = row.cells[column];
  const number = Number(cell.textContent);
  return cell.classList.contains("number") && cell.textContent !== "" ? number : cell.textContent;
}

function sort(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = Array.from(table.tBodies[0].rows);
  rows.sort((a, b) => {
    const [x, y] = [value(a, column), value(b, column)];
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return up ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

function filters(table) {
  const place = document.createElement("div");
  place.className = "filters";
  const menus = [];
  const apply = () => {
    for (const row of table.tBodies[0].rows)
      row.hidden = menus.some(([column, menu]) => menu.value !== "" && row.cells[column].textContent !== menu.value);
  };
  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    if (!head.hasAttribute("data-filter")) return;
    const values = new Set(Array.from(table.tBodies[0].rows, (row) => row.cells[column].textContent));
    const label = document.createElement("label");
    const menu = document.createElement("select");
    label.append(head.textContent + " ", menu);
    menu.append(new Option("all", ""));
    for (const one of Array.from(values).sort()) if (one !== "") menu.append(new Option(one, one));
    menu.addEventListener("change", apply);
    menus.push([column, menu]);
    place.append(label);
  });
  (table.closest(".results-scroll") || table).before(place);
}

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.results")) {
    Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
      head.tabIndex = 0;
      head.addEventListener("click", () => sort(table, column));
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(table, column); });
    });
    filters(table);
  }
});
