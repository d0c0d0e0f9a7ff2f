// Around the texts and maps: the bar of controls, and the card of the chosen expert.

// on: show([left, right]), quantity(name), layer(place), step(token), written(), move(by), play(): what the controls ask for.
class Bar {
  constructor(place, payload, docs, on) {
    Object.assign(this, { place, on });
    const names = docs.map((doc, i) => [String(i), doc.label]);
    const colours = payload.quantities.map(({ label }, i) => [String(i), label]);
    colours.push(["expert", "weight of the chosen expert"], ["segment", "part of the conversation"]);
    if (docs.length > 1) colours.push(["pair", "divergence from the pair"]);
    const show = () => on.show([this.left.value, this.right.value].map((value) => (value === "" ? null : Number(value))));
    this.left = this.selector("text", names, show);
    this.right = this.selector("beside", [["", "nothing"], ...names], show);
    this.right.parentElement.hidden = docs.length < 2;
    this.quantity = this.selector("colour", colours, () => on.quantity(this.quantity.value));
    const layers = [["-1", "mean of all"], ...payload.layers.map((name, i) => [String(i), String(name)])];
    this.layer = this.selector("layer", layers, () => on.layer(Number(this.layer.value)));
    this.buildStepper();
  }

  selector(label, options, change) {
    const select = element("select", {}, ...options.map(([value, textContent]) => element("option", { value, textContent })));
    select.addEventListener("change", change);
    this.place.append(element("label", {}, `${label} `, select));
    return select;
  }

  buildStepper() {
    this.slider = element("input", { type: "range", min: "0", ariaLabel: "token" });
    this.slider.addEventListener("input", () => this.on.step(Number(this.slider.value)));
    this.play = this.button("▶", "play from here", () => this.on.play());
    this.count = element("span", { className: "wbx-place" });
    this.place.append(element("span", { className: "wbx-steps" },
      this.button("written", "to the first token written by the model", () => this.on.written()),
      this.button("‹", "one token back", () => this.on.move(-1)), this.play,
      this.button("›", "one token on", () => this.on.move(1)), this.slider, this.count));
  }

  button(textContent, name, click) {
    const made = element("button", { type: "button", textContent, ariaLabel: name, title: name });
    made.addEventListener("click", click);
    return made;
  }

  follow(token, nTokens) {
    this.slider.max = String(nTokens - 1);
    this.slider.value = String(token);
    this.count.textContent = `${token + 1} / ${nTokens}`;
  }

  playing(runs) {
    this.play.textContent = runs ? "⏸" : "▶";
    this.play.ariaLabel = this.play.title = runs ? "pause" : "play from here";
  }
}

// The facts of one expert over the documents of the view; jumps to a card of the page with the id expert-LAYER-EXPERT.
function fillCard(card, docs, layers, layer, expert) {
  const facts = expertCard(docs, layer, expert), anchor = `expert-${layers[layer]}-${expert}`;
  const share = ({ name, taken, total }) => `${name ?? "other"} ${percent(taken / total)} (${taken} of ${total})`;
  const line = (title, ...content) => element("li", {}, element("strong", { textContent: `${title}: ` }), ...content);
  const heading = element("h3", { textContent: `Layer ${layers[layer]}, expert ${expert}` });
  if (document.getElementById(anchor)) heading.append(" ", element("a", { href: `#${anchor}`, textContent: "to its card" }));
  const load = `${percent(facts.nTaken / facts.nTokens)} of ${facts.nTokens} tokens, ${facts.ratio.toFixed(2)} × an equal share`;
  const top = facts.top.flatMap(({ name, taken, total }) =>
    [element("span", { className: "wbx-chip", textContent: name || "(byte)" }), ` ${taken} of ${total}   `]);
  card.replaceChildren(heading, element("ul", {},
    line("load", load), line("languages", facts.langs.map(share).join("; ")),
    line("segments", facts.segments.map(share).join("; ")), line("most taken", ...(top.length ? top : ["no token"]))),
  element("p", { className: "wbx-soft", textContent: `Counted over the ${docs.length} documents of this view.` }));
}

function percent(share) { return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`; }

function number(value) { return Number(value.toPrecision(3)).toString(); }
