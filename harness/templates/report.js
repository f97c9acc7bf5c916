"use strict";
(() => {
  const cards = Array.from(document.querySelectorAll("details.sample"));
  const tools = document.querySelector(".tools");
  if (tools) {
    const byTask = document.getElementById("by-task");
    const byPattern = document.getElementById("by-pattern");
    const count = document.getElementById("shown-count");
    const visible = () => cards.filter((card) => !card.hidden);
    const filter = () => {
      for (const card of cards) {
        card.hidden =
          (byTask.value !== "" && card.dataset.task !== byTask.value) ||
          (byPattern.value !== "" && card.dataset.pattern !== byPattern.value);
      }
      count.textContent = `${visible().length} shown`;
    };
    const setAll = (open) => visible().forEach((card) => (card.open = open));
    byTask.addEventListener("change", filter);
    byPattern.addEventListener("change", filter);
    document.getElementById("open-all").addEventListener("click", () => setAll(true));
    document.getElementById("close-all").addEventListener("click", () => setAll(false));
    tools.hidden = false;
    filter();
  }
  // paper cannot be unfolded: tables and charts open for printing and close again after it
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = Array.from(document.querySelectorAll("details.fold:not([open])"));
    opened.forEach((fold) => (fold.open = true));
  });
  addEventListener("afterprint", () => opened.forEach((fold) => (fold.open = false)));
})();
