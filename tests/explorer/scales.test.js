import assert from "node:assert/strict";
import { test } from "node:test";

import { line, scaleOf, ticksOf } from "../../dmpipeline/report/explorer/src/scales.js";

test("a scale goes from end to end, and back", () => {
  for (const [ends, log] of [[[-3, 5], false], [[250, 4000], true]]) {
    const scale = scaleOf(ends, [40, 400], log);
    assert.ok(Math.abs(scale(ends[0]) - 40) < 1e-9);
    assert.ok(Math.abs(scale(ends[1]) - 400) < 1e-9);
    assert.ok(Math.abs(scale.invert(scale(1000)) - 1000) < 1e-6);
  }
  assert.ok(Math.abs(scaleOf([1, 100], [0, 2], true)(10) - 1) < 1e-12);
});

test("a single value has a place, not a division by nothing", () => {
  assert.equal(scaleOf([2, 2], [0, 10])(2), 0);
});

test("ticks of a logarithmic scale are 1, 2 and 5 times powers of ten within it", () => {
  assert.deepEqual(ticksOf([250, 4000], 5, true), [500, 1000, 2000]);
  assert.deepEqual(ticksOf([0, 1], 5), [0, 0.2, 0.4, 0.6, 0.8, 1]);
});

test("a stepped line holds each value up to the next", () => {
  const same = (value) => value;
  assert.equal(line([[0, 1], [2, 3]], same, same), "M0.0 1.0L2.0 3.0");
  assert.equal(line([[0, 1], [2, 3]], same, same, true), "M0.0 1.0H2.0V3.0");
});
