// Where boxes and nodes lie: in layers, in time linear in what is to be seen, and the same for every pass.

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
