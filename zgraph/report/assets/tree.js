// The tree of modules that nodes lie in, with boxes that are alike folded into one.

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
