// Niceties only: everything can be read without this script.
"use strict";

for (const chart of document.querySelectorAll("svg[data-points]")) readValuesUnderPointer(chart);
offerSampleFilter(document.getElementById("sample-filter"), document.getElementById("sample-list"));

function readValuesUnderPointer(chart) {
  const readout = chart.parentElement.querySelector(".readout");
  if (!readout) return;
  readout.hidden = false;
  const series = JSON.parse(chart.dataset.points);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "crosshair");
  chart.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    const words = [];
    let nearest = null;
    for (const [name, points] of Object.entries(series)) {
      const best = points.reduce((a, b) => (Math.abs(a[2] - at.x) <= Math.abs(b[2] - at.x) ? a : b));
      words.push(`${name} ${Number(best[1].toPrecision(4))} at step ${Math.round(best[0]).toLocaleString("en")}`);
      if (!nearest || Math.abs(best[2] - at.x) < Math.abs(nearest[2] - at.x)) nearest = best;
    }
    for (const [key, value] of Object.entries({ x1: nearest[2], x2: nearest[2], y1: 24, y2: chart.viewBox.baseVal.height - 50 })) line.setAttribute(key, value);
    chart.append(line);
    readout.textContent = words.join("; ");
  });
  chart.addEventListener("pointerleave", () => {
    line.remove();
    readout.textContent = "";
  });
}

function offerSampleFilter(bar, list) {
  if (!bar || !list) return;
  const samples = [...list.children];
  const kinds = [
    ["All", () => true],
    ["Disagreements", (sample) => sample.dataset.agree === "no"],
    ["Student wrong", (sample) => sample.dataset.wrong === "yes"],
  ].filter(([, wanted]) => samples.some(wanted));
  const search = Object.assign(document.createElement("input"), { type: "search", placeholder: "Find in samples" });
  search.setAttribute("aria-label", "Find in samples");
  const told = document.createElement("output");
  let chosen = kinds[0][1];
  const apply = () => {
    const needle = search.value.toLowerCase();
    for (const sample of samples) sample.hidden = !(chosen(sample) && sample.textContent.toLowerCase().includes(needle));
    const left = samples.filter((sample) => !sample.hidden).length;
    told.textContent = left === samples.length ? "" : `${left} of ${samples.length} shown`;
  };
  const buttons = kinds.map(([name, wanted]) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: `${name} (${samples.filter(wanted).length})` });
    button.setAttribute("aria-pressed", String(wanted === chosen));
    button.addEventListener("click", () => {
      chosen = wanted;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      apply();
    });
    return button;
  });
  search.addEventListener("input", apply);
  bar.append(...buttons, search, told);
  bar.hidden = false;
}
