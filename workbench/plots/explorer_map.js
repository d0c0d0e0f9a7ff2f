// A layer x expert map on a canvas, with a cursor for pointer and keyboard.

const GUTTER = { left: 34, bottom: 20 };

// Concrete colours of the current theme: a canvas understands no variables.
function themeColours(place) {
  const probe = document.createElement("i"), found = {};
  place.append(probe);
  for (const name of ["mark", "cell", "soft", "text"]) {
    probe.style.color = `var(--wbx-${name})`;
    found[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return found;
}

class ExpertMap {
  // on.hover(layer, expert) while pointing or moving the cursor (null, null when it leaves), on.pick(layer, expert).
  constructor(place, layers, nExperts, on) {
    Object.assign(this, { layers, nExperts, on, levels: null, row: -1, chosen: null, cursor: null });
    this.canvas = element("canvas", { className: "wbx-map", tabIndex: 0 });
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "map of layers and experts");
    this.canvas.setAttribute("aria-label", "layers down, experts across; arrows move, Enter chooses, Escape lets go");
    this.place = place;
    place.append(this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.point(this.cellAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("click", (event) => this.pick(this.cellAt(event)));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.restyle();
  }

  restyle() { // after a change of theme or width
    const width = this.place.clientWidth || 640, nLayers = this.layers.length;
    this.cell = {
      width: Math.min(22, Math.max(3, Math.floor((width - GUTTER.left) / this.nExperts))),
      height: Math.min(22, Math.max(5, Math.floor(400 / nLayers))),
    };
    this.width = GUTTER.left + this.cell.width * this.nExperts;
    this.height = this.cell.height * nLayers + GUTTER.bottom;
    this.colours = themeColours(this.place);
    const ratio = window.devicePixelRatio || 1;
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    this.empty = this.drawEmpty(ratio);
    this.canvas.width = this.empty.width;
    this.canvas.height = this.empty.height;
    this.ink = this.canvas.getContext("2d");
    this.ink.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.redraw();
  }

  // levels: [layer expert] from 0 to 1, NaN where there is nothing; row: the layer to underline, -1 for none.
  draw(levels, row, chosen) {
    Object.assign(this, { levels, row, chosen });
    this.redraw();
  }

  redraw() {
    const ink = this.ink, { width, height } = this.cell;
    ink.clearRect(0, 0, this.width, this.height);
    ink.drawImage(this.empty, 0, 0, this.width, this.height);
    ink.fillStyle = this.colours.mark;
    for (let i = 0; this.levels && i < this.levels.length; i++) {
      if (Number.isNaN(this.levels[i])) continue;
      ink.globalAlpha = this.levels[i];
      ink.fillRect(...this.corner(Math.floor(i / this.nExperts), i % this.nExperts), width - 1, height - 1);
    }
    ink.globalAlpha = 1;
    if (this.row >= 0) this.frame(this.row, 0, this.nExperts, this.colours.soft);
    if (this.cursor) this.frame(...this.cursor, 1, this.colours.soft);
    if (this.chosen) this.frame(...this.chosen, 1, this.colours.text);
  }

  frame(layer, expert, span, colour) {
    const [x, y] = this.corner(layer, expert);
    this.ink.strokeStyle = colour;
    this.ink.lineWidth = 1.5;
    this.ink.strokeRect(x - 1, y - 1, span * this.cell.width + 1, this.cell.height + 1);
  }

  corner(layer, expert) { return [GUTTER.left + expert * this.cell.width, layer * this.cell.height]; }

  drawEmpty(ratio) { // the grid with its axes, drawn once per theme and width
    const canvas = document.createElement("canvas"), ink = canvas.getContext("2d"), { width, height } = this.cell;
    canvas.width = Math.round(this.width * ratio);
    canvas.height = Math.round(this.height * ratio);
    ink.scale(ratio, ratio);
    ink.fillStyle = this.colours.cell;
    for (let l = 0; l < this.layers.length; l++) {
      for (let e = 0; e < this.nExperts; e++) ink.fillRect(...this.corner(l, e), width - 1, height - 1);
    }
    ink.fillStyle = this.colours.soft;
    ink.font = "11px sans-serif";
    ink.textBaseline = "middle";
    ink.textAlign = "right";
    for (let l = 0; l < this.layers.length; l += step(14 / height)) {
      ink.fillText(this.layers[l], GUTTER.left - 6, (l + 0.5) * height);
    }
    ink.textAlign = "center";
    for (let e = 0; e < this.nExperts; e += step(24 / width)) {
      ink.fillText(e, GUTTER.left + (e + 0.5) * width, this.height - GUTTER.bottom / 2);
    }
    return canvas;
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientX - box.left - GUTTER.left) / this.cell.width);
    const layer = Math.floor((event.clientY - box.top) / this.cell.height);
    return expert >= 0 && expert < this.nExperts && layer >= 0 && layer < this.layers.length ? [layer, expert] : null;
  }

  point(cell) {
    if (String(cell) === String(this.cursor)) return;
    this.cursor = cell;
    this.redraw();
    this.on.hover(...(cell ?? [null, null]));
  }

  pick(cell) { if (cell) this.on.pick(...cell); }

  key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key in moves) {
      const [layer, expert] = this.cursor ?? this.chosen ?? [0, 0], [down, right] = this.cursor ? moves[event.key] : [0, 0];
      this.point([clamp(layer + down, this.layers.length), clamp(expert + right, this.nExperts)]);
    } else if ((event.key === "Enter" || event.key === " ") && this.cursor) {
      this.pick(this.cursor);
    } else return;
    event.preventDefault();
  }
}

function step(least) { // label every 1, 2, 4, 8 ... rows or columns, so that labels do not touch
  return 2 ** Math.max(0, Math.ceil(Math.log2(least)));
}

function clamp(value, count) { return Math.min(count - 1, Math.max(0, value)); }
