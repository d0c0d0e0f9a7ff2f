// mount(place, payload, tell) draws one explorer; mountAll() those of the page whose data lie beside them as JSON.

const SCAFFOLDING = ["bos", "system", "developer", "control"]; // a text opens below these

function mountAll() {
  for (const place of document.querySelectorAll('[data-workbench-explorer="1"]:not([data-mounted])')) {
    place.dataset.mounted = "";
    mount(place, JSON.parse(place.querySelector('script[type="application/json"]').textContent));
  }
}

// Returns { select, destroy }. `tell` hears of every change of the selection: doc_id, pos, layer, expert, or null each.
function mount(place, payload, tell = () => {}) {
  const explorer = new Explorer(place, payload, tell);
  return { select: (selection) => explorer.select(selection), destroy: () => explorer.destroy() };
}

class Explorer {
  constructor(place, payload, tell) {
    Object.assign(this, { place, payload, tell, docs: readDocs(payload), playing: null });
    this.colours = new Colours(payload, this.docs);
    place.classList.add("wbx");
    place.replaceChildren();
    this.stage = element("div", { className: "wbx-stage" });
    this.legend = element("p", { className: "wbx-legend" });
    this.status = element("p", { className: "wbx-status" });
    this.status.setAttribute("role", "status");
    this.card = element("section", { className: "wbx-card", hidden: true });
    const bar = element("div", { className: "wbx-bar" });
    place.append(bar, this.legend, this.stage, this.status, this.card);
    this.bar = new Bar(bar, payload, this.docs, {
      show: (shown) => this.show(shown),
      quantity: (name) => { this.colours.quantity = name; this.refresh(); },
      layer: (layer) => { this.colours.layer = layer; this.refresh(); },
      step: (token) => { this.stop(); this.step(token); },
      move: (by) => { this.stop(); this.step(this.active.text.current + by); },
      written: () => { this.stop(); this.step(Math.max(0, this.active.doc.phases.indexOf("decode"))); },
      play: () => (this.playing === null ? this.play() : this.stop()),
    });
    this.show([0, payload.compare && this.docs.length > 1 ? 1 : null]);
    this.listen();
    this.followHash();
  }

  // ---- what is on the stage

  show(shown) { // places of the left and, unless null, the right document
    this.stop();
    this.shown = shown.filter((place) => place !== null);
    this.pinned = null;
    this.bar.left.value = String(this.shown[0]);
    this.bar.right.value = String(this.shown[1] ?? "");
    this.stage.replaceChildren();
    this.stage.classList.toggle("wbx-two", this.shown.length > 1);
    this.panes = this.shown.map((place) => this.buildPane(place));
    this.active = this.panes[0];
    this.recolour();
    this.panes.forEach((pane) => {
      this.drawMap(pane);
      pane.text.open(Math.max(0, pane.doc.segments.findIndex((name) => !SCAFFOLDING.includes(name))));
    });
    this.follow(this.active);
  }

  buildPane(place) {
    const root = element("div", { className: "wbx-pane" }), doc = this.docs[place], pane = { place, doc, token: null };
    const side = element("div", { className: "wbx-side" }), map = element("div", { className: "wbx-map-place" });
    pane.title = element("p", { className: "wbx-map-title" });
    pane.experts = element("pre", { className: "wbx-experts", tabIndex: 0 });
    pane.list = element("details", {}, element("summary", { textContent: "experts as text" }), pane.experts);
    const textSide = element("div", { className: "wbx-reading" }, element("p", { className: "wbx-title", textContent: doc.label }));
    side.append(pane.title, map, pane.list);
    root.append(textSide, side);
    this.stage.append(root);
    pane.text = new TokenText(textSide, doc, {
      hover: (token) => { if (this.pinned === null && this.playing === null) this.look(pane, token); },
      pick: (token) => this.pin(pane, token),
    });
    pane.map = new ExpertMap(map, this.payload.layers, this.payload.n_experts, {
      hover: (layer, expert) => this.say(layer === null ? "" : this.describeCell(pane, layer, expert)),
      pick: (layer, expert) => this.choose(layer, expert),
    });
    pane.list.addEventListener("toggle", () => this.writeExperts(pane));
    return pane;
  }

  // ---- tokens

  look(pane, token) { // show a token's experts, null: the whole document
    pane.token = token;
    pane.text.mark(token, this.pinned !== null);
    this.drawMap(pane);
    if (token === null) return;
    this.active = pane;
    this.follow(pane);
  }

  pin(pane, token) { // keep a token until it is picked again or Escape
    const again = this.pinned !== null && this.active === pane && pane.token === token;
    this.pinned = again ? null : token;
    this.look(pane, token);
    this.report();
  }

  follow(pane) { // the stepper shows where the active document stands
    this.bar.follow(pane.text.current, pane.doc.nTokens);
  }

  drawMap(pane) {
    const { doc, token } = pane;
    pane.map.draw(token === null ? loadLevels(doc) : tokenLevels(doc, token), this.colours.layer, this.expert);
    pane.title.textContent = token === null
      ? "load over the whole text; full shade: the busiest expert. Layers down, experts across"
      : `${this.describeToken(doc, token)}: shade is the routing weight. Layers down, experts across`;
    if (pane.list.open) this.writeExperts(pane);
  }

  writeExperts(pane) {
    const { doc, token } = pane;
    pane.experts.textContent = token === null ? "point at a token" : expertLines(doc, token, this.payload.layers);
  }

  // ---- experts

  get expert() { return this.colours.expert; } // [place of the layer, expert] that is chosen, or null

  choose(layer, expert) { // light the tokens that an expert took; again: let go
    this.colours.choose(layer, expert);
    this.refresh();
    this.report();
  }

  refresh() {
    this.recolour();
    this.panes.forEach((pane) => this.drawMap(pane));
    this.card.hidden = !this.expert;
    if (this.expert) fillCard(this.card, this.docs, this.payload.layers, ...this.expert);
  }

  // ---- colours

  recolour() {
    const lists = this.panes.map((pane) => this.colours.values(pane.place, this.shown)), range = this.colours.range(lists);
    this.panes.forEach((pane, i) => { pane.values = lists[i]; pane.text.colour(lists[i], range, this.colours.floor); });
    this.place.classList.toggle("wbx-by-segment", this.colours.quantity === "segment");
    this.bar.quantity.value = this.colours.quantity;
    this.bar.layer.disabled = ["expert", "segment"].includes(this.colours.quantity);
    this.colours.explain(this.legend, range, this.shown, lists);
  }

  // ---- words

  describeToken(doc, token) {
    const value = this.panes.find((pane) => pane.doc === doc)?.values?.[token], { unit } = this.colours.meaning(this.shown);
    const measured = value === undefined || Number.isNaN(value) ? "" : `, ${number(value)}${unit ? ` ${unit}` : ""}`;
    const text = doc.tokens[token] || "(byte)";
    return `“${text}” at ${doc.pos[token]} (id ${doc.token_ids[token]}, ${doc.segments[token]}, ${doc.phases[token]}${measured})`;
  }

  describeCell(pane, layer, expert) {
    const name = `layer ${this.payload.layers[layer]}, expert ${expert}`, { doc, token } = pane;
    const taken = expertWeights(doc, layer, expert).reduce((n, weight) => n + !Number.isNaN(weight), 0);
    const own = token === null ? undefined : expertsOf(doc, token, layer).find(([id]) => id === expert);
    return `${name}: ${own ? `weight ${own[1].toFixed(2)} here, ` : ""}took ${taken} of ${doc.nTokens} tokens`;
  }

  say(text) { this.status.textContent = text; }

  // ---- stepping

  step(token) { // stands at a token as the model did: what comes later is dimmed
    const pane = this.active;
    this.pinned = clamp(token, pane.doc.nTokens);
    this.place.classList.add("wbx-stepping");
    this.look(pane, this.pinned);
    pane.text.show(this.pinned);
    this.report();
  }

  play() {
    this.bar.playing(true);
    this.playing = setInterval(() => {
      const next = this.active.text.current + 1;
      if (!this.place.isConnected || next >= this.active.doc.nTokens) this.stop();
      else this.step(next);
    }, 200);
  }

  stop() {
    clearInterval(this.playing);
    this.playing = null;
    this.bar.playing(false);
  }

  // ---- from and to the outside

  letGo() {
    this.stop();
    this.place.classList.remove("wbx-stepping");
    this.pinned = null;
    this.panes.forEach((pane) => this.look(pane, null));
    if (this.expert) this.choose(...this.expert);
    else this.report();
  }

  report() {
    const token = this.pinned, { doc } = this.active, [layer, expert] = this.expert ?? [null, null];
    const selection = {
      doc_id: token === null ? null : doc.doc_id, pos: token === null ? null : doc.pos[token],
      layer: layer === null ? null : this.payload.layers[layer], expert,
    };
    this.place.dispatchEvent(new CustomEvent("workbench-explorer-select", { bubbles: true, detail: selection }));
    this.tell(selection);
  }

  select({ doc_id, pos, layer, expert }) { // the same selection as `report` gives, without reporting it back
    const tell = this.tell, place = this.docs.findIndex((doc) => doc.doc_id === doc_id);
    this.tell = () => {};
    const row = this.payload.layers.indexOf(layer), known = row >= 0 && expert >= 0 && expert < this.payload.n_experts;
    if (known && String(this.expert) !== String([row, expert])) this.choose(row, expert);
    if (!known && this.expert) this.choose(...this.expert);
    if (place >= 0) {
      if (!this.shown.includes(place)) this.show([place, this.shown[1] ?? null]);
      const pane = this.panes.find((candidate) => candidate.place === place), token = pane.doc.pos.indexOf(pos);
      if (token >= 0) { this.pinned = token; this.look(pane, token); pane.text.show(token); }
    }
    if (doc_id === null) { this.pinned = null; this.panes.forEach((pane) => this.look(pane, null)); }
    this.tell = tell;
  }

  listen() {
    const restyle = () => this.panes.forEach((pane) => pane.map.restyle());
    const scheme = matchMedia("(prefers-color-scheme: dark)"), hash = () => this.followHash();
    const theme = new MutationObserver(restyle), width = new ResizeObserver(restyle);
    scheme.addEventListener("change", restyle);
    theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"] });
    width.observe(this.stage);
    window.addEventListener("hashchange", hash);
    this.place.addEventListener("workbench-explorer-choose", (event) => this.select(event.detail));
    this.place.addEventListener("keydown", (event) => { if (event.key === "Escape") this.letGo(); });
    this.destroy = () => {
      this.stop();
      scheme.removeEventListener("change", restyle);
      theme.disconnect();
      width.disconnect();
      window.removeEventListener("hashchange", hash);
    };
  }

  followHash() { // a link to #expert-L-E anywhere on the page lights that expert here
    const [, layer, expert] = /^#expert-(\d+)-(\d+)$/.exec(location.hash) ?? [];
    if (layer !== undefined) this.select({ layer: Number(layer), expert: Number(expert) });
  }
}
