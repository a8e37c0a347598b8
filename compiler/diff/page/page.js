"use strict";
// Draws DATA (compiler/diff/view.py says what it holds). The address's fragment holds the state: #edit=3, #search=Cast, #whole.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const closed = new Set();     // groups that are drawn as one box
let zoom = 1, picked = null, query = "", whole = false;
const NEAR = 2, MANY = 260;   // steps around a change, and how many nodes are drawn without being asked to

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

function fillSides() {
  byId("title").textContent = `${data.before.title} → ${data.after.title}`;
  byId("summary").textContent = data.summary;
  byId("summary").className = data.bad ? "bad" : "";
  document.title = data.report ? "octavo compile" : "octavo diff";
  const list = document.querySelector("#edits ol");
  data.edits.forEach((edit, index) => {
    const item = html("li", edit.tone);
    if (edit.count > 1) item.append(html("span", "count", `×${edit.count}`));
    item.append(html("span", "", edit.what));
    if (edit.where) item.append(html("small", "", edit.where));
    item.onclick = () => { picked = picked === index ? null : index; reveal(); remember(); draw(); };
    list.append(item);
  });
  if (!data.edits.length) list.append(html("li", "same", "Nothing changed."));
  rows("#cost table", data.cost.map((row) => [row, false]));
  rows("#numbers table", data.numbers.rows);
  document.querySelector("#numbers p").textContent = data.numbers.note;
  byId("numbers").hidden = !data.numbers.rows.length;
  byId("rules").hidden = !data.rules.length;
  for (const rule of data.rules) document.querySelector("#rules ul").append(html("li", rule.ok ? "" : "bad", `${rule.ok ? "✓" : "✗"} ${rule.text}`));
  byId("report").hidden = !data.report;
  if (data.report) {
    const box = document.querySelector("#report div");
    for (const refusal of data.report.refusals) {
      const item = html("div", "refusal");
      item.append(html("b", "", `refused at ${refusal.where}: `), html("span", "", refusal.reason));
      if (refusal.nearest) item.append(html("small", "", `nearest: ${refusal.nearest}`));
      box.append(item);
    }
    const table = html("table");
    box.append(table);
    for (const row of data.report.stages) table.append(rowOf(row, false));
    for (const line of data.report.lines) box.append(html("small", "", line));
  }
}

function rowOf(cells, bad) {
  const row = html("tr", bad ? "bad" : "");
  cells.forEach((cell) => row.append(html("td", "", cell)));
  return row;
}

function rows(selector, found) {
  for (const [cells, bad] of found) document.querySelector(selector).append(rowOf(cells, bad));
}

const matches = (node) => query && node.text.toLowerCase().includes(query);
const concerned = (node) => picked !== null && node.edits.includes(picked);

// The nodes to draw: all, or what lies near a change, a hit, or the picked edit.
function visible(side) {
  const nodes = side.nodes.filter((node) => !closed.has(node.group));
  if (whole || (side.nodes.length <= MANY)) return new Set(nodes.map((node) => node.id));
  let seen = new Set(nodes.filter((node) => node.tone !== "same" && node.tone !== "port" || matches(node) || concerned(node)).map((node) => node.id));
  for (let step = 0; step < NEAR; step++) {
    const next = new Set(seen);
    for (const [from, to] of side.edges) { if (seen.has(from)) next.add(to); if (seen.has(to)) next.add(from); }
    seen = next;
  }
  if (!seen.size) seen = new Set(nodes.slice(0, MANY).map((node) => node.id));
  return seen;
}

function drawSide(name) {
  const side = data[name], shown = visible(side);
  const graph = new dagre.graphlib.Graph({ compound: true, multigraph: false });
  graph.setGraph({ rankdir: "TB", nodesep: 18, ranksep: 26, marginx: 16, marginy: 16 });
  graph.setDefaultEdgeLabel(() => ({}));
  const place = new Map();
  for (const group of side.groups) {
    if (closed.has(group.id)) graph.setNode(group.id, size({ lines: [`${group.count} × layer`, `${group.size} nodes`] }));
    else if (side.nodes.some((node) => node.group === group.id && shown.has(node.id))) graph.setNode(group.id, {});
  }
  for (const node of side.nodes) {
    if (closed.has(node.group)) place.set(node.id, node.group);
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
    const layer = element("g", { class: closed.has(group.id) ? "node fold " + group.tone : "group" });
    layer.append(element("rect", { x: box.x - box.width / 2, y: box.y - box.height / 2, width: box.width, height: box.height, rx: 8 }));
    if (closed.has(group.id)) write(layer, box, [`${group.count} × layer`, `${group.size} nodes, click to open`]);
    else layer.append(element("text", { x: box.x - box.width / 2 + 10, y: box.y - box.height / 2 + 15 }, `×${group.count}  ▾`));
    (closed.has(group.id) ? layer : layer.lastChild).addEventListener("click", () => {
      if (!closed.delete(group.id)) closed.add(group.id);
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
    drawn.append(element("rect", { x: box.x - box.width / 2, y: box.y - box.height / 2, width: box.width, height: box.height, rx: node.tone === "port" ? 12 : 5 }));
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
  for (const index of node.edits) box.append(html("p", "", data.edits[index].what));
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
  for (const side of [data.before, data.after])
    for (const node of side.nodes) if (matches(node) || concerned(node)) closed.delete(node.group);
}

function remember() {
  const parts = [];
  if (picked !== null) parts.push(`edit=${picked}`);
  if (query) parts.push(`search=${encodeURIComponent(query)}`);
  if (whole) parts.push("whole");
  history.replaceState(null, "", `#${parts.join("&")}`);
}

for (const part of location.hash.slice(1).split("&")) {
  const [key, value] = part.split("=");
  if (key === "edit" && data.edits[Number(value)]) picked = Number(value);
  if (key === "search") query = decodeURIComponent(value).toLowerCase();
  if (key === "whole") whole = true;
}
// Layers without a change stay closed, unless those beside them have one.
data.before.groups.forEach((group, k) => {
  const other = data.after.groups[k];
  if (group.tone === "same" && (!other || other.tone === "same")) { closed.add(group.id); if (other) closed.add(other.id); }
});
data.after.groups.slice(data.before.groups.length).forEach((group) => { if (group.tone === "same") closed.add(group.id); });
byId("search").value = query;
byId("whole").checked = whole;
byId("search").oninput = (event) => { query = event.target.value.trim().toLowerCase(); reveal(); remember(); draw(); };
byId("whole").onchange = (event) => { whole = event.target.checked; remember(); draw(); };
byId("smaller").onclick = () => { zoom = Math.max(0.2, zoom / 1.25); draw(); };
byId("larger").onclick = () => { zoom = Math.min(4, zoom * 1.25); draw(); };
fillSides();
reveal();
draw();
