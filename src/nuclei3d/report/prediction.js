"use strict";
// The page of a prediction. Each frame lies packed in an element of its own and is unpacked when it is looked at.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const count = data.names.length;
  const state = { t: 0, chosen: null, track: null, gain: 0, order: { by: "label", down: false }, playing: false };
  const unpacked = new Map();
  let current = null, ticket = 0, box = null;

  // ---------------------------------------------------------------- unpacking
  const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  async function unpack(t) {
    if (!unpacked.has(t)) {
      const [picture, rest] = element("frame-" + t).textContent.split(".").map(bytesOf);
      const stream = new Blob([rest]).stream().pipeThrough(new DecompressionStream("deflate"));
      const [image, frame] = await Promise.all([
        createImageBitmap(new Blob([picture], { type: "image/jpeg" })), new Response(stream).json()]);
      const nuclei = frame.nuclei.map((values, k) => ({
        ...Object.fromEntries(data.fields.map((name, i) => [name, values[i]])), paths: frame.outlines[k].map(pathOf), box: boxOf(frame.outlines[k][0]) }));
      if (unpacked.size > 20) unpacked.delete(unpacked.keys().next().value);
      unpacked.set(t, { ...frame, image, nuclei });
    }
    return unpacked.get(t);
  }
  function pathOf(points) {
    const path = new Path2D();
    for (let k = 0; k < points.length; k += 2) path.lineTo(points[k] / 2, points[k + 1] / 2);
    path.closePath();
    return path;
  }
  function boxOf(points) {
    const x = points.filter((_, k) => k % 2 === 0), y = points.filter((_, k) => k % 2);
    const [left, right, top, bottom] = [Math.min(...x), Math.max(...x), Math.min(...y), Math.max(...y)].map((v) => v / 2);
    return { x: (left + right) / 2, y: (top + bottom) / 2, area: (right - left) * (bottom - top) };
  }

  // ---------------------------------------------------------------- drawing
  function layOut() {
    const room = element("views").getBoundingClientRect(), edge = 8, dense = window.devicePixelRatio || 1;
    const [depth, height, width] = current.size;
    const scale = Math.min((room.width - 2 * edge) / current.image.width, (room.height - 2 * edge) / current.image.height);
    const canvas = element("picture");
    const size = [current.image.width, current.image.height].map((length) => Math.max(1, Math.round(scale * length)));
    const left = Math.round((room.width - size[0]) / 2), top = Math.round((room.height - size[1]) / 2);
    Object.assign(canvas.style, { left: left + "px", top: top + "px", width: size[0] + "px", height: size[1] + "px" });
    [canvas.width, canvas.height] = size.map((length) => Math.round(length * dense));
    box = { scale, dense };
    const gap = current.image.width - width - depth;
    for (const [view, x, y] of [["xy", 0, 0], ["yz", width + gap, 0], ["xz", 0, height + gap]])
      Object.assign(element("caption-" + view).style, { left: left + scale * x + 6 + "px", top: top + scale * y + 4 + "px" });
  }
  // neighbouring numbers get hues far apart
  const hueOf = (number) => `hsl(${(number * 137.508) % 360} 90% ${60 + 12 * (number % 3 - 1)}%)`;
  function colorOf(nucleus) {
    const by = element("color").value;
    if (by === "track") return nucleus.track === null ? "#8b949e" : hueOf(nucleus.track);
    if (by === "score") return nucleus.score === null ? "#8b949e" : `hsl(${240 - 185 * nucleus.score} 90% ${45 + 12 * nucleus.score}%)`;
    return by === "label" ? hueOf(nucleus.label) : data.color;
  }
  let pending = false;
  function draw() {
    if (pending || !current) return;
    pending = true;
    element("views").setAttribute("aria-busy", "true");
    requestAnimationFrame(() => {
      pending = false;
      const pen = element("picture").getContext("2d"), whole = box.scale * box.dense;
      pen.setTransform(whole, 0, 0, whole, 0, 0);
      pen.imageSmoothingQuality = "high";
      pen.filter = `brightness(${Math.pow(2, state.gain)})`;
      pen.drawImage(current.image, 0, 0);
      pen.filter = "none";
      pen.lineJoin = "round";
      for (const nucleus of current.nuclei) {
        const marked = nucleus === state.chosen;
        if (!marked && !element("outlines").checked) continue;
        pen.strokeStyle = marked ? "#fff" : colorOf(nucleus);
        pen.lineWidth = (marked ? 3 : 1.4) / box.scale;
        for (const path of nucleus.paths) pen.stroke(path);
      }
      if (element("numbers").checked) {
        pen.font = `${12 / box.scale}px system-ui, sans-serif`;
        pen.textAlign = "center";
        pen.textBaseline = "middle";
        for (const nucleus of current.nuclei) {
          pen.fillStyle = colorOf(nucleus);
          pen.fillText(element("color").value === "track" && nucleus.track !== null ? nucleus.track : nucleus.label, nucleus.box.x, nucleus.box.y);
        }
      }
      drawScale(pen);
      element("views").dataset.drawn = `${data.names[state.t]} ${current.nuclei.length} ${state.chosen ? state.chosen.label : "-"}`;
      element("views").setAttribute("aria-busy", "false");
    });
  }
  function drawScale(pen) {
    const [, height, width] = current.size, px = 1 / current.px_um;
    const length = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].findLast((um) => um * px < width / 3) || 1;
    const unit = 1 / box.scale;
    pen.fillStyle = "#fff";
    pen.textAlign = "left";
    pen.textBaseline = "alphabetic";
    pen.font = `${12 * unit}px system-ui, sans-serif`;
    pen.fillRect(10 * unit, height - 14 * unit, length * px, 3 * unit);
    pen.fillText(`${length} µm`, 10 * unit, height - 20 * unit);
  }

  // ---------------------------------------------------------------- frames
  async function open(t, choose) {
    const mine = ++ticket;
    state.t = Math.min(Math.max(t, 0), count - 1);
    element("views").setAttribute("aria-busy", "true");
    let frame;
    try {
      frame = await unpack(state.t);
    } catch (error) {
      element("loading").textContent = "This browser cannot unpack the frame: " + error;
      return;
    }
    if (mine !== ticket) return;
    current = frame;
    if (choose) state.track = null;
    state.chosen = current.nuclei.find(choose || ((nucleus) => nucleus.track !== null && nucleus.track === state.track)) || null;
    if (choose && state.chosen) state.track = state.chosen.track;
    element("t").value = state.t;
    element("t-value").textContent = `${state.t + 1} of ${count}`;
    element("name").textContent = `${data.names[state.t]}: ${current.nuclei.length} nuclei`;
    layOut();
    list();
    draw();
    markTree();
  }
  const mark = (nucleus) => open(state.t, (each) => each === nucleus);
  element("t").oninput = (event) => open(Number(event.target.value));
  element("brightness").oninput = (event) => {
    state.gain = Number(event.target.value);
    element("brightness-value").textContent = (state.gain > 0 ? "+" : "") + state.gain.toFixed(1);
    draw();
  };
  for (const id of ["outlines", "numbers", "color"]) element(id).onchange = draw;
  element("play").onclick = async () => {
    state.playing = !state.playing;
    element("play").textContent = state.playing ? "stop" : "play";
    while (state.playing) {
      const wait = new Promise((done) => setTimeout(done, 150));
      await open((state.t + 1) % count);
      await wait;
    }
  };
  element("views").onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, PageUp: -10, ArrowRight: 1, ArrowDown: 1, PageDown: 10 }[event.key];
    if (!step) return;
    event.preventDefault();
    open(state.t + step);
  };
  element("picture").onclick = (event) => {
    const pen = element("picture").getContext("2d"), bounds = element("picture").getBoundingClientRect();
    const x = (event.clientX - bounds.left) / box.scale, y = (event.clientY - bounds.top) / box.scale;
    pen.setTransform(1, 0, 0, 1, 0, 0);
    const hit = current.nuclei.filter((nucleus) => nucleus.paths.some((path) => pen.isPointInPath(path, x, y)));
    // of nuclei one above the other the smallest: the others can be reached beside it
    mark(hit.sort((a, b) => a.box.area - b.box.area)[0]);
  };
  window.addEventListener("resize", () => { if (current) { layOut(); draw(); } });
  for (const button of document.querySelectorAll("button[data-frame]"))
    button.onclick = () => { element("view").scrollIntoView(); open(Number(button.dataset.frame)); };
  // a point of a chart goes to its frame
  for (const title of document.querySelectorAll("svg.chart g > title")) {
    const t = data.names.indexOf(title.textContent.replace(/: [^:]*$/, ""));
    if (t < 0) continue;
    title.parentNode.style.cursor = "pointer";
    title.parentNode.addEventListener("click", () => { element("view").scrollIntoView(); open(t); });
  }

  // ---------------------------------------------------------------- the list of nuclei
  const COLUMNS = [["label", "label", 0], ["z_um", "z µm", 1], ["y_um", "y", 1], ["x_um", "x", 1], ["volume_um3", "µm³", 0], ["mean_intensity", "bright", 0], ["score", "score", 2]];
  if (data.tracks) COLUMNS.unshift(["track", "track", 0]);
  for (const [name, title] of COLUMNS) {
    const head = document.createElement("th");
    head.textContent = title;
    head.title = "sort by " + title;
    head.onclick = () => { state.order.down = state.order.by === name && !state.order.down; state.order.by = name; list(); };
    element("columns").append(head);
  }
  function list() {
    const { by, down } = state.order, body = element("rows"), room = element("listing");
    const rows = [...current.nuclei].sort((a, b) =>
      (a[by] === null || b[by] === null ? (a[by] === null) - (b[by] === null) : (down ? -1 : 1) * (a[by] - b[by])));
    body.textContent = "";
    for (const nucleus of rows) {
      const line = body.insertRow();
      line.tabIndex = 0;
      line.className = nucleus === state.chosen ? "chosen" : "";
      for (const [name, , digits] of COLUMNS) line.insertCell().textContent = nucleus[name] === null ? "" : nucleus[name].toFixed(digits);
      line.onclick = () => mark(nucleus);
      line.onkeydown = (event) => { if (event.key === "Enter") mark(nucleus); };
      if (nucleus === state.chosen && !state.playing) {
        const above = line.offsetTop - room.scrollTop;
        if (above < 30 || above + line.offsetHeight > room.clientHeight) room.scrollTop = line.offsetTop - room.clientHeight / 2;
      }
    }
  }

  // ---------------------------------------------------------------- the lineage tree
  const LANE = 10, EDGE = 24;
  const part = (parent, name, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    parent.append(node);
    return node;
  };
  const tree = { lines: new Map(), across: () => 0 };
  const heightOf = (lane) => (lane + 1) * LANE;
  function growTree() {
    if (!data.tracks) return;
    const room = element("tree"), width = room.clientWidth - 4;
    const height = heightOf(Math.max(...data.tracks.map((track) => track.lane)) + 1);
    room.textContent = "";
    const svg = part(room, "svg", { width, height, role: "img" });
    tree.across = (t) => EDGE + (count > 1 ? t / (count - 1) : 0) * (width - 2 * EDGE);
    tree.now = part(svg, "line", { y1: 0, y2: height, stroke: "#8b949e" });
    const byNumber = new Map(data.tracks.map((track) => [track.track, track]));
    for (const { track, parent, first, last, lane } of data.tracks) {
      const line = part(svg, "g", { stroke: hueOf(track), "stroke-width": 2, "stroke-linecap": "round", fill: "none" });
      const mother = byNumber.get(parent), y = heightOf(lane);
      const fork = mother ? `M${tree.across(mother.last)} ${heightOf(mother.lane)}H${tree.across(first)}V${y}` : "";
      part(line, "path", { d: `${fork}M${tree.across(first)} ${y}H${tree.across(last) + 0.1}` });
      part(line, "title", {}).textContent = `track ${track}` + (mother ? `, of ${parent}` : "");
      tree.lines.set(track, line);
    }
    svg.onclick = (event) => {
      const bounds = svg.getBoundingClientRect();
      const far = ({ first, last, lane }) => Math.abs(heightOf(lane) - event.clientY + bounds.top) +
        Math.max(tree.across(first) - event.clientX + bounds.left, event.clientX - bounds.left - tree.across(last), 0);
      const nearest = data.tracks.reduce((best, track) => (far(track) < far(best) ? track : best));
      const share = (event.clientX - bounds.left - EDGE) / (width - 2 * EDGE);
      state.track = nearest.track;
      element("view").scrollIntoView();
      open(Math.min(Math.max(Math.round(share * (count - 1)), nearest.first), nearest.last));
    };
    markTree();
  }
  function markTree() {
    if (!tree.now) return;
    for (const end of ["x1", "x2"]) tree.now.setAttribute(end, tree.across(state.t));
    for (const [track, line] of tree.lines) line.setAttribute("stroke-width", track === state.track ? 6 : 2);
  }
  growTree();
  window.addEventListener("resize", growTree);
  open(0);
})();
