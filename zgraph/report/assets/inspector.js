// All that is known of a node, or of a box.

const PLACEMENTS = { replicated: "replicated: the same on all ranks", sharded: "sharded: a part on each rank", "per rank": "each rank's own" };

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
    ["gives", make("code", {}, program.form(row))], ["lies", placementOf(node)],
    ["phase", program.phase(row)], ["module", program.module(row)],
    ["family", program.isCall(row) ? program.cost(row, "family") : ""], ["lane", program.isCall(row) ? program.lane(row) : ""],
    ["takes", took ? `${seconds(took)}, ${percent(took / played.step)} of the step` : program.isCall(row) ? "no time of its own" : ""],
    ["runs", isHere && start !== undefined ? `from ${seconds(start)} to ${seconds(played.ends.get(node))}` : ""],
    ["moves", moved && took ? `${bytes(moved)}, ${rate(moved / took, "B/s")}` : moved ? bytes(moved) : ""],
    ["computes", flops && took ? `${rate(flops, "FLOP")}, ${rate(flops / took, "FLOP/s")}` : ""],
    ["receives", received ? bytes(received) : ""],
    ["made by", program.maker(row)], ["passes", touchedBy(node)]));
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
  const text = tables.texts[tables.text_of[rows.operator[row]]];
  if (text) parts.push(make("h3", {}, "As it is compiled"), make("pre", { class: "code generated" }, text));
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

/** Where a node's value lies, in words. */
function placementOf(node) {
  const words = state.program.placement(state.k).get(node) || "", isAlone = report.mesh.size === 1;
  const lies = words.split(", ").filter((word) => word && !(isAlone && !word.startsWith("on ")));
  return lies.map((word) => PLACEMENTS[word] || word).join(", ");
}

/** Which passes touched a node, each with what it did. */
function touchedBy(node) {
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
