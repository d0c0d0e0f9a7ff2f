"use strict";
// Draws every figure of the page from the JSON beside it.
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
for (const place of document.querySelectorAll("[data-figure]")) {
  const source = document.getElementById("figure-" + place.dataset.figure);
  const { data, layout } = JSON.parse(source.textContent);
  Plotly.newPlot(place, data, layout, { ...config, toImageButtonOptions: { filename: place.dataset.figure, format: "svg" } });
}
