// The data of an explorer, and its arithmetic: no page in here. Arrays are flat; shapes are given as [token layer k].

const MISSING = 65535;
const FLOOR = 0.25; // shade of a routing weight of nothing

function decodeBytes(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

function decodeUint16(text) {
  const bytes = decodeBytes(text), values = new Uint16Array(bytes.length / 2);
  for (let i = 0; i < values.length; i++) values[i] = bytes[2 * i] | (bytes[2 * i + 1] << 8);
  return values;
}

// The documents with their arrays unpacked; every one knows its sizes, so that functions need nothing else.
function readDocs(payload) {
  return payload.docs.map((doc) => {
    const segments = [], phases = [];
    for (const [segment, phase, count] of doc.runs) {
      for (let i = 0; i < count; i++) { segments.push(segment); phases.push(phase); }
    }
    return {
      ...doc, segments, phases, nTokens: doc.tokens.length,
      nLayers: payload.layers.length, nExperts: payload.n_experts, k: payload.k, scale: payload.weight_scale / 255,
      ids: payload.n_experts <= 256 ? decodeBytes(doc.ids) : decodeUint16(doc.ids),
      weights: decodeBytes(doc.weights),
      values: decodeUint16(doc.values),
    };
  });
}

// The experts of one token in one layer, strongest first: [[expert, weight], ...].
function expertsOf(doc, token, layer) {
  const start = (token * doc.nLayers + layer) * doc.k;
  return Array.from({ length: doc.k }, (_, k) => [doc.ids[start + k], doc.weights[start + k] * doc.scale]);
}

// One number per token; layer -1 is the mean over the layers that have a value. NaN: no value.
function overLayers(nTokens, nLayers, layer, at) {
  const values = new Float32Array(nTokens);
  for (let t = 0; t < nTokens; t++) {
    if (layer >= 0) { values[t] = at(t * nLayers + layer); continue; }
    let sum = 0, count = 0;
    for (let l = 0; l < nLayers; l++) {
      const value = at(t * nLayers + l);
      if (!Number.isNaN(value)) { sum += value; count++; }
    }
    values[t] = count ? sum / count : NaN;
  }
  return values;
}

function quantityValues(doc, quantities, place, layer) {
  const { low, high } = quantities[place], offset = place * doc.nTokens * doc.nLayers;
  const at = (i) => {
    const step = doc.values[offset + i];
    return step === MISSING ? NaN : low + (step / (MISSING - 1)) * (high - low);
  };
  return overLayers(doc.nTokens, doc.nLayers, layer, at);
}

// Weight of one expert for every token; NaN where the expert did not work on it.
function expertWeights(doc, layer, expert) {
  const values = new Float32Array(doc.nTokens).fill(NaN);
  for (let t = 0; t < doc.nTokens; t++) {
    const start = (t * doc.nLayers + layer) * doc.k;
    for (let k = 0; k < doc.k; k++) if (doc.ids[start + k] === expert) values[t] = doc.weights[start + k] * doc.scale;
  }
  return values;
}

// Token-slots of every expert: [layer expert].
function slotCounts(doc) {
  const counts = new Float64Array(doc.nLayers * doc.nExperts), width = doc.nLayers * doc.k;
  for (let i = 0; i < doc.ids.length; i++) counts[Math.floor((i % width) / doc.k) * doc.nExperts + doc.ids[i]]++;
  return counts;
}

// Shades of the map, [layer expert] with NaN where there is nothing: the routing weights of one token ...
function tokenLevels(doc, token) {
  const levels = new Float32Array(doc.nLayers * doc.nExperts).fill(NaN);
  for (let layer = 0; layer < doc.nLayers; layer++) {
    const start = (token * doc.nLayers + layer) * doc.k;
    for (let k = 0; k < doc.k; k++) {
      levels[layer * doc.nExperts + doc.ids[start + k]] = FLOOR + (1 - FLOOR) * (doc.weights[start + k] / 255);
    }
  }
  return levels;
}

// ... or the load over a whole document, the busiest expert at 1.
function loadLevels(doc) {
  if (!doc.load) {
    const counts = slotCounts(doc), most = counts.reduce((a, b) => Math.max(a, b), 1);
    doc.load = Float32Array.from(counts, (count) => (count ? 0.08 + 0.92 * (count / most) : NaN));
  }
  return doc.load;
}

// The experts of one token as text, a line per layer.
function expertLines(doc, token, layers) {
  const named = ([expert, weight]) => `${expert} (${weight.toFixed(2)})`;
  return layers.map((name, layer) => `layer ${name}: ${expertsOf(doc, token, layer).map(named).join("  ")}`).join("\n");
}

// Mean share of the weight that each expert gets, [layer expert], by segment; "" is the whole document.
function meanRouting(doc) {
  const size = doc.nLayers * doc.nExperts, sums = new Map(), counts = new Map();
  for (let t = 0; t < doc.nTokens; t++) {
    for (const name of ["", doc.segments[t]]) {
      if (!sums.has(name)) { sums.set(name, new Float64Array(size)); counts.set(name, 0); }
      const sum = sums.get(name);
      counts.set(name, counts.get(name) + 1);
      for (let l = 0; l < doc.nLayers; l++) {
        const start = (t * doc.nLayers + l) * doc.k, total = slotTotal(doc, start);
        for (let k = 0; k < doc.k; k++) sum[l * doc.nExperts + doc.ids[start + k]] += slotShare(doc, start + k, total);
      }
    }
  }
  for (const [name, sum] of sums) for (let i = 0; i < size; i++) sum[i] /= counts.get(name);
  return sums;
}

function slotTotal(doc, start) {
  let total = 0;
  for (let k = 0; k < doc.k; k++) total += doc.weights[start + k];
  return total;
}

function slotShare(doc, slot, total) {
  return total ? doc.weights[slot] / total : 1 / doc.k;
}

// Jensen-Shannon divergence in bits between a token's routing weights and their mean over the same segment of `other`
// (over all of it where it has no such segment); layer -1 is the mean over layers. 0: same experts, 1: none in common.
function divergenceValues(doc, other, layer) {
  const means = meanRouting(other);
  return overLayers(doc.nTokens, doc.nLayers, layer, (i) => {
    const token = Math.floor(i / doc.nLayers), row = (i % doc.nLayers) * doc.nExperts, start = i * doc.k;
    const mean = means.get(doc.segments[token]) ?? means.get(""), total = slotTotal(doc, start);
    let bits = 0, rest = 1;
    for (let k = 0; k < doc.k; k++) {
      const p = slotShare(doc, start + k, total), q = mean[row + doc.ids[start + k]], middle = (p + q) / 2;
      if (p > 0) bits += p * Math.log2(p / middle);
      if (q > 0) bits += q * Math.log2(q / middle);
      rest -= q;
    }
    return Math.min(1, Math.max(0, (bits + Math.max(0, rest)) / 2)); // an expert only the mean has adds q log2(q / (q/2))
  });
}

// The document that says the same in the other language at the same effort, else any other of its group, else null.
function pairOf(docs, place) {
  const doc = docs[place], rest = docs.filter((other) => other !== doc && other.group_id === doc.group_id);
  const pair = rest.find((other) => other.lang !== doc.lang && other.effort === doc.effort) ?? rest[0];
  return pair ? docs.indexOf(pair) : null;
}

// The values between which colours run: the 2nd and the 98th percentile, so that one outlier does not wash out the rest.
function colourRange(lists) {
  const finite = lists.flatMap((values) => Array.from(values)).filter((value) => !Number.isNaN(value)).sort((a, b) => a - b);
  if (!finite.length) return null;
  const at = (share) => finite[Math.round(share * (finite.length - 1))];
  return [at(0.02), at(0.98)];
}

// What one expert of one layer did in `docs`: its load, its tokens by text, and its share by language and segment.
function expertCard(docs, layer, expert, nTop = 8) {
  const texts = new Map(), langs = new Map(), segments = new Map();
  const add = (map, name, taken) => {
    const entry = map.get(name) ?? { name, taken: 0, total: 0 };
    entry.taken += taken; entry.total += 1;
    map.set(name, entry);
  };
  let nTokens = 0, nTaken = 0;
  for (const doc of docs) {
    const weights = expertWeights(doc, layer, expert);
    for (let t = 0; t < doc.nTokens; t++) {
      const taken = Number.isNaN(weights[t]) ? 0 : 1;
      nTokens++; nTaken += taken;
      add(texts, doc.tokens[t], taken); add(langs, doc.lang, taken); add(segments, doc.segments[t], taken);
    }
  }
  const byTaken = (a, b) => b.taken - a.taken || b.taken / b.total - a.taken / a.total || (a.name < b.name ? -1 : 1);
  const listed = (map) => [...map.values()].sort(byTaken);
  const { k, nExperts } = docs[0];
  return {
    nTokens, nTaken, ratio: (nTaken / nTokens) * (nExperts / k),
    top: listed(texts).filter((entry) => entry.taken).slice(0, nTop), langs: listed(langs), segments: listed(segments),
  };
}
