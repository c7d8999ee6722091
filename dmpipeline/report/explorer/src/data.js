// Answers to what the views ask, from the facts and arrays that Python wrote; no element of the page is touched here.

import { readRoute, writeRoute } from "./route.js";

/** What all views read. */
export class Data {
  constructor(facts, arrays) {
    this.facts = facts;
    this.arrays = arrays;
    this.nTrain = facts.n_train;
    this.nTargets = facts.n_targets;
  }

  /** What a target is numbered: the page may hold some targets of many. */
  number(part, index) {
    const numbers = part === "train" ? null : this.facts.target_numbers;
    return numbers ? numbers[index] : index;
  }

  /** The address of a view of the page; examples are named by their numbers. */
  address({ view, index, ...options }) {
    return writeRoute({ view, index: view === "target" ? this.number("targets", index) : index, ...options });
  }

  /** What an address names; see `readRoute`. */
  route(hash) {
    const numbers = this.facts.target_numbers;
    const counts = { targets: numbers ? Math.max(...numbers) + 1 : this.nTargets, train: this.nTrain };
    const route = readRoute(hash, counts);
    if (!numbers || route.view !== "target") return route;
    const index = numbers.indexOf(route.index);
    return index < 0 ? { view: "targets", missing: String(route.index) } : { ...route, index };
  }

  /** What examples of each kind are called: helpers and harmers, where more of the output is better. */
  get kinds() {
    return this.facts.better === "higher"
      ? { helper: { title: "Help most", many: "helpers" }, harmer: { title: "Hurt most", many: "harmers" } }
      : {
          helper: { title: "Raise it most", many: "examples that raise it" },
          harmer: { title: "Lower it most", many: "examples that lower it" },
        };
  }

  /** The label of an example as the user calls it, or null. */
  label(part, index) {
    const labels = this.arrays[part === "train" ? "train_label" : "target_label"];
    if (!labels) return null;
    const value = labels[index];
    const { classes } = this.facts;
    return classes ? classes[value] : this.facts.is_regression ? Number(value.toPrecision(4)) : value;
  }

  /** A value of an array with an entry a target, null where it is not known. */
  of(name, target) {
    const values = this.arrays[name];
    return values && !Number.isNaN(values[target]) ? values[target] : null;
  }

  /** How many examples of a kind the datamodel of a target lists here. */
  influences(target, kind) {
    const { [`${kind}_index`]: indices, [`${kind}_weight`]: weights, [`${kind}_count`]: counts } = this.arrays;
    const stable = this.arrays[`${kind}_stable`];
    const width = indices.shape[1];
    return Array.from({ length: counts[target] }, (_, rank) => {
      const place = target * width + rank;
      return {
        rank,
        index: indices[place],
        weight: weights[place],
        stable: stable && stable[place] !== 255 ? stable[place] : null,
      };
    });
  }

  /** Numbers of removed examples for which an output is known, rising from 0. */
  get steps() {
    return this.arrays.removal_k;
  }

  /** The largest number of removals that means something for a target: all its helpers, or all its harmers. */
  stepsOf(target, kind) {
    const most = this.arrays[`${kind}_total`][target];
    const steps = Array.from(this.steps).filter((k) => k < most);
    return [...steps, most];
  }

  /** The predicted output of a target after removing the first k of its helpers or harmers; k is one of `stepsOf`. */
  predicted(target, kind, k) {
    const drop = this.arrays[`${kind}_drop`];
    const place = this.steps.findIndex((step) => step >= k); // beyond its last one nothing is left to remove
    return this.arrays.target_full[target] - drop[target * drop.shape[1] + place];
  }

  /** Measured outputs of models that were trained without the first k helpers or harmers: {k, mean, low, high, n}. */
  retrained(target, kind) {
    return (this.facts.retrained[target] ?? []).filter((dot) => dot.kind === kind || dot.k === 0);
  }

  /** Whether the prediction on a target is right, by its measured or predicted output on the full set; null if unknown. */
  isRight(target) {
    if (!this.facts.is_margin) return null;
    return (this.of("target_mean", target) ?? this.arrays.target_full[target]) > 0;
  }

  /** How many removals flip the prediction: 0 where it is wrong as it is, null where none suffice. */
  support(target) {
    const sizes = this.arrays.support;
    return !sizes || sizes[target] < 0 ? null : sizes[target];
  }

  /** Targets that list a training example among their largest weights, strongest first. */
  leaning(example) {
    this.reverse ??= this.#reversed();
    const { start, target, weight } = this.reverse;
    const found = [];
    for (let place = start[example]; place < start[example + 1]; place++)
      found.push({ index: target[place], weight: weight[place] });
    return found.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  }

  #reversed() {
    const start = new Uint32Array(this.nTrain + 2);
    const kinds = ["helper", "harmer"];
    const each = (use) => {
      for (const kind of kinds)
        for (let target = 0; target < this.nTargets; target++)
          for (const { index, weight } of this.influences(target, kind)) use(index, target, weight);
    };
    each((index) => start[index + 2]++);
    for (let i = 2; i < start.length; i++) start[i] += start[i - 1];
    const target = new Uint32Array(start[start.length - 1]);
    const weight = new Float32Array(target.length);
    each((index, of, value) => {
      const place = start[index + 1]++;
      target[place] = of;
      weight[place] = value;
    });
    return { start, target, weight };
  }

  /** Targets in an order: by index, "hardest", "worst" predicted by its datamodel (LDS), or most "brittle". */
  ordered(order, targets) {
    const key = {
      index: (t) => t,
      hardest: (t) => (this.facts.better === "lower" ? -1 : 1) * (this.of("target_mean", t) ?? this.arrays.target_full[t]),
      worst: (t) => this.of("target_lds", t) ?? Infinity,
      brittle: (t) => this.support(t) ?? Infinity,
    }[order];
    return targets.map((t) => [key(t), t]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, t]) => t);
  }

  /** Examples of a part whose index, label or words hold a text, of one class if one is given. */
  found(part, text, label) {
    const count = part === "train" ? this.nTrain : this.nTargets;
    const wanted = text.trim().toLowerCase();
    const indices = [];
    for (let index = 0; index < count; index++) {
      if (label !== "" && String(this.arrays[part === "train" ? "train_label" : "target_label"][index]) !== label) continue;
      const own = this.label(part, index);
      const words = this.words(part, index);
      if (wanted && String(this.number(part, index)) !== wanted && !`${own ?? ""} ${words}`.toLowerCase().includes(wanted)) continue;
      indices.push(index);
    }
    return indices;
  }

  /** What an example says, in words: a text's tokens, or the first columns of a table. */
  words(part, index) {
    return this.facts.words?.[part]?.[index] ?? "";
  }

  /** Values of a table's columns. */
  features(part, index) {
    const values = this.arrays[`${part}_features`];
    if (!values) return null;
    const width = values.shape[1];
    return Array.from(values.subarray(index * width, (index + 1) * width));
  }

  /** Labels of a part for a choice, as {value, name}; null where they are numbers of a regression, or too many. */
  choices(part = "targets") {
    const labels = this.arrays[part === "train" ? "train_label" : "target_label"];
    if (!labels || this.facts.is_regression) return null;
    const found = [...new Set(labels)].sort((a, b) => a - b);
    const named = (value) => String(this.facts.classes ? this.facts.classes[value] : value) || "(no name)";
    return found.length > 400 ? null : found.map((value) => ({ value: String(value), name: named(value) }));
  }

  /** Share of targets that flip within k removals by the estimate, at each k where it rises: [k, share]. */
  supportCurve() {
    const sizes = [...this.arrays.support].filter((size) => size >= 0).sort((a, b) => a - b);
    const points = [];
    sizes.forEach((size, place) => {
      const share = (place + 1) / this.nTargets;
      if (points.at(-1)?.[0] === size) points.at(-1)[1] = share;
      else points.push([size, share]);
    });
    return points;
  }
}

/** Counts of values in equal bins from low to high; what is not known is left out. */
export function histogram(values, low, high, nBins) {
  const bins = Array.from({ length: nBins }, (_, i) => ({
    from: low + ((high - low) * i) / nBins,
    to: low + ((high - low) * (i + 1)) / nBins,
    members: [],
  }));
  values.forEach((value, index) => {
    if (Number.isNaN(value) || value < low || value > high) return;
    bins[Math.min(nBins - 1, Math.floor(((value - low) / (high - low)) * nBins))].members.push(index);
  });
  return bins;
}
