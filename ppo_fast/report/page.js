
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

// Samples: each pane pages through the updates of its run, on its own.
const card = ([prompt, completion, verdict, fault]) => {
  const made = document.getElementById("card").content.cloneNode(true);
  made.querySelector(".prompt bdi").textContent = prompt;
  made.querySelector(".completion bdi").textContent = completion;
  made.querySelector(".verdict").textContent = verdict;
  made.querySelector(".verdict").classList.toggle("warn", fault);
  return made;
};
const runs = [...document.querySelectorAll(".run")];
for (const run of runs) {
  let parsed;
  const data = () => (parsed ??= JSON.parse(run.querySelector("script").textContent));
  for (const pager of run.querySelectorAll(".pager")) {
    const pane = pager.parentElement;
    const slider = pager.querySelector("input");
    const show = (place) => {
      const { updates, cards } = data();
      slider.value = place;
      const at = slider.valueAsNumber;
      slider.setAttribute("aria-valuetext", `update ${updates[at]}`);
      pane.querySelector("h4 span").textContent = updates[at];
      pane.querySelector("h4 small")?.toggleAttribute("hidden", updates[at] !== 0);
      pane.querySelector(".cards").replaceChildren(...cards[at].map(card));
    };
    slider.addEventListener("input", () => show(slider.valueAsNumber));
    const places = {
      first: () => 0,
      previous: () => slider.valueAsNumber - 1,
      next: () => slider.valueAsNumber + 1,
      last: () => Number(slider.max),
    };
    for (const button of pager.querySelectorAll("button")) {
      button.addEventListener("click", () => show(places[button.value]()));
    }
    pager.hidden = false;
  }
}
const chooser = document.querySelector(".chooser");
if (chooser) {
  const select = chooser.querySelector("select");
  const choose = () => runs.forEach((run, i) => { run.hidden = i !== select.selectedIndex; });
  select.addEventListener("change", choose);
  runs.forEach((run) => { run.querySelector("h3").hidden = true; });
  chooser.hidden = false;
  choose();
}
