"use strict";
/* The page is whole without this. Here: filters over the cases, and links into cases that are folded away. */
(() => {
  const $ = (id) => document.getElementById(id);

  /* Not every browser unfolds what a link points into. */
  function unfold() {
    const target = location.hash && $(decodeURIComponent(location.hash.slice(1)));
    const cell = target && target.closest("details");
    for (let details = cell; details; details = details.parentElement.closest("details")) {
      details.hidden = false;
      details.open = true;
    }
    if (!cell) return;
    cell.scrollIntoView();
    cell.querySelector("summary").focus({ preventScroll: true });
  }
  addEventListener("hashchange", unfold);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#cases-']");
    if (link && link.hash === location.hash) unfold();
  });

  const form = $("filters");
  if (!form) return unfold();
  const UNFOLD = 50; /* cases left, at most, for them to be shown at once */
  const ops = [...document.querySelectorAll("details.op")];
  const groups = [...document.querySelectorAll("details.cases")].map((details) => ({
    details,
    text: details.querySelector("summary").textContent.toLowerCase(),
    cases: [...details.querySelectorAll("tbody")].map((body) => ({ body, text: body.textContent.toLowerCase() })),
  }));
  const total = groups.reduce((sum, group) => sum + group.cases.length, 0);

  function update() {
    const words = $("f-text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const [run, mode, state] = ["f-run", "f-mode", "f-state"].map((id) => $(id).value);
    const active = words.length > 0 || run || mode || state;
    let left = 0;
    for (const { details, text, cases } of groups) {
      let mine = 0;
      for (const one of cases) {
        const fits = (!run || details.dataset.run === run)
          && (!mode || one.body.dataset.mode === mode)
          && (!state || one.body.dataset.state === state)
          && words.every((word) => one.text.includes(word) || text.includes(word));
        one.body.hidden = !fits;
        mine += fits;
      }
      details.hidden = !mine;
      left += mine;
    }
    for (const op of ops) op.hidden = !op.querySelector("details:not([hidden])");
    for (const details of [...ops, ...groups.map((group) => group.details)]) {
      details.open = Boolean(active && left <= UNFOLD && !details.hidden);
    }
    $("nothing").hidden = left > 0;
    $("count").textContent = `${left} of ${total} cases`;
  }
  let waiting;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(update, 120); });
  form.addEventListener("reset", () => setTimeout(update));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update();
  unfold();
})();
