// The verdict, the slider, and a row for each pass.

function drawTop() {
  const { plan, machine, mesh } = report, step = plan.chosen.step_s;
  const measured = report.programs.every((each) => each.measured)
    ? report.programs.reduce((sum, each) => sum + each.measured.end_s[each.measured.end_s.length - 1] * each.repeats, 0) : null;
  $("model").textContent = plan.model;
  const nodes = Math.ceil(plan.world_size / plan.devices_per_node);
  const where = nodes > 1 ? ` in ${count(nodes)} nodes of ${plan.devices_per_node}` : "";
  const options = optionsText(plan.chosen.options);
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
    chip(`${percent(plan.chosen.exposed_s / step)} waiting for ${["links", ...movers()].join(" or ")}`, "",
      `Share of the step in which computing waits for communication${movers().length ? ", or for what comes from a lower tier and goes there" : ""}`),
    report.is_proved ? chip("✓ every pass proved", "good", "After each pass, every output is still what was captured")
      : chip("not proved", "", "The passes ran without the proof"),
    chip(`schedule ${report.digest.slice(0, 10)}`, "", `The same on all ranks; SHA-256 ${report.digest}`));
}

/** What moves something to or from lower tiers in the step. */
const movers = () => ["the link to the host", "the disk"].filter((name) => report.programs.some((each) => name in each.if_faster));

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
      const rail = $("rail"), { top, bottom } = row.getBoundingClientRect(), seen = rail.getBoundingClientRect();
      rail.scrollTop += Math.min(top - seen.top, 0) || Math.max(bottom - seen.bottom, 0); // and the window stays
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
