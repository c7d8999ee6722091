import assert from "node:assert/strict";
import { test } from "node:test";
import { deflateSync } from "node:zlib";

import { arraysOf, bytesOf, halfToFloat, inflate } from "../../dmpipeline/report/explorer/src/payload.js";

test("what was deflated and written in base64 comes back as arrays", async () => {
  const floats = new Float32Array([1.5, -2, NaN]);
  const bytes = Buffer.concat([Buffer.from(floats.buffer), Buffer.alloc(4), Buffer.from(new Uint16Array([7, 65535, 0, 0]).buffer)]);
  const text = deflateSync(bytes).toString("base64");
  const arrays = arraysOf(await inflate(bytesOf(`\n${text}\n`)), {
    a: { dtype: "f4", shape: [3], offset: 0 },
    b: { dtype: "u2", shape: [1, 2], offset: 16 },
    none: { dtype: "i4", shape: [0, 5], offset: 24 },
  });
  assert.deepEqual([...arrays.a], [1.5, -2, NaN]);
  assert.deepEqual([...arrays.b], [7, 65535]);
  assert.deepEqual(arrays.b.shape, [1, 2]);
  assert.equal(arrays.none.length, 0);
});

test("halves are read as IEEE 754 has them", () => {
  const cases = [[0x3c00, 1], [0xc000, -2], [0x7bff, 65504], [0x0001, 2 ** -24], [0x0400, 2 ** -14], [0x7c00, Infinity], [0xfc00, -Infinity], [0x3555, 0.333251953125]];
  for (const [bits, value] of cases) assert.equal(halfToFloat(bits), value);
  assert.ok(Number.isNaN(halfToFloat(0x7e00)));
});
