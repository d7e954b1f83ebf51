"use strict";
// The report page. One state (program, pass, node, folds) and one function for each panel that draws it.
// Names from a model are written as text (textContent, createTextNode, canvas), never as markup.

const $ = (id) => document.getElementById(id);
const seen = (window.__zgraph = { ready: false, errors: [] });
window.addEventListener("error", (event) => fail(event.message));
window.addEventListener("unhandledrejection", (event) => fail(String(event.reason)));

function fail(message) {
  seen.errors.push(message);
  $("failed").hidden = false;
  $("failed").textContent = "This page has failed: " + message;
}

// -- words ---------------------------------------------------------------------------------------------------

const UNITS = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]];

function bytes(n) {
  for (const [unit, size] of UNITS) if (Math.abs(n) >= size) return figure(n / size) + " " + unit;
  return Math.round(n) + " B";
}

function figure(x) {
  const digits = Math.abs(x) >= 100 ? 0 : Math.abs(x) >= 10 ? 1 : 2;
  return x.toFixed(digits);
}

function seconds(s) {
  const size = Math.abs(s);
  if (size >= 1) return figure(s) + " s";
  if (size >= 1e-3) return figure(s * 1e3) + " ms";
  return size === 0 ? "0 s" : figure(s * 1e6) + " µs";
}

function rate(perSecond, unit) {
  const scale = perSecond >= 1e12 ? [1e12, "T"] : perSecond >= 1e9 ? [1e9, "G"] : [1e6, "M"];
  return figure(perSecond / scale[0]) + " " + scale[1] + unit;
}

const count = (n) => n.toLocaleString("en-US");
const signed = (value, show) => (value === 0 ? "" : (value > 0 ? "+" : "−") + show(Math.abs(value)));
const percent = (x) => (100 * x).toFixed(1) + " %";
const short = (operator) => operator.replace(/^(aten|_c10d_functional|zgraph|operator)\./, "").replace(/\.default$/, "");

/** An element; properties are set as properties, `class`, `role` and what has a dash as attributes. */
function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class" || name === "role" || name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function fill(parent, ...children) {
  parent.replaceChildren(...children);
}

// -- the data ------------------------------------------------------------------------------------------------

async function unpack() {
  const packed = Uint8Array.from(atob($("data").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const SAME = 0, ADDED = 1, REMOVED = 2, MOVED = 3, ALTERED = 4;
const CHANGES = ["", "added", "removed", "moved", "altered"];
const SIGNS = ["", "+", "−", "→", "~"];

function expand(runs) {
  const found = [];
  for (const [first, num] of runs) for (let i = 0; i < num; i++) found.push(first + i);
  return found;
}

/** One of the report's programs: what it was after each pass, and the tree of modules that its nodes lie in. */
class Program {
  constructor(document, data) {
    this.tables = document.tables;
    this.rows = document.tables.rows;
    this.machine = document.machine;
    this.data = data;
    this.passes = data.passes;
    this.numNodes = this.rows.node.reduce((most, n) => Math.max(most, n), -1) + 1;
    this.stages = [];
    this.differences = [];
    this.played = [];
    this._merge();
    this.tree = new Tree(this);
  }

  /** Rows in order after pass k, and for each node its row and its place; -1 where it is not there. */
  stage(k) {
    if (!this.stages[k]) {
      const order = expand(this.passes[k].order);
      const rowOf = new Int32Array(this.numNodes).fill(-1);
      const at = new Int32Array(this.numNodes).fill(-1);
      order.forEach((row, i) => { rowOf[this.rows.node[row]] = row; at[this.rows.node[row]] = i; });
      this.stages[k] = { order, rowOf, at };
    }
    return this.stages[k];
  }

  /** What pass k did to each node, and how many it added, removed, moved and altered. */
  difference(k) {
    if (!this.differences[k]) {
      const of = new Uint8Array(this.numNodes), counts = [0, 0, 0, 0, 0];
      if (k > 0) {
        const before = this.stage(k - 1).rowOf, after = this.stage(k).rowOf;
        const moved = expand(this.passes[k].moved);
        for (const node of moved) of[node] = MOVED;
        counts[MOVED] = moved.length;
        for (let node = 0; node < this.numNodes; node++) {
          if (before[node] === after[node]) continue;
          of[node] = before[node] < 0 ? ADDED : after[node] < 0 ? REMOVED : ALTERED;
          counts[of[node]]++;
        }
      }
      this.differences[k] = { of, counts };
    }
    return this.differences[k];
  }

  /** All nodes that ever were, each behind the one it first came behind: the same for every pass. */
  _merge() {
    const next = new Map(), birth = new Int32Array(this.numNodes).fill(-1);
    this.passes.forEach((_, k) => {
      let before = -1;
      for (const row of this.stage(k).order) {
        const node = this.rows.node[row];
        if (birth[node] < 0) {
          birth[node] = row;
          next.set(node, next.get(before));
          next.set(before, node);
        }
        before = node;
      }
    });
    this.birth = birth;
    this.all = [];
    for (let node = next.get(-1); node !== undefined; node = next.get(node)) this.all.push(node);
  }

  operator(row) { return this.tables.operators[this.rows.operator[row]]; }
  form(row) { return this.tables.forms[this.rows.form[row]]; }
  module(row) { return this.tables.modules[this.rows.module[row]]; }
  source(row) { return this.tables.sources[this.rows.source[row]].at || ""; }
  phase(row) { return this.tables.phases[this.rows.phase[row]]; }
  maker(row) { return this.tables.makers[this.rows.made_by[row]]; }
  lane(row) { return this.tables.lanes[this.rows.lane[row]]; }
  cost(row, what) { return this.tables.costs[what][this.rows.cost[row]]; }
  isCall(row) { const phase = this.phase(row); return phase !== "input" && phase !== "result"; }

  arguments(row) {
    const text = this.tables.arguments[this.rows.arguments[row]], inputs = this.rows.inputs[row];
    const pieces = text.split("%");
    if (pieces.length !== inputs.length + 1) return text; // a literal has a % of its own
    return pieces.reduce((made, piece, i) => made + "%" + inputs[i - 1] + piece);
  }

  text(row) {
    const number = "%" + this.rows.node[row];
    if (this.phase(row) === "input") return `${number}: ${this.form(row)} = input ${this.arguments(row)}`;
    if (this.phase(row) === "result") return `return ${this.arguments(row)}`;
    return `${number}: ${this.form(row)} = ${this.operator(row)}(${this.arguments(row)})`;
  }

  /** The program played on the machine, by the rules of zgraph/timeline.py. */
  play(k) {
    if (this.played[k]) return this.played[k];
    const { order, rowOf } = this.stage(k), { launch_s: launch, runs_ahead: isAhead } = this.machine;
    const events = [], ends = new Map(), links = new Map(), startOf = new Map();
    let issued = 0, computed = 0, exposed = 0, starved = 0;
    for (const row of order) {
      if (!this.isCall(row)) continue;
      const node = this.rows.node[row], lane = this.lane(row);
      let start, end;
      if (this.operator(row) === this.tables.wait) {
        const source = this.rows.inputs[row][0];
        start = Math.max(computed, issued);
        starved += start - computed;
        computed = Math.max(isAhead ? start : start + this.cost(rowOf[source], "seconds"), ends.get(source));
        exposed += computed - start;
        end = computed;
        events.push({ row, lane, start, end, waitsFor: source });
      } else {
        const calls = this.cost(row, "num_calls"), took = this.cost(row, "seconds");
        if (!calls && lane === "compute") { ends.set(node, computed); startOf.set(node, computed); continue; }
        issued = (isAhead ? issued : computed) + launch * calls;
        if (!isAhead || lane === "compute") {
          starved += Math.max(issued - computed, 0);
          computed = Math.max(issued, computed);
        }
        start = computed;
        if (lane !== "compute") {
          start = Math.max(issued, computed, links.get(lane) || 0);
          links.set(lane, start + took);
        } else {
          computed += took;
        }
        end = start + took;
        events.push({ row, lane, start, end });
      }
      ends.set(node, end);
      startOf.set(node, start);
    }
    const step = Math.max(issued, computed, ...links.values());
    const byLane = new Map();
    for (const event of events) {
      if (!byLane.has(event.lane)) byLane.set(event.lane, []);
      byLane.get(event.lane).push(event);
    }
    this.played[k] = { events, byLane, step, exposed, starved, startOf, ends };
    return this.played[k];
  }
}

/** What was measured of a program, as tracks: calls one after another, and collectives until they were waited for. */
function measuredTracks(program) {
  const { position, end_s: ends } = program.data.measured, { order } = program.stage(program.passes.length - 1);
  const byLane = new Map([["compute", []]]), started = new Map();
  position.forEach((at, i) => {
    const row = order[at], lane = program.lane(row), start = i ? ends[i - 1] : 0, end = ends[i];
    if (program.operator(row) === program.tables.wait) {
      const source = program.rows.inputs[row][0], event = started.get(source);
      event.end = end;
      byLane.get("compute").push({ row, lane: "compute", start, end, waitsFor: source });
    } else if (lane === "compute") {
      byLane.get("compute").push({ row, lane, start, end });
    } else {
      if (!byLane.has(lane)) byLane.set(lane, []);
      started.set(program.rows.node[row], { row, lane, start, end });
      byLane.get(lane).push(started.get(program.rows.node[row]));
    }
  });
  return [...byLane].map(([lane, events]) => ({ name: "measured", lane, events }));
}

// -- the tree of modules -------------------------------------------------------------------------------------

const FEW = 6;
const COLUMNS = ["inputs", "forward", "backward", "update"];

/** Nodes in nested boxes, by phase and module path. Boxes that are alike but for their number are in a group. */
class Tree {
  constructor(program) {
    this.program = program;
    this.boxes = [];
    this.root = this._box("", null);
    this.homeOf = new Array(program.numNodes);
    for (const name of COLUMNS) this._child(this.root, name);
    this.many = this._many();
    for (const node of program.all) this._add(node);
    this.root.items = this.root.items.filter((column) => column.items.length);
    this._fold(this.root, new Map());
    this._number(this.root, 0);
    this._connect();
    this._open();
  }

  _box(name, parent) {
    const box = { id: this.boxes.length, name, parent, children: new Map(), items: [], open: false, depth: 0, group: 0 };
    this.boxes.push(box);
    return box;
  }

  _child(parent, name) {
    let child = parent.children.get(name);
    if (!child) {
      child = this._box(name, parent);
      parent.children.set(name, child);
      parent.items.push(child);
    }
    return child;
  }

  /** How many calls of an operator a phase has outside of all modules: of more than a few, a box is made. */
  _many() {
    const program = this.program, found = new Map();
    for (const node of program.all) {
      const row = program.birth[node], key = program.phase(row) + " " + program.operator(row);
      if (program.isCall(row) && !program.module(row)) found.set(key, (found.get(key) || 0) + 1);
    }
    return found;
  }

  _add(node) {
    const program = this.program, row = program.birth[node], phase = program.phase(row);
    let box;
    if (phase === "input") {
      const role = program.tables.arguments[program.rows.arguments[row]].split(":", 1)[0];
      box = this._child(this._child(this.root, "inputs"), role);
    } else {
      box = this._child(this.root, phase === "result" ? "update" : phase);
    }
    const path = program.module(row);
    if (!path && this.many.get(phase + " " + program.operator(row)) > FEW) box = this._child(box, short(program.operator(row)));
    if (path) for (const name of path.split(".")) box = this._child(box, name);
    box.items.push(node);
    this.homeOf[node] = box;
  }

  /**
   * Put boxes that are alike but for the number in their name into one. What was captured in them counts, so that they
   * stay together whatever passes do to them; of boxes that passes made, all of it. Returns numbers of both forms.
   */
  _fold(box, known) {
    const program = this.program, captured = [], all = [], alike = new Map();
    for (const item of box.items) {
      if (typeof item === "number") {
        const row = program.birth[item], form = program.operator(row) + " " + program.form(row);
        if (program.maker(row) === "capture") captured.push(form);
        all.push(form);
        continue;
      }
      const forms = this._fold(item, known), [, stem, number] = item.name.match(/^(.*?)(\d*)$/s);
      if (forms.captured) captured.push(stem + "#" + forms.captured);
      all.push(stem + "#" + forms.all);
      if (number && box !== this.root) {
        const key = forms.captured ? `${stem} captured ${forms.captured}` : `${stem} made ${forms.all}`;
        if (!alike.has(key)) alike.set(key, { stem, boxes: [] });
        alike.get(key).boxes.push(item);
      }
    }
    for (const { stem, boxes } of alike.values()) {
      if (boxes.length < 2) continue;
      const group = this._box(stem + ranges(boxes.map((each) => Number(each.name.slice(stem.length)))), box);
      group.group = boxes.length;
      box.items[box.items.indexOf(boxes[0])] = group;
      const inside = new Set(boxes);
      box.items = box.items.filter((item) => !inside.has(item));
      group.items = boxes;
      for (const each of boxes) each.parent = group;
    }
    const number = (forms) => {
      const form = forms.join("\n");
      if (!known.has(form)) known.set(form, known.size + 1);
      return known.get(form);
    };
    return { captured: captured.length ? number(captured) : 0, all: number(all) };
  }

  _number(box, depth) {
    box.depth = depth;
    box.size = 0;
    for (const item of box.items) {
      if (typeof item !== "number") this._number(item, depth + 1);
      box.size += typeof item === "number" ? 1 : item.size;
    }
  }

  /** For what each row reads, the box in which both ends lie, and between which of its items the edge runs. */
  _connect() {
    const { rows, numNodes } = this.program, known = new Map();
    this.edges = [];
    this.edgesOfRow = new Map();
    for (const box of this.boxes) box.edges = [];
    for (let k = 0; k < this.program.passes.length; k++) {
      for (const row of this.program.stage(k).order) {
        if (this.edgesOfRow.has(row)) continue;
        this.edgesOfRow.set(row, rows.inputs[row].map((source) => {
          let x = source, inX = this.homeOf[source], y = rows.node[row], inY = this.homeOf[y];
          while (inX.depth > inY.depth) { x = inX; inX = inX.parent; }
          while (inY.depth > inX.depth) { y = inY; inY = inY.parent; }
          while (inX !== inY) { x = inX; inX = inX.parent; y = inY; inY = inY.parent; }
          const key = this.idOf(x) * (numNodes + this.boxes.length) + this.idOf(y);
          if (!known.has(key)) {
            known.set(key, this.edges.length);
            inX.edges.push({ id: this.edges.length, from: x, to: y });
            this.edges.push(key);
          }
          return known.get(key);
        }));
      }
    }
  }

  idOf(item) { return typeof item === "number" ? item : this.program.numNodes + item.id; }

  /** Open boxes from the outside inwards while all of it can still be seen at a glance. */
  _open() {
    this.root.open = true;
    let shown = this.root.items.length;
    for (let waiting = [...this.root.items]; waiting.length; ) {
      const box = waiting.shift();
      if (typeof box === "number" || (box.depth > 1 && (box.group || shown + box.items.length > 70))) continue;
      box.open = true;
      shown += box.items.length;
      waiting.push(...box.items);
    }
  }

  foldAll() {
    for (const box of this.boxes) box.open = box.depth < 2;
  }

  reveal(node) {
    for (let box = this.homeOf[node]; box; box = box.parent) box.open = true;
  }

  /** The innermost box or node that is drawn for a node. */
  shown(node) {
    let item = node;
    for (let box = this.homeOf[node]; box; box = box.parent) if (!box.open) item = box;
    return item;
  }

  path(box) {
    const names = [];
    for (; box.parent; box = box.parent) if (!box.group) names.unshift(box.name);
    return names.join(".");
  }

  /** Nodes and seconds in each box after pass k, and what the pass did there. */
  sums(k) {
    const program = this.program, { rowOf } = program.stage(k), { of } = program.difference(k);
    const sums = this.boxes.map(() => ({ present: 0, seconds: 0, collectives: 0, changed: [0, 0, 0, 0, 0] }));
    for (const node of program.all) {
      const row = rowOf[node];
      if (row < 0 && !of[node]) continue;
      const took = row < 0 ? 0 : program.cost(row, "seconds"), travels = row >= 0 && program.lane(row) !== "compute";
      for (let box = this.homeOf[node]; box; box = box.parent) {
        const sum = sums[box.id];
        if (row >= 0) sum.present++;
        sum.seconds += took;
        if (travels) sum.collectives++;
        if (of[node]) sum.changed[of[node]]++;
      }
    }
    return sums;
  }
}

function ranges(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b), found = [];
  for (const n of sorted) {
    const last = found[found.length - 1];
    if (last && last[1] === n - 1) last[1] = n;
    else found.push([n, n]);
  }
  const shown = found.map(([a, b]) => (a === b ? String(a) : a + "–" + b));
  return shown.length > 3 ? shown.slice(0, 2).join(", ") + ", …" : shown.join(", ");
}

// -- layout of the graph -------------------------------------------------------------------------------------

const NODE_HEIGHT = 22, BOX_HEIGHT = 38, HEAD = 24, PAD = 8, GAP_X = 8, GAP_Y = 14, COLUMN_WIDTH = 330;
const measure = document.createElement("canvas").getContext("2d");

function textWidth(text) {
  measure.font = '11.5px system-ui, "DejaVu Sans", sans-serif';
  return measure.measureText(text).width;
}

/** Items of a box in layers: each below what it reads there. Linear in items and edges; what goes back is left out. */
function layers(box) {
  if (box.layers) return box.layers;
  const place = new Map(box.items.map((item, i) => [item, i]));
  const below = box.items.map(() => []), layer = new Int32Array(box.items.length);
  for (const { from, to } of box.edges) {
    const a = place.get(from), b = place.get(to);
    if (a < b) below[a].push(b);
  }
  const found = [];
  box.items.forEach((item, i) => {
    for (const b of below[i]) layer[b] = Math.max(layer[b], layer[i] + 1);
    (found[layer[i]] ||= []).push(item);
  });
  box.layers = found.filter(Boolean);
  return box.layers;
}

/** Where everything that is to be seen lies. */
class Layout {
  constructor(tree) {
    this.tree = tree;
    this.items = []; // outer boxes before what they hold
    this.edges = [];
    this.placeOf = new Map();
    let x = 12, bottom = 0;
    for (const column of tree.root.items) {
      const size = this._size(column, COLUMN_WIDTH);
      this._place(column, x, 8, size);
      x += Math.max(size.w, 120) + 34;
      bottom = Math.max(bottom, 8 + size.h);
    }
    this.width = x;
    this.height = bottom + 20;
  }

  _size(item, width) {
    if (typeof item === "number") {
      const row = this.tree.program.birth[item], program = this.tree.program;
      const input = program.phase(row) === "input";
      const name = input ? program.tables.arguments[program.rows.arguments[row]].split(":").slice(1).join(":") : short(program.operator(row));
      const label = clip(input ? name.slice(-24) : name, 24);
      return { w: Math.ceil(textWidth(label)) + 30, h: NODE_HEIGHT, label };
    }
    if (!item.open) return { w: Math.max(118, Math.ceil(textWidth(clip(item.name, 26))) + (item.group ? 66 : 26)), h: BOX_HEIGHT };
    let y = HEAD, widest = 110;
    const inside = [];
    for (const layer of layers(item)) {
      let x = PAD, height = 0;
      for (const each of layer) {
        const size = this._size(each, width - 2 * PAD);
        if (x > PAD && x + size.w > width - PAD) {
          y += height + 5;
          x = PAD;
          height = 0;
        }
        inside.push([each, x, y, size]);
        x += size.w + GAP_X;
        widest = Math.max(widest, x - GAP_X + PAD);
        height = Math.max(height, size.h);
      }
      y += height + GAP_Y;
    }
    return { w: Math.max(widest, Math.ceil(textWidth(item.name)) + 60), h: y - GAP_Y + PAD, inside };
  }

  _place(item, x, y, size) {
    const placed = { item, x, y, w: size.w, h: size.h, label: size.label };
    this.items.push(placed);
    this.placeOf.set(item, placed);
    if (!size.inside) return;
    for (const [each, dx, dy, inner] of size.inside) this._place(each, x + dx, y + dy, inner);
    for (const { id, from, to } of item.edges) {
      const a = this.placeOf.get(from), b = this.placeOf.get(to);
      if (a.y + a.h <= b.y) this.edges.push({ id, a, b });
    }
  }
}

const clip = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

// -- state ---------------------------------------------------------------------------------------------------

const state = {
  programs: [], program: null, k: 0, node: null, box: null, tab: "graph", colour: "change",
  query: "", matches: new Set(), layout: null, window: null, pointer: null,
};
let report = null;

function go(k) {
  const last = state.program.passes.length - 1;
  state.k = Math.min(Math.max(k, 0), last);
  draw();
}

function choose(index) {
  state.program = state.programs[index];
  state.layout = null;
  state.node = state.box = state.window = null;
  $("slider").max = state.program.passes.length - 1;
  state.k = state.program.passes.length - 1;
  search(state.query);
  draw();
}

function select(node, { reveal = false } = {}) {
  state.node = node;
  state.box = null;
  if (reveal) {
    state.program.tree.reveal(node);
    state.layout = null;
  }
  draw();
  if (reveal) scrollTo(node);
}

function scrollTo(node) {
  const place = state.layout.placeOf.get(state.program.tree.shown(node)), panel = $("panel-graph");
  if (!place || panel.hidden) return;
  panel.scrollTo(place.x - panel.clientWidth / 2 + place.w / 2, place.y - panel.clientHeight / 2);
}

function show(tab) {
  state.tab = tab;
  draw();
}

function draw() {
  seen.pass = state.k;
  drawPass();
  drawRail();
  drawTabs();
  if (state.tab === "graph") drawGraph();
  if (state.tab === "diff") drawDiff();
  if (state.tab === "peak") drawPeak();
  if (state.tab === "decisions") drawDecisions();
  drawInspector();
  drawTime();
}

// -- the top -------------------------------------------------------------------------------------------------

function drawTop() {
  const { plan, machine, mesh } = report, step = plan.chosen.step_s;
  const measured = report.programs.every((each) => each.measured)
    ? report.programs.reduce((sum, each) => sum + each.measured.end_s[each.measured.end_s.length - 1] * each.repeats, 0) : null;
  $("model").textContent = plan.model;
  const nodes = Math.ceil(plan.world_size / plan.devices_per_node);
  const where = nodes > 1 ? ` in ${count(nodes)} nodes of ${plan.devices_per_node}` : "";
  const options = Object.entries(plan.chosen.options).map(([name, value]) => `${name}=${value}`).join(", ");
  $("about").textContent = `${count(plan.num_params)} parameters · ${count(plan.world_size)} × ${machine.name}${where}` +
    (Object.keys(mesh.axes).length > 1 ? ` · axes ${Object.entries(mesh.axes).map(([a, n]) => `${a} ${n}`).join(", ")}` : "") +
    ` · ${options || "default options"}`;
  const chip = (text, mark = "", title = "") => make("li", { class: mark, title }, text);
  fill($("verdict"),
    chip(`${plan.fits ? "✓ fits" : "✗ does not fit"}: ${bytes(plan.chosen.reserved_bytes)} of ${bytes(plan.budget_bytes)}`,
      plan.fits ? "good" : "bad", "What is taken of a rank's memory for what is live at the peak"),
    chip(`peak ${bytes(plan.chosen.peak_bytes)}`, "", "The most that tensors hold at once"),
    chip(`step ${seconds(step)} predicted`, "", "All micro-batches together"),
    ...(measured === null ? [] : [chip(`${seconds(measured)} measured (${measured < step ? "−" : "+"}${percent(Math.abs(measured / step - 1))})`, "", "The median of the steps that were profiled")]),
    chip(`${percent(plan.chosen.exposed_s / step)} waiting for links`, "", "Share of the step in which computing waits for communication"),
    report.is_proved ? chip("✓ every pass proved", "good", "After each pass, every output is still what was captured")
      : chip("not proved", "", "The passes ran without the proof"),
    chip(`schedule ${report.digest.slice(0, 10)}`, "", `The same on all ranks; SHA-256 ${report.digest}`));
}

function drawPass() {
  const { passes } = state.program, pass = passes[state.k];
  $("slider").value = state.k;
  $("slider").setAttribute("aria-valuetext", pass.name);
  $("pass").textContent = `${state.k} / ${passes.length - 1}  ${pass.name}`;
  $("back").disabled = state.k === 0;
  $("forth").disabled = state.k === passes.length - 1;
  const { counts } = state.program.difference(state.k);
  seen.counts = { added: counts[ADDED], removed: counts[REMOVED], moved: counts[MOVED], altered: counts[ALTERED] };
  seen.num_nodes = state.program.stage(state.k).order.length;
  const chips = CHANGES.slice(1).map((name, i) => [name, SIGNS[i + 1], counts[i + 1]]).filter(([, , n]) => n)
    .map(([name, sign, n]) => make("li", { class: name, "data-change": name }, `${sign} ${count(n)} ${name}`));
  if (state.k && !chips.length) chips.push(make("li", { class: "quiet" }, "nothing changed"));
  fill($("changes"), make("li", { class: "quiet" }, `${count(seen.num_nodes)} nodes`), ...chips);
}

function drawRail() {
  const { passes } = state.program;
  if ($("passes").dataset.of !== String(state.programs.indexOf(state.program))) {
    $("passes").dataset.of = String(state.programs.indexOf(state.program));
    fill($("passes"), ...passes.map((pass, k) => {
      const before = passes[k - 1];
      const change = (name, text) => {
        const value = before ? pass[name] - before[name] : pass[name];
        const mark = !before ? "quiet" : Math.abs(value) < 1e-6 * Math.abs(pass[name]) ? "quiet" : value < 0 ? "less" : "more";
        return make("td", { class: mark, title: `${text(pass[name])} after it` },
          !before ? text(value) : mark === "quiet" ? "" : signed(value, text));
      };
      const nodes = make("div", { class: "changed" }, ...(before ? [] : [`${count(pass.num_nodes)} nodes`]));
      for (const [i, name] of [[ADDED, "num_added"], [REMOVED, "num_removed"], [MOVED, "num_moved"], [ALTERED, "num_altered"]]) {
        if (pass[name]) nodes.append(make("span", { class: CHANGES[i], title: CHANGES[i] }, `${SIGNS[i]}${count(pass[name])}`), " ");
      }
      const idle = before && !pass.num_added && !pass.num_removed && !pass.num_moved && !pass.num_altered;
      const took = pass.time_s + pass.verify_s;
      const assumes = pass.assumes.length ? `, taking on trust: ${pass.assumes.join("; ")}` : "";
      const row = make("tr", { class: idle ? "idle" : "", tabIndex: 0, "data-pass": k },
        make("td", { title: pass.about.split("\n")[0] },
          make("div", { class: "pass-name" }, pass.name, " ", make("span", { class: "less", title: `proved to have changed no meaning${assumes}` }, before && pass.proved ? "✓" : "")), nodes),
        change("peak_bytes", bytes), change("step_s", seconds), change("communicated_bytes", bytes));
      if (before) row.lastChild.append(make("div", { class: "changed", title: `${seconds(pass.time_s)}, and ${seconds(pass.verify_s)} for the proof` }, "took " + seconds(took)));
      row.addEventListener("click", () => go(k));
      row.addEventListener("keydown", (event) => { if (event.key === "Enter") go(k); });
      return row;
    }));
  }
  for (const row of $("passes").children) {
    if (Number(row.dataset.pass) === state.k) {
      row.setAttribute("aria-current", "true");
      row.scrollIntoView({ block: "nearest" });
    } else {
      row.removeAttribute("aria-current");
    }
  }
}

const TABS = { graph: "Graph", diff: "Diff", peak: "Peak", decisions: "Decisions" };

function drawTabs() {
  if (!$("tabs").children.length) {
    for (const [name, label] of Object.entries(TABS)) {
      const tab = make("button", { type: "button", role: "tab", "data-testid": "tab-" + name }, label);
      tab.addEventListener("click", () => show(name));
      $("tabs").append(tab);
    }
  }
  Object.keys(TABS).forEach((name, i) => {
    $("tabs").children[i].setAttribute("aria-selected", String(name === state.tab));
    $("panel-" + name).hidden = name !== state.tab;
  });
  for (const each of document.querySelectorAll(".for-graph")) each.hidden = state.tab !== "graph";
}

// -- the graph -----------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawGraph() {
  const { program } = state;
  if (!state.layout || state.layout.tree !== program.tree) state.layout = new Layout(program.tree);
  state.sums = program.tree.sums(state.k);
  state.busy = new Map(); // how many edges of the program as it is now run between the same two items
  for (const row of program.stage(state.k).order) {
    for (const id of program.tree.edgesOfRow.get(row)) state.busy.set(id, (state.busy.get(id) || 0) + 1);
  }
  const svg = $("graph");
  svg.setAttribute("width", state.layout.width);
  svg.setAttribute("height", state.layout.height);
  seen.num_shown = state.layout.items.length;
  drawVisible();
}

/** Only what the panel shows now: opened boxes may hold thousands of nodes. */
function drawVisible() {
  const { layout, program, busy } = state, panel = $("panel-graph"), near = 150;
  if (state.tab !== "graph" || !layout) return;
  const top = panel.scrollTop - near, bottom = panel.scrollTop + panel.clientHeight + near;
  const left = panel.scrollLeft - near, right = panel.scrollLeft + panel.clientWidth + near;
  const visible = (place) => place.y < bottom && place.y + place.h > top && place.x < right && place.x + place.w > left;
  const drawn = [], boxes = [], rest = [];
  for (const place of layout.items) {
    if (!visible(place)) continue;
    (typeof place.item !== "number" && place.item.open ? boxes : rest).push(drawItem(place));
  }
  for (const { id, a, b } of layout.edges) {
    const num = busy.get(id);
    if (!num || b.y < top || a.y + a.h > bottom) continue;
    const [x1, y1, x2, y2] = [a.x + a.w / 2, a.y + a.h, b.x + b.w / 2, b.y], half = (y1 + y2) / 2;
    drawn.push(shape("path", { class: "edge", d: `M${x1} ${y1}C${x1} ${half} ${x2} ${half} ${x2} ${y2}`, "stroke-width": Math.min(1 + Math.log2(num) / 2, 4) }));
  }
  fill($("graph"), ...boxes, ...drawn, ...rest, ...drawNeighbours());
}

function drawItem(place) {
  return typeof place.item === "number" ? drawNode(place) : drawBox(place);
}

function drawNode({ item: node, x, y, w, h, label }) {
  const { program } = state, row = program.stage(state.k).rowOf[node], change = program.difference(state.k).of[node];
  if (row < 0 && change !== REMOVED) {
    return shape("circle", { class: "dot", cx: x + w / 2, cy: y + h / 2, r: 2 });
  }
  const at = row < 0 ? program.stage(state.k - 1).rowOf[node] : row, travels = program.lane(at) !== "compute";
  const isMatch = state.matches.has(node), marks = ["item", "node"];
  if (state.colour === "change" && change) marks.push("is-" + CHANGES[change]);
  if (node === state.node) marks.push("selected");
  if (isMatch) marks.push("match");
  const group = shape("g", { class: marks.join(" "), tabindex: "0", role: "button", "data-node": node, "aria-label": program.text(at) });
  const face = travels // what travels has pointed ends, so that it is told from what computes without colour
    ? shape("path", { class: "face", d: `M${x + 8} ${y}H${x + w - 8}L${x + w} ${y + h / 2}L${x + w - 8} ${y + h}H${x + 8}L${x} ${y + h / 2}Z` })
    : shape("rect", { class: "face", x, y, width: w, height: h, rx: 5 });
  if (state.colour === "lane" && row >= 0) {
    face.setAttribute("stroke", laneColour(program.lane(at)));
    face.style.stroke = laneColour(program.lane(at));
    face.style.strokeWidth = program.cost(at, "seconds") ? "2" : "1";
    face.style.fill = travels ? laneColour(program.lane(at)) + "33" : "";
  }
  const sign = state.colour === "change" ? SIGNS[change] : "";
  group.append(face, shape("text", { class: "name " + (sign && CHANGES[change]), x: x + 18, y: y + 15 }, label));
  if (sign) group.append(shape("text", { class: CHANGES[change], x: x + 7, y: y + 15 }, sign));
  group.addEventListener("click", (event) => { event.stopPropagation(); select(node); });
  group.addEventListener("keydown", (event) => { if (event.key === "Enter") select(node); });
  group.addEventListener("mousemove", (event) => tip(event, describeNode(at)));
  group.addEventListener("mouseleave", () => tip(null));
  return group;
}

function drawBox({ item: box, x, y, w, h }) {
  const sum = state.sums[box.id], marks = ["item", box.open ? "open" : "closed"];
  const isColumn = box.depth === 1;
  if (isColumn) marks.push("column");
  if (!sum.present && !sum.changed.some(Boolean)) marks.push("absent");
  if (box === state.box) marks.push("selected");
  if (!box.open && state.query && state.matchedBoxes.has(box.id)) marks.push("match");
  const name = box.group ? `${clip(box.name, 20)}` : clip(box.name, 26);
  const label = `${state.program.tree.path(box)}${box.group ? " " + box.name : ""}: ${count(sum.present)} nodes`;
  const group = shape("g", { class: marks.join(" "), tabindex: "0", role: "button", "aria-expanded": box.open, "data-box": box.id, "data-name": box.name, "aria-label": label });
  if (box.group && !box.open) group.append(shape("rect", { x: x + 4, y: y - 4, width: w, height: h, rx: 6 }));
  group.append(shape("rect", { class: "face", x, y, width: w, height: h, rx: 6 }));
  group.append(shape("text", { class: "name", x: x + 9, y: y + 16 }, isColumn ? name : (box.open ? "▾ " : "▸ ") + name));
  if (box.group) group.append(shape("text", { class: "times", x: x + w - 12 - textWidth("×" + box.group), y: y + 16 }, "×" + box.group));
  const changed = state.colour === "change"
    ? CHANGES.map((mark, i) => [mark, SIGNS[i] + count(sum.changed[i]), sum.changed[i]]).filter(([, , n]) => n)
    : [];
  const parts = [["count", sum.present ? count(sum.present) : "none", 1], ...changed];
  if (state.colour === "lane" && sum.seconds) parts.push(["count", seconds(sum.seconds), 1], ...(sum.collectives ? [["moved", "⬡ " + count(sum.collectives), 1]] : []));
  const wide = parts.reduce((total, [, text]) => total + textWidth(text) + 8, 0);
  const inHead = box.open && wide < w - 60 - textWidth(name) - (box.group ? 50 : 0);
  let at = inHead ? x + w - wide - (box.group ? 22 + textWidth("×" + box.group) : 2) : x + 11;
  if (!box.open || inHead) {
    for (const [mark, text] of parts) {
      group.append(shape("text", { class: mark, x: at, y: box.open ? y + 16 : y + 31 }, text));
      at += textWidth(text) + 8;
    }
  }
  const toggle = () => {
    state.box = box;
    state.node = null;
    if (box.depth > 1) {
      box.open = !box.open;
      state.layout = null;
    }
    draw();
  };
  group.addEventListener("click", toggle);
  group.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(); });
  return group;
}

/** Lines from the selected node to what it reads, and to what reads it, wherever these are. */
function drawNeighbours() {
  const { program, layout } = state;
  if (state.node === null) return [];
  const { order, rowOf } = program.stage(state.k), mine = rowOf[state.node];
  if (mine < 0) return [];
  const here = layout.placeOf.get(program.tree.shown(state.node)), drawn = [];
  const line = (other, kind) => {
    const there = layout.placeOf.get(program.tree.shown(other));
    if (!there || there === here) return;
    const [x1, y1, x2, y2] = [here.x + here.w / 2, here.y + here.h / 2, there.x + there.w / 2, there.y + there.h / 2];
    drawn.push(shape("path", { class: "edge " + kind, d: `M${x1} ${y1}C${(x1 + x2) / 2} ${y1} ${(x1 + x2) / 2} ${y2} ${x2} ${y2}` }));
  };
  for (const source of new Set(program.rows.inputs[mine])) line(source, "of");
  for (const row of order) if (program.rows.inputs[row].includes(state.node)) line(program.rows.node[row], "to");
  return drawn;
}

function laneColour(lane) {
  const index = Math.min(state.program.tables.lanes.indexOf(lane), 3);
  return style("--lane" + index);
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// -- search --------------------------------------------------------------------------------------------------

/** Nodes of the program, before or after this pass, whose operator, module, source line or input has all the words. */
function search(query) {
  const { program } = state, { tables, rows } = program;
  state.query = query.trim().toLowerCase();
  state.matches = new Set();
  state.matchedBoxes = new Set();
  if (state.query) {
    const words = state.query.split(/\s+/), known = new Map();
    const texts = (row) => {
      const parts = [rows.operator[row], rows.module[row], rows.source[row], rows.phase[row], program.phase(row) === "input" ? rows.arguments[row] : -1];
      const key = parts.join();
      if (!known.has(key)) {
        const text = [program.operator(row), program.module(row), program.source(row), program.phase(row), parts[4] < 0 ? "" : tables.arguments[parts[4]]].join("\n").toLowerCase();
        known.set(key, words.every((word) => text.includes(word)));
      }
      return known.get(key) || words.join(" ") === "%" + rows.node[row];
    };
    for (const row of program.stage(state.k).order) {
      if (!texts(row)) continue;
      const node = rows.node[row];
      state.matches.add(node);
      for (let box = program.tree.homeOf[node]; box; box = box.parent) state.matchedBoxes.add(box.id);
    }
  }
  seen.num_found = state.matches.size;
  $("found").textContent = state.query ? `${count(state.matches.size)} found` : "";
}

function nextMatch(back) {
  const found = state.program.all.filter((node) => state.matches.has(node));
  if (!found.length) return;
  const at = found.indexOf(state.node), next = (at + (back ? -1 : 1) + found.length) % found.length;
  if (state.tab !== "graph") state.tab = "graph";
  select(found[at < 0 ? 0 : next], { reveal: true });
}

// -- what a pass did, as text --------------------------------------------------------------------------------

const AROUND = 3, MOST_LINES = 1500;

/** Lines of the program before and after a pass, put together: each a kind of change and a row. */
function lines(program, k) {
  const { rows } = program, { of } = program.difference(k), after = program.stage(k).order;
  if (!k) return after.map((row) => [SAME, row]);
  const before = program.stage(k - 1).order, rowNow = program.stage(k).rowOf, found = [];
  const stays = (node) => of[node] === SAME || of[node] === ALTERED;
  const moved = new Set(expand(program.passes[k].moved));
  let i = 0;
  const gone = () => {
    for (; i < before.length; i++) {
      const node = rows.node[before[i]];
      if (stays(node) && !moved.has(node)) return;
      found.push([rowNow[node] < 0 ? REMOVED : MOVED, before[i], "from"]);
    }
  };
  for (const row of after) {
    const node = rows.node[row];
    if (moved.has(node)) {
      found.push([MOVED, row, "to"]);
    } else if (of[node] === ADDED) {
      found.push([ADDED, row]);
    } else {
      gone();
      if (of[node] === ALTERED) found.push([REMOVED, before[i], "was"], [ADDED, row, "is"]);
      else found.push([SAME, row]);
      i++;
    }
  }
  gone();
  return found;
}

function drawDiff() {
  const { program, k } = state, pass = program.passes[k], all = lines(program, k), parts = [];
  parts.push(make("div", { class: "text" }, make("h2", {}, pass.name), make("pre", { class: "note" }, pass.about)));
  const keep = new Uint8Array(all.length);
  all.forEach(([kind], i) => {
    if (kind === SAME && k > 0) return;
    for (let j = Math.max(i - AROUND, 0); j <= Math.min(i + AROUND, all.length - 1); j++) keep[j] = 1;
  });
  let skipped = 0, num = 0, left = 0;
  const flush = () => {
    if (skipped) parts.push(make("div", { class: "gap" }, `${count(skipped)} lines as before`));
    skipped = 0;
  };
  all.forEach(([kind, row, how], i) => {
    if (!keep[i]) { skipped++; return; }
    if (num >= MOST_LINES) { left++; return; }
    flush();
    num++;
    parts.push(drawLine(kind, row, how));
  });
  flush();
  if (left) parts.push(make("div", { class: "gap" }, `${count(left)} more lines are in report.json`));
  if (k && !num) parts.push(make("p", { class: "text note" }, "This pass changed nothing in this program."));
  seen.num_lines = num;
  fill($("panel-diff"), ...parts);
}

function drawLine(kind, row, how) {
  const { program } = state, mark = how === "was" || how === "is" ? "altered" : CHANGES[kind];
  const sign = { from: "←", to: "→", was: "−", is: "~" }[how] || SIGNS[kind] || " ";
  const file = program.source(row).replace(/^.*\/(?=[^/]*\/[^/]*:\d+ \()/s, "…/"); // the inspector has the whole path
  const origin = program.isCall(row) ? [program.phase(row), program.module(row), file].filter(Boolean).join(" ") : "";
  const by = kind === ADDED && !how ? `  [made by ${program.maker(row)}]` : "";
  const node = program.rows.node[row];
  const line = make("div", { class: `line ${mark} ${node === state.node ? "selected" : ""}`, "data-node": node },
    make("span", { class: mark, title: how ? { from: "moved from here", to: "moved here", was: "as it was", is: "as it is now" }[how] : mark }, sign),
    make("pre", {}, program.text(row), make("span", { class: "from" }, origin ? "  # " + origin + by : by)));
  line.addEventListener("click", () => select(node));
  return line;
}

// -- what is held at the peak --------------------------------------------------------------------------------

function drawPeak() {
  const { program, k } = state, pass = program.passes[k], memory = pass.memory, kinds = Object.keys(memory.bytes);
  const total = memory.seconds.map((_, i) => kinds.reduce((sum, kind) => sum + memory.bytes[kind][i], 0));
  const peak = total.indexOf(Math.max(...total));
  const byKind = kinds.map((kind) => [kind, memory.bytes[kind][peak]]).filter(([, held]) => held).sort((a, b) => b[1] - a[1]);
  const whole = byKind.reduce((sum, [, held]) => sum + held, 0);
  const kindRows = byKind.map(([kind, held]) => make("tr", {},
    make("td", {}, swatch(kindColour(kind)), kind), make("td", {}, bytes(held)), make("td", { class: "quiet" }, percent(held / whole)),
    make("td", { class: "left quiet" }, report.would_free[kind] || "")));
  const owners = pass.owners.map((owner) => {
    const find = make("button", { type: "button", class: "link" }, owner.what);
    find.addEventListener("click", () => { $("search").value = owner.what.replace(/^[a-z_]+:/, ""); search($("search").value); nextMatch(); });
    return make("tr", {}, make("td", {}, owner.count > 1 ? `${count(owner.count)} × ` : "", find), make("td", {}, bytes(owner.num_bytes)),
      make("td", { class: "left" }, swatch(kindColour(owner.kind)), owner.kind), make("td", { class: "left" }, owner.module), make("td", { class: "left mono" }, owner.source || ""));
  });
  const at = program.stage(k).order[memory.positions[peak]];
  fill($("panel-peak"), make("div", { class: "text" },
    make("p", {}, `The most is held ${seconds(memory.seconds[peak])} into the program, at `,
      nodeLink(program.rows.node[at]), `: ${bytes(whole)} on each rank, of a budget of ${bytes(report.plan.budget_bytes)}.`),
    make("h3", {}, "What it is for, and what would make it less"),
    table(["At the peak", "Bytes", "Share", "Less of it with"], kindRows, [3]),
    make("h3", {}, "What holds most of it"),
    table(["Tensors", "Bytes", "What for", "Module", "Made at"], owners, [2, 3, 4])));
}

function table(heads, rows, left = []) {
  return make("table", { class: "listing" }, make("thead", {}, make("tr", {}, ...heads.map((head, i) => make("th", { class: left.includes(i) ? "left" : "" }, head)))), make("tbody", {}, ...rows));
}

function swatch(colour) {
  const made = make("span", { class: "swatch" });
  made.style.background = colour;
  return made;
}

const KINDS = [
  "parameter shards", "gathered parameters", "gradients", "optimizer state", "buffers and batch", "activations",
  "communication buffers", "temporaries", "scratch of libraries", "arena, not in use",
];
const kindColour = (kind) => style("--kind" + Math.max(KINDS.indexOf(kind), 0));

// -- what was decided ----------------------------------------------------------------------------------------

function drawDecisions() {
  const { plan } = report, shown = (options) => Object.entries(options).map(([name, value]) => `${name}=${typeof value === "number" && name.endsWith("bytes") ? bytes(value) : value}`).join(", ") || "the defaults";
  const row = (estimate, why, mark = "") => make("tr", { class: mark }, make("td", {}, shown(estimate.options)), make("td", {}, bytes(estimate.reserved_bytes)),
    make("td", {}, seconds(estimate.step_s)), make("td", {}, percent(estimate.exposed_s / estimate.step_s)), make("td", { class: "left" }, why));
  const over = plan.chosen.reserved_bytes - plan.budget_bytes;
  const verdict = over > 0 ? `does not fit: ${bytes(over)} too much` : `fits, with ${bytes(-over)} to spare`;
  const most = Object.entries(plan.by_kind)[0];
  const faster = Object.keys(report.programs[0].if_faster).map((name) => [name, report.programs.reduce((sum, each) => sum + each.if_faster[name] * each.repeats, 0)])
    .sort((a, b) => a[1] - b[1]);
  const parts = [
    make("p", {}, `Each rank may take ${bytes(plan.budget_bytes)} of memory. What was chosen ${verdict}.`),
    make("dl", {}, make("dt", {}, "limits the step"), make("dd", {}, faster[0][0]),
      make("dt", {}, "if twice as fast"), make("dd", {}, faster.map(([name, step]) => `${name}: ${seconds(step)} (${percent(1 - step / plan.chosen.step_s)} less)`).join(", ")),
      make("dt", {}, "most of the peak"), make("dd", {}, most ? `${most[0]}: ${bytes(most[1])}` : "nothing"),
      make("dt", {}, "in any order"), make("dd", {}, `at least ${seconds(plan.least_s)}: ${percent(1 - plan.least_s / plan.chosen.step_s)} less at most, with the same calls`)),
    make("h3", {}, "Options, and what each would take"),
    table(["Options", "Memory", "Step", "Waiting", "Why"], [row(plan.chosen, over > 0 ? "takes least memory" : plan.rejected.length ? "the fastest that fits" : "as they were given", "chosen"),
      ...plan.rejected.map((other) => row(other.estimate, other.why))], [4]),
  ];
  if (!plan.rejected.length) parts.push(make("p", { class: "note" }, "Nothing was searched: options were given, or are the defaults. memory=\"8GiB\" of zgraph.compile, and zgraph.plan, compare them."));
  if (!plan.fits) {
    parts.push(make("h3", {}, "Ways out"), plan.ways_out.length
      ? table(["Change", "Memory", "Step", "Cost of an example"], plan.ways_out.map((way) => make("tr", {}, make("td", {}, way.change), make("td", {}, bytes(way.reserved_bytes)), make("td", {}, seconds(way.step_s)), make("td", {}, "× " + way.cost.toFixed(2)))))
      : make("p", {}, "None was found."));
  }
  for (const note of [...report.notes, ...Object.entries(plan.unknown).map(([name, n]) => `${name} (${n} calls) is costed by its bytes alone`)]) parts.push(make("p", { class: "note" }, note));
  const all = Object.entries(report.options).map(([name, value]) => [make("dt", {}, name), make("dd", { class: "mono" }, JSON.stringify(value))]);
  parts.push(make("h3", {}, "All options"), make("dl", {}, ...all.flat()));
  fill($("panel-decisions"), make("div", { class: "text" }, ...parts));
}

// -- the inspector -------------------------------------------------------------------------------------------

function nodeLink(node) {
  const { program } = state, { rowOf } = program.stage(state.k), row = rowOf[node] < 0 ? program.birth[node] : rowOf[node];
  const name = program.phase(row) === "input" ? program.arguments(row) : short(program.operator(row));
  const link = make("button", { type: "button", class: "link" }, `%${node} ${clip(name, 48)}`);
  link.addEventListener("click", () => select(node, { reveal: state.tab === "graph" }));
  return link;
}

function list(nodes) {
  const made = make("div", {}, ...nodes.slice(0, 12).flatMap((node) => [nodeLink(node), make("br")]));
  if (nodes.length > 12) made.append(`and ${count(nodes.length - 12)} more`);
  return made;
}

function drawInspector() {
  const parts = state.node !== null ? inspectNode(state.node) : state.box ? inspectBox(state.box) : [
    make("h2", {}, "Inspector"), make("p", { class: "note" }, "Choose a node or a box. ← and → step through the passes, / searches, Enter goes to the next match."),
    ...report.notes.map((note) => make("p", { class: "note" }, note)),
  ];
  fill($("inspector"), ...parts);
}

function facts(...pairs) {
  return make("dl", {}, ...pairs.filter(([, value]) => value !== "" && value !== null).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function inspectNode(node) {
  const { program, k } = state, stage = program.stage(k), { rows, tables } = program;
  const isHere = stage.rowOf[node] >= 0, row = isHere ? stage.rowOf[node] : lastRow(node), parts = [];
  const took = program.cost(row, "seconds"), moved = program.cost(row, "num_bytes"), flops = program.cost(row, "flops"), received = program.cost(row, "received_bytes");
  parts.push(make("h2", { "data-testid": "inspected" }, program.phase(row) === "input" ? program.arguments(row) : program.operator(row)));
  const wasThere = program.passes.some((_, before) => before < k && program.stage(before).rowOf[node] >= 0);
  if (!isHere) parts.push(make("p", { class: "removed" }, wasThere ? "Not there any more." : "A later pass makes it."));
  const played = program.play(k), start = played.startOf.get(node);
  parts.push(facts(
    ["number", `%${node}` + (isHere ? `, line ${count(stage.at[node] + 1)} of ${count(stage.order.length)}` : "")],
    ["gives", make("code", {}, program.form(row))],
    ["phase", program.phase(row)], ["module", program.module(row)],
    ["family", program.isCall(row) ? program.cost(row, "family") : ""], ["lane", program.isCall(row) ? program.lane(row) : ""],
    ["takes", took ? `${seconds(took)}, ${percent(took / played.step)} of the step` : program.isCall(row) ? "no time of its own" : ""],
    ["runs", isHere && start !== undefined ? `from ${seconds(start)} to ${seconds(played.ends.get(node))}` : ""],
    ["moves", moved && took ? `${bytes(moved)}, ${rate(moved / took, "B/s")}` : moved ? bytes(moved) : ""],
    ["computes", flops && took ? `${rate(flops, "FLOP")}, ${rate(flops / took, "FLOP/s")}` : ""],
    ["receives", received ? bytes(received) : ""],
    ["made by", program.maker(row)], ["passes", history(node)]));
  const source = tables.sources[rows.source[row]];
  if (source.at) {
    parts.push(make("h3", {}, "Source"), make("p", { class: "mono" }, source.at));
    if (source.code.length) {
      const at = Number((source.at.match(/:(\d+) \(/) || [])[1]);
      parts.push(make("pre", { class: "code" }, ...source.code.map(([number, text]) => make("span", { class: number === at ? "here" : "" }, `${number}  ${text}${number === at ? "" : "\n"}`))));
    }
  }
  if (program.isCall(row)) parts.push(make("h3", {}, "Call"), make("pre", { class: "code" }, program.text(row)));
  const body = tables.bodies[rows.operator[row]];
  if (body) parts.push(make("h3", {}, "Kernel"), make("pre", { class: "code" }, body.replace(/; /g, ";\n")));
  const inputs = [...new Set(rows.inputs[row])], users = isHere ? stage.order.filter((each) => rows.inputs[each].includes(node)).map((each) => rows.node[each]) : [];
  if (inputs.length) parts.push(make("h3", {}, `Reads ${count(inputs.length)}`), list(inputs));
  if (users.length) parts.push(make("h3", {}, `Read by ${count(users.length)}`), list(users));
  return parts;
}

function lastRow(node) {
  for (let k = state.k; k >= 0; k--) {
    const row = state.program.stage(k).rowOf[node];
    if (row >= 0) return row;
  }
  return state.program.birth[node];
}

/** Which passes touched a node, each with what it did. */
function history(node) {
  const { program } = state, found = [];
  program.passes.forEach((pass, k) => {
    const change = program.difference(k).of[node];
    if (change) found.push(`${pass.name} (${CHANGES[change]})`);
  });
  return found.join(", ") || "untouched since capture";
}

function inspectBox(box) {
  const { program, k } = state, { tree } = program, inside = new Map(), slow = [];
  for (const row of program.stage(k).order) {
    let within = false;
    for (let each = tree.homeOf[program.rows.node[row]]; each; each = each.parent) within ||= each === box;
    if (!within) continue;
    const name = short(program.operator(row)), took = program.cost(row, "seconds");
    const sum = inside.get(name) || [0, 0];
    inside.set(name, [sum[0] + 1, sum[1] + took]);
    slow.push(row);
  }
  const sum = tree.sums(k)[box.id], step = program.play(k).step;
  slow.sort((a, b) => program.cost(b, "seconds") - program.cost(a, "seconds"));
  const byOperator = [...inside].sort((a, b) => b[1][1] - a[1][1] || b[1][0] - a[1][0]).slice(0, 12);
  return [
    make("h2", { "data-testid": "inspected" }, box.group ? `${tree.path(box)} ${box.name}` : tree.path(box) || box.name),
    facts(["alike", box.group ? `${box.group} boxes, as they were captured` : ""], ["nodes", count(sum.present)],
      ["takes", `${seconds(sum.seconds)}, ${percent(step ? sum.seconds / step : 0)} of the step`], ["collectives", sum.collectives ? count(sum.collectives) : ""],
      ["this pass", CHANGES.map((name, i) => (sum.changed[i] ? `${SIGNS[i]}${count(sum.changed[i])} ${name}` : "")).filter(Boolean).join(", ")]),
    make("h3", {}, "Operators"),
    table(["Operator", "Calls", "Seconds"], byOperator.map(([name, [num, took]]) => make("tr", {}, make("td", { class: "mono" }, clip(name, 30)), make("td", {}, count(num)), make("td", {}, took ? seconds(took) : "")))),
    make("h3", {}, "Slowest"), list(slow.filter((row) => program.cost(row, "seconds")).slice(0, 8).map((row) => program.rows.node[row])),
  ];
}

// -- time and memory -----------------------------------------------------------------------------------------

const LEFT = 92, LANE = 24, AXIS = 18;

function scale(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.style.height = height + "px";
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = '11px system-ui, "DejaVu Sans", sans-serif';
  context.textBaseline = "middle";
  return [context, width];
}

function shownTime() {
  return state.window || [0, wholeTime()];
}

function drawTime() {
  drawTimeline();
  drawMemory();
}

/** What is drawn below one another: a name, a lane, and its events in order; below what is predicted what was measured. */
function tracks() {
  const { program, k } = state, { byLane } = program.play(k);
  const predicted = program.tables.lanes.filter((lane) => byLane.has(lane)).map((lane) => ({ name: lane, lane, events: byLane.get(lane) }));
  if (!program.data.measured || k < program.passes.length - 1) return predicted;
  program.measured ||= measuredTracks(program);
  return predicted.flatMap((track) => [track, ...program.measured.filter(({ lane }) => lane === track.lane)]);
}

/** How long the time axis is. */
function wholeTime() {
  return Math.max(state.program.play(state.k).step, ...tracks().map(({ events }) => (events.length ? events[events.length - 1].end : 0))) || 1;
}

function drawTimeline() {
  const { program, k } = state, played = program.play(k), [from, to] = shownTime(), all = tracks();
  const [context, width] = scale($("timeline"), AXIS + LANE * Math.max(all.length, 1) + 4);
  const x = (second) => LEFT + ((second - from) / (to - from)) * (width - LEFT - 8);
  const faint = style("--faint"), line = style("--line"), text = style("--text"), wait = style("--wait");
  ticks(from, to, (second, label) => {
    context.fillStyle = line;
    context.fillRect(x(second), 0, 1, 400);
    context.fillStyle = faint;
    context.fillText(label, x(second) + 4, AXIS / 2);
  });
  all.forEach(({ name, lane, events }, i) => {
    const y = AXIS + i * LANE, colour = laneColour(lane);
    context.fillStyle = text;
    context.fillText(clip(name, 15), 10, y + LANE / 2);
    let drawnTo = -1;
    context.save();
    context.beginPath();
    context.rect(LEFT, 0, width - LEFT, 1000);
    context.clip();
    for (const event of events) {
      if (event.end < from || event.start > to || event.end === event.start) continue;
      const a = x(event.start), b = Math.max(x(event.end), a + 0.6), node = program.rows.node[event.row];
      if (b < drawnTo + 0.5 && node !== state.node) continue; // it would lie in a pixel that is full
      drawnTo = b;
      const isWait = event.waitsFor !== undefined, phase = program.phase(event.row);
      context.globalAlpha = isWait ? 1 : { forward: 0.75, backward: 1, update: 0.5 }[phase] || 1;
      context.fillStyle = isWait ? wait : colour;
      context.fillRect(a, y + 3, b - a - (b - a > 3 ? 1 : 0), LANE - 7);
      context.globalAlpha = 1;
      if (isWait && b - a > 4) hatch(context, a, y + 3, b - a, LANE - 7, text);
      if (node === state.node || state.matches.has(node)) {
        context.strokeStyle = node === state.node ? style("--text") : style("--removed");
        context.lineWidth = 2;
        context.strokeRect(a, y + 2, Math.max(b - a, 2), LANE - 5);
      }
      if (b - a > 50 && !isWait) {
        context.fillStyle = style("--back");
        context.fillText(clip(short(program.operator(event.row)), Math.floor((b - a) / 7)), a + 4, y + LANE / 2);
      }
    }
    context.restore();
  });
  seen.played = { step_s: played.step, exposed_s: played.exposed, starved_s: played.starved, num_events: played.events.length };
}

function hatch(context, x, y, w, h, colour) {
  context.save();
  context.beginPath();
  context.rect(x, y, w, h);
  context.clip();
  context.strokeStyle = colour;
  context.globalAlpha = 0.35;
  context.lineWidth = 1;
  context.beginPath();
  for (let d = -h; d < w; d += 6) {
    context.moveTo(x + d, y + h);
    context.lineTo(x + d + h, y);
  }
  context.stroke();
  context.restore();
}

/** Round times between two, about seven of them. */
function ticks(from, to, draw) {
  const rough = (to - from) / 7, size = 10 ** Math.floor(Math.log10(rough));
  const apart = [1, 2, 5, 10].map((n) => n * size).find((n) => n >= rough);
  for (let i = Math.ceil(from / apart); i * apart <= to; i++) draw(i * apart, seconds(Number((i * apart).toPrecision(6))));
}

function drawMemory() {
  const { program, k } = state, { memory } = program.passes[k], [from, to] = shownTime(), height = 130;
  const [context, width] = scale($("memory"), height), kinds = KINDS.filter((kind) => memory.bytes[kind]);
  const total = memory.seconds.map((_, i) => kinds.reduce((sum, kind) => sum + memory.bytes[kind][i], 0));
  const peak = Math.max(...total, 1), budget = report.plan.budget_bytes, near = budget < 1.7 * peak;
  const most = near ? Math.max(budget, peak) * 1.06 : peak * 1.08, end = program.play(k).step || 1;
  const x = (second) => LEFT + ((second - from) / (to - from)) * (width - LEFT - 8), y = (held) => height - 6 - (held / most) * (height - 16);
  context.save();
  context.beginPath();
  context.rect(LEFT, 0, width - LEFT, height);
  context.clip();
  const base = total.map(() => 0);
  for (const kind of kinds) {
    const held = memory.bytes[kind];
    context.beginPath();
    memory.seconds.forEach((second, i) => {
      const until = i + 1 < memory.seconds.length ? memory.seconds[i + 1] : end;
      context.lineTo(x(i ? second : 0), y(base[i] + held[i]));
      context.lineTo(x(until), y(base[i] + held[i]));
    });
    for (let i = memory.seconds.length - 1; i >= 0; i--) {
      const until = i + 1 < memory.seconds.length ? memory.seconds[i + 1] : end;
      context.lineTo(x(until), y(base[i]));
      context.lineTo(x(i ? memory.seconds[i] : 0), y(base[i]));
    }
    context.closePath();
    context.fillStyle = kindColour(kind);
    context.fill();
    held.forEach((each, i) => { base[i] += each; });
  }
  const at = total.indexOf(peak);
  if (at >= 0) {
    context.fillStyle = style("--text");
    const px = x(memory.seconds[at]), py = y(peak);
    context.beginPath();
    context.moveTo(px, py + 1);
    context.lineTo(px - 5, py - 7);
    context.lineTo(px + 5, py - 7);
    context.fill();
  }
  if (near) {
    context.setLineDash([6, 4]);
    context.strokeStyle = style("--bad");
    context.lineWidth = 1.5;
    context.beginPath();
    context.moveTo(LEFT, y(budget));
    context.lineTo(width, y(budget));
    context.stroke();
    context.setLineDash([]);
  }
  context.restore();
  context.fillStyle = style("--text");
  context.fillText(bytes(peak), 10, Math.max(y(peak), 10));
  context.fillStyle = style("--faint");
  context.fillText("peak", 10, Math.max(y(peak), 10) + 13);
  if (near && Math.abs(y(budget) - y(peak)) > 26) {
    context.fillStyle = style("--bad");
    context.fillText("budget", 10, Math.max(y(budget), 8));
  } else if (!near) {
    context.fillText(`budget ${bytes(budget)}`, 10, Math.max(y(peak), 10) + 30);
    context.fillText("is above", 10, Math.max(y(peak), 10) + 43);
  }
  $("whole").hidden = state.window === null;
  fill($("legend"), make("li", {}, swatch(style("--wait")), "hatched: waiting"), ...kinds.map((kind) => make("li", {}, swatch(kindColour(kind)), kind)));
}

function describeNode(row) {
  const { program } = state, took = program.cost(row, "seconds"), moved = program.cost(row, "num_bytes"), received = program.cost(row, "received_bytes");
  return [program.text(row), [program.phase(row), program.module(row)].filter(Boolean).join(" "), program.source(row),
    took ? [seconds(took), moved ? `${bytes(moved)} at ${rate(moved / took, "B/s")}` : "", received ? `receives ${bytes(received)}` : ""].filter(Boolean).join(", ") : "",
  ].filter(Boolean).map((line) => clip(line, 220)).join("\n");
}

function eventAt(event) {
  const box = $("timeline").getBoundingClientRect(), second = timeAt(event.clientX);
  const track = tracks()[Math.floor((event.clientY - box.top - AXIS) / LANE)];
  if (!track || second === null) return null;
  const lane = track.events;
  let low = 0, high = lane.length; // the last that starts no later
  while (low < high) {
    const middle = (low + high) >> 1;
    if (lane[middle].start <= second) low = middle + 1;
    else high = middle;
  }
  while (low > 1 && lane[low - 1].end === lane[low - 1].start) low--;
  const found = lane[low - 1];
  return found && found.end >= second ? found : null;
}

function timeAt(clientX) {
  const box = $("timeline").getBoundingClientRect(), [from, to] = shownTime();
  const share = (clientX - box.left - LEFT) / (box.width - LEFT - 8);
  return share < 0 || share > 1 ? null : from + share * (to - from);
}

function zoom(at, factor) {
  const whole = wholeTime(), [from, to] = shownTime();
  const wide = Math.min((to - from) * factor, whole);
  const start = Math.min(Math.max(at - ((at - from) / (to - from)) * wide, 0), whole - wide);
  state.window = wide >= whole ? null : [start, start + wide];
  drawTime();
}

function pan(by) {
  const whole = wholeTime(), [from, to] = shownTime(), start = Math.min(Math.max(from + by, 0), whole - (to - from));
  if (state.window) state.window = [start, start + to - from];
  drawTime();
}

function tip(event, text) {
  const box = $("tip");
  box.hidden = !event || !text;
  if (box.hidden) return;
  box.textContent = text;
  box.style.left = Math.min(event.clientX + 14, window.innerWidth - box.offsetWidth - 8) + "px";
  const below = event.clientY + 16;
  box.style.top = (below + box.offsetHeight > window.innerHeight ? event.clientY - box.offsetHeight - 10 : below) + "px";
}

// -- what the reader does ------------------------------------------------------------------------------------

function listen() {
  $("slider").addEventListener("input", () => go(Number($("slider").value)));
  $("back").addEventListener("click", () => go(state.k - 1));
  $("forth").addEventListener("click", () => go(state.k + 1));
  $("program").addEventListener("change", () => choose(Number($("program").value)));
  $("colour").addEventListener("change", () => { state.colour = $("colour").value; draw(); });
  $("fold-all").addEventListener("click", () => { state.program.tree.foldAll(); state.layout = null; draw(); });
  $("search").addEventListener("input", () => { search($("search").value); draw(); });
  $("search").addEventListener("keydown", (event) => { if (event.key === "Enter") nextMatch(event.shiftKey); });
  $("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  $("whole").addEventListener("click", () => { state.window = null; drawTime(); });
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const types = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target !== $("slider");
    if (types) { if (event.key === "Escape") event.target.blur(); return; }
    if (event.key === "ArrowLeft") go(state.k - 1);
    else if (event.key === "ArrowRight") go(state.k + 1);
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(Infinity);
    else if (event.key === "/") $("search").focus();
    else return;
    event.preventDefault();
  });
  let waiting = false;
  $("panel-graph").addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; drawVisible(); });
  });
  for (const canvas of [$("timeline"), $("memory")]) {
    let drag = null;
    canvas.addEventListener("wheel", (event) => {
      const at = timeAt(event.clientX);
      if (at === null) return;
      event.preventDefault();
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan((event.deltaX / canvas.clientWidth) * (shownTime()[1] - shownTime()[0]));
      else zoom(at, event.deltaY > 0 ? 1.25 : 0.8);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => { drag = event.clientX; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointerup", () => { drag = null; });
    canvas.addEventListener("pointermove", (event) => {
      if (drag !== null && event.buttons) {
        pan(((drag - event.clientX) / canvas.clientWidth) * (shownTime()[1] - shownTime()[0]));
        drag = event.clientX;
      } else {
        hover(canvas, event);
      }
    });
    canvas.addEventListener("pointerleave", () => tip(null));
    canvas.addEventListener("dblclick", () => { state.window = null; drawTime(); });
  }
  $("timeline").addEventListener("click", (event) => { const found = eventAt(event); if (found) select(state.program.rows.node[found.row]); });
  $("memory").addEventListener("click", () => show("peak"));
  window.addEventListener("resize", () => draw());
  window.addEventListener("hashchange", fromAddress);
}

function hover(canvas, event) {
  const { program, k } = state;
  if (canvas === $("timeline")) {
    const found = eventAt(event);
    if (!found) return tip(null);
    const waits = found.waitsFor !== undefined ? `\nwaits for %${found.waitsFor} ${short(program.operator(program.stage(k).rowOf[found.waitsFor]))}: ${seconds(found.end - found.start)}` : "";
    return tip(event, describeNode(found.row) + `\nfrom ${seconds(found.start)} to ${seconds(found.end)}` + waits);
  }
  const second = timeAt(event.clientX), { memory } = program.passes[k];
  if (second === null) return tip(null);
  let i = memory.seconds.findIndex((each) => each > second) - 1;
  if (i < 0) i = memory.seconds[0] > second ? 0 : memory.seconds.length - 1;
  const held = Object.entries(memory.bytes).map(([kind, each]) => [kind, each[i]]).filter(([, n]) => n).sort((a, b) => b[1] - a[1]);
  tip(event, [`${seconds(second)}: ${bytes(held.reduce((sum, [, n]) => sum + n, 0))}`, ...held.map(([kind, n]) => `${kind} ${bytes(n)}`)].join("\n"));
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  if (state.program) draw();
}

/** `#pass=3&tab=diff&theme=dark&node=12&search=mm`: a link to what is on the screen. */
function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.has("theme")) theme(asked.get("theme") === "dark" ? "dark" : "light");
  if (asked.has("program") && state.programs[Number(asked.get("program"))]) choose(Number(asked.get("program")));
  if (asked.has("colour")) $("colour").value = state.colour = asked.get("colour") === "lane" ? "lane" : "change";
  if (Object.hasOwn(TABS, asked.get("tab") || "")) state.tab = asked.get("tab");
  if (asked.has("pass")) go(Number(asked.get("pass")) || 0);
  if (asked.has("search")) { $("search").value = asked.get("search"); search(asked.get("search")); }
  const node = asked.has("node") ? Number(asked.get("node")) : NaN;
  if (state.program.tree.homeOf[node]) select(node, { reveal: true });
  else draw();
}

async function start() {
  const began = performance.now();
  report = await unpack();
  report.programs.forEach((data, i) => {
    state.programs.push(new Program(report, data));
    $("program").append(make("option", { value: i }, data.repeats > 1 ? `${data.name} (× ${count(data.repeats)})` : data.name));
  });
  $("program-label").hidden = report.programs.length < 2;
  document.documentElement.dataset.theme = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  drawTop();
  listen();
  $("program").value = report.programs.length - 1;
  choose(report.programs.length - 1);
  fromAddress();
  Object.assign(seen, {
    ready: true, num_passes: state.program.passes.length, took_ms: performance.now() - began,
    play: (k) => state.program.play(k), state, go, select, tracks,
  });
}

start().catch((error) => fail(error.stack || String(error)));
