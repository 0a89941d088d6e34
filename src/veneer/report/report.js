// Draws the page's charts, and while its run is not over loads the page again, with the reader where they were.
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const { charts, config, reload } = read("page-data");
  // Expressions are interpreted (ast), not compiled: the page's policy allows no eval.
  const options = { ast: true, actions: false, renderer: "svg", mode: "vega-lite", config, defaultStyle: false,
    tooltip: { theme: "page", disableDefaultStyle: true } };
  const drawn = Object.entries(charts).map(([id, spec]) => vegaEmbed(document.getElementById(id), spec, options));
  Promise.all(drawn).then(
    () => { document.documentElement.dataset.drawn = String(drawn.length); restore(); },
    (error) => { document.documentElement.dataset.failed = String(error); console.error(error); });

  const store = (() => { try { return window.sessionStorage; } catch { return null; } })();
  const key = "veneer:" + location.pathname;
  function keep() {
    const open = [...document.querySelectorAll("details")].map((one) => one.open);
    try { store?.setItem(key, JSON.stringify({ y: window.scrollY, open })); } catch { /* it starts at the top then */ }
  }
  function restore() {
    let kept = null;
    try { kept = JSON.parse(store?.getItem(key) ?? "null"); store?.removeItem(key); } catch { /* none */ }
    if (!kept) return;
    document.querySelectorAll("details").forEach((one, n) => { if (kept.open[n] !== undefined) one.open = kept.open[n]; });
    window.scrollTo(0, kept.y);
  }

  const live = document.getElementById("live");
  if (!live || !reload) return;
  history.scrollRestoration = "manual";
  let paused = false;
  const since = live.querySelector("span"), button = live.querySelector("button");
  button.addEventListener("click", () => { paused = !paused; button.textContent = paused ? "go on" : "pause"; });
  const loaded = Date.now();
  const ago = (seconds) => seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
  setInterval(() => {
    const old = Math.max(0, (Date.now() - Date.parse(reload.written)) / 1000);
    // A process that was killed writes no page any more: this one says so, and looks again ever more seldom.
    const quiet = old > reload.quiet;
    since.textContent = quiet ? `no news for ${ago(old)}; it may have been stopped` : `written ${ago(old)} ago`;
    const wait = quiet ? Math.min(600, old / 4) : reload.seconds;
    const selects = String(window.getSelection()) !== "";
    if (!paused && !document.hidden && !selects && Date.now() - loaded > wait * 1000) { keep(); location.reload(); }
  }, 1000);
})();
