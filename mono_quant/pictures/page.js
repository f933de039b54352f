"use strict";
const table = document.getElementById("rows");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];

function compare(place, numeric) {
  return (one, other) => {
    const [a, b] = [one.cells[place], other.cells[place]];
    if (!numeric) return a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
    return Number(a.dataset.value) - Number(b.dataset.value);
  };
}

function sort(place) {
  const head = heads[place], numeric = head.dataset.kind === "number";
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of heads) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const known = [], empty = [];
  for (const row of body.rows) (row.cells[place].textContent ? known : empty).push(row);
  known.sort(compare(place, numeric));
  if (down) known.reverse();
  body.append(...known, ...empty);
}

heads.forEach((head, place) => head.firstElementChild.addEventListener("click", () => sort(place)));

const filter = document.getElementById("filter");
if (filter) {
  const found = document.getElementById("found");
  filter.closest("p").hidden = false;
  const words = [...heads.keys()].filter((place) => heads[place].dataset.kind === "text");
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase();
    let count = 0;
    for (const row of body.rows) {
      const texts = words.map((place) => row.cells[place].textContent.toLowerCase());
      row.hidden = !texts.some((text) => text.includes(wanted));
      count += row.hidden ? 0 : 1;
    }
    found.textContent = `${count} of ${body.rows.length} rows`;
  });
}
