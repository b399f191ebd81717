"use strict";
// Curves as inline SVG. All charts share one range of steps, so one cursor runs through all of them.

const SVG = "http://www.w3.org/2000/svg";

/** An element; `on...` properties are listeners, strings among the children become text nodes. */
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  set(element, properties);
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function s(tag, properties = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  set(element, properties);
  element.append(...children);
  return element;
}

function set(element, properties) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
}

const minus = (text) => text.replace("-", "\u2212");
const show = {
  percent: (v) => minus(`${(100 * v).toFixed(1)}%`),
  seconds: (v) => {
    if (v < 10) return `${v.toFixed(v < 0.1 ? 3 : 2)} s`;
    const whole = Math.round(v);
    if (whole < 60) return `${v.toFixed(1)} s`;
    const pad = (n) => String(n).padStart(2, "0");
    if (whole < 3600) return `${Math.floor(whole / 60)}:${pad(whole % 60)} min`;
    return `${Math.floor(whole / 3600)}:${pad(Math.floor(whole / 60) % 60)}:${pad(whole % 60)} h`;
  },
  bytes: (v) => (v < 2 ** 30 ? `${Math.round(v / 2 ** 20)} MiB` : `${(v / 2 ** 30).toFixed(2)} GiB`),
  number: (v) => {
    const size = Math.abs(v);
    if (size >= 1e9) return minus(`${(v / 1e9).toFixed(2)}B`);
    if (size >= 1e6) return minus(`${(v / 1e6).toFixed(size < 1e7 ? 2 : 1)}M`);
    if (size >= 1000) return minus(Math.round(v).toLocaleString("en-US"));
    if (Number.isInteger(v)) return minus(String(v));
    return minus(size >= 0.001 ? String(Number(v.toPrecision(4))) : v.toExponential(2));
  },
};

/** How a metric's values are written, by the suffix of its name. */
function formatOf(key) {
  if (/(_frac|accuracy)$/.test(key)) return show.percent;
  if (/_per_s$/.test(key)) return show.number;
  if (/_s$/.test(key)) return show.seconds;
  if (/_bytes$/.test(key)) return show.bytes;
  return show.number;
}

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 2.5, 5, 10].map((m) => m * power).find((u) => u >= rough * 0.999);
  // One mark alone gives no scale.
  if (Math.floor(high / unit + 1e-9) - Math.ceil(low / unit - 1e-9) < 1 && count < 12) return ticks(low, high, count + 1);
  const found = [];
  for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + unit * 1e-6; i++) found.push(Number((i * unit).toPrecision(12)));
  return found;
}

/** Tick labels that tell neighbours apart and share their decimals. */
function tickLabels(values, format) {
  if (format === show.percent) return values.map((v) => `${Number((100 * v).toFixed(1))}%`);
  if (format === show.bytes) return values.map(show.bytes);
  const decimals = Math.max(...values.map((v) => (String(v).split(".")[1] || "").length), 0);
  const suffix = format === show.seconds ? " s" : "";
  const largest = Math.max(...values.map(Math.abs));
  if (largest >= 1e6) return values.map((v) => minus(`${Number((v / 1e6).toFixed(2))}M`));
  if (largest >= 10000) return values.map((v) => minus(`${Number((v / 1e3).toFixed(1))}k`));
  if (largest < 0.001 && largest > 0) return values.map((v) => (v === 0 ? "0" : minus(v.toExponential(0))));
  return values.map((v) => minus(v.toFixed(decimals)) + suffix);
}

/** Index of the step nearest to `step` in the rising list. */
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
}

/** Centred running mean over about a twentieth of the values. */
function smooth(values) {
  const reach = Math.floor(values.length / 40);
  return values.map((_, i) => {
    const around = values.slice(Math.max(0, i - reach), i + reach + 1);
    return around.reduce((a, b) => a + b, 0) / around.length;
  });
}

const charts = [];
let stepRange = [0, 1];
let onStepChosen = () => {};

/**
 * A card with a chart. spec: name, series [{name, color, s, v, lo?, hi?}], format, height, size ("third", "full", ""),
 * low and high (fixed bounds), stacked, dots (each value was measured on its own: no smoothing), legend.
 */
function chart(spec) {
  const svg = s("svg", { role: "img", "aria-label": `${spec.name} by step` });
  const tip = h("div", { class: "tip" });
  const last = spec.series[0] && spec.series[0].v[spec.series[0].v.length - 1];
  const now = spec.stacked || last === undefined ? "" : spec.format(last);
  const card = h("div", { class: `chart card ${spec.size || ""}`, "data-chart": spec.key || spec.name },
    h("div", { class: "head" }, h("span", { class: "name", title: spec.name }, spec.name), h("span", { class: "now" }, now)),
    spec.legend || null, svg, tip);
  const self = { spec, svg, tip, card, width: 0 };
  charts.push(self);
  new ResizeObserver(() => fit(self)).observe(card);
  return card;
}

/** Draw the chart if its width has changed. */
function fit(self) {
  const width = Math.round(self.svg.getBoundingClientRect().width);
  if (width > 0 && width !== self.width) {
    self.width = width;
    draw(self);
  }
}

function draw(self) {
  const { spec, svg, width } = self;
  const height = spec.height || 190;
  const format = spec.format;
  const [low, high] = bounds(spec);
  const marks = ticks(low, high, height < 150 ? 3 : 4);
  const labels = tickLabels(marks, format);
  const left = Math.max(...labels.map((label) => label.length), 2) * 6.6 + 10;
  const box = { left, right: width - 8, top: 10, bottom: height - 22 };
  const [first, lastStep] = stepRange;
  const x = (step) => box.left + ((step - first) / Math.max(lastStep - first, 1)) * (box.right - box.left);
  const y = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  marks.forEach((value, i) => {
    svg.append(s("line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }));
    svg.append(s("text", { x: box.left - 8, y: y(value) + 4, "text-anchor": "end" }, labels[i]));
  });
  svg.append(s("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  const stepMarks = [...new Set(ticks(first, lastStep, Math.max(Math.floor(width / 90), 3)).filter(Number.isInteger))];
  const edge = (step) => (x(step) > box.right - 14 ? "end" : "middle");
  for (const step of stepMarks) {
    svg.append(s("text", { x: x(step), y: height - 6, "text-anchor": edge(step) }, step.toLocaleString("en-US")));
  }
  if (spec.stacked) drawStack(svg, spec, x, y, box); else for (const series of spec.series) drawLine(svg, series, spec, x, y);
  const cursor = s("line", { class: "cursor", y1: box.top, y2: box.bottom });
  const dots = spec.stacked ? [] : spec.series.map((series) => s("circle", { r: 3.5, fill: `var(${series.color})`, visibility: "hidden" }));
  const hit = s("rect", { class: "hit", x: box.left, y: box.top, width: Math.max(box.right - box.left, 0), height: box.bottom - box.top });
  svg.append(cursor, ...dots, hit);
  Object.assign(self, { x, y, cursor, dots, box });
  const stepAt = (event) => {
    const place = (event.clientX - svg.getBoundingClientRect().left - box.left) / Math.max(box.right - box.left, 1);
    return first + Math.min(Math.max(place, 0), 1) * (lastStep - first);
  };
  hit.addEventListener("pointermove", (event) => pointAt(stepAt(event), self));
  hit.addEventListener("pointerleave", () => pointAt(null, self));
  hit.addEventListener("click", (event) => onStepChosen(stepAt(event)));
}

function bounds(spec) {
  let low = Infinity, high = -Infinity;
  if (spec.stacked) {
    low = 0;
    const count = spec.series.length ? spec.series[0].v.length : 0;
    for (let i = 0; i < count; i++) high = Math.max(high, spec.series.reduce((sum, series) => sum + series.v[i], 0));
  } else {
    for (const series of spec.series) {
      for (const v of series.lo || series.v) low = Math.min(low, v);
      for (const v of series.hi || series.v) high = Math.max(high, v);
    }
  }
  if (!Number.isFinite(low) || !Number.isFinite(high)) return [0, 1];
  if (spec.low !== undefined) low = Math.min(spec.low, low);
  if (spec.high !== undefined) high = Math.max(spec.high, high);
  if (high - low < 1e-12 * Math.max(Math.abs(low), Math.abs(high), 1e-300)) {
    const room = Math.abs(high) * 0.1 || 1;
    return [low - room, high + room];
  }
  const room = 0.05 * (high - low);
  // A value that can't be negative is not given room below zero.
  const floor = spec.low !== undefined ? low : low >= 0 && low - room < 0 ? 0 : low - room;
  return [floor, spec.high !== undefined ? high : high + room];
}

const path = (points) => points.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");

function drawLine(svg, series, spec, x, y) {
  const color = `var(${series.color})`;
  const points = series.s.map((step, i) => [x(step), y(series.v[i])]);
  if (series.lo) {
    const upper = series.s.map((step, i) => [x(step), y(series.hi[i])]);
    const lower = series.s.map((step, i) => [x(step), y(series.lo[i])]).reverse();
    svg.append(s("path", { d: `${path([...upper, ...lower])}Z`, fill: color, opacity: 0.14 }));
  }
  const smoothed = !spec.dots && points.length >= 40;
  const line = { fill: "none", stroke: color, "stroke-linejoin": "round", "stroke-linecap": "round" };
  svg.append(s("path", { ...line, d: path(points), "stroke-width": smoothed ? 1 : 2, opacity: smoothed ? 0.38 : 1 }));
  if (smoothed) {
    const means = smooth(series.v);
    svg.append(s("path", { ...line, d: path(series.s.map((step, i) => [x(step), y(means[i])])), "stroke-width": 2 }));
  }
  if (points.length === 1 || (spec.dots && points.length <= 60)) {
    for (const [px, py] of points) svg.append(s("circle", { cx: px, cy: py, r: 3, fill: color }));
  }
}

function drawStack(svg, spec, x, y, box) {
  const count = spec.series.length ? spec.series[0].v.length : 0;
  const base = new Array(count).fill(0);
  const bars = count <= 120;
  for (const series of spec.series) {
    const top = base.map((value, i) => value + series.v[i]);
    const fill = `var(${series.color})`;
    if (bars) {
      const each = (box.right - box.left) / Math.max(count, 1);
      const wide = Math.max(Math.min(each * 0.66, 26), 1);
      for (let i = 0; i < count; i++) {
        if (series.v[i] <= 0) continue;
        // Kept within the axes: the first and the last bar would stick out by half.
        const from = Math.min(Math.max(x(series.s[i]) - wide / 2, box.left), box.right - wide);
        svg.append(s("rect", { x: from.toFixed(1), y: y(top[i]).toFixed(1), width: wide.toFixed(1), height: Math.max(y(base[i]) - y(top[i]), 0).toFixed(2), fill }));
      }
    } else {
      const upper = series.s.map((step, i) => [x(step), y(top[i])]);
      const lower = series.s.map((step, i) => [x(step), y(base[i])]).reverse();
      svg.append(s("path", { d: `${path([...upper, ...lower])}Z`, fill, opacity: 0.9 }));
    }
    top.forEach((value, i) => { base[i] = value; });
  }
}

/** Put the cursor of every chart at `step` (null: nowhere); `owner` shows the values. */
function pointAt(step, owner) {
  for (const self of charts) {
    if (!self.x) continue;
    const series = self.spec.series;
    if (step === null || !series.length || !series[0].s.length) {
      self.cursor.style.visibility = "hidden";
      self.tip.style.visibility = "hidden";
      self.dots.forEach((dot) => dot.setAttribute("visibility", "hidden"));
      continue;
    }
    const at = series.map((one) => nearest(one.s, step));
    const shown = series[0].s[at[0]];
    const px = self.x(shown);
    self.cursor.setAttribute("x1", px);
    self.cursor.setAttribute("x2", px);
    self.cursor.style.visibility = "visible";
    self.dots.forEach((dot, i) => {
      dot.setAttribute("cx", self.x(series[i].s[at[i]]));
      dot.setAttribute("cy", self.y(series[i].v[at[i]]));
      dot.setAttribute("visibility", "visible");
    });
    if (self !== owner) { self.tip.style.visibility = "hidden"; continue; }
    fillTip(self, series, at, shown);
    const room = self.card.clientWidth;
    const wide = self.tip.offsetWidth;
    self.tip.style.left = `${Math.min(Math.max(px + 30, 6), Math.max(room - wide - 6, 6))}px`;
    if (px + 30 + wide > room - 6) self.tip.style.left = `${Math.max(px - wide, 6)}px`;
    self.tip.style.top = `${self.svg.getBoundingClientRect().top - self.card.getBoundingClientRect().top + 8}px`;
    self.tip.style.visibility = "visible";
  }
}

function fillTip(self, series, at, step) {
  const line = (one, i) => h("div", {}, h("i", { style: `background:var(${one.color})` }), one.name, h("b", {}, self.spec.format(one.v[at[i]])));
  const lines = series.map(line);
  if (self.spec.stacked) {
    const total = series.reduce((sum, one, i) => sum + one.v[at[i]], 0);
    lines.push(h("div", {}, "total", h("b", {}, self.spec.format(total))));
  } else if (series.length === 1 && series[0].lo) {
    const { lo, hi } = series[0];
    lines.push(h("div", { class: "step" }, "range", h("b", {}, `${self.spec.format(lo[at[0]])} to ${self.spec.format(hi[at[0]])}`)));
  }
  self.tip.replaceChildren(h("div", { class: "step" }, `step ${step.toLocaleString("en-US")}`), ...lines);
}
