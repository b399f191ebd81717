"use strict";
// The rollouts browser: one recorded step at a time, its prompts with all their samples.

const GROUPS_AT_ONCE = 20;

const REWARD_FILTERS = {
  all: ["any reward", () => true],
  solved: ["reward 1 or more", (record) => record.reward !== null && record.reward >= 1],
  part: ["between 0 and 1", (record) => record.reward > 0 && record.reward < 1],
  zero: ["0 or less", (record) => record.reward !== null && record.reward <= 0],
  failed: ["failed", (record) => record.status === "failed"],
};

/** The browser's element. `select(step)` of the result shows the recorded step nearest to `step`. */
function rolloutBrowser(rollouts) {
  const byKind = { train: [], eval: [] };
  for (const file of rollouts.files) byKind[file.kind].push(file);
  if (!rollouts.files.length) {
    return { element: h("div", { class: "card empty" }, "No rollouts were recorded."), select: () => {} };
  }
  const state = { kind: byKind.train.length ? "train" : "eval", filter: "all", query: "", all: false, limit: GROUPS_AT_ONCE };
  const at = { train: byKind.train.length - 1, eval: byKind.eval.length - 1 };
  const files = () => byKind[state.kind];

  const kinds = h("div", { class: "segments", role: "group", "aria-label": "Kind" });
  for (const [kind, name] of [["train", "Training"], ["eval", "Held-out"]]) {
    if (byKind[kind].length) kinds.append(h("button", { type: "button", "data-kind": kind, onclick: () => change({ kind }) }, name));
  }
  const slider = h("input", { type: "range", min: 0, "aria-label": "Step", oninput: () => go(Number(slider.value)) });
  const back = h("button", { class: "button", type: "button", title: "Earlier step", onclick: () => go(at[state.kind] - 1) }, "\u2190");
  const next = h("button", { class: "button", type: "button", title: "Later step", onclick: () => go(at[state.kind] + 1) }, "\u2192");
  const stepName = h("span", { class: "step-name" });
  const filter = h("select", { "aria-label": "Reward", onchange: () => change({ filter: filter.value }) });
  for (const [value, [name]] of Object.entries(REWARD_FILTERS)) filter.append(h("option", { value }, name));
  const search = h("input", { type: "search", placeholder: "Search prompts and responses", "aria-label": "Search",
    oninput: () => change({ query: search.value.toLowerCase() }) });
  const everywhere = h("input", { type: "checkbox", onchange: () => change({ all: everywhere.checked }) });
  const count = h("span", { class: "count" });
  const list = h("div", { class: "groups" });
  const more = h("button", { class: "button more", type: "button", onclick: () => { state.limit += GROUPS_AT_ONCE; render(); } });
  const recorded = rollouts.files.length < rollouts.num_recorded
    ? h("span", { class: "count" }, `${rollouts.files.length} of ${rollouts.num_recorded} recorded steps are in this page`) : null;
  const element = h("div", {},
    h("div", { class: "card tools" }, byKind.train.length && byKind.eval.length ? kinds : null,
      h("div", { class: "grow" }, back, slider, next, stepName), recorded),
    h("div", { class: "card tools", style: "margin-top:8px" }, search, filter, h("label", {}, everywhere, "all steps"), count),
    list, more);

  function change(what) { Object.assign(state, what, { limit: GROUPS_AT_ONCE }); render(); }
  function go(index) {
    at[state.kind] = Math.min(Math.max(index, 0), files().length - 1);
    change({});
  }

  function render() {
    const index = at[state.kind];
    slider.max = files().length - 1;
    slider.value = index;
    slider.disabled = back.disabled = next.disabled = state.all;
    if (!state.all) { back.disabled = index === 0; next.disabled = index === files().length - 1; }
    stepName.textContent = state.all ? "all steps" : `step ${files()[index].step.toLocaleString("en-US")}`;
    for (const button of kinds.children) button.setAttribute("aria-pressed", button.dataset.kind === state.kind);
    const passes = REWARD_FILTERS[state.filter][1];
    let records = (state.all ? files() : [files()[index]]).flatMap((file) => file.records);
    const total = records.length;
    records = records.filter((record) => passes(record) && (!state.query || haystack(record).includes(state.query)));
    count.textContent = records.length === total ? `${total} rollouts` : `${records.length} of ${total} rollouts`;
    const groups = grouped(records);
    list.replaceChildren(...groups.slice(0, state.limit).map((group) => groupCard(group, state.all)));
    if (!groups.length) list.replaceChildren(h("div", { class: "card empty" }, "No rollout matches."));
    more.hidden = groups.length <= state.limit;
    more.textContent = `Show more (${groups.length - state.limit} prompts)`;
    more.style.display = more.hidden ? "none" : "";
  }

  render();
  return {
    element,
    select(step) {
      everywhere.checked = false;
      Object.assign(state, { all: false });
      go(nearest(files().map((file) => file.step), step));
    },
  };
}

/** Samples of one prompt stand together: ids are prompt/sample/branch. */
function grouped(records) {
  const groups = new Map();
  for (const record of records) {
    const key = `${record.step} ${String(record.trajectory_id).replace(/\/[^/]*\/[^/]*$/, "")}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(record);
  }
  return [...groups.values()];
}

function haystack(record) {
  if (record.searchable === undefined) {
    const texts = [record.trajectory_id, record.response, record.error, asText(record.target)];
    for (const message of record.prompt || []) texts.push(asText(message.content));
    for (const turn of record.turns || []) texts.push(turn.observation);
    record.searchable = texts.filter(Boolean).join("\n").toLowerCase();
  }
  return record.searchable;
}

function asText(value) {
  if (value === null || value === undefined) return "";
  return typeof value === "string" ? value : JSON.stringify(value);
}

function groupCard(records, withStep) {
  const first = records[0];
  const messages = first.prompt || [];
  const text = h("div", { class: "text" });
  for (const message of messages) {
    if (messages.length > 1) text.append(h("div", { class: "role" }, asText(message.role)));
    text.append(h("div", {}, asText(message.content)));
  }
  if (!messages.length) text.append(h("span", { class: "role" }, "prompt not recorded"));
  const rewards = records.map((record) => record.reward).filter((reward) => reward !== null);
  const mean = rewards.reduce((a, b) => a + b, 0) / rewards.length;
  const target = asText(first.target);
  const side = h("div", { class: "side" },
    target ? h("div", { class: "target", title: target }, "target ", h("b", {}, target)) : null,
    rewards.length ? h("div", {}, "mean reward ", h("b", {}, show.number(mean))) : null,
    withStep ? h("div", {}, `step ${first.step.toLocaleString("en-US")}`) : null);
  return h("article", { class: "group card" }, h("div", { class: "prompt" }, text, side), ...records.map(sampleRow));
}

function sampleRow(record) {
  const failed = record.status === "failed" || record.reward === null;
  const kind = failed ? "bad" : record.reward >= 1 ? "good" : record.reward > 0 ? "part" : "bad";
  const meta = [];
  if (record.advantage !== null && record.advantage !== undefined) {
    meta.push(`adv ${record.advantage > 0 ? "+" : ""}${minus(record.advantage.toFixed(2))}`);
  }
  meta.push(`${record.num_response_tokens} tok`);
  if (record.finish_reason && record.finish_reason !== "stop") meta.push(record.finish_reason);
  const row = h("div", { class: "sample" });
  const button = h("button", { type: "button", "aria-expanded": "false" },
    h("span", { class: `pill ${kind}` }, failed ? "failed" : minus(Number(record.reward.toFixed(3)).toString())),
    h("span", { class: "answer" }, firstLine(record)),
    h("span", { class: "meta" }, meta.join("  \u00b7  ")));
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    if (open) row.lastChild.remove(); else row.append(detail(record));
  });
  row.append(button);
  return row;
}

function firstLine(record) {
  const text = record.status === "failed" && record.error ? record.error : record.response || "";
  return text.trim().replace(/\s*\n\s*/g, " \u23ce ") || "(empty)";
}

function detail(record) {
  const versions = (record.versions || []).map((span) => span.version);
  const facts = h("div", { class: "row" });
  const fact = (name, value) => { if (value !== "" && value !== null && value !== undefined) facts.append(h("span", {}, `${name} `, h("b", {}, String(value)))); };
  fact("id", record.trajectory_id);
  fact("status", record.status);
  fact("finish", record.finish_reason);
  fact("policy version", [...new Set(versions)].join(", "));
  fact("environment", record.environment);
  const box = h("div", { class: "detail" }, facts);
  if (record.error) box.append(h("div", { class: "box text error" }, record.error));
  const turns = record.turns || [];
  turns.forEach((turn, i) => {
    if (turn.observation) box.append(h("div", { class: "role" }, "observation"), h("div", { class: "box seen text" }, turn.observation));
    if (turns.length > 1) box.append(h("div", { class: "role" }, `turn ${i + 1}, reward ${asText(turn.reward)}`));
    box.append(h("div", { class: "box" }, tokens(turn)));
  });
  if (turns.some((turn) => turn.logprobs)) {
    box.append(h("div", { class: "hint" }, "The stronger the colour, the less likely was the token; hover for its probability."));
  }
  return box;
}

function tokens(turn) {
  if (!turn.tokens) return h("div", { class: "text" }, turn.response || "(empty)");
  const element = h("div", { class: "tokens" });
  turn.tokens.forEach((token, i) => {
    const logprob = turn.logprobs ? turn.logprobs[i] : null;
    const known = logprob !== null && logprob !== undefined;
    const chance = known ? Math.exp(logprob) : 1;
    const id = turn.token_ids ? `token ${turn.token_ids[i]}` : "token";
    const title = known ? `${id} \u00b7 p ${(100 * chance).toFixed(1)}% \u00b7 logprob ${minus(logprob.toFixed(3))}` : id;
    element.append(h("span", { title, style: `background:rgba(var(--token),${(0.75 * (1 - Math.min(chance, 1))).toFixed(3)})` }, token));
  });
  return element;
}
