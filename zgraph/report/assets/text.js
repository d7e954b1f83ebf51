// What a pass did, as lines of the program.

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
      found.push(rowNow[node] < 0 ? [REMOVED, before[i]] : [MOVED, before[i], "from"]);
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
  parts.push(make("div", { class: "text" }, make("h2", {}, pass.name), make("pre", { class: "about" }, pass.about.replace(/``/g, ""))));
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
