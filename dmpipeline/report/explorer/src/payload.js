// The numbers of the page: one block of bytes, deflated and written in base64, that its facts describe.

/** Undo base64. */
export function bytesOf(base64) {
  return Uint8Array.from(atob(base64.trim()), (character) => character.charCodeAt(0));
}

/** Undo deflate, by the browser's own decompressor. */
export async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const KINDS = { u1: Uint8Array, u2: Uint16Array, i2: Int16Array, i4: Int32Array, f4: Float32Array };

/**
 * Cut a block of bytes into arrays.
 * @param bytes Uint8Array; little-endian numbers in C order, each array at a multiple of 8
 * @param described object by name of {dtype, shape, offset}; dtype "f2" becomes a Float32Array
 */
export function arraysOf(bytes, described) {
  const arrays = {};
  for (const [name, { dtype, shape, offset }] of Object.entries(described)) {
    const length = shape.reduce((product, size) => product * size, 1);
    const values =
      dtype === "f2"
        ? Float32Array.from(new Uint16Array(bytes.buffer, bytes.byteOffset + offset, length), halfToFloat)
        : new KINDS[dtype](bytes.buffer, bytes.byteOffset + offset, length);
    values.shape = shape;
    arrays[name] = values;
  }
  return arrays;
}

/** Read the bits of an IEEE 754 half. */
export function halfToFloat(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * 2 ** -24 * fraction;
  return sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
}
