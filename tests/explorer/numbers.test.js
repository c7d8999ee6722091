import assert from "node:assert/strict";
import { test } from "node:test";

import { counted, csv, fixed, percent, signed, whole } from "../../dmpipeline/report/explorer/src/numbers.js";

test("negative numbers have a true minus sign, and small and large ones digits that say something", () => {
  assert.equal(fixed(-1.256), "−1.26");
  assert.equal(fixed(-0.00123), "−0.0012");
  assert.equal(fixed(0), "0.00");
  assert.equal(fixed(2263860248601433088), "2.26e18");
  assert.equal(fixed(3e-9), "3.00e−9");
  assert.equal(signed(0.5), "+0.50");
  assert.equal(signed(0.001), "+0.001");
  assert.equal(signed(0), "0.00");
  assert.equal(signed(-2, 1), "−2.0");
});

test("what is not known is said to be", () => {
  for (const value of [null, undefined, NaN]) {
    assert.equal(fixed(value), "not known");
    assert.equal(percent(value), "not known");
  }
  assert.equal(whole(null), "not known");
});

test("counts agree with their noun", () => {
  assert.equal(counted(1, "test image"), "1 test image");
  assert.equal(counted(12345, "test image"), "12,345 test images");
});

test("a CSV quotes what must be, and leaves no text that a spreadsheet would run", () => {
  assert.equal(csv(["a", "b"], [['x,"y"', -1.5], ["=1+1", null], ["-2", NaN]]), 'a,b\r\n"x,""y""",-1.5\r\n\'=1+1,\r\n\'-2,\r\n');
});
