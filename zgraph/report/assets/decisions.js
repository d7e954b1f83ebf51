// What is held at the peak, and what was decided.

function drawPeak() {
  const { program, k } = state, pass = program.passes[k], { memory } = pass, { peak } = memory;
  const byKind = heldAt(memory.bytes, peak), away = ["host", "disk"].map((tier) => [tier, heldAt(memory[`on_${tier}`] || {}, peak)]).filter(([, held]) => held.length);
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
    ...away.map(([tier, held]) => make("p", {}, `Then ${held.map(([kind, held]) => `${bytes(held)} of ${kind}`).join(", ")} lie on each rank's ${tier} instead.`)),
    make("h3", {}, "What it is for, and what would make it less"),
    table(["At the peak", "Bytes", "Share", "Less of it with"], kindRows, [3]),
    make("h3", {}, "What holds most of it"),
    table(["Tensors", "Bytes", "What for", "Module", "Made at"], owners, [2, 3, 4])));
}

/** What is held of each kind at a moment, largest first. */
function heldAt(byKind, moment) {
  return Object.entries(byKind).map(([kind, held]) => [kind, held[moment]]).filter(([, held]) => held).sort((a, b) => b[1] - a[1]);
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
  const { plan } = report;
  const row = (estimate, why, mark = "") => make("tr", { class: mark }, make("td", {}, optionsText(estimate.options) || "the defaults"), make("td", {}, bytes(estimate.reserved_bytes)),
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
    table(["Options", "Memory", "Step", "Waiting", "Why"], [row(plan.chosen, over > 0 ? "takes least memory" : plan.rejected.length ? "the fastest that fits" : "given, the defaults, or the first that fit", "chosen"),
      ...plan.rejected.map((other) => row(other.estimate, other.why))], [4]),
  ];
  if (!plan.rejected.length) parts.push(make("p", { class: "note" }, "Nothing else was looked at: these options were given, are the defaults, or are the first that fit."));
  const weighed = report.programs.flatMap((each) => (each.kernels || []).map((kernel) => ({ ...kernel, count: kernel.count * each.repeats })));
  if (weighed.length) {
    parts.push(make("h3", {}, "Kernels of forward and backward"), table(["Calls", "Times", "As", "Why"], weighed.map((kernel) => make("tr", {},
      make("td", { class: "mono" }, kernel.name), make("td", {}, count(kernel.count)), make("td", { class: "left" }, kernel.is_kernel ? "one kernel" : "ATen's calls"), make("td", { class: "left" }, kernel.why))), [2, 3]));
  }
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
