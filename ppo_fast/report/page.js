
"use strict";
// The pointer's update and every curve's number there, in the corner of its chart.
const written = (v) => (Math.abs(v) >= 1000 ? v.toFixed(0) : v.toPrecision(3));
for (const figure of document.querySelectorAll("figure:has(svg)")) {
  const { updates, at, curves } = JSON.parse(figure.querySelector("script").textContent);
  const [svg, cursor, box] = ["svg", ".cursor", "output"].map((s) => figure.querySelector(s));
  const row = (text, colour) => {
    const line = document.createElement("div");
    line.textContent = text;
    if (colour !== undefined) line.className = `c${colour % 6}`;
    return line;
  };
  const show = (event) => {
    const x = ((event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth)
      * svg.viewBox.baseVal.width;
    const i = at.reduce((best, a, k) => (Math.abs(a - x) < Math.abs(at[best] - x) ? k : best), 0);
    cursor.setAttribute("x1", at[i]);
    cursor.setAttribute("x2", at[i]);
    cursor.setAttribute("visibility", "visible");
    box.replaceChildren(row(`update ${updates[i]}`));
    curves.forEach(({ mean, low, high }, g) => {
      if (mean[i] === null) return;
      const range = low[i] < high[i] ? `  (${written(low[i])} to ${written(high[i])})` : "";
      box.append(row(written(mean[i]) + range, g));
    });
    box.hidden = false;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    box.hidden = true;
  });
}
