"use strict";
// Draws every figure of the page from the JSON beside it.
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
for (const place of document.querySelectorAll("[data-figure]")) {
  const source = document.getElementById("figure-" + place.dataset.figure);
  const { data, layout } = JSON.parse(source.textContent);
  Plotly.newPlot(place, data, layout, { ...config, toImageButtonOptions: { filename: place.dataset.figure, format: "svg" } });
}

// From a card to the tokens of its expert ...
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-expert]"), explorer = document.querySelector("[data-workbench-explorer]");
  if (!link || !explorer) return;
  const detail = { layer: Number(link.dataset.layer), expert: Number(link.dataset.expert) };
  explorer.dispatchEvent(new CustomEvent("workbench-explorer-choose", { detail }));
});

// ... and back: a link to a card unfolds its layer.
function unfold() {
  const card = location.hash.startsWith("#expert-") ? document.getElementById(location.hash.slice(1)) : null;
  if (!card) return;
  card.closest("details").open = true;
  card.scrollIntoView();
}
window.addEventListener("hashchange", unfold);
unfold();
