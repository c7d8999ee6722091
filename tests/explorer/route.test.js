import assert from "node:assert/strict";
import { test } from "node:test";

import { readRoute, writeRoute } from "../../dmpipeline/report/explorer/src/route.js";

const counts = { targets: 10, train: 20 };

test("an address names a view, an example and options, and is read back as it was written", () => {
  for (const route of [{ view: "overview" }, { view: "target", index: 3, k: "20" }, { view: "train", index: 19 }, { view: "targets", q: "a&b =c", order: "worst" }])
    assert.deepEqual(readRoute(writeRoute(route), counts), route);
});

test("an example that there is not leads to the list, which says so", () => {
  assert.deepEqual(readRoute("#target=10", counts), { view: "targets", missing: "10" });
  assert.deepEqual(readRoute("#train=-1", counts), { view: "training", missing: "-1" });
  assert.deepEqual(readRoute("#target=1e1", counts), { view: "targets", missing: "1e1" });
});

test("an option is never taken for the view or the example", () => {
  assert.deepEqual(readRoute("#target=3&view=map&index=5", counts), { view: "target", index: 3 });
});

test("anything else is the overview", () => {
  for (const hash of ["", "#", "#nothing", "#__proto__=1", "#constructor"]) assert.deepEqual(readRoute(hash, counts), { view: "overview" });
});
