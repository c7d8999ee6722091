import assert from "node:assert/strict";
import { test } from "node:test";

import { Data, histogram } from "../../dmpipeline/report/explorer/src/data.js";

const shaped = (array, shape) => Object.assign(array, { shape });

function small() {
  return new Data(
    { n_train: 4, n_targets: 3, classes: ["cat", "dog"], is_regression: false, is_margin: true, retrained: { 0: [{ k: 0, kind: "full" }, { k: 2, kind: "helper" }, { k: 1, kind: "harmer" }] } },
    {
      removal_k: new Int32Array([0, 1, 2, 3, 4]),
      helper_index: shaped(new Uint16Array([2, 0, 1, 3, 0, 0]), [3, 2]),
      helper_weight: shaped(new Float32Array([2, 1, 0.5, 0.25, 0, 0]), [3, 2]),
      helper_stable: shaped(new Uint8Array([2, 1, 0, 255, 255, 255]), [3, 2]),
      helper_count: new Uint16Array([2, 2, 0]),
      helper_total: new Int32Array([2, 3, 0]),
      helper_drop: shaped(new Float32Array([0, 2, 3, 3, 3, 0, 0.5, 0.75, 0.875, 0.875, 0, 0, 0, 0, 0]), [3, 5]),
      harmer_index: shaped(new Uint16Array([1, 0, 2, 0, 2, 0]), [3, 2]),
      harmer_weight: shaped(new Float32Array([-3, 0, -1, 0, -0.5, 0]), [3, 2]),
      harmer_count: new Uint16Array([1, 1, 1]),
      harmer_total: new Int32Array([1, 1, 1]),
      harmer_drop: shaped(new Float32Array(15), [3, 5]),
      target_full: new Float32Array([2.5, -1, 4]),
      target_lds: new Float32Array([0.9, NaN, 0.2]),
      target_label: new Int32Array([1, 0, 1]),
      train_label: new Int32Array([0, 1, 1, 0]),
      support: new Int32Array([2, 0, -1]),
    },
  );
}

test("a target's helpers come with weight and stability, and no more than it has", () => {
  assert.deepEqual(small().influences(0, "helper"), [{ rank: 0, index: 2, weight: 2, stable: 2 }, { rank: 1, index: 0, weight: 1, stable: 1 }]);
  assert.deepEqual(small().influences(1, "helper").map((row) => row.stable), [0, null]);
  assert.deepEqual(small().influences(2, "helper"), []);
});

test("without its first helpers a target is predicted at what they add up to less", () => {
  const data = small();
  assert.deepEqual(data.stepsOf(0, "helper"), [0, 1, 2]);
  assert.equal(data.predicted(0, "helper", 2), -0.5);
  assert.deepEqual(data.stepsOf(2, "helper"), [0]);
});

test("the reverse lists every target that lists an example, the strongest weight first", () => {
  const data = small();
  assert.deepEqual(data.leaning(1), [{ index: 0, weight: -3 }, { index: 1, weight: 0.5 }]);
  assert.deepEqual(data.leaning(3), [{ index: 1, weight: 0.25 }]);
  assert.deepEqual(data.leaning(0), [{ index: 0, weight: 1 }]);
});

test("targets are ordered by what is asked, those of which it is not known last", () => {
  const data = small();
  assert.deepEqual(data.ordered("hardest", [0, 1, 2]), [1, 0, 2]);
  assert.deepEqual(data.ordered("worst", [0, 1, 2]), [2, 0, 1]);
  assert.deepEqual(data.ordered("brittle", [0, 1, 2]), [1, 0, 2]);
});

test("a search finds a number itself, and labels that hold a text", () => {
  const data = small();
  assert.deepEqual(data.found("targets", "1", ""), [1]);
  assert.deepEqual(data.found("targets", " DO ", ""), [0, 2]);
  assert.deepEqual(data.found("train", "", "0"), [0, 3]);
});

test("of measured sets those of the kind asked for are shown, and the full set", () => {
  assert.deepEqual(small().retrained(0, "helper").map(({ k }) => k), [0, 2]);
  assert.deepEqual(small().retrained(1, "helper"), []);
});

test("a target that flips only without all its helpers can be shown without all", () => {
  assert.deepEqual(small().stepsOf(1, "helper"), [0, 1, 2, 3]);
  assert.equal(small().predicted(1, "helper", 3), -1.875);
});

test("a page of some targets names them by their own numbers", () => {
  const data = small();
  data.facts.target_numbers = [100, 7, 42];
  assert.equal(data.address({ view: "target", index: 2, k: 5 }), "#target=42&k=5");
  assert.deepEqual(data.route("#target=42&k=5"), { view: "target", index: 2, k: "5" });
  assert.deepEqual(data.route("#target=2"), { view: "targets", missing: "2" });
  assert.deepEqual(data.found("targets", "7", ""), [1]);
});

test("of a squared error the largest is the hardest, and nobody helps", () => {
  const data = small();
  data.facts.better = "lower";
  assert.deepEqual(data.ordered("hardest", [0, 1, 2]), [2, 0, 1]);
  assert.equal(data.kinds.helper.title, "Raise it most");
});

test("the support curve counts targets that are wrong as they are, and never those that do not flip", () => {
  assert.deepEqual(small().supportCurve(), [[0, 1 / 3], [2, 2 / 3]]);
});

test("a histogram counts every value once, its ends included", () => {
  const bins = histogram(new Float32Array([0, 0.5, 1, NaN, 2]), 0, 1, 2);
  assert.deepEqual(bins.map(({ members }) => members), [[0], [1, 2]]);
});
