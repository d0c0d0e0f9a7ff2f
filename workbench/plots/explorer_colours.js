// What the colours of the tokens stand for: a number of the routing, the weight of the chosen expert, the part of the
// conversation, or the divergence from a paired text.

class Colours {
  // quantity: the place of a number of the routing as text, "expert", "segment" or "pair"; layer: its place, -1 the mean.
  constructor(payload, docs) {
    Object.assign(this, { payload, docs, layer: -1, expert: null, before: null });
    this.quantity = payload.quantities.length ? "0" : "segment";
  }

  choose(layer, expert) { // again the same: let go, back to the colours from before
    const again = this.expert && this.expert[0] === layer && this.expert[1] === expert;
    this.expert = again ? null : [layer, expert];
    if (!again) this.before ??= this.quantity;
    this.quantity = again ? (this.before ?? this.quantity) : "expert";
    if (again) this.before = null;
  }

  // One number per token of the document at `place` (NaN: no colour), or null; `shown` are the places on the stage.
  values(place, shown) {
    const doc = this.docs[place];
    if (this.quantity === "expert") return this.expert && expertWeights(doc, ...this.expert);
    if (this.quantity === "pair") {
      const other = this.pair(place, shown);
      return other === null ? null : divergenceValues(doc, this.docs[other], this.layer);
    }
    return this.quantity === "segment" ? null : quantityValues(doc, this.payload.quantities, Number(this.quantity), this.layer);
  }

  pair(place, shown) {
    if (shown.length < 2) return pairOf(this.docs, place);
    return shown[0] === place ? shown[1] : shown[0];
  }

  range(lists) { // [low, high] of the colours, or null
    if (this.quantity === "expert") return [0, this.payload.weight_scale];
    const found = lists.filter(Boolean);
    return found.length ? colourRange(found) : null;
  }

  get floor() { return this.quantity === "expert" ? FLOOR : 0; } // a token that an expert took at a small weight is seen too

  explain(legend, range, shown, lists) {
    const { title, unit } = this.meaning(shown);
    legend.replaceChildren(title);
    const ramp = element("span", { className: "wbx-ramp" });
    ramp.style.setProperty("--v", `${100 * this.floor}%`);
    if (range) legend.append(` ${number(range[0])} `, ramp, ` ${number(range[1])} ${unit}`);
    if (this.quantity === "expert" && this.expert) {
      const taken = lists.map((values) => `${values.reduce((n, v) => n + !Number.isNaN(v), 0)} of ${values.length}`);
      legend.append(`; it took ${taken.join(" and ")} tokens`);
    }
  }

  meaning(shown) {
    const where = this.layer < 0 ? "mean over layers" : `layer ${this.payload.layers[this.layer]}`;
    if (this.quantity === "segment") return { title: "colour: part of the conversation", unit: "" };
    if (this.quantity === "pair") {
      const other = this.pair(shown[0], shown);
      if (other === null) return { title: "no document to compare with", unit: "" };
      const with_ = shown.length > 1 ? "the other document" : this.docs[other].label;
      return { title: `divergence from the same segment of ${with_} (${where}, 2nd to 98th percentile)`, unit: "bits" };
    }
    if (this.quantity !== "expert") {
      const { label, unit } = this.payload.quantities[Number(this.quantity)];
      return { title: `${label} (${where}, 2nd to 98th percentile)`, unit };
    }
    if (!this.expert) return { title: "click an expert on the map to see the tokens it took", unit: "" };
    return { title: `weight of layer ${this.payload.layers[this.expert[0]]} expert ${this.expert[1]}`, unit: "" };
  }
}
