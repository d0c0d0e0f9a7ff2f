// A document as text: one span per token, in blocks of one segment and phase.

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

class TokenText {
  // on.hover(token) while pointing at or focusing a token (null when the pointer leaves), on.pick(token).
  constructor(place, doc, on) {
    Object.assign(this, { doc, on, current: 0 });
    this.root = element("div", { className: "wbx-text" });
    this.root.setAttribute("role", "listbox");
    this.root.setAttribute("aria-label", `tokens of ${doc.label}`);
    this.spans = doc.tokens.map((text, token) => this.span(text, token));
    this.root.append(...this.blocks());
    this.spans[0].tabIndex = 0;
    place.append(this.root);
    this.root.addEventListener("pointerover", (event) => this.hover(event));
    this.root.addEventListener("pointerleave", () => on.hover(null));
    this.root.addEventListener("focusin", (event) => this.hover(event));
    this.root.addEventListener("click", (event) => { const token = tokenOf(event); if (token !== null) on.pick(token); });
    this.root.addEventListener("keydown", (event) => this.key(event));
  }

  span(text, token) {
    const span = element("span", { textContent: text, tabIndex: -1 });
    span.dataset.t = token;
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    // a further byte of the character before it: no text of its own, shown as a thin mark so that it can be pointed at
    if (text === "") { span.className = "wbx-byte"; span.setAttribute("aria-label", "further byte of the character"); }
    return span;
  }

  blocks() {
    let token = 0, written = false;
    return this.doc.runs.map(([segment, phase, count]) => {
      const name = `${segment} · ${phase === "decode" ? "written by the model" : "given"}`;
      const block = element("div", { className: `wbx-block wbx-in-${segment}` });
      block.setAttribute("role", "group");
      block.setAttribute("aria-label", name);
      if (phase === "decode" && !written) block.classList.add("wbx-first-written");
      written ||= phase === "decode";
      if (segment !== "control") block.append(element("small", { textContent: name, ariaHidden: "true" }));
      block.append(...this.spans.slice(token, (token += count)));
      return block;
    });
  }

  // values: one number per token (NaN: no colour) or null; range: [low, high] of the colours, the low one at `floor`.
  colour(values, range, floor) {
    const [low, high] = range ?? [0, 1], width = high - low || 1;
    this.spans.forEach((span, token) => {
      const value = values ? values[token] : NaN;
      if (Number.isNaN(value)) { span.style.removeProperty("--v"); return; }
      const level = Math.min(1, Math.max(0, (value - low) / width));
      span.style.setProperty("--v", `${Math.round(100 * (floor + (1 - floor) * level))}%`);
    });
  }

  mark(token, pinned) { // the token whose experts are on the map
    const before = this.spans[this.current];
    before.classList.remove("wbx-current", "wbx-pinned");
    before.setAttribute("aria-selected", "false");
    before.parentElement.classList.remove("wbx-here");
    before.tabIndex = -1;
    if (token !== null) this.current = token;
    const span = this.spans[this.current];
    span.tabIndex = 0; // Tab returns to where one was
    if (token === null) return;
    span.classList.add("wbx-current");
    span.classList.toggle("wbx-pinned", pinned);
    span.setAttribute("aria-selected", String(pinned));
    span.parentElement.classList.add("wbx-here");
  }

  open(token) { this.root.scrollTop = this.spans[token].parentElement.offsetTop - this.root.offsetTop - 4; }

  show(token) { // scrolls inside the text only, never the page
    const span = this.spans[token], top = span.offsetTop - this.root.offsetTop;
    if (top < this.root.scrollTop || top + span.offsetHeight > this.root.scrollTop + this.root.clientHeight) {
      this.root.scrollTop = top - this.root.clientHeight / 3;
    }
  }

  hover(event) {
    const token = tokenOf(event);
    if (token !== null) this.on.hover(token);
  }

  key(event) {
    const token = tokenOf(event), last = this.spans.length - 1;
    if (token === null) return;
    const moves = {
      ArrowLeft: () => token - 1, ArrowRight: () => token + 1, Home: () => 0, End: () => last,
      ArrowUp: () => this.inNextLine(token, -1), ArrowDown: () => this.inNextLine(token, 1),
    };
    if (event.key in moves) {
      const target = clamp(moves[event.key](), last + 1);
      this.spans[target].focus({ preventScroll: true });
      this.show(target);
    } else if (event.key === "Enter" || event.key === " ") {
      this.on.pick(token);
    } else return;
    event.preventDefault();
  }

  inNextLine(token, direction) { // the token of the neighbouring line that is nearest sideways
    const from = this.spans[token].getBoundingClientRect();
    let line = null, best = token, distance = Infinity;
    for (let t = token + direction; t >= 0 && t < this.spans.length; t += direction) {
      const box = this.spans[t].getBoundingClientRect();
      if (Math.abs(box.top - from.top) < from.height / 2) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > from.height / 2) break;
      if (Math.abs(box.left - from.left) < distance) { best = t; distance = Math.abs(box.left - from.left); }
    }
    return best;
  }
}

function tokenOf(event) {
  const span = event.target.closest?.("[data-t]");
  return span ? Number(span.dataset.t) : null;
}
