"use strict";
// The viewer of the report. Volumes lie deflated in the page; each is unpacked when it is looked at.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);

  // Links of the tables outside the viewer.
  const openers = document.querySelectorAll("button[data-volume]");
  if (!element("viewer")) return;

  const LAYERS = [
    { key: "true", side: "truth", hit: 1, text: "true, found", width: 1.6, dashed: false },
    { key: "pred", side: "pred", hit: 1, text: "predicted, right", width: 1.6, dashed: true },
    { key: "missed", side: "truth", hit: 0, text: "true, missed", width: 2.8, dashed: false },
    { key: "false", side: "pred", hit: 0, text: "predicted, false", width: 2.8, dashed: true },
  ];
  const state = { v: 0, at: [0, 0, 0], on: { true: true, pred: true, missed: true, false: true }, gain: 0, chosen: null, solo: null };
  const unpacked = new Map();
  let current = null;
  let ticket = 0;

  // ---------------------------------------------------------------- unpacking
  const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  async function inflate(text) {
    const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint16Array(await new Response(stream).arrayBuffer());
  }
  async function planesOf(volume) {
    const [depth, height, width] = volume.shape;
    if (!volume.image) return null;
    const sprite = await createImageBitmap(new Blob([bytesOf(volume.image)], { type: "image/jpeg" }));
    const canvas = document.createElement("canvas");
    const grey = new Uint8Array(depth * height * width);
    canvas.width = width;
    canvas.height = height;
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    for (let z = 0; z < depth; z++) {
      const column = z % volume.columns, row = Math.floor(z / volume.columns);
      pen.drawImage(sprite, column * width, row * height, width, height, 0, 0, width, height);
      const plane = pen.getImageData(0, 0, width, height).data;
      for (let i = 0, o = z * height * width; i < height * width; i++) grey[o + i] = plane[4 * i];
    }
    return grey;
  }
  async function unpack(index) {
    if (!unpacked.has(index)) {
      const volume = data.volumes[index];
      const [grey, truth, pred] = await Promise.all([planesOf(volume), inflate(volume.truth), inflate(volume.pred)]);
      if (unpacked.size > 3) unpacked.delete(unpacked.keys().next().value);
      unpacked.set(index, { ...volume, grey, truth, pred });
    }
    return unpacked.get(index);
  }

  // ---------------------------------------------------------------- geometry
  // Per view the axes that run across and down, and the axis that the plane fixes (0 z, 1 y, 2 x).
  const VIEWS = { xy: [2, 1, 0], yz: [0, 1, 2], xz: [2, 0, 1] };
  const box = {};
  function layOut() {
    const room = element("views").getBoundingClientRect();
    const um = current.shape.map((n, axis) => n * current.voxel_um[axis]);
    const gap = 6, edge = 8;
    const scale = Math.min(
      (room.width - gap - 2 * edge) / (um[2] + um[0]), (room.height - gap - 2 * edge) / (um[1] + um[0]));
    const left = Math.max(edge, (room.width - gap - scale * (um[2] + um[0])) / 2);
    const top = Math.max(edge, (room.height - gap - scale * (um[1] + um[0])) / 2);
    const sizes = { xy: [um[2], um[1]], yz: [um[0], um[1]], xz: [um[2], um[0]] };
    if (state.solo) {
      // One view alone, as large as the room allows.
      const [across, down] = sizes[state.solo];
      const alone = Math.min((room.width - 2 * edge) / across, (room.height - 2 * edge) / down);
      for (const view of Object.keys(VIEWS)) {
        if (view === state.solo) place(view, (room.width - alone * across) / 2, (room.height - alone * down) / 2, alone, sizes[view]);
        else hide(view);
      }
      return;
    }
    const corners = {
      xy: [left, top], yz: [left + scale * um[2] + gap, top], xz: [left, top + scale * um[1] + gap] };
    for (const view of Object.keys(VIEWS)) place(view, ...corners[view], scale, sizes[view]);
  }
  function hide(view) {
    element(view).hidden = element("caption-" + view).hidden = true;
    box[view] = null;
  }
  function place(view, left, top, scale, size) {
    const canvas = element(view), dense = window.devicePixelRatio || 1;
    const [width, height] = size.map((length) => Math.max(1, Math.round(scale * length)));
    const [x, y] = [Math.round(left), Math.round(top)];
    canvas.hidden = element("caption-" + view).hidden = false;
    Object.assign(canvas.style, { left: x + "px", top: y + "px", width: width + "px", height: height + "px" });
    canvas.width = Math.round(width * dense);
    canvas.height = Math.round(height * dense);
    box[view] = { width, height, dense, scale };
    Object.assign(element("caption-" + view).style, { left: x + 6 + "px", top: y + 4 + "px" });
  }

  // ---------------------------------------------------------------- drawing
  function cut(values, view, Type) {
    const [across, down, fixed] = VIEWS[view];
    const [, height, width] = current.shape;
    const stride = [height * width, width, 1];
    const w = current.shape[across], h = current.shape[down];
    const plane = new Type(w * h);
    const start = state.at[fixed] * stride[fixed];
    for (let j = 0; j < h; j++) {
      let from = start + j * stride[down];
      for (let i = 0; i < w; i++, from += stride[across]) plane[j * w + i] = values[from];
    }
    return { plane, w, h };
  }
  const buffer = document.createElement("canvas");
  function drawImage(pen, view) {
    const { width, height } = box[view];
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, width, height);
    if (!current.grey) return;
    const { plane, w, h } = cut(current.grey, view, Uint8Array);
    // Stored are square roots; at gain 0 they are shown half-way back to linear.
    const gamma = 1.4 * Math.pow(2, -state.gain / 1.5), gain = Math.pow(2, state.gain / 2);
    const shade = Uint8ClampedArray.from({ length: 256 }, (_, k) => 255 * gain * Math.pow(k / 255, gamma));
    const pixels = new ImageData(w, h);
    for (let k = 0; k < plane.length; k++) {
      const value = shade[plane[k]];
      pixels.data[4 * k] = pixels.data[4 * k + 1] = pixels.data[4 * k + 2] = value;
      pixels.data[4 * k + 3] = 255;
    }
    buffer.width = w;
    buffer.height = h;
    buffer.getContext("2d").putImageData(pixels, 0, 0);
    pen.imageSmoothingEnabled = true;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(buffer, 0, 0, width, height);
  }
  function drawOutlines(pen, view) {
    const { width, height } = box[view];
    for (const side of ["truth", "pred"]) {
      const { plane, w, h } = cut(current[side], view, Uint16Array);
      const hits = side === "truth" ? current.found : current.right;
      const sx = width / w, sy = height / h;
      for (const layer of LAYERS.filter((l) => l.side === side && state.on[l.key])) {
        const path = new Path2D();
        for (let j = 0; j < h; j++) {
          for (let i = 0; i < w; i++) {
            const label = plane[j * w + i];
            if (!label || hits[label - 1] !== layer.hit) continue;
            // Borders are made of short pieces, on which a dash pattern would not show: leave out every other pair.
            if (layer.dashed && ((i + j) >> 1) & 1) continue;
            const x0 = i * sx, x1 = (i + 1) * sx, y0 = j * sy, y1 = (j + 1) * sy;
            if (i === 0 || plane[j * w + i - 1] !== label) { path.moveTo(x0, y0); path.lineTo(x0, y1); }
            if (i === w - 1 || plane[j * w + i + 1] !== label) { path.moveTo(x1, y0); path.lineTo(x1, y1); }
            if (j === 0 || plane[(j - 1) * w + i] !== label) { path.moveTo(x0, y0); path.lineTo(x1, y0); }
            if (j === h - 1 || plane[(j + 1) * w + i] !== label) { path.moveTo(x0, y1); path.lineTo(x1, y1); }
          }
        }
        pen.strokeStyle = data.colors[layer.key];
        pen.lineWidth = layer.width;
        pen.lineCap = "square";
        pen.stroke(path);
      }
    }
  }
  function drawCross(pen, view) {
    const [across, down] = VIEWS[view];
    const { width, height } = box[view];
    const x = (state.at[across] + 0.5) * width / current.shape[across];
    const y = (state.at[down] + 0.5) * height / current.shape[down];
    pen.strokeStyle = "rgba(255,255,255,.35)";
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(x, 0); pen.lineTo(x, height); pen.moveTo(0, y); pen.lineTo(width, y);
    pen.stroke();
    const row = state.chosen;
    if (!row || row.volume !== current.name) return;
    const [, , fixed] = VIEWS[view];
    const radius = Math.cbrt(3 * row.volume_um3 / (4 * Math.PI)) + 3;
    const off = Math.abs(row.place[fixed] - state.at[fixed] * current.voxel_um[fixed]);
    if (off > radius) return;
    pen.strokeStyle = "#fff";
    pen.lineWidth = 1.5;
    pen.setLineDash([6, 5]);
    pen.beginPath();
    pen.arc((row.place[across] / current.voxel_um[across] + 0.5) * width / current.shape[across],
      (row.place[down] / current.voxel_um[down] + 0.5) * height / current.shape[down],
      radius * box[view].scale, 0, 2 * Math.PI);
    pen.stroke();
    pen.setLineDash([]);
  }
  function drawScale(pen, view) {
    const { width, height, scale } = box[view];
    const length = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].findLast((um) => um * scale < width / 3) || 1;
    pen.fillStyle = "#fff";
    pen.fillRect(10, height - 14, length * scale, 3);
    pen.font = "12px system-ui, sans-serif";
    pen.fillText(`${length} ${data.unit}`, 10, height - 20);
  }
  let pending = false;
  function draw() {
    if (pending || !current) return;
    pending = true;
    element("views").setAttribute("aria-busy", "true");
    requestAnimationFrame(() => {
      pending = false;
      for (const view of Object.keys(VIEWS).filter((v) => box[v])) {
        const pen = element(view).getContext("2d");
        pen.setTransform(box[view].dense, 0, 0, box[view].dense, 0, 0);
        drawImage(pen, view);
        drawOutlines(pen, view);
        drawCross(pen, view);
        if (view === (state.solo || "xy")) drawScale(pen, view);
        const axis = VIEWS[view][2];
        const name = "zyx"[axis];
        const um = (state.at[axis] * current.voxel_um[axis]).toFixed(1);
        element("caption-" + view).textContent = `${view}   ${name} = ${um} ${data.unit}`;
      }
      element("views").dataset.drawn = `${current.name} ${state.at.join(" ")}`;
      element("views").setAttribute("aria-busy", "false");
    });
  }

  // ---------------------------------------------------------------- controls
  function showControls() {
    ["z", "y", "x"].forEach((name, axis) => {
      const slider = element(name);
      slider.max = current.shape[axis] - 1;
      slider.value = state.at[axis];
      element(name + "-value").textContent = (state.at[axis] * current.voxel_um[axis]).toFixed(1) + " " + data.unit;
    });
    element("volume").value = state.v;
    element("t").value = state.v;
    element("t-value").textContent = `${state.v + 1} of ${data.volumes.length}`;
    element("brightness-value").textContent = (state.gain > 0 ? "+" : "") + state.gain.toFixed(1);
  }
  function moveTo(axis, index) {
    if (!current) return;
    state.at[axis] = Math.min(Math.max(Math.round(index), 0), current.shape[axis] - 1);
    showControls();
    draw();
  }
  async function open(index, place) {
    const mine = ++ticket;
    state.v = index;
    element("loading").textContent = "unpacking ...";
    element("views").setAttribute("aria-busy", "true");
    let volume;
    try {
      volume = await unpack(index);
    } catch (error) {
      element("loading").textContent = "This browser cannot unpack the volume: " + error;
      return;
    }
    if (mine !== ticket) return;
    element("loading").textContent = "";
    const same = current && String(current.shape) === String(volume.shape);
    current = volume;
    if (place) state.at = place.map((um, axis) => Math.round(um / volume.voxel_um[axis]));
    else if (!same) state.at = volume.shape.map((n) => n >> 1);
    state.at = state.at.map((n, axis) => Math.min(Math.max(n, 0), volume.shape[axis] - 1));
    layOut();
    showControls();
    draw();
  }
  data.volumes.forEach((volume, index) => {
    const missed = volume.found.filter((hit) => !hit).length, wrong = volume.right.filter((hit) => !hit).length;
    element("volume").add(new Option(`${volume.name}: ${missed} missed, ${wrong} false of ${volume.found.length}`, index));
  });
  element("t").max = data.volumes.length - 1;
  element("volume").onchange = (event) => open(Number(event.target.value));
  element("t").oninput = (event) => open(Number(event.target.value));
  ["z", "y", "x"].forEach((name, axis) => { element(name).oninput = (event) => moveTo(axis, Number(event.target.value)); });
  element("brightness").oninput = (event) => { state.gain = Number(event.target.value); showControls(); draw(); };
  for (const layer of LAYERS) {
    const label = document.createElement("label");
    const check = Object.assign(document.createElement("input"), { type: "checkbox", checked: true, id: "layer-" + layer.key });
    check.onchange = () => { state.on[layer.key] = check.checked; draw(); };
    label.append(check);
    label.insertAdjacentHTML("beforeend", `<svg width="26" height="10" aria-hidden="true"><path d="M1 5H25" stroke="${data.colors[layer.key]}" ` +
      `stroke-width="${layer.width}" stroke-dasharray="${layer.dashed ? "5 4" : ""}"/></svg>`);
    label.append(layer.text);
    element("layers").append(label);
  }
  for (const [view, [across, down, fixed]] of Object.entries(VIEWS)) {
    const canvas = element(view);
    const point = (event) => {
      const bounds = canvas.getBoundingClientRect();
      moveTo(across, Math.floor((event.clientX - bounds.left) / bounds.width * current.shape[across]));
      moveTo(down, Math.floor((event.clientY - bounds.top) / bounds.height * current.shape[down]));
    };
    canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); point(event); };
    canvas.onpointermove = (event) => { if (event.buttons & 1) point(event); };
    canvas.ondblclick = () => { state.solo = state.solo ? null : view; layOut(); draw(); };
    canvas.addEventListener("wheel", (event) => {
      if (event.ctrlKey) return;
      event.preventDefault();
      moveTo(fixed, state.at[fixed] + Math.sign(event.deltaY));
    }, { passive: false });
  }
  element("views").onkeydown = (event) => {
    const steps = { ArrowLeft: [2, -1], ArrowRight: [2, 1], ArrowUp: [1, -1], ArrowDown: [1, 1], PageUp: [0, -1], PageDown: [0, 1] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    moveTo(step[0], state.at[step[0]] + step[1]);
  };
  window.addEventListener("resize", () => { if (current) { layOut(); draw(); } });

  // ---------------------------------------------------------------- the list of nuclei
  const COLUMNS = [
    ["volume", "volume", (row) => row.volume],
    ["outcome", "what", (row) => row.outcome],
    ["label", "label", (row) => row.label],
    ["contrast", "contrast", (row) => (row.contrast === null ? "" : row.contrast.toFixed(1))],
    ["best_iou", "IoU", (row) => row.best_iou.toFixed(2)],
    ["volume_um3", data.unit + "³", (row) => Math.round(row.volume_um3)],
  ];
  const SHOWN = 400;
  const rows = data.nuclei.map((values) => Object.fromEntries(data.fields.map((name, k) => [name, values[k]])));
  for (const row of rows) row.place = [row.z_um, row.y_um, row.x_um];
  const kinds = { missed: true, false: true, found: false };
  const order = { by: "contrast", down: false };
  for (const kind of Object.keys(kinds)) {
    const label = document.createElement("label");
    const check = Object.assign(document.createElement("input"), { type: "checkbox", checked: kinds[kind], id: "list-" + kind });
    check.onchange = () => { kinds[kind] = check.checked; list(); };
    label.append(check, `list ${kind} (${rows.filter((row) => row.outcome === kind).length})`);
    element("kinds").append(label);
  }
  for (const [name, title] of COLUMNS) {
    const head = document.createElement("th");
    head.textContent = title;
    head.title = "sort by " + title;
    head.onclick = () => { order.down = order.by === name ? !order.down : false; order.by = name; list(); };
    element("columns").append(head);
  }
  function choose(row) {
    const index = data.volumes.findIndex((volume) => volume.name === row.volume);
    if (index < 0) {
      element("list-hint").textContent = `${row.volume} is not among the volumes in this file.`;
      return;
    }
    state.chosen = row;
    const room = element("listing");
    for (const line of element("rows").children) {
      line.classList.toggle("chosen", line.row === row);
      if (line.row !== row) continue;
      const above = line.offsetTop - room.scrollTop, height = room.clientHeight;
      if (above < 30 || above + line.offsetHeight > height) room.scrollTop = line.offsetTop - height / 2;
    }
    open(index, row.place);
  }
  function list() {
    const chosen = rows.filter((row) => kinds[row.outcome]);
    const sign = order.down ? -1 : 1;
    chosen.sort((a, b) => {
      const [p, q] = [a[order.by], b[order.by]];
      if (p === null || q === null) return (p === null) - (q === null);
      return sign * (typeof p === "string" ? p.localeCompare(q, "en", { numeric: true }) : p - q);
    });
    const body = element("rows");
    body.textContent = "";
    for (const row of chosen.slice(0, SHOWN)) {
      const line = document.createElement("tr");
      line.row = row;
      line.tabIndex = 0;
      line.className = row === state.chosen ? "chosen" : "";
      for (const [name, , text] of COLUMNS) {
        const cell = line.insertCell();
        cell.textContent = text(row);
        if (name === "outcome") cell.className = row.outcome;
      }
      line.onclick = () => choose(row);
      line.onkeydown = (event) => { if (event.key === "Enter") choose(row); };
      body.append(line);
    }
    const more = chosen.length > SHOWN ? ` The first ${SHOWN} of ${chosen.length} are listed; all are in nuclei.csv.` : "";
    element("list-hint").textContent = "Click a line to go there, a heading to sort. The wheel and the arrows move the planes; a double click enlarges a view." + more;
  }
  list();
  for (const button of openers) {
    const index = data.volumes.findIndex((volume) => volume.name === button.dataset.volume);
    if (index < 0) { button.disabled = true; button.title = "not among the volumes in this file"; continue; }
    button.onclick = () => { element("view").scrollIntoView(); open(index); };
  }
  // Begin where there is most to see: at the first missed nucleus of the volume with the most errors.
  const errors = data.volumes.map((v) => v.found.filter((h) => !h).length + v.right.filter((h) => !h).length);
  const worst = errors.indexOf(Math.max(...errors));
  const target = rows.find((row) => row.outcome === "missed" && row.volume === data.volumes[worst].name) ||
    rows.find((row) => row.outcome === "false" && row.volume === data.volumes[worst].name);
  if (target) choose(target); else open(worst);
})();
