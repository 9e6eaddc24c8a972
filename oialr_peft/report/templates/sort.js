"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  const original = [...body.rows];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      // ascending, descending, as in the model
      const next = { none: "ascending", ascending: "descending", descending: "none" };
      const order = next[header.getAttribute("aria-sort") ?? "none"];
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      if (order !== "none") header.setAttribute("aria-sort", order);
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const numbers = !Number.isNaN(Number(x)) && !Number.isNaN(Number(y));
        const found = numbers ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true });
        return order === "descending" ? -found : found;
      };
      body.append(...(order === "none" ? original : [...original].sort(compare)));
    });
  });
}
