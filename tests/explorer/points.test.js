import assert from "node:assert/strict";
import { test } from "node:test";

import { contains, discOf, packed, paint } from "../../dmpipeline/report/explorer/src/points.js";

test("a colour is packed as the pixels of a canvas lie in memory", () => {
  const bytes = new Uint8Array(new Uint32Array([packed(" #123456")]).buffer);
  assert.deepEqual([...bytes], [0x12, 0x34, 0x56, 0xff]);
});

test("a polygon contains what is inside, whatever its corners' order, and a hollow is outside", () => {
  const u = [[0, 0], [3, 0], [3, 3], [2, 3], [2, 1], [1, 1], [1, 3], [0, 3]];
  for (const polygon of [u, [...u].reverse()]) {
    assert.ok(contains(polygon, 0.5, 2));
    assert.ok(!contains(polygon, 1.5, 2));
    assert.ok(!contains(polygon, 5, 2));
  }
});

test("discs are round, and painted where they are partly outside too", () => {
  assert.deepEqual(discOf(2), [0, 0]);
  const inset = discOf(8);
  assert.ok(inset[0] > inset[3] && inset[0] === inset[7]);
  const canvas = { width: 4, height: 4 };
  const image = { data: new Uint8ClampedArray(64) };
  paint({ canvas, createImageData: () => image, putImageData() {} }, [0, 3, 99], [0, 3, 99], null, new Uint32Array([0xff0000ff]), (v) => v, (v) => v, 0.3);
  const painted = new Uint32Array(image.data.buffer);
  assert.equal(painted[0], 0xff0000ff);
  assert.equal(painted[15], 0xff0000ff);
  assert.equal(painted[3], 0);
});
