// The report's data: programs after each pass, what each pass did, and when calls run.

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
    this.passes.forEach((pass, k) => { pass.memory ||= this.passes[k - 1].memory; }); // told once where it stayed
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
      const order = this._order(k);
      const rowOf = new Int32Array(this.numNodes).fill(-1);
      const at = new Int32Array(this.numNodes).fill(-1);
      order.forEach((row, i) => { rowOf[this.rows.node[row]] = row; at[this.rows.node[row]] = i; });
      this.stages[k] = { order, rowOf, at };
    }
    return this.stages[k];
  }

  /** Rows in order, of which those that were there before are told by their place in that order, and others behind these. */
  _order(k) {
    const told = expand(this.passes[k].order);
    if (k === 0) return told;
    const { order: before } = this.stage(k - 1);
    return told.map((number) => (number < before.length ? before[number] : number - before.length));
  }

  /** How each node lies after pass k: on all ranks alike, divided, or each rank's own; nothing of one rank. */
  placement(k) {
    const found = new Map();
    for (const { placed } of this.passes.slice(0, k + 1)) {
      for (const [words, runs] of Object.entries(placed || {})) for (const node of expand(runs)) found.set(node, words);
    }
    return found;
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
    const eventOf = new Map(), lastOn = new Map(); // and what each event starts behind: `after`; nothing where the host is behind
    let issued = 0, computed = 0, exposed = 0, starved = 0, last = null;
    for (const row of order) {
      if (!this.isCall(row)) continue;
      const node = this.rows.node[row], lane = this.lane(row);
      let start, end;
      if (this.operator(row) === this.tables.wait) {
        const source = this.rows.inputs[row][0];
        start = Math.max(computed, issued);
        starved += start - computed;
        const isApart = this.lane(rowOf[source]) in (this.tables.transfer_lanes || {});
        const isBusy = !isAhead && !isApart; // cores move what travels between ranks
        const before = start === computed ? last : null, alone = isBusy ? start + this.cost(rowOf[source], "seconds") : start;
        computed = Math.max(alone, ends.get(source));
        exposed += computed - start;
        end = computed;
        events.push({ row, lane, start, end, waitsFor: source, after: ends.get(source) > alone ? eventOf.get(source) : before });
        last = events[events.length - 1];
      } else {
        const calls = this.cost(row, "num_calls"), took = this.cost(row, "seconds");
        if (!calls && lane === "compute") { ends.set(node, computed); startOf.set(node, computed); continue; }
        const done = computed; // where the host does not run ahead, its part comes behind what was computed
        issued = (isAhead ? issued : computed) + launch * calls;
        if (!isAhead || lane === "compute") {
          starved += Math.max(issued - computed, 0);
          computed = Math.max(issued, computed);
        }
        start = computed;
        if (lane !== "compute") start = Math.max(issued, computed, links.get(lane) || 0);
        end = start + took;
        const isBehind = !isAhead || start === done, isQueued = lane !== "compute" && start === links.get(lane);
        events.push({ row, lane, start, end, after: isQueued ? lastOn.get(lane) : isBehind ? last : null });
        eventOf.set(node, events[events.length - 1]);
        if (lane !== "compute") {
          links.set(lane, end);
          lastOn.set(lane, eventOf.get(node));
        } else {
          computed = end;
          last = eventOf.get(node);
        }
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
    const critical = new Set();
    for (let event = events.findLast(({ end }) => end === step); event; event = event.after) critical.add(event);
    this.played[k] = { events, byLane, step, exposed, starved, startOf, ends, critical };
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
      byLane.get("compute").push({ row, lane: "compute", start, end, waitsFor: source, isMeasured: true });
    } else if (lane === "compute") {
      byLane.get("compute").push({ row, lane, start, end, isMeasured: true });
    } else {
      if (!byLane.has(lane)) byLane.set(lane, []);
      started.set(program.rows.node[row], { row, lane, start, end, isMeasured: true });
      byLane.get(lane).push(started.get(program.rows.node[row]));
    }
  });
  return [...byLane].map(([lane, events]) => ({ name: "measured", lane, events }));
}
