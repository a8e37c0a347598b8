"use strict";
// Draws DATA (html.py and view.py say what it holds). The address's fragment holds the state: #step=2, #edit=3, #search=Cast, #whole.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const closed = { before: new Set(), after: new Set() };     // groups that are drawn as one box
let zoom = 1, picked = null, query = "", whole = false, at = 0, sides = null;
const NEAR = 2, MANY = 260, MOST = 900;   // steps around a change; how many nodes are drawn without being asked to; how many changed ones

const element = (name, attributes = {}, text = null) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
};
const html = (name, className = "", text = null) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== null) made.textContent = text;
  return made;
};
const short = (text, most = 34) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

// The strongest of a node's edits colours it.
const ORDER = ["replaced", "inserted", "removed", "changed", "same"];

// One side of a step as it is drawn: nodes and groups with the tones that this step's edits give them.
function sideOf(step, which) {
  const graph = data.graphs[step[which]], marks = step.marks[which === "before" ? 0 : 1];
  const strongest = (tones) => ORDER.find((tone) => tones.includes(tone)) || "same";
  const nodes = graph.nodes.map(([text, group, port], index) => {
    const [lines, details] = data.texts[text], edits = marks[index] || [];
    const tone = port && !edits.length ? "port" : strongest(edits.map((edit) => step.edits[edit].tone));
    return { id: `n${index}`, group: group < 0 ? "" : `g${group}`, lines, details, port, edits, tone,
      text: [...lines, ...details.filter((line) => !/^input \d+ from /.test(line))].join(" ") };
  });
  const groups = graph.groups.map((group, index) => ({
    id: `g${index}`, count: group.count, size: group.size,
    tone: strongest(nodes.filter((node) => node.group === `g${index}`).map((node) => node.tone)),
  }));
  const edges = [];
  for (let k = 0; k < graph.edges.length; k += 2) edges.push([`n${graph.edges[k]}`, `n${graph.edges[k + 1]}`]);
  // Of a pass both graphs are on the way from the source to the artifact.
  const title = data.steps.length === 1 || at === 0 ? data.titles[which === "before" ? 0 : 1]
    : which === "after" ? `after ${step.name}` : at === 1 ? data.titles[0] : `after ${data.steps[at - 1].name}`;
  return { title, total: graph.total, nodes, groups, edges };
}

// Shows a step: its changes and costs, and its graphs; layers without a change are closed, unless those beside them have one.
function show(number) {
  at = number;
  const step = data.steps[at];
  sides = { before: sideOf(step, "before"), after: sideOf(step, "after") };
  closed.before.clear();
  closed.after.clear();
  const [before, after] = [sides.before.groups, sides.after.groups];
  for (let k = 0; k < Math.max(before.length, after.length); k++) {
    if ([before[k], after[k]].some((group) => group && group.tone !== "same")) continue;
    if (before[k]) closed.before.add(before[k].id);
    if (after[k]) closed.after.add(after[k].id);
  }
  const list = document.querySelector("#edits ol");
  list.replaceChildren();
  step.edits.forEach((edit, index) => {
    const item = html("li", edit.tone);
    if (edit.count > 1) item.append(html("span", "count", `×${edit.count}`));
    item.append(html("span", "", edit.what));
    if (edit.where) item.append(html("small", "", edit.where));
    item.onclick = () => { picked = picked === index ? null : index; reveal(); remember(); draw(); };
    list.append(item);
  });
  if (!step.edits.length) list.append(html("li", "same", "Nothing changed."));
  const costs = document.querySelector("#cost table");
  costs.replaceChildren(...step.cost.map((row) => rowOf(row, false)));
  byId("step").value = at;
  byId("back").disabled = at === 0;
  byId("next").disabled = at === data.steps.length - 1;
  document.body.dataset.step = step.name;
  const box = document.querySelector("#pass div"), outcome = step.outcome;
  byId("pass").hidden = !outcome;
  box.replaceChildren();
  if (outcome) {
    document.querySelector("#pass h2").textContent = `Pass ${at}: ${step.name}`;
    for (const refusal of outcome.refusals) box.append(html("div", "refusal", refusal));
    box.append(html("p", "", `nodes ${outcome.nodes}${outcome.counts ? ` · rewritten ${outcome.counts}` : ""}`));
    for (const note of outcome.notes) box.append(html("small", "", note));
  }
}

function go(number) {
  if (number < 0 || number >= data.steps.length) return;
  picked = null;
  show(number);
  reveal();
  remember();
  draw();
}

// What is the same for all steps.
function fillSides() {
  byId("title").textContent = data.titles.join(" → ");
  byId("summary").textContent = data.summary;
  byId("summary").className = data.bad ? "bad" : "";
  document.title = data.kind;
  byId("steps").hidden = data.steps.length === 1;
  data.steps.forEach((step, index) => {
    const changes = step.edits.reduce((sum, edit) => sum + edit.count, 0);
    const option = html("option", "", `${index ? `${index}. ` : ""}${step.name}${index ? (changes ? ` (${changes})` : " –") : ""}`);
    option.value = index;
    if (step.outcome && step.outcome.refusals.length) option.className = "bad";
    byId("step").append(option);
  });
  for (const [cells, bad] of data.numbers.rows) document.querySelector("#numbers table").append(rowOf(cells, bad));
  document.querySelector("#numbers p").textContent = data.numbers.note;
  byId("numbers").hidden = !data.numbers.rows.length;
  byId("rules").hidden = !data.rules.length;
  for (const rule of data.rules) document.querySelector("#rules ul").append(html("li", rule.ok ? "" : "bad", `${rule.ok ? "✓" : "✗"} ${rule.text}`));
  byId("report").hidden = !data.report;
  if (!data.report) return;
  const box = document.querySelector("#report div");
  for (const refusal of data.report.refusals) {
    const item = html("div", "refusal");
    item.append(html("b", "", `refused at ${refusal.where}: `), html("span", "", refusal.reason));
    if (refusal.nearest) item.append(html("small", "", `nearest: ${refusal.nearest}`));
    box.append(item);
  }
  for (const line of data.report.lines) box.append(html("small", "", line));
}

function rowOf(cells, bad) {
  const row = html("tr", bad ? "bad" : "");
  cells.forEach((cell) => row.append(html("td", "", cell)));
  return row;
}

const matches = (node) => query && node.text.toLowerCase().includes(query);
const concerned = (node) => picked !== null && node.edits.includes(picked);

// The nodes to draw: all, or what lies near a change, a hit, or the picked edit.
function visible(side, shut) {
  const nodes = side.nodes.filter((node) => !shut.has(node.group));
  if (whole || (side.nodes.length <= MANY)) return new Set(nodes.map((node) => node.id));
  let seen = new Set(nodes.filter((node) => node.tone !== "same" && node.tone !== "port" || matches(node) || concerned(node)).map((node) => node.id));
  for (let step = 0; step < NEAR; step++) {
    const next = new Set(seen);
    for (const [from, to] of side.edges) { if (seen.has(from)) next.add(to); if (seen.has(to)) next.add(from); }
    if (next.size > MANY) break;   // what everything reads brings everything
    seen = next;
  }
  if (!seen.size || seen.size > MOST) seen = new Set([...(seen.size ? seen : nodes.map((node) => node.id))].slice(0, seen.size ? MOST : MANY));
  return seen;
}

function drawSide(name) {
  const side = sides[name], shut = closed[name], shown = visible(side, shut);
  const graph = new dagre.graphlib.Graph({ compound: true, multigraph: false });
  graph.setGraph({ rankdir: "TB", nodesep: 18, ranksep: 26, marginx: 16, marginy: 16 });
  graph.setDefaultEdgeLabel(() => ({}));
  const place = new Map();
  for (const group of side.groups) {
    if (shut.has(group.id)) graph.setNode(group.id, size({ lines: [`${group.count} × layer`, `${group.size} nodes`] }));
    else if (side.nodes.some((node) => node.group === group.id && shown.has(node.id))) graph.setNode(group.id, {});
  }
  for (const node of side.nodes) {
    if (shut.has(node.group)) place.set(node.id, node.group);
    else if (shown.has(node.id)) {
      graph.setNode(node.id, size(node));
      if (node.group) graph.setParent(node.id, node.group);
      place.set(node.id, node.id);
    }
  }
  for (const [from, to] of side.edges) {
    const a = place.get(from), b = place.get(to);
    if (a && b && a !== b) graph.setEdge(a, b);
  }
  dagre.layout(graph);
  const { width = 0, height = 0 } = graph.graph();
  const canvas = document.querySelector(`#${name} .canvas`);
  // As wide as the pane, within reason; the buttons scale from there.
  const scale = zoom * Math.min(1, Math.max(0.62, (canvas.clientWidth - 20) / (width || 1)));
  const svg = element("svg", { width: width * scale, height: height * scale, viewBox: `0 0 ${width} ${height}` });
  const defs = element("defs"), marker = element("marker", { id: `tip-${name}`, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" });
  marker.append(element("path", { d: "M0,0 L8,4 L0,8 z" }));
  defs.append(marker);
  svg.append(defs);
  for (const group of side.groups) {
    const box = graph.node(group.id);
    if (!box || box.x === undefined) continue;
    const layer = element("g", { class: shut.has(group.id) ? "node fold " + group.tone : "group" });
    layer.append(element("rect", { x: box.x - box.width / 2, y: box.y - box.height / 2, width: box.width, height: box.height, rx: 8 }));
    if (shut.has(group.id)) write(layer, box, [`${group.count} × layer`, `${group.size} nodes, click to open`]);
    else layer.append(element("text", { x: box.x - box.width / 2 + 10, y: box.y - box.height / 2 + 15 }, `×${group.count}  ▾`));
    (shut.has(group.id) ? layer : layer.lastChild).addEventListener("click", () => {
      if (!shut.delete(group.id)) shut.add(group.id);
      draw();
    });
    svg.append(layer);
  }
  for (const edge of graph.edges()) {
    const points = graph.edge(edge).points;
    svg.append(element("path", { d: curve(points), "marker-end": `url(#tip-${name})`, "data-from": edge.v, "data-to": edge.w }));
  }
  const active = picked !== null || query;
  let first = null;
  for (const node of side.nodes) {
    const box = place.get(node.id) === node.id ? graph.node(node.id) : null;
    if (!box) continue;
    const hit = concerned(node) || matches(node);
    const drawn = element("g", { class: `node ${node.tone}${active ? (hit ? " hit" : " dimmed") : ""}`, "data-node": node.id });
    drawn.append(element("rect", { x: box.x - box.width / 2, y: box.y - box.height / 2, width: box.width, height: box.height, rx: node.port ? 12 : 5 }));
    write(drawn, box, node.lines);
    drawn.append(element("title", {}, node.text));
    drawn.addEventListener("click", () => detail(node));
    svg.append(drawn);
    if (!first && (hit || (!active && node.tone !== "same" && node.tone !== "port"))) first = box;
  }
  canvas.replaceChildren(svg);
  canvas.scrollTop = first ? Math.max(0, first.y * scale - 160) : 0;
  canvas.scrollLeft = first ? Math.max(0, first.x * scale - canvas.clientWidth / 2) : 0;
  const hidden = side.nodes.length - place.size;
  const caption = document.querySelector(`#${name} figcaption`);
  caption.replaceChildren(html("b", "", name), ` ${side.title} · ${side.total} nodes${hidden ? ` · ${hidden} drawn boxes away from any change are left out` : ""}`);
  return place.size;
}

function size(node) {
  const width = Math.max(...node.lines.map((line, k) => short(line).length * (k ? 6.7 : 7.3))) + 20;
  return { width, height: 12 + node.lines.length * 15 };
}

function write(parent, box, lines) {
  lines.forEach((line, k) => parent.append(element("text", {
    x: box.x, y: box.y - box.height / 2 + 18 + k * 15, "text-anchor": "middle", class: k ? "more" : "op",
  }, short(line))));
}

// Through the middles of the polyline's stretches, so that bends are round.
function curve(points) {
  let path = `M${points[0].x},${points[0].y}`;
  for (let k = 1; k < points.length - 1; k++) {
    const end = k === points.length - 2 ? points[k + 1] : { x: (points[k].x + points[k + 1].x) / 2, y: (points[k].y + points[k + 1].y) / 2 };
    path += ` Q${points[k].x},${points[k].y} ${end.x},${end.y}`;
  }
  return points.length > 2 ? path : `${path} L${points[1].x},${points[1].y}`;
}

function detail(node) {
  const box = byId("detail");
  box.hidden = false;
  box.replaceChildren(html("h2", "", "node"), html("p", "", node.lines[0]));
  for (const line of node.details) { const p = html("p"); p.append(html("code", "", line)); box.append(p); }
  for (const index of node.edits) box.append(html("p", "", data.steps[at].edits[index].what));
  const close = html("button", "", "close");
  close.onclick = () => { box.hidden = true; };
  box.append(close);
}

function draw() {
  document.querySelectorAll("#edits li").forEach((item, index) => item.classList.toggle("picked", index === picked));
  const drawn = drawSide("before") + drawSide("after");
  document.body.dataset.drawn = drawn;
  document.body.dataset.hits = document.querySelectorAll("svg .hit").length;
}

// A hit inside of closed layers opens them.
function reveal() {
  for (const name of ["before", "after"])
    for (const node of sides[name].nodes) if (matches(node) || concerned(node)) closed[name].delete(node.group);
}

function remember() {
  const parts = [];
  if (at) parts.push(`step=${at}`);
  if (picked !== null) parts.push(`edit=${picked}`);
  if (query) parts.push(`search=${encodeURIComponent(query)}`);
  if (whole) parts.push("whole");
  history.replaceState(null, "", `#${parts.join("&")}`);
}

const asked = new Map(location.hash.slice(1).split("&").map((part) => part.split("=")));
if (asked.has("search")) query = decodeURIComponent(asked.get("search")).toLowerCase();
whole = asked.has("whole");
fillSides();
// A step by its place, or the first of a name.
show(Math.max(0, data.steps.findIndex((step, index) => [step.name, `${index}`].includes(asked.get("step")))));
if (data.steps[at].edits[Number(asked.get("edit") ?? -1)]) picked = Number(asked.get("edit"));
byId("search").value = query;
byId("whole").checked = whole;
byId("search").oninput = (event) => { query = event.target.value.trim().toLowerCase(); reveal(); remember(); draw(); };
byId("whole").onchange = (event) => { whole = event.target.checked; remember(); draw(); };
byId("smaller").onclick = () => { zoom = Math.max(0.2, zoom / 1.25); draw(); };
byId("larger").onclick = () => { zoom = Math.min(4, zoom * 1.25); draw(); };
byId("step").onchange = (event) => go(Number(event.target.value));
byId("back").onclick = () => go(at - 1);
byId("next").onclick = () => go(at + 1);
reveal();
draw();
