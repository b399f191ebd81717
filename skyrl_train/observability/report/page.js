"use strict";
// Puts the page together from the data that stands in it.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function theme() {
  const order = ["auto", "light", "dark"];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = "auto";
  // Storage is refused to pages opened from some places; the choice then lasts as long as the page.
  try { chosen = localStorage.getItem("skyrl_train.theme") || "auto"; } catch { /* as above */ }
  const wanted = /[#&]theme=(light|dark)/.exec(location.hash);
  if (wanted) chosen = wanted[1];
  const apply = () => {
    const isDark = chosen === "dark" || (chosen === "auto" && dark.matches);
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    $("theme").textContent = { auto: "Auto", light: "Light", dark: "Dark" }[chosen];
  };
  dark.addEventListener("change", apply);
  $("theme").addEventListener("click", () => {
    chosen = order[(order.indexOf(chosen) + 1) % order.length];
    try { localStorage.setItem("skyrl_train.theme", chosen); } catch { /* as above */ }
    apply();
  });
  apply();
}

function head() {
  document.querySelector("h1").textContent = data.run;
  const facts = document.querySelector(".facts");
  for (const [name, value] of Object.entries(data.facts)) facts.append(h("span", {}, `${name} `, h("b", {}, value)));
  for (const problem of data.problems) $("notes").append(h("div", { class: "note" }, problem));
  if (data.nonfinite.count) {
    const { count, named } = data.nonfinite;
    const rest = count > named.length ? `, and ${count - named.length} more` : "";
    $("notes").append(h("div", { class: "note" }, h("b", {}, `${count} values were not finite: `), named.join("; ") + rest));
  }
}

function tiles() {
  const { accuracy, reward, num_steps: steps, seconds, tokens, tokens_per_s: speed, peak_bytes: peak } = data.summary;
  const tile = (name, value, sub, kind = "") => $("tiles").append(h("div", { class: `tile card ${kind}` },
    h("div", { class: "label" }, name), value instanceof Node ? value : h("div", { class: "value" }, value), h("div", { class: "sub" }, sub || "\u00a0")));
  if (accuracy) {
    const gain = 100 * (accuracy.last - accuracy.first);
    const value = h("div", { class: `value ${gain < 0 ? "fell" : gain > 0 ? "rose" : ""}` }, h("span", { class: "from" }, `${show.percent(accuracy.first)} \u2192 `),
      h("span", { class: "to" }, show.percent(accuracy.last)));
    tile("Held-out accuracy", value, `${gain < 0 ? "" : "+"}${minus(gain.toFixed(1))} points, best ${show.percent(accuracy.best)}`, "hero");
  }
  if (reward) tile("Mean reward", show.number(Number(reward.last.toFixed(3))), `from ${show.number(Number(reward.first.toFixed(3)))}`);
  if (steps) tile("Steps", steps.toLocaleString("en-US"), seconds ? `${show.seconds(seconds / steps)} each` : "");
  if (seconds !== undefined) tile("Time in steps", show.seconds(seconds), tokens !== undefined && speed ? `${Math.round(100 * tokens / speed / seconds)}% rollouts` : "");
  if (tokens !== undefined) tile("Tokens sampled", show.number(tokens), peak ? `peak ${show.bytes(peak)}` : "");
  if (speed !== undefined) tile("Rollout speed", `${show.number(Math.round(speed))}`, "tokens/s");
}

function setStepRange() {
  const edges = Object.values(data.series).flatMap((one) => [one.s[0], one.s[one.s.length - 1]]);
  if (edges.length) stepRange = [Math.min(...edges), Math.max(...edges)];
}

function overview() {
  const add = (key, name, color, options = {}) => {
    const series = data.series[key];
    if (series) $("charts").append(chart({ key, name, format: formatOf(key), series: [{ name, color, ...series }], ...options }));
  };
  if (!Object.keys(data.series).length) {
    $("charts").append(h("div", { class: "chart full card empty" }, "No step was logged yet."));
    return;
  }
  add("reward/mean", "Reward", "--c0", { height: 230 });
  add("eval/accuracy", "Held-out accuracy", "--c1", { height: 230, dots: true, low: 0, high: 1 });
  const small = { size: "third", height: 140 };
  add("policy/loss", "Policy loss", "--c2", small);
  add(data.series["policy/ref_kl"] ? "policy/ref_kl" : "policy/approx_kl", data.series["policy/ref_kl"] ? "KL to the reference" : "KL of the update", "--c3", small);
  add("policy/entropy", "Entropy", "--c5", small);
  add("policy/grad_norm", "Gradient norm", "--c4", small);
  add("throughput/rollout_tokens_per_s", "Rollout tokens/s", "--c6", { low: 0, height: 210 });
  if (data.phases.names.length) $("charts").append(phaseChart());
}

function phaseChart() {
  const { names, steps, seconds, totals } = data.phases;
  const all = totals.reduce((a, b) => a + b, 0) || 1;
  // The longest at the bottom, where lengths compare best.
  const order = names.map((_, i) => i).sort((a, b) => totals[b] - totals[a]);
  const color = (rank, i) => (names[i] === "other" ? "--c7" : `--c${rank % 7}`);
  const series = order.map((i, rank) => ({ name: names[i], color: color(rank, i), s: steps, v: seconds[i] }));
  const legend = h("div", { class: "legend" }, ...order.map((i, rank) => h("span", {},
    h("i", { style: `background:var(${color(rank, i)})` }), `${names[i]} `, h("b", {}, `${(100 * totals[i] / all).toFixed(totals[i] / all < 0.1 ? 1 : 0)}%`))));
  return chart({ key: "phases", name: "Where a step's time goes", format: show.seconds, series, stacked: true, legend, height: 182 });
}

function allMetrics() {
  const view = $("metric-view");
  const keys = Object.keys(data.series);
  if (!keys.length) { view.append(h("div", { class: "card empty" }, "No metrics yet.")); return; }
  const families = new Map();
  for (const key of keys) {
    const family = key.includes("/") ? key.slice(0, key.indexOf("/")) : "other";
    families.set(family, [...(families.get(family) || []), key]);
  }
  [...families].forEach(([family, members], rank) => {
    const grid = h("div", { class: "charts" });
    const fill = () => {
      if (grid.childElementCount) return;
      for (const key of members) {
        const dots = data.series[key].s.length < 40;
        grid.append(chart({ key: `all:${key}`, name: key, format: formatOf(key), series: [{ name: key, color: `--c${rank % 7}`, ...data.series[key] }], height: 120, dots }));
      }
      charts.forEach(fit);
    };
    // Drawn when opened: hundreds of charts would make the page slow to open.
    view.append(h("details", { class: "family card", ontoggle: fill }, h("summary", {}, family, h("span", {}, String(members.length))), grid));
  });
}

function configuration() {
  const view = $("config-view");
  const entries = data.config;
  if (!entries.length) { view.append(h("div", { class: "card empty" }, "No configuration was saved with this run.")); return; }
  const changed = entries.filter((entry) => entry.default !== undefined);
  let onlyChanged = changed.length > 0;
  const body = h("tbody");
  const count = h("span", { class: "count" });
  const search = h("input", { type: "search", placeholder: "Filter keys and values", "aria-label": "Filter keys", oninput: () => render() });
  const modes = h("div", { class: "segments", role: "group", "aria-label": "Keys shown" },
    h("button", { type: "button", onclick: () => { onlyChanged = true; render(); } }, "Changed from default"),
    h("button", { type: "button", onclick: () => { onlyChanged = false; render(); } }, "All keys"));
  function render() {
    const query = search.value.toLowerCase();
    const shown = (onlyChanged ? changed : entries).filter((entry) => `${entry.key} ${entry.value}`.toLowerCase().includes(query));
    body.replaceChildren(...shown.map(row));
    count.textContent = `${shown.length} of ${entries.length} keys`;
    modes.children[0].setAttribute("aria-pressed", String(onlyChanged));
    modes.children[1].setAttribute("aria-pressed", String(!onlyChanged));
  }
  function row(entry) {
    const cut = entry.key.lastIndexOf(".") + 1;
    return h("tr", { class: entry.default === undefined ? "" : "changed" },
      h("td", { class: "key" }, entry.key.slice(0, cut), h("b", {}, entry.key.slice(cut))),
      h("td", { class: "value" }, entry.value), h("td", { class: "default" }, entry.default === undefined ? "" : entry.default));
  }
  const heads = h("tr", {}, h("th", {}, "Key"), h("th", {}, "Value"), h("th", {}, "Default"));
  view.append(h("div", { class: "card" }, h("div", { class: "tools" }, changed.length ? modes : null, search, count),
    h("div", { class: "scroll" }, h("table", {}, h("thead", {}, heads), body))));
  render();
}

theme();
head();
tiles();
setStepRange();
overview();
charts.forEach(fit);
const browser = rolloutBrowser(data.rollouts);
$("rollout-view").append(browser.element);
onStepChosen = (step) => {
  browser.select(step);
  $("rollouts").scrollIntoView({ behavior: "smooth" });
};
allMetrics();
configuration();
document.documentElement.dataset.ready = "true";
