// What the reader does, and the beginning.

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
    let drag = null, dragged = 0; // from where, and how far: letting go behind it is no click
    canvas.addEventListener("wheel", (event) => {
      const at = timeAt(event.clientX);
      if (at === null) return;
      event.preventDefault();
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan((event.deltaX / canvas.clientWidth) * (shownTime()[1] - shownTime()[0]));
      else zoom(at, event.deltaY > 0 ? 1.25 : 0.8);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => { drag = event.clientX; dragged = 0; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointerup", () => { drag = null; });
    canvas.addEventListener("pointermove", (event) => {
      if (drag !== null && event.buttons) {
        pan(((drag - event.clientX) / canvas.clientWidth) * (shownTime()[1] - shownTime()[0]));
        dragged += Math.abs(drag - event.clientX);
        drag = event.clientX;
      } else {
        hover(canvas, event);
      }
    });
    canvas.addEventListener("pointerleave", () => tip(null));
    canvas.addEventListener("dblclick", () => { state.window = null; drawTime(); });
    canvas.addEventListener("click", (event) => {
      if (dragged > 3) return;
      if (canvas === $("memory")) return show("peak");
      const found = eventAt(event);
      if (found) select(state.program.rows.node[found.row]);
    });
  }
  window.addEventListener("resize", () => draw());
  window.addEventListener("hashchange", fromAddress);
}

function hover(canvas, event) {
  const { program, k } = state;
  if (canvas === $("timeline")) {
    const found = eventAt(event);
    if (!found) return tip(null);
    const waits = found.waitsFor !== undefined ? `\nwaits for %${found.waitsFor} ${short(program.operator(program.stage(k).rowOf[found.waitsFor]))}: ${seconds(found.end - found.start)}` : "";
    const text = describeNode(found.row, found.isMeasured && found.waitsFor === undefined ? found.end - found.start : null);
    return tip(event, text + `\nfrom ${seconds(found.start)} to ${seconds(found.end)}` + waits + (program.play(k).critical.has(found) ? "\non the critical path" : ""));
  }
  const second = timeAt(event.clientX), { memory } = program.passes[k];
  if (second === null) return tip(null);
  let i = memory.seconds.findIndex((each) => each > second) - 1;
  if (i < 0) i = memory.seconds[0] > second ? 0 : memory.seconds.length - 1;
  let below = event.clientY - canvas.getBoundingClientRect().top;
  const all = tiers(), tier = all.find(({ height }) => (below -= height) <= 0) || all[all.length - 1], held = heldAt(tier.bytes, i);
  tip(event, [`${seconds(second)}: ${bytes(held.reduce((sum, [, n]) => sum + n, 0))}${tier === all[0] ? "" : ` ${tier.name}`}`, ...held.map(([kind, n]) => `${kind} ${bytes(n)}`)].join("\n"));
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  state.themed = true;
  if (state.program) draw();
}

let writing = null;

/** Write what is on the screen into the address, as `fromAddress` reads it; soon, since browsers allow few in a second. */
function toAddress() {
  clearTimeout(writing);
  writing = setTimeout(() => {
    const { programs, program } = state, now = new URLSearchParams();
    if (program !== programs[programs.length - 1]) now.set("program", programs.indexOf(program));
    if (state.k < program.passes.length - 1) now.set("pass", state.k);
    if (state.tab !== "graph") now.set("tab", state.tab);
    if (state.colour !== "change") now.set("colour", state.colour);
    if (state.node !== null) now.set("node", state.node);
    if (state.query) now.set("search", $("search").value.trim());
    if (state.themed) now.set("theme", document.documentElement.dataset.theme);
    history.replaceState(null, "", "#" + now);
  }, 150);
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
  choose(report.programs.length - 1);
  fromAddress();
  Object.assign(seen, {
    ready: true, num_passes: state.program.passes.length, took_ms: performance.now() - began,
    play: (k) => state.program.play(k), state, go, select, tracks,
  });
}

start().catch((error) => fail(error.stack || String(error)));
