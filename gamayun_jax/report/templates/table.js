// A click on a heading, or Enter, sorts the rows of a table's body by data-v; cells
// without a value come last.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const sort = () => {
      const up = head.getAttribute("aria-sort") != "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.v;
      const order = (a, b) =>
        (value(a) == "") - (value(b) == "") ||
        (up ? 1 : -1) * (value(a) - value(b));
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    };
    head.onclick = sort;
    head.onkeydown = (event) => {
      if (event.key == "Enter") sort();
    };
  });
}
