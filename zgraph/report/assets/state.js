// What is looked at, and what draws it anew.

const state = {
  programs: [], program: null, k: 0, node: null, box: null, tab: "graph", colour: "change",
  query: "", matches: new Set(), layout: null, window: null, themed: false,
};
let report = null;

function go(k) {
  const last = state.program.passes.length - 1;
  state.k = Math.min(Math.max(k, 0), last);
  search(state.query);
  draw();
}

function choose(index) {
  state.program = state.programs[index];
  $("program").value = index;
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
  if (state.tab !== "graph") return;
  const place = state.layout.placeOf.get(state.program.tree.shown(node)), panel = $("panel-graph");
  if (!place) return;
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
  toAddress();
}
