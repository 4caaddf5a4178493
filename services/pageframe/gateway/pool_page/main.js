// The pool page: takes frames in as they come, draws once for each picture of the screen.

import { Feed } from "./feed.js";
import { Grid } from "./grid.js";
import { Pool } from "./model.js";
import { Replicas } from "./replicas.js";
import { Timeline } from "./charts.js";
import { Tip, age } from "./tip.js";

const PANEL_INTERVAL_MS = 400;
const NUM_HOLDERS = 12;
const KEY = "pageframe-api-key";
// Okabe and Ito's palette without black; the same for tenants, in the order of their coming.
const OWN_COLOURS = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442"];
const GOLDEN_ANGLE = 137.508;

const $ = (id) => document.getElementById(id);
// Asking the style sheet makes the browser lay the page out, so each colour is asked for once.
const asked = new Map();
function colour(name) {
  if (!asked.has(name)) {
    asked.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  }
  return asked.get(name);
}
const figure = (number) => number.toLocaleString("en");

const pool = new Pool();
const tenantColours = new Map();
let kindColours = [];
let mode = "state";
let chosen = 0;

function colourOfTenant(tenant) {
  if (!tenant) return colours.quiet;
  if (!tenantColours.has(tenant)) {
    const number = tenantColours.size;
    tenantColours.set(tenant, OWN_COLOURS[number] ?? `hsl(${number * GOLDEN_ANGLE} 60% 55%)`);
  }
  return tenantColours.get(tenant);
}

function colourOfSequence(sequence) {
  if (!sequence) return colours.quiet;
  return `hsl(${(sequence * GOLDEN_ANGLE) % 360} ${sequence % 2 ? 62 : 48}% ${sequence % 3 ? 52 : 64}%)`;
}

function colourOf(id) {
  const kind = pool.columns.kind[id];
  const holder = pool.columns.holder[id];
  if (mode === "state") return kindColours[kind];
  // Colours stand for holders now: what waits for somebody to find it has none.
  if (holder < 0) return pool.kinds[kind] === "cached" ? colours.idle : kindColours[kind];
  return mode === "tenant" ? colourOfTenant(pool.tenantOf(holder)) : colourOfSequence(holder);
}

const colours = {};
const grid = new Grid($("cells"), colourOf);
const feed = new Feed(
  { frame, state: showState, ask }, () => sessionStorage.getItem(KEY) ?? "", () => replicas.query,
);
const replicas = new Replicas($("replica"), $("replicas"), () => feed.headers(), turn);
const tip = new Tip(pool, feed, $("tip"), $("told"));
const timeline = new Timeline($("charts"), colour);

function readColours() {
  colours.quiet = colour("--quiet");
  colours.idle = colour("--idle");
  kindColours = pool.kinds.map((kind) => colour(`--${kind}`));
  grid.ground = colour("--panel");
  grid.flash = colour("--flash");
  grid.outline = colour("--mark");
  grid.change(null);
}

function layOut() {
  const width = $("grid").clientWidth;
  grid.layOut(pool.numBlocks, width, Math.max(320, Math.min(innerHeight * 0.62, 720)));
}

let hasNews = false;
function frame(frame) {
  const changed = pool.take(frame);
  if (frame.whole) {
    readColours();
    layOut();
  }
  grid.change(frame.whole ? null : changed);
  // A name is no change of a block, but of its colour.
  if (mode !== "state" && frame.names?.length) grid.change(null);
  hasNews = true;
  showState(pool.away ? "away" : "live", pool.away || "live");
}

function showState(word, sentence) {
  $("state").dataset.state = word;
  $("state").textContent = sentence;
}

/** Another replica was chosen: nothing of the one before may be taken for its. */
function turn() {
  tell(-1);
  grid.moveCursor(-1);
  pool.forget();
  layOut();
  showState("wait", "connecting");
  if (pool.kinds.length) showPanels(1);
  feed.turn();
}

function ask(why) {
  $("ask-why").textContent = why;
  if (!$("ask").open) $("ask").showModal();
}

function cell(text, name) {
  const element = document.createElement("td");
  if (name) element.className = name;
  if (text instanceof Node) element.append(text);
  else element.textContent = element.title = text;
  return element;
}

function swatch(value) {
  const element = document.createElement("span");
  element.className = "swatch";
  element.style.background = value;
  return element;
}

function row(...cells) {
  const element = document.createElement("tr");
  element.append(...cells);
  return element;
}

function showPanels(elapsedMs) {
  const { kinds, sequences } = pool.tally();
  if (chosen) grid.mark(pool.blocksOf(chosen));
  showFigures(kinds, sequences, elapsedMs);
  showLegend(kinds);
  showHolders(sequences);
  showTenants(sequences);
  showWaits();
  timeline.show(pool.steps);
  const numSequences = pool.steps.at(-1)?.[3];
  $("step-told").textContent = numSequences ? `${figure(numSequences)} sequences in the newest` : "";
}

let operationBefore = 0;
function showFigures(kinds, sequences, elapsedMs) {
  const numFree = kinds[pool.kinds.indexOf("free")];
  const numCached = kinds[pool.kinds.indexOf("cached")];
  const share = 1 - (numFree + numCached) / Math.max(1, pool.numBlocks);
  $("num-blocks").textContent = figure(pool.numBlocks);
  $("block-size").textContent = pool.blockSize ? ` of ${pool.blockSize} tokens` : "";
  $("in-use").textContent = `${(100 * share).toFixed(0)} %`;
  $("num-sequences").textContent = figure(sequences.size - sequences.has(0));
  $("step").textContent = figure(pool.step);
  const isFirst = !operationBefore || pool.operation < operationBefore;
  const rate = isFirst ? 0 : (pool.operation - operationBefore) / (elapsedMs / 1000);
  $("rate").textContent = `${figure(Math.round(rate))}/s`;
  operationBefore = pool.operation;
}

function showLegend(kinds) {
  const order = ["held", "shared", "pinned", "cached", "fenced", "quarantined", "free"];
  const bars = [], entries = [];
  for (const name of order) {
    const number = kinds[pool.kinds.indexOf(name)];
    const bar = document.createElement("i");
    bar.style.width = `${(100 * number) / Math.max(1, pool.numBlocks)}%`;
    bar.style.background = colour(`--${name}`);
    bars.push(bar);
    const entry = document.createElement("li");
    entry.append(swatch(colour(`--${name}`)), `${name} ${figure(number)}`);
    entries.push(entry);
  }
  $("share").replaceChildren(...bars);
  $("legend").replaceChildren(...entries);
}

function showHolders(sequences) {
  const largest = [...sequences.values()].sort((one, other) => other.blocks - one.blocks);
  const rows = largest.slice(0, NUM_HOLDERS).map(({ sequence, blocks, shared }) => {
    const name = pool.names.get(sequence);
    const others = pool.isOperator ? "no sequence" : "another tenant";
    const element = row(
      cell(swatch(mode === "tenant" ? colourOfTenant(name?.tenant) : colourOfSequence(sequence))),
      cell(sequence ? name?.request || `sequence ${sequence}` : others, "name"),
      cell(name?.tenant ?? "", "name"), cell(figure(blocks), "number"),
      cell(figure(shared), "number"),
      cell(name?.since ? age(Date.now() - name.since) : "", "number"),
    );
    element.dataset.sequence = sequence;
    return element;
  });
  $("holder-rows").replaceChildren(...rows);
  const numMore = largest.length - NUM_HOLDERS;
  $("holders-more").textContent =
    numMore > 0 ? `and ${figure(numMore)} more` : largest.length ? "" : "nobody";
}

function showTenants(sequences) {
  const held = new Map(pool.tenants.map(([tenant]) => [tenant, 0]));
  for (const { sequence, blocks } of sequences.values()) {
    const tenant = pool.tenantOf(sequence);
    if (tenant) held.set(tenant, (held.get(tenant) ?? 0) + blocks);
  }
  const quotas = new Map(pool.tenants.map(([tenant, ...bounds]) => [tenant, bounds]));
  $("tenant-rows").replaceChildren(...[...held].map(([tenant, blocks]) => {
    const [floor, ceiling] = quotas.get(tenant) ?? [0, null];
    return row(
      cell(swatch(colourOfTenant(tenant))), cell(tenant, "name"), cell(figure(blocks), "number"),
      cell(figure(floor), "number"), cell(ceiling === null ? "none" : figure(ceiling), "number"),
    );
  }));
}

function showWaits() {
  const waits = pool.waits();
  const note = document.createElement("p");
  note.className = "quiet all";
  note.textContent = pool.isOperator ? "nothing has ended" : "shown to operators";
  if (!waits.length) {
    $("stall-rows").replaceChildren(note);
    return;
  }
  const total = waits.reduce((sum, [, ms]) => sum + ms, 0);
  $("stall-rows").replaceChildren(...waits.flatMap(([cause, ms]) => {
    const [name, meter, value] = [0, 0, 0].map(() => document.createElement("div"));
    name.textContent = cause.replaceAll("_", " ");
    meter.className = "meter";
    const bar = document.createElement("i");
    bar.style.width = `${(100 * ms) / waits.reduce((most, it) => Math.max(most, it[1]), 0)}%`;
    bar.style.background = colour(cause === "computing" ? "--held" : "--fenced");
    meter.append(bar);
    value.textContent = `${(ms / 1000).toFixed(2)} s, ${((100 * ms) / total).toFixed(0)} %`;
    return [name, meter, value];
  }));
}

function choose(sequence) {
  chosen = sequence;
  grid.mark(sequence ? pool.blocksOf(sequence) : []);
}

function tell(id, x, y) {
  if (id < 0) {
    tip.hide();
    choose(0);
    return;
  }
  const holder = Math.max(0, pool.columns.holder[id]);
  if (holder !== chosen) choose(holder);
  tip.show(id, x, y);
}

function listen() {
  const canvas = $("cells");
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    tell(grid.blockAt(event.clientX - box.left, event.clientY - box.top), event.clientX, event.clientY);
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", () => tell(-1));
  canvas.addEventListener("blur", () => { grid.moveCursor(-1); tell(-1); });
  canvas.addEventListener("keydown", (event) => {
    const moves = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -grid.numColumns, ArrowDown: grid.numColumns,
    };
    if (event.key === "Escape") { grid.moveCursor(-1); tell(-1); return; }
    if (!(event.key in moves) || !pool.numBlocks) return;
    event.preventDefault();
    const wanted = grid.cursor < 0 ? 0 : grid.cursor + moves[event.key];
    if (wanted < 0 || wanted >= pool.numBlocks) return;
    grid.moveCursor(wanted);
    const box = canvas.getBoundingClientRect();
    const [x, y] = grid.placeOf(wanted);
    tell(wanted, box.left + x + grid.size, box.top + y + grid.size);
  });
  $("modes").addEventListener("change", (event) => {
    mode = event.target.value;
    grid.change(null);
  });
  const rowOf = (event) => event.target.closest("tr[data-sequence]");
  $("holder-rows").addEventListener("pointerover", (event) => {
    choose(Number(rowOf(event)?.dataset.sequence ?? 0));
  });
  $("holder-rows").addEventListener("pointerleave", () => choose(0));
  $("ask").addEventListener("close", () => {
    sessionStorage.setItem(KEY, $("key").value.trim());
    feed.look();
    replicas.ask();
  });
  new ResizeObserver(layOut).observe($("grid"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    asked.clear();
    readColours();
    timeline.build();
  });
}

let shownAt = 0;
function draw(now) {
  grid.draw(now);
  if (hasNews && pool.numBlocks && now - shownAt >= PANEL_INTERVAL_MS) {
    hasNews = false;
    showPanels(now - shownAt);
    shownAt = now;
  }
  requestAnimationFrame(draw);
}

readColours();
listen();
requestAnimationFrame(draw);
feed.look();
// For the console, and for tests.
globalThis.pageframe = { pool, grid, feed, tip, replicas };
