// The graph of what is to be seen, and the search in it.

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

/** Nodes of the program after this pass whose operator, module, source line or input has all the words. */
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
