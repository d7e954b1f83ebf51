// Lanes and memory, on one axis of time.

const LEFT = 92, LANE = 24, AXIS = 18;

function scale(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.style.height = height + "px";
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = '11px system-ui, "DejaVu Sans", sans-serif';
  context.textBaseline = "middle";
  return [context, width];
}

function shownTime() {
  return state.window || [0, wholeTime()];
}

function drawTime() {
  drawTimeline();
  drawMemory();
}

/** What is drawn below one another: a name, a lane, and its events in order; below what is predicted what was measured. */
function tracks() {
  const { program, k } = state, { byLane } = program.play(k);
  const predicted = program.tables.lanes.filter((lane) => byLane.has(lane)).map((lane) => ({ name: lane, lane, events: byLane.get(lane) }));
  if (!program.data.measured || k < program.passes.length - 1) return predicted;
  program.measured ||= measuredTracks(program);
  return predicted.flatMap((track) => [track, ...program.measured.filter(({ lane }) => lane === track.lane)]);
}

/** How long the time axis is. */
function wholeTime() {
  return Math.max(state.program.play(state.k).step, ...tracks().map(({ events }) => (events.length ? events[events.length - 1].end : 0))) || 1;
}

function drawTimeline() {
  const { program, k } = state, played = program.play(k), [from, to] = shownTime(), all = tracks();
  const [context, width] = scale($("timeline"), AXIS + LANE * Math.max(all.length, 1) + 4);
  const x = (second) => LEFT + ((second - from) / (to - from)) * (width - LEFT - 8);
  const faint = style("--faint"), line = style("--line"), text = style("--text"), wait = style("--wait");
  ticks(from, to, (second, label) => {
    context.fillStyle = line;
    context.fillRect(x(second), 0, 1, 400);
    context.fillStyle = faint;
    context.fillText(label, x(second) + 4, AXIS / 2);
  });
  all.forEach(({ name, lane, events }, i) => {
    const y = AXIS + i * LANE, colour = laneColour(lane);
    context.fillStyle = text;
    context.fillText(clip(name, 15), 10, y + LANE / 2);
    let drawnTo = -1;
    context.save();
    context.beginPath();
    context.rect(LEFT, 0, width - LEFT, 1000);
    context.clip();
    for (const event of events) {
      if (event.end < from || event.start > to || event.end === event.start) continue;
      const a = x(event.start), b = Math.max(x(event.end), a + 0.6), node = program.rows.node[event.row];
      if (b < drawnTo + 0.5 && node !== state.node) continue; // it would lie in a pixel that is full
      drawnTo = b;
      const isWait = event.waitsFor !== undefined, phase = program.phase(event.row);
      context.globalAlpha = isWait ? 1 : { forward: 0.75, backward: 1, update: 0.5 }[phase] || 1;
      context.fillStyle = isWait ? wait : colour;
      context.fillRect(a, y + 3, b - a - (b - a > 3 ? 1 : 0), LANE - 7);
      context.globalAlpha = 1;
      if (played.critical.has(event)) {
        context.fillStyle = text;
        context.fillRect(a, y + LANE - 4, b - a, 2);
      }
      if (isWait && b - a > 4) hatch(context, a, y + 3, b - a, LANE - 7, text);
      if (node === state.node || state.matches.has(node)) {
        context.strokeStyle = node === state.node ? style("--text") : style("--removed");
        context.lineWidth = 2;
        context.strokeRect(a, y + 2, Math.max(b - a, 2), LANE - 5);
      }
      if (b - a > 50 && !isWait) {
        context.fillStyle = style("--back");
        context.fillText(clip(short(program.operator(event.row)), Math.floor((b - a) / 7)), a + 4, y + LANE / 2);
      }
    }
    context.restore();
  });
  seen.played = { step_s: played.step, exposed_s: played.exposed, starved_s: played.starved, num_events: played.events.length };
}

function hatch(context, x, y, w, h, colour) {
  context.save();
  context.beginPath();
  context.rect(x, y, w, h);
  context.clip();
  context.strokeStyle = colour;
  context.globalAlpha = 0.35;
  context.lineWidth = 1;
  context.beginPath();
  for (let d = -h; d < w; d += 6) {
    context.moveTo(x + d, y + h);
    context.lineTo(x + d + h, y);
  }
  context.stroke();
  context.restore();
}

/** Round times between two, about seven of them. */
function ticks(from, to, draw) {
  const rough = (to - from) / 7, size = 10 ** Math.floor(Math.log10(rough));
  const apart = [1, 2, 5, 10].map((n) => n * size).find((n) => n >= rough);
  for (let i = Math.ceil(from / apart); i * apart <= to; i++) draw(i * apart, seconds(Number((i * apart).toPrecision(6))));
}

const STACK = 130, LOWER_STACK = 64;

/** The tiers that hold something: what of each kind is held there over time, below which line, and how high it is drawn. */
function tiers() {
  const { memory } = state.program.passes[state.k], found = [{ bytes: memory.bytes, height: STACK, budget: report.plan.budget_bytes, at: memory.peak, name: "peak" }];
  for (const tier of ["host", "disk"]) {
    const held = memory[`on_${tier}`] || {};
    if (Object.keys(held).length) found.push({ bytes: held, height: LOWER_STACK, budget: null, at: null, name: `on ${tier}` });
  }
  return found.map((tier) => {
    const kinds = KINDS.filter((kind) => tier.bytes[kind]);
    return { ...tier, kinds, total: memory.seconds.map((_, i) => kinds.reduce((sum, kind) => sum + tier.bytes[kind][i], 0)) };
  });
}

function drawMemory() {
  const all = tiers(), [context, width] = scale($("memory"), all.reduce((sum, { height }) => sum + height, 0));
  let top = 0;
  for (const tier of all) {
    context.save();
    context.translate(0, top);
    drawTier(context, width, tier);
    context.restore();
    top += tier.height;
  }
  $("whole").hidden = state.window === null;
  const shown = KINDS.filter((kind) => all.some(({ kinds }) => kinds.includes(kind)));
  fill($("legend"), make("li", {}, swatch(style("--wait")), "hatched: waiting"), make("li", {}, "underlined: critical path"), ...shown.map((kind) => make("li", {}, swatch(kindColour(kind)), kind)));
}

/** What a tier holds, stacked by kind, with its most and its budget. */
function drawTier(context, width, { bytes: held, kinds, total, height, budget, at, name }) {
  const { program, k } = state, { seconds: moments } = program.passes[k].memory, [from, to] = shownTime();
  const peak = Math.max(...total, 1), near = budget !== null && budget < 1.7 * peak;
  const most = near ? Math.max(budget, peak) * 1.06 : peak * 1.08, end = program.play(k).step || 1;
  const x = (second) => LEFT + ((second - from) / (to - from)) * (width - LEFT - 8), y = (num) => height - 6 - (num / most) * (height - 16);
  context.save();
  context.beginPath();
  context.rect(LEFT, 0, width - LEFT, height);
  context.clip();
  const base = total.map(() => 0), until = (i) => (i + 1 < moments.length ? moments[i + 1] : end);
  for (const kind of kinds) {
    context.beginPath();
    moments.forEach((second, i) => {
      context.lineTo(x(i ? second : 0), y(base[i] + held[kind][i]));
      context.lineTo(x(until(i)), y(base[i] + held[kind][i]));
    });
    for (let i = moments.length - 1; i >= 0; i--) {
      context.lineTo(x(until(i)), y(base[i]));
      context.lineTo(x(i ? moments[i] : 0), y(base[i]));
    }
    context.closePath();
    context.fillStyle = kindColour(kind);
    context.fill();
    held[kind].forEach((each, i) => { base[i] += each; });
  }
  if (at !== null && total.length) {
    context.fillStyle = style("--text");
    const px = x(moments[at]), py = y(peak);
    context.beginPath();
    context.moveTo(px, py + 1);
    context.lineTo(px - 5, py - 7);
    context.lineTo(px + 5, py - 7);
    context.fill();
  }
  if (near) {
    context.setLineDash([6, 4]);
    context.strokeStyle = style("--bad");
    context.lineWidth = 1.5;
    context.beginPath();
    context.moveTo(LEFT, y(budget));
    context.lineTo(width, y(budget));
    context.stroke();
    context.setLineDash([]);
  }
  context.restore();
  const label = Math.max(y(peak), 10);
  context.fillStyle = style("--text");
  context.fillText(bytes(peak), 10, label);
  context.fillStyle = style("--faint");
  context.fillText(name, 10, label + 13);
  if (near && Math.abs(y(budget) - y(peak)) > 26) {
    context.fillStyle = style("--bad");
    context.fillText("budget", 10, Math.max(y(budget), 8));
  } else if (budget !== null && !near) {
    ["budget of", bytes(budget), "is above"].forEach((line, i) => context.fillText(line, 10, label + 30 + 13 * i));
  }
}

/** What a node is and takes; with `measured`, seconds that were, beside those that were predicted. */
function describeNode(row, measured = null) {
  const { program } = state, predicted = program.cost(row, "seconds"), moved = program.cost(row, "num_bytes"), received = program.cost(row, "received_bytes");
  const took = measured === null ? predicted : measured;
  return [program.text(row), [program.phase(row), program.module(row)].filter(Boolean).join(" "), program.source(row),
    took ? [
      measured === null ? seconds(took) : `measured ${seconds(took)}` + (predicted ? ` (predicted ${seconds(predicted)})` : ""),
      moved ? `${bytes(moved)} at ${rate(moved / took, "B/s")}` : "", received ? `receives ${bytes(received)}` : "",
    ].filter(Boolean).join(", ") : "",
  ].filter(Boolean).map((line) => clip(line, 220)).join("\n");
}

function eventAt(event) {
  const box = $("timeline").getBoundingClientRect(), second = timeAt(event.clientX);
  const track = tracks()[Math.floor((event.clientY - box.top - AXIS) / LANE)];
  if (!track || second === null) return null;
  const lane = track.events;
  let low = 0, high = lane.length; // the last that starts no later
  while (low < high) {
    const middle = (low + high) >> 1;
    if (lane[middle].start <= second) low = middle + 1;
    else high = middle;
  }
  while (low > 1 && lane[low - 1].end === lane[low - 1].start) low--;
  const found = lane[low - 1];
  return found && found.end >= second ? found : null;
}

function timeAt(clientX) {
  const box = $("timeline").getBoundingClientRect(), [from, to] = shownTime();
  const share = (clientX - box.left - LEFT) / (box.width - LEFT - 8);
  return share < 0 || share > 1 ? null : from + share * (to - from);
}

function zoom(at, factor) {
  const whole = wholeTime(), [from, to] = shownTime();
  const wide = Math.min((to - from) * factor, whole);
  const start = Math.min(Math.max(at - ((at - from) / (to - from)) * wide, 0), whole - wide);
  state.window = wide >= whole ? null : [start, start + wide];
  drawTime();
}

function pan(by) {
  const whole = wholeTime(), [from, to] = shownTime(), start = Math.min(Math.max(from + by, 0), whole - (to - from));
  if (state.window) state.window = [start, start + to - from];
  drawTime();
}

function tip(event, text) {
  const box = $("tip");
  box.hidden = !event || !text;
  if (box.hidden) return;
  box.textContent = text;
  box.style.left = Math.min(event.clientX + 14, window.innerWidth - box.offsetWidth - 8) + "px";
  const below = event.clientY + 16;
  box.style.top = (below + box.offsetHeight > window.innerHeight ? event.clientY - box.offsetHeight - 10 : below) + "px";
}
