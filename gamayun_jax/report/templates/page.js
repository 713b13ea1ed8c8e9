// A click or tap on a heading, or Enter, sorts the rows of a table's body by data-v;
// cells without a value come last.
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
    head.title = "sort by this column";
    head.onclick = sort;
    head.onkeydown = (event) => {
      if (event.key == "Enter") sort();
    };
  });
}

// Tables that do not fit: a block for each row, its values beside their headings.
const fit = () => {
  for (const table of document.querySelectorAll(".scroll > table")) {
    const heads = table.tHead.rows[0].cells;
    if (!table.dataset.named)
      for (const row of table.querySelectorAll("tbody tr, tfoot tr"))
        [...row.cells].forEach((cell, i) => (cell.dataset.head = heads[i].textContent));
    table.dataset.named = true;
    table.classList.remove("stacked");
    const wide = table.scrollWidth > table.parentElement.clientWidth + 1;
    const narrow = table.classList.contains("words") && innerWidth < 700;
    table.classList.toggle("stacked", wide || narrow);
  }
};
addEventListener("resize", fit);
document.addEventListener("toggle", fit, true);
fit();

// Over a panel of lines: the values of each at the nearest point to the pointer, which
// are read back from the path, and an upright line there. data-x and data-y have the
// ends of the axes.
const told = document.getElementById("told");
const short = (x) => {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(x) >= size * 0.9995) return Number((x / size).toPrecision(3)) + unit;
  return String(Number(x.toPrecision(3)));
};
for (const plot of document.querySelectorAll(".plot")) {
  const ends = (name) => plot.dataset[name].split(" ").map(Number);
  const [[left, right], [low, high]] = [ends("x"), ends("y")];
  const { width, height } = plot.viewBox.baseVal.width ? plot.viewBox.baseVal : {
    width: plot.width.baseVal.value, height: plot.height.baseVal.value,
  };
  const lines = [...plot.querySelectorAll("path.line:not(.faint)")].map((path) => ({
    name: path.dataset.name,
    points: path.getAttribute("d").slice(1).split("L").map((p) => p.split(" ").map(Number)),
  }));
  if (!lines.length) continue;
  const rule = document.createElementNS("http://www.w3.org/2000/svg", "path");
  rule.setAttribute("class", "axis");
  plot.append(rule);
  plot.onpointermove = plot.onpointerdown = (event) => {
    const box = plot.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const near = lines.map(({ name, points }) => [name, points.reduce((a, b) =>
      Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)]);
    const x = near.reduce((a, b) =>
      Math.abs(b[1][0] - at) < Math.abs(a[1][0] - at) ? b : a)[1][0];
    const value = (y) => {
      const v = high - (y / height) * (high - low);
      if (plot.dataset.form == "percent") return `${(100 * v).toFixed(1)} %`;
      return plot.dataset.form == "short" ? short(v) : v.toFixed(3);
    };
    const place = left + (x / width) * (right - left);
    const rows = near.filter(([, point]) => Math.abs(point[0] - x) < width / 50);
    told.textContent = [
      `${short(place)} ${plot.dataset.over}`,
      ...rows.map(([name, point]) => `${name} ${value(point[1])}`.trim()),
    ].join("\n");
    rule.setAttribute("d", `M${x} 0V${height}`);
    told.hidden = false;
    const beside = Math.min(event.clientX + 14, innerWidth - told.offsetWidth - 6);
    told.style.left = `${Math.max(4, beside)}px`;
    told.style.top = `${Math.max(4, event.clientY - told.offsetHeight - 10)}px`;
  };
  plot.onpointerleave = () => {
    told.hidden = true;
    rule.removeAttribute("d");
  };
}
