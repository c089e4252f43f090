"use strict";
(() => {
  const tip = document.getElementById("tip");

  const put = (parent, tag, text, cls) => {
    const node = document.createElement(tag);
    node.textContent = text;
    if (cls) node.className = cls;
    parent.append(node);
    return node;
  };

  const hide = (svg) => {
    tip.hidden = true;
    svg.classList.remove("hot");
  };

  const show = (svg, points, x, event) => {
    const near = points.reduce((a, b) => (Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a)).x;
    const here = points.filter((p) => p.x === near).sort((a, b) => b.y - a.y);
    const guide = svg.querySelector(".guide");
    guide.setAttribute("x1", near);
    guide.setAttribute("x2", near);
    svg.classList.add("hot");
    tip.replaceChildren();
    const simulated = here.some((p) => p.sim);
    tip.classList.toggle("three", simulated);
    put(tip, "strong", here[0].at);
    for (const p of here) {
      const line = put(tip, "div", "", p.cls);
      put(line, "span", p.name);
      put(line, "span", p.value);
      if (simulated) put(line, "span", p.sim ?? "–");
    }
    put(tip, "small", (simulated ? "measured " : "") + `median${here.some((p) => p.value.includes("[")) ? " [95 % interval]" : ""}${simulated ? ", simulated and its error; " : ", "}${here[0].n} generations` + (svg.dataset.note ? `, ${svg.dataset.note}` : ""));
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 16, room)) + scrollX}px`;
    const above = event.clientY - tip.offsetHeight - 14;
    tip.style.top = `${(above > 4 ? above : event.clientY + 18) + scrollY}px`;
  };

  for (const svg of document.querySelectorAll("svg.chart")) {
    const points = [...svg.querySelectorAll(".pt")].map((g) => {
      const place = g.transform.baseVal.getItem(0).matrix;
      const series = g.parentNode;
      return {
        x: place.e, y: place.f, at: `${g.dataset.at} ms RTT`, value: g.dataset.value + svg.dataset.suffix, n: g.dataset.n,
        sim: g.dataset.sim, name: series.dataset.name, cls: series.getAttribute("class"),
      };
    });
    if (!points.length) continue;
    const move = (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      show(svg, points, at.x, event);
    };
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", () => hide(svg));
    svg.addEventListener("pointercancel", () => hide(svg));
  }

  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    if (["", "–", "unlimited"].includes(text)) return Infinity;
    const number = parseFloat(text.replaceAll(",", "").replace("−", "-")); // of "1,234 [1,200, 1,300]" the first
    return Number.isNaN(number) ? text : number;
  };

  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.parentNode;
      const down = head.getAttribute("aria-sort") === "ascending";
      const body = head.closest("table").tBodies[0];
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => {
        const [u, v] = [value(a, head.cellIndex), value(b, head.cellIndex)];
        const order = typeof u === "number" && typeof v === "number" ? (u === v ? 0 : u - v) : String(u).localeCompare(String(v));
        return down ? -order : order;
      });
      body.append(...rows);
    });
  }
})();
